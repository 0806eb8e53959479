"""The "cuda" backend with its kernel compiled for the CPU: everything of it but the GPU. Used by conftest.py.

The module is csrc's own files, with sgd_cuda_on_cpu.cpp in the place of sgd_cuda.cu; its CUDA devices are the CPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

from wd_fused import build_config, extension, toolchain
from wd_fused.backends import CompiledBackend

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = ROOT / "tests" / "cuda_on_cpu"
# ops.cpp registers operators, which a process can have once only.
SOURCES = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "ops.cpp"]
SOURCES.append(STAND_IN / "sgd_cuda_on_cpu.cpp")
FLAGS = [*build_config.cxx_flags("none"), "-DWD_FUSED_CUDA_ON_CPU", "-Wno-maybe-uninitialized"]


@cache
def module() -> ModuleType:
    """The module, from torch's extension cache or built into it."""
    digest = hashlib.sha256(f"{build_config.build_record(ROOT / 'csrc', _torch_version())} {FLAGS}".encode())
    for path in sorted(STAND_IN.iterdir()):
        digest.update(path.read_bytes())
    name = f"wd_fused_cuda_on_cpu_{digest.hexdigest()[:12]}"
    folder = extension.cache_root() / name
    finished = folder / f"{name}.so"
    if not finished.is_file():
        from torch.utils import cpp_extension

        folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([os.path.dirname(toolchain.ninja()), os.environ.get("PATH", os.defpath)])
        print(f"building {name}", file=sys.stderr)
        with mock.patch.dict(os.environ, CXX=toolchain.cxx_compiler(), PATH=path):
            built: ModuleType = cpp_extension.load(
                name,
                [str(source) for source in SOURCES],
                extra_cflags=[shlex.quote(flag) for flag in FLAGS],
                extra_include_paths=[str(ROOT / "csrc"), str(STAND_IN)],
                build_directory=str(folder),
                with_cuda=False,
            )
            return built
    spec = importlib.util.spec_from_file_location(name, finished)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


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
