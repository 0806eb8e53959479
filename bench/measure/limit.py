"""The limit of a step: plain kernels that read and write the same bytes of the same tensors, and which is the fastest.

On the CPU those of kernels.cpp, compiled here; on a GPU those of gpu/kernels.cu (roofline.py), which take one
tensor. Used by lineup.py.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bench.cases import Case
from bench.cases.implementations import Absent
from bench.measure.interleaved import interleave
from wd_fused.build import toolchain

SOURCE = Path(__file__).with_name("kernels.cpp")
# How often each kernel is timed before one is chosen, by the median.
TRIALS = 5


class Kernels(Protocol):
    """What a device has: kernels by number, each to be bound to tensors."""

    names: list[str]

    def usable(self) -> list[int]:
        """Those that this machine can run."""

    def bind(self, variant: int, p: list[Tensor], g: list[Tensor], b: list[Tensor]) -> Callable[[], object]:
        """A call that moves all of the tensors: reads p, g and b, writes p and b. Changes nothing."""


class _Tensors(ctypes.Structure):
    """Tensors of kernels.cpp."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("p", ctypes.POINTER(ctypes.c_void_p)),
        ("g", ctypes.POINTER(ctypes.c_void_p)),
        ("b", ctypes.POINTER(ctypes.c_void_p)),
        ("starts", ctypes.POINTER(ctypes.c_int64)),
    )


class CpuKernels:
    """Those of kernels.cpp, with torch's threads."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.variant_name.restype = ctypes.c_char_p
        self._library.stream.argtypes = [ctypes.c_int, ctypes.POINTER(_Tensors), ctypes.c_uint64]
        self._library.stream.restype = None
        self.names = [self._library.variant_name(v).decode() for v in range(self._library.variants())]

    def usable(self) -> list[int]:
        return [v for v in range(len(self.names)) if self._library.variant_runs(v)]

    def bind(
        self, variant: int, p: list[Tensor], g: list[Tensor], b: list[Tensor], mask: int = 0
    ) -> Callable[[], object]:
        """``mask``: of 64 bits; those of g that it has are or-ed into p and b. For the tests of the kernels."""
        count = len(p)
        addresses = [(ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in operand)) for operand in (p, g, b)]
        starts = itertools.accumulate((tensor.nbytes for tensor in p), initial=0)
        tensors = _Tensors(count, *addresses, (ctypes.c_int64 * (count + 1))(*starts))
        stream, pointer = self._library.stream, ctypes.pointer(tensors)
        kept = (p, g, b)  # the call holds addresses only

        def call(kept: object = kept) -> None:
            stream(variant, pointer, mask)

        return call


class GpuKernels:
    """Those of gpu/kernels.cu, on torch's current stream."""

    def __init__(self, folder: Path) -> None:
        from bench.gpu import roofline

        capability = torch.cuda.get_device_capability()
        self._streams = roofline.Streams(roofline.build(folder, capability))
        self._width = 32 if capability[0] >= 10 else 16
        self.names = self._streams.names

    def usable(self) -> list[int]:
        return self._streams.of_width(self._width)

    def bind(self, variant: int, p: list[Tensor], g: list[Tensor], b: list[Tensor]) -> Callable[[], object]:
        if len(p) != 1:
            raise Absent("on a GPU it takes one tensor: elsewhere a row's share is of the bandwidth that it has there")
        return lambda: self._streams.run(variant, p[0], g[0], b[0])


@cache
def kernels(device: str) -> Kernels:
    """Of a device, compiled once in a process.

    Raises:
        Absent: there is no compiler, or it fails.
    """
    folder = Path(tempfile.mkdtemp(prefix="wd_fused_limit_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if device == "cpu":
        return CpuKernels(_compiled(folder))
    from bench.gpu.roofline import CannotBuild

    try:
        return GpuKernels(folder)
    except CannotBuild as error:
        raise Absent(str(error)) from error


def _compiled(folder: Path) -> Path:
    from torch.utils import cpp_extension

    try:
        compiler = toolchain.cxx_compiler()
    except toolchain.MissingTool as error:
        raise Absent(str(error)) from error
    library = folder / "cpu_kernels.so"
    # As the extension is built: with OpenMP, but linked to no other runtime of it than the one that torch has loaded.
    compiled = folder / "cpu_kernels.o"
    flags = ["-O3", "-std=c++20", "-fopenmp", "-fPIC", "-Wno-psabi"]
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    for command in (
        [compiler, *flags, *includes, "-c", str(SOURCE), "-o", str(compiled)],
        [compiler, "-shared", str(compiled), *libraries, "-o", str(library)],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise Absent(f"{compiler} fails: {done.stdout.strip()[-400:]}")
    return library


def fastest(
    case: Case, device: str, p: list[Tensor], g: list[Tensor], b: list[Tensor]
) -> tuple[str, Callable[[], object]]:
    """The name of the kernel that is fastest over these tensors, and a call of it.

    Raises:
        Absent: there is none for this case on this device.
    """
    candidates = kernels(device)
    p = [tensor.detach() for tensor in p]
    before = [tensor.clone() for tensor in p[:3]]
    calls = {variant: candidates.bind(variant, p, g, b) for variant in candidates.usable()}

    def timed(variant: int) -> float:
        begin = time.perf_counter()
        calls[variant]()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds = interleave(calls, TRIALS, timed)
    best = min(calls, key=lambda variant: statistics.median(seconds[variant]))
    if not all(torch.equal(tensor, was) for tensor, was in zip(p, before, strict=False)):
        raise RuntimeError(f"a streaming kernel changed what it moved: {case.name}")
    return candidates.names[best], calls[best]
