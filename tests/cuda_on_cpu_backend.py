"""The "cuda" backend with its kernel compiled for the CPU: everything of it but the GPU. Used by conftest.py.

The module is csrc's own files, with sgd_cuda_on_cpu.cpp in the place of sgd_cuda.cu; its CUDA devices are the CPU.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

from wd_fused import build_config, extension, toolchain
from wd_fused.backends import CompiledBackend

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = ROOT / "tests" / "cuda_on_cpu"
# ops.cpp registers operators, which a process can have once only.
SOURCES = [path for path in sorted((ROOT / "csrc").rglob("*.cpp")) if path.name != "ops.cpp"]
SOURCES.append(STAND_IN / "sgd_cuda_on_cpu.cpp")
SOURCES.sort(key=lambda path: path.name != "module.cpp")  # which takes longest begins first
# -O1 comes after the -O3 of the product: it takes half as long to compile, and gives the same bits, since no flag of
# either lets the compiler contract or reorder arithmetic.
FLAGS = [*build_config.cxx_flags("none"), "-O1", "-DWD_FUSED_CUDA_ON_CPU", "-Wno-maybe-uninitialized"]


@cache
def module() -> ModuleType:
    """The module, from torch's extension cache or built into it."""
    digest = hashlib.sha256(f"{build_config.build_record(ROOT / 'csrc', _torch_version())} {FLAGS}".encode())
    for path in sorted(STAND_IN.iterdir()):
        digest.update(path.read_bytes())
    name = f"wd_fused_cuda_on_cpu_{digest.hexdigest()[:12]}"
    folder = extension.cache_root() / name
    finished = folder / f"{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of one run need it at the same time
        if not finished.is_file():
            return _built(name, finished)
    spec = importlib.util.spec_from_file_location(name, finished)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _built(name: str, finished: Path) -> ModuleType:
    """The module, built in a fresh folder: one that was killed leaves torch's lock and half a module behind."""
    from torch.utils import cpp_extension

    path = os.pathsep.join([os.path.dirname(toolchain.ninja()), os.environ.get("PATH", os.defpath)])
    print(f"building {name}", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory(prefix="build-", dir=finished.parent) as work,
        mock.patch.dict(os.environ, CXX=toolchain.cxx_compiler(), PATH=path),
    ):
        built: ModuleType = cpp_extension.load(
            name,
            [str(source) for source in SOURCES],
            extra_cflags=[shlex.quote(flag) for flag in FLAGS],
            extra_include_paths=[str(ROOT / "csrc"), str(STAND_IN)],
            build_directory=work,
            with_cuda=False,
        )
        os.replace(Path(work) / finished.name, finished)
        built.__file__ = str(finished)
    return built


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


class CudaOnCpu(CompiledBackend):
    """Stands in backends.FUSED["cuda"], and takes CPU tensors."""

    def __init__(self) -> None:
        super().__init__("cuda")

    def unavailable(self) -> str | None:
        return None

    def module(self) -> ModuleType | None:
        return module()
