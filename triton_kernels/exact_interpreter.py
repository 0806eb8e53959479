"""Triton's interpreter with the arithmetic of a GPU: a multiply-add that rounds once, bfloat16 rounded to nearest.

As it is, the interpreter rounds the product of tl.fma, cuts bfloat16 off, and does not do 1 / 0. Used by launcher.py
around its own launches only: other kernels of the program are interpreted as ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Array = Any  # of numpy, whose types would be the only reason to import more of it


def fma_float32(a: Array, x: Array, y: Array) -> Array:
    """a*x + y of float32 arrays, rounded once.

    In double the product is exact. The sum is rounded to odd: where it is not exact, to that of the two neighbours whose
    last bit is set, which never lies half-way between two floats; then the rounding to float is the only one. (Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.)
    """
    product = a.astype(np.float64) * x.astype(np.float64)
    addend = y.astype(np.float64)
    total = product + addend
    back = total - product  # Knuth's error of a sum
    error = (product - (total - back)) + (addend - back)
    is_even = (total.view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (error != 0) & is_even
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(inexact, odd, total).astype(np.float32)


_libm_fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
_libm_fma.restype = ctypes.c_double
_libm_fma.argtypes = [ctypes.c_double] * 3
_fma_each = np.frompyfunc(_libm_fma, 3, 1)


def fma_float64(a: Array, x: Array, y: Array) -> Array:
    """a*x + y of float64 arrays, rounded once: the C library's, an element at a time."""
    return np.asarray(_fma_each(a, x, y), dtype=np.float64)


def to_bfloat16(x: Array) -> Array:
    """The bits of the bfloat16 numbers nearest to float32 ones, ties to even."""
    bits = x.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), nearest).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class _Exact(interpreter.InterpreterBuilder):  # type: ignore[misc]
    """The methods that stand in for the interpreter's own."""

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        fma = fma_float64 if z.data.dtype == np.float64 else fma_float32
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        here, there = src.dtype.scalar, dst_type.scalar
        if here == tl.float32 and there == tl.bfloat16:
            return interpreter.TensorHandle(to_bfloat16(src.data), there)
        if here == tl.bfloat16 and there == tl.float32:
            return interpreter.TensorHandle(from_bfloat16(src.data), there)
        return super().cast_impl(src, dst_type)


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Within it kernels are interpreted with a GPU's arithmetic, one thread's at a time: there is one interpreter."""
    builder = interpreter.interpreter_builder
    with _one_at_a_time, np.errstate(all="ignore"):  # infinities and NaN are as welcome as on a GPU
        before = type(builder)
        builder.__class__ = _Exact
        try:
            yield
        finally:
            builder.__class__ = before
