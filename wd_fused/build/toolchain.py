"""Finds the programs that a build needs, and says in one sentence what is missing and how to get it.

Decides, too, whether a build has a CUDA part, and for which GPUs. Called by extension.py, the environment report and
by setup.py, which loads this file by its path before wd_fused can be imported: standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Capability = tuple[int, int]

NAMED = "TORCH_CUDA_ARCH_LIST"  # what decided the targets, where the user did
USUAL_CUDA_HOME = "/usr/local/cuda"

# The targets where neither TORCH_CUDA_ARCH_LIST nor a GPU decides, as far as nvcc knows them: one a generation, from
# Turing on. A binary for 8.0 runs on 8.6 and 8.9 too, one for 10.0 on 10.3, one for 12.0 on 12.1, and what limits this
# code is memory, which no binary makes faster.
DEFAULT_TARGETS: tuple[Capability, ...] = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))
# What torch's build helpers take for a target, from torch 2.11 on, of what the CUDA sources can be compiled for.
_TARGETS_OF_TORCH = tuple(sorted({*DEFAULT_TARGETS, (7, 0), (7, 2), (8, 6), (8, 7), (8, 9), (10, 3), (11, 0), (12, 1)}))


class MissingTool(Exception):
    """Something that a build needs is not on this machine. The message says what, and what to do."""


def output_of(*command: str) -> str | None:
    """What a program prints, standard error included; None if it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def described(program: str) -> str:
    """What tells one version of a compiler from another."""
    return output_of(program, "--version") or ""


def what_steers(nvcc_path: str) -> str:
    """What may make a build succeed that failed before, with the same sources and the same versions of the tools."""
    variables = ("CC", "CXX", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "PYTORCH_NVCC")
    return repr([nvcc_path, os.stat(nvcc_path).st_mtime_ns, *map(os.environ.get, variables)])


def cxx_compiler() -> str:
    """Path of the C++ compiler: ``$CXX`` where it is set, else the first of c++, g++ and clang++ on PATH."""
    named = os.environ.get("CXX", "").strip()
    if named:
        path = shutil.which(named)
        if path is None:
            # torch's build helper passes CXX on as one word, so "ccache g++" cannot work either.
            raise MissingTool(
                f"no C++ compiler: CXX is {named!r}, which is not a program here; "
                "set CXX to the path of one program, without arguments, or unset it"
            )
        return path
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return path
    raise MissingTool(
        "no C++ compiler: neither c++, g++ nor clang++ is on PATH; install one (Debian, Ubuntu: apt-get install g++; "
        "Fedora: dnf install gcc-c++; conda: conda install gxx) or set CXX to its path"
    )


def ninja() -> str:
    """Path of ninja: on PATH, else where pip puts it, since a virtual environment need not be activated to be used."""
    folders = [sysconfig.get_path("scripts"), sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))]
    path = shutil.which("ninja") or shutil.which("ninja", path=os.pathsep.join(folders))
    if path is None:
        raise MissingTool(f"no ninja, which torch builds C++ extensions with: {sys.executable} -m pip install ninja")
    return path


def path_with_ninja() -> str:
    """PATH with ninja on it: torch's build helpers look nowhere else. Behind all else, so that it hides no compiler."""
    path = os.environ.get("PATH", os.defpath)
    return path if shutil.which("ninja", path=path) else os.pathsep.join([path, os.path.dirname(ninja())])


def require_python_headers() -> None:
    """Python.h, which a Linux distribution packages apart from the interpreter."""
    folder = sysconfig.get_path("include", "nt" if sys.platform == "win32" else "posix_prefix")
    if not os.path.isfile(os.path.join(folder, "Python.h")):
        raise MissingTool(
            f"no Python headers: {folder} holds no Python.h; install them "
            "(Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel)"
        )


def nvcc() -> str | None:
    """Path of nvcc as the user would start it, or None."""
    return shutil.which("nvcc")


def cuda_home() -> tuple[str | None, str]:
    """The CUDA toolkit's folder, or None, and how it was found, or what was tried.

    torch takes the folder above nvcc's, which is wrong where nvcc on PATH is a script that calls the real one. Here a
    folder is believed only if it holds ``include/cuda_runtime.h``, and nvcc itself is asked where it is.
    """
    candidates = [(variable, os.environ.get(variable)) for variable in ("CUDA_HOME", "CUDA_PATH")]
    path = nvcc()
    if path is not None:
        said = re.search(r"^#\$ TOP=(.+)$", output_of(path, "--dryrun", "-x", "cu", os.devnull) or "", re.MULTILINE)
        candidates.append(("nvcc --dryrun", said.group(1).strip() if said else None))
        candidates.append(("nvcc on PATH", str(Path(path).resolve().parent.parent)))
    candidates.append(("the usual place", USUAL_CUDA_HOME))
    tried = []
    for how, folder in candidates:
        if not folder:
            continue
        folder = os.path.realpath(folder)
        if os.path.isfile(os.path.join(folder, "include", "cuda_runtime.h")):
            return folder, how
        tried.append(f"{folder} ({how})")
    return None, "no include/cuda_runtime.h in " + ", ".join(tried)


class CudaPart(NamedTuple):
    """What the CUDA part of a build is made with, and what for."""

    home: str  # the toolkit's folder
    nvcc: str  # the one in it, which torch's build helpers start
    version: str  # nvcc's, "13.0"
    targets: str  # as torch takes them: "8.0;9.0+PTX"
    chosen_by: str  # what decided the targets


