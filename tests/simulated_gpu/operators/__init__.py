"""torch's operators on the simulated GPU: how their library is compiled, and put into torch's dispatcher."""

from __future__ import annotations

import ctypes
from pathlib import Path

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))


def flags(cuda_home: str) -> tuple[list[str], list[str]]:
    """For g++, to compile each source, and to link them. Imports torch."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-I{path}" for path in (*include_paths(), f"{cuda_home}/include")]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    compiled = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DAT_PER_OPERATOR_HEADERS", *includes]
    return compiled, [*libraries, "-lc10", "-ltorch_cpu", "-lc10_cuda", "-ltorch_cuda"]


def install(library: str) -> None:
    """From now on a CUDA tensor's operators are the CPU's. Before the first of them."""
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL).simulated_gpu_install_operators()
