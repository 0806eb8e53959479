"""The environment report: what this machine has, what wd_fused found and chose, and whether the bits are right.

`python -m wd_fused` prints it, with `--json` for programs; it is what a bug report should carry.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import wd_fused
from wd_fused import backends, self_test
from wd_fused.build import extension, jit, toolchain

Line = tuple[str, str]

_VARIABLES = (
    *("CXX", "CC", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
    *("CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST", "TORCH_EXTENSIONS_DIR"),
)


_ABOUT = (
    "Prints what this machine has, what wd_fused found and chose, and whether its bits are right; builds the compiled "
    "part if there is none yet. Exit status: 0 fused and right, 1 a wrong bit, 2 right, but torch's own code steps."
)


def main(*arguments: str) -> int:
    """Prints the report, or JSON; the exit status: 1 if the self-test failed, else 2 if torch's code does the steps."""
    parser = argparse.ArgumentParser("python -m wd_fused", description=_ABOUT)
    parser.add_argument("--json", action="store_true", help="print the same as JSON, for programs")
    chosen, unknown = parser.parse_known_args(arguments)
    if unknown:  # not by parser.error(): its 2 means that a step is not fused
        parser.exit(os.EX_USAGE, f"{parser.format_usage()}{parser.prog}: unknown: {' '.join(unknown)}\n")
    as_json = chosen.json
    sections = {"versions": _versions, "tools": _tools, "extension": _extension}
    sections |= {"backends": _backends, "devices": _devices}
    told: dict[str, Any] = {"wd_fused": wd_fused.__version__}
    if as_json:
        told |= {title: dict(lines()) for title, lines in sections.items()}
    else:
        print(f"wd_fused {wd_fused.__version__}")
        for title, lines in sections.items():
            _print(title, lines())
    started = time.perf_counter()
    results = [result for name in _usable() for result in self_test.run(name)]
    seconds = time.perf_counter() - started
    # Where models train here: on GPUs if there are any.
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"]
    choices = {device: _chosen(device) for device in devices}
    fused = {device: name for device, (name, _) in choices.items() if name in backends.FUSED}
    not_fused = {device: reason for device, (_, reason) in choices.items() if device not in fused}
    failed = sum(not result.passed for result in results)
    status = 1 if failed else 2 if not_fused else 0
    if as_json:
        told["self_test"] = [{"backend": name, "result": text} for name, text in map(_self_test_line, results)]
        print(json.dumps(told | {"fused": fused, "not_fused": not_fused, "status": status}, indent=2))
        return status
    _print("self-test: FusedSGD against torch.optim.SGD(foreach=False), bit for bit", map(_self_test_line, results))
    print(f"\nself-test {f'FAILED ({failed} of {len(results)})' if failed else 'passed'} in {seconds:.1f} s")
    for device, name in fused.items():
        print(f'fused on {device}, by backend "{name}"')
    for device, reason in not_fused.items():
        print(f"NOT FUSED on {device}, torch's own code does the step: {reason}")
    return status


def _print(title: str, lines: Iterator[Line]) -> None:
    print(f"\n{title}")
    for name, text in lines:
        first, *rest = text.splitlines() or [""]
        print(f"  {name:<12}  {first}")
        for line in rest:
            print(textwrap.indent(line, " " * 16))
        sys.stdout.flush()


def _versions() -> Iterator[Line]:
    yield "wd_fused", f"{wd_fused.__version__}  {Path(wd_fused.__file__).parent}"
    yield "python", f"{platform.python_version()}  {sys.executable}"
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield "torch", f"{torch.__version__}  ({built_for})  {Path(torch.__file__).parent}"
    try:
        yield "triton", importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield "triton", "not installed"
    yield "system", f"{platform.platform()}, {platform.machine()}"
    for variable in sorted(os.environ):
        if variable.startswith("WD_FUSED_") or variable in _VARIABLES:
            yield variable, os.environ[variable]