def cuda_part(
    csrc: Path, torch_version: str, torch_cuda: str | None, capabilities: Iterable[Capability]
) -> CudaPart | str:
    """How to build the CUDA part of ``csrc`` here, or why it cannot be built, with the remedy.

    Args:
        torch_version, torch_cuda: ``torch.__version__`` and ``torch.version.cuda``.
        capabilities: the compute capabilities of the GPUs present. No GPU is needed.
    """
    if not any(csrc.rglob("*.cu")):
        return "these sources have no CUDA part"
    if os.environ.get("WD_FUSED_CUDA") == "0":
        return "WD_FUSED_CUDA=0 leaves it out: unset it"
    if torch_cuda is None:
        return f"this torch, {torch_version}, is built without CUDA: install one that is built with it"
    wanted = f"install CUDA toolkit {torch_cuda.split('.')[0]}, or set CUDA_HOME to the folder that it is in"
    home, how = cuda_home()
    if home is None:
        path = nvcc()
        if path is None:
            return f"no nvcc on PATH nor in CUDA_HOME: {wanted}"
        return f"the CUDA toolkit that {path} belongs to was not found ({how}): set CUDA_HOME to its folder"
    compiler = shutil.which(os.path.join(home, "bin", "nvcc"))
    if compiler is None:
        return f"no nvcc in the CUDA toolkit {home} (found by {how}): {wanted}"
    release = re.search(r"release (\d+)\.(\d+)", output_of(compiler, "--version") or "")
    known = {int(number) for number in re.findall(r"compute_(\d+)", output_of(compiler, "--list-gpu-arch") or "")}
    if release is None or not known:
        return f"{compiler} does not answer as nvcc does: {wanted}"
    version = f"{release[1]}.{release[2]}"
    if release[1] != torch_cuda.split(".")[0]:
        return f"nvcc is {version} ({compiler}), torch {torch_version} is built for CUDA {torch_cuda}: {wanted}"
    present = sorted(set(capabilities))
    targets, chosen_by = _targets(known, present)
    if not targets:
        return (
            f"nvcc {version} compiles for none of the GPUs present (compute capability {_listed(present)}): install a "
            "torch that is built for a CUDA which does, and that CUDA's toolkit"
        )
    return CudaPart(home, compiler, version, targets, chosen_by)


def _targets(known: set[int], capabilities: list[Capability]) -> tuple[str, str]:
    """The targets, and what decided them. ``known`` are the architectures of nvcc: 90 is compute capability 9.0."""
    named = re.split(r"[;\s]+", os.environ.get(NAMED, "").strip("; \t"))
    if named not in ([""], ["native"]):
        return ";".join(named), NAMED
    usable = [target for target in _TARGETS_OF_TORCH if 10 * target[0] + target[1] in known]
    if capabilities:
        # A GPU that is newer than nvcc, or than torch, runs what its driver makes of PTX.
        found = {
            max(older): capability not in older
            for capability in capabilities
            if (older := [target for target in usable if target <= capability])
        }
        chosen_by = "the GPUs present"
    else:
        found = {target: False for target in DEFAULT_TARGETS if target in usable}
        if found:
            found[max(found)] = True
        chosen_by = "the default targets"
    return ";".join(_listed([target]) + "+PTX" * ptx for target, ptx in sorted(found.items())), chosen_by


def _listed(capabilities: Iterable[Capability]) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in capabilities)


def covers(targets: str, capability: Capability) -> bool:
    """Whether code for ``targets`` runs on a GPU: its own binary, one of an earlier minor version, or an older PTX."""
    for target in targets.split(";"):
        parts = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", target)
        if parts is None:  # a name such as "Hopper", which torch knows
            continue
        built = (int(parts[1]), int(parts[2]))
        if built == capability:
            return True
        if built < capability and not parts[3] and (parts[4] or built[0] == capability[0]):
            return True
    return False


def gpu_capabilities(torch_cuda: Any) -> list[Capability]:
    """The compute capabilities of this machine's GPUs; none where ``torch_cuda``, that is torch.cuda, sees no GPU.

    The driver's management library is asked first: a process in which torch has initialised CUDA can no longer be
    forked into processes that use it, and a step on the CPU must not be what does that.
    """
    count = torch_cuda.device_count()
    found = _capabilities_by_nvml() if count else []
    if count and not found:
        with contextlib.suppress(RuntimeError):  # CUDA cannot be initialised, as in a forked process
            found = [torch_cuda.get_device_capability(index) for index in range(count)]
    return found


def _capabilities_by_nvml() -> list[Capability]:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return []
    except (OSError, AttributeError):
        return []
    found = []
    count, major, minor, device = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
        for index in range(count.value):
            if (
                nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0
                and nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) == 0
            ):
                found.append((major.value, minor.value))
    nvml.nvmlShutdown()
    return found


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables for a while: torch's build helpers take much from there only."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def torch_builds_with(part: CudaPart | None, cpp_extension: Any) -> Iterator[None]:
    """Have torch's build helpers (the module torch.utils.cpp_extension) use this toolkit and these targets for a while.

    The module guesses the toolkit when it is imported, and keeps its guess. Without TORCH_CUDA_ARCH_LIST it looks for a
    GPU, and fails where there is none. nvcc's own choice for the host's code is gcc, whatever CXX says.
    """
    if part is None:
        yield
        return
    guessed = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = part.home
    host = {} if os.environ.get("NVCC_CCBIN") else {"NVCC_CCBIN": cxx_compiler()}
    try:
        with environment(CUDA_HOME=part.home, TORCH_CUDA_ARCH_LIST=part.targets, **host):
            yield
    finally:
        cpp_extension.CUDA_HOME = guessed
