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

    In double the product is exact. Its sum with y is rounded to odd, which is never half-way between two floats, so
    that the rounding to float is the only one that counts. (Boldo and Melquiond, "Emulation of a FMA and correctly
    rounded sums: proved algorithms using rounding to odd", 2008.)
    """
    return _to_odd(*_sum(a.astype(np.float64) * x.astype(np.float64), y.astype(np.float64))).astype(np.float32)


_libm_fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
_libm_fma.restype = ctypes.c_double
_libm_fma.argtypes = [ctypes.c_double] * 3
_libm_fma_each = np.frompyfunc(_libm_fma, 3, 1)


def fma_float64(a: Array, x: Array, y: Array) -> Array:
    """a*x + y of float64 arrays, rounded once: the algorithm of the same paper, which has no wider type to go to.

    Where its intermediates could leave double's range, by the C library's fma, an element at a time.
    """
    a, x, y = np.broadcast_arrays(a, x, y)
    product = a * x
    product_error = _low_part(a, x, product)
    low, low_error = _sum(y, product_error)
    high, high_error = _sum(product, low)
    made = high + _to_odd(*_sum(low_error, high_error))

    def is_between(value: Array, least: float, largest: float) -> Array:
        magnitude = np.abs(value)
        return (magnitude == 0) | ((magnitude > least) & (magnitude < largest))

    is_safe = is_between(a, 1e-140, 1e140) & is_between(x, 1e-140, 1e140) & is_between(y, 1e-250, 1e290)
    is_safe &= (made != 0) & (product != 0)  # a zero has the sign of its terms
    has_zero = (a == 0) | (x == 0)
    made = np.where(has_zero, product + y, made)
    is_safe |= has_zero
    if not is_safe.all():
        made[~is_safe] = _libm_fma_each(a[~is_safe], x[~is_safe], y[~is_safe]).astype(np.float64)
    return made


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and what the rounding took away, exactly (Knuth)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _low_part(a: Array, x: Array, product: Array) -> Array:
    """a*x - product, exactly (Dekker, Veltkamp)."""

    def halves(value: Array) -> tuple[Array, Array]:
        shifted = value * (2.0**27 + 1)
        high = shifted - (shifted - value)
        return high, value - high

    (a_high, a_low), (x_high, x_low) = halves(a), halves(x)
    return ((a_high * x_high - product) + a_high * x_low + a_low * x_high) + a_low * x_low


def _to_odd(total: Array, error: Array) -> Array:
    """A rounded sum and its error, rounded to odd instead: of the two neighbours to that whose last bit is set."""
    is_even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(np.isfinite(total) & (error != 0) & is_even, odd, total)


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