def _tools() -> Iterator[Line]:
    for name, find in (("c++", toolchain.cxx_compiler), ("ninja", toolchain.ninja)):
        try:
            path = find()
        except toolchain.MissingTool as missing:
            yield name, str(missing)
        else:
            yield name, f"{path}  ({_version(path)})"
    nvcc = toolchain.nvcc()
    yield "nvcc", f"{nvcc}  ({_version(nvcc)})" if nvcc else "not on PATH"
    home, how = toolchain.cuda_home()
    yield "CUDA toolkit", f"{home}  (from {how})" if home else f"not found: {how}"
    csrc = extension.sources()
    if csrc is not None:
        gpus = toolchain.gpu_capabilities(torch.cuda)
        part = toolchain.cuda_part(csrc, str(torch.__version__), torch.version.cuda, gpus)
        if isinstance(part, str):
            yield "CUDA build", f"not possible: {part}"
        else:
            fits = f"by nvcc {part.version}, for torch's CUDA {torch.version.cuda}"
            yield "CUDA build", f"possible {fits}, for {part.targets} ({part.chosen_by})"


def _version(path: str) -> str:
    """The line of a program's --version that names its version: nvcc's is not the first."""
    said = toolchain.output_of(path, "--version")
    if said is None:
        return "does not run"
    return next((line for line in said.splitlines() if re.search(r"\d+\.\d+", line)), said)


def _extension() -> Iterator[Line]:
    found = extension.status()  # before load(), which would print as a warning what is told here
    module = extension.load()
    sources = {"ahead-of-time": "built ahead of time", "jit": "JIT build", "none": "none"}
    built_now = "" if found.seconds is None else f", built in {found.seconds:.0f} s just now"
    yield "source", sources[found.source] + built_now
    if found.path is not None:
        yield "path", found.path
    if found.reason is not None:
        yield "reason", found.reason
    yield "JIT cache", str(jit.cache_root())
    if module is not None:
        yield "CPU code", str(module.cpu_isa())
        yield "CUDA part", f"for {module.cuda_architectures()}" if found.cuda is None else f"none: {found.cuda}"
    yield "torch's code", torch.backends.cpu.get_cpu_capability()


def _backends() -> Iterator[Line]:
    for name, missing in backends.available().items():
        # The extension's own reason is a section up, and may be many lines.
        yield name, "available" if missing is None else f"not available: {missing.splitlines()[0]}"


def _usable() -> list[str]:
    return [name for name, missing in backends.available().items() if missing is None]


def _devices() -> Iterator[Line]:
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch; {_choice('cpu')}"
    if torch.version.cuda is None:
        yield "cuda", "none: this torch is built without CUDA"
    elif (obstacle := _why_no_cuda()) is not None:
        yield "cuda", f"none that torch can use: {obstacle}"
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield (
                f"cuda:{index}",
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB; {_covered(index)}; {_choice(f'cuda:{index}')}",
            )


def _choice(device: str) -> str:
    name, reason = _chosen(device)
    return f'backend="auto" takes {name}: {reason}' if name else reason


def _chosen(device: str) -> tuple[str, str]:
    """What steps a float32 parameter there by default, and why."""
    try:
        name, reason = backends.choose(torch.empty(1, device=device), backends.wanted("auto"))
    except (ValueError, RuntimeError) as error:  # of WD_FUSED_BACKEND, or of the device
        return "", f'backend="auto" fails: {error}'
    return name, reason.splitlines()[0]


def _why_no_cuda() -> str | None:
    """Why torch can use no GPU, in its own words (no driver, one too old, all GPUs hidden); None if it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same that is told here
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            return str(error)
    return "it does not say why"


def _covered(index: int) -> str:
    """Whether the extension's CUDA part runs on this GPU."""
    module = extension.load()
    if module is None or extension.status().cuda is not None:
        return "the extension has no CUDA part"
    missing: str | None = module.why_not_cuda(index)
    return "the CUDA part runs on it" if missing is None else f"the CUDA part does not run on it: {missing}"


def _self_test_line(result: self_test.Result) -> Line:
    what = f"{str(result.dtype).removeprefix('torch.')} on {result.device}: "
    if result.error is not None:
        return result.backend, what + f"FAILED, {result.error}"
    verdict = "ok" if result.passed else "FAILED"
    return result.backend, what + f"{verdict}, {result.differing:,} of {result.elements:,} elements differ"
