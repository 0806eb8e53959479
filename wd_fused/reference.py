"""The update in plain torch operations: the definition that every backend is compared with.

sgd() is the plain step; sgd_with_options() is one with options, for what no fused backend takes.
One loop over tensors, no regard for speed. With ``numerics="torch"`` it is what torch.optim.SGD computes, operator by
operator, each result rounded to the storage dtype; with ``numerics="opmath"`` only the stores are rounded.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wd_fused.options.spec import GroupStep, RowOptions

OPMATH = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_NO_OPTIONS = GroupStep(math.nan, l1=0.0, decoupled=0.0, l2=True, average_weight=0.0, random_key=0)


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    numerics: str = "torch",
) -> None:
    """Steps ``params`` in place; a ``None`` in ``momentum_buffers`` (a first step with momentum) is replaced.

    Args:
        params: tensors of any shape, float32, float64, float16 or bfloat16.
        grads: a gradient for each parameter, of its shape and dtype.
        momentum_buffers: one for each parameter, or ``None``; not looked at where ``momentum`` is 0.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        numerics: "torch" rounds every intermediate to the storage dtype, "opmath" none.

    Formula: the docstring of torch.optim.SGD; its multiply-adds are those of ``torch.add(y, x, alpha=a)``, which has
    one rounding wherever ATen runs on a processor with fused multiply-add.
    """
    group = Hyperparameters(_NO_OPTIONS, lr, momentum, dampening, weight_decay, nesterov, maximize, numerics)
    rows = [RowOptions(momentum_dtype=param.dtype) for param in params]
    sgd_with_options(params, grads, momentum_buffers, rows, range(len(params)), group)


class Hyperparameters(NamedTuple):
    """A group's numbers, those of its options among them."""

    step: GroupStep  # the numbers of the options
    lr: float  # as in sgd(), like all down to numerics
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    numerics: str = "torch"
    coefficient: float = 1.0  # what clips the gradients: wd_fused.options.clipping.coefficients(); where a row clips
    inverse_scale: float | None = None  # 1 / the scale of torch.amp.GradScaler, rounded to float32


@torch.no_grad()
def sgd_with_options(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: list[Tensor | None],
    row_options: Sequence[RowOptions],
    positions: Sequence[int],
    h: Hyperparameters,
) -> None:
    """Steps the parameters of a group in place, with the options; gradients stay as they are.

    Args:
        params: tensors of any shape; float32, float64, float16, bfloat16, or, without weights or momenta of another
            dtype, complex.
        grads: for each parameter a gradient of its shape, of any floating-point dtype, or ``None``: then the parameter
            is averaged and nothing else is done.
        momentum_buffers: as in :func:`sgd`, of the dtype that ``row_options`` has.
        row_options: what the options keep for each parameter. Written: extra, momentum_scale, ema.
        positions: the place of each parameter in its group, which random numbers depend on.
        h: the group's numbers.

    Formulas: clipping is torch.nn.utils.clip_grads_with_norm_; decoupled weight decay SGDW's (arXiv:1711.05101); the
    average torch's ``lerp``, as torch.optim.swa_utils.get_ema_multi_avg_fn calls it.
    """
    for i, (param, grad, row) in enumerate(zip(params, grads, row_options, strict=True)):
        ema = row.ema if row.averages else None
        if grad is None and ema is None:
            continue
        buffer, is_first, is_scalar = momentum_buffers[i], momentum_buffers[i] is None, param.dim() == 0
        if grad is not None and h.momentum != 0 and is_first:
            with torch.inference_mode(False):  # later steps write it, wherever the first was
                buffer = momentum_buffers[i] = torch.empty_like(param.detach(), dtype=row.momentum_dtype)
        if param.is_complex():  # real and imaginary parts are stepped as numbers of their own
            grad = None if grad is None else grad.resolve_conj()
            param = torch.view_as_real(param.detach())
            grad, buffer, ema = (None if x is None else torch.view_as_real(x) for x in (grad, buffer, ema))
        order = memory_order(param)
        if grad is None:
            # As the next forward pass sees them, and of master weights all digits.
            x = load_weights(param, row.extra, "parameter" if row.weights == "kahan" else row.weights, order)
        else:
            x = _stepped(param, grad, buffer, is_first, is_scalar, row, positions[i], order, h)
        if ema is not None:
            put(ema, averaged(flat(ema, order), x, h.step.average_weight), order)


def _stepped(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    is_first: bool,  # the buffer is to be filled
    is_scalar: bool,
    row: RowOptions,
    position: int,
    order: list[int] | None,
    h: Hyperparameters,
) -> Tensor:
    """The formula. Returns the new weights in opmath, [numel], as an average sees them."""
    opmath, rounded = OPMATH.get(param.dtype, param.dtype), _rounding(param, grad, row, h.numerics)
    w = load_weights(param, row.extra, row.weights, order)
    g = flat(grad, order).to(opmath)
    if h.inverse_scale is not None:
        g = rounded(torch.mul(g, h.inverse_scale))
    if row.clips:  # a scalar torch multiplies in the norm's dtype, as both have no dimensions
        g = rounded(torch.mul(g.double() if is_scalar else g, h.coefficient).to(opmath))
    if h.maximize:
        g = -g
    if h.weight_decay != 0 and h.step.l2:
        g = rounded(torch.add(g, w, alpha=h.weight_decay))
    if h.step.l1 != 0:
        g = rounded(torch.add(g, (w > 0).to(opmath) - (w < 0).to(opmath), alpha=h.step.l1))
    if h.step.decoupled != 0:
        w = rounded(torch.mul(w, 1 - h.lr * h.step.decoupled))
    if h.momentum != 0:
        assert buffer is not None, "made before"
        b = g
        if not is_first:
            b = rounded(torch.mul(load_momentum(buffer, row, order, opmath), h.momentum))
            b = rounded(torch.add(b, g, alpha=1 - h.dampening))
        store_momentum(buffer, b, row, order)
        g = rounded(torch.add(g, b, alpha=h.momentum)) if h.nesterov else b
    w = torch.add(w, g, alpha=-h.lr)
    if row.stochastic:
        index = None if row.place is None else indices(param, row.place, order)
        put(param, stochastically_rounded(w, h.step.random_key, position, index), order)
        return flat(param, order).to(opmath)
    return store_weights(param, row.extra, w, row.weights, order)


def _rounding(param: Tensor, grad: Tensor, row: RowOptions, numerics: str) -> Callable[[Tensor], Tensor]:
    """What becomes of every intermediate: rounded to the parameter's dtype, where operators on such tensors do so."""
    dtypes = {param.dtype, grad.dtype, row.momentum_dtype}
    if numerics == "torch" and row.weights == "parameter" and not row.stochastic and len(dtypes) == 1:
        return lambda x: x.to(param.dtype).to(x.dtype)
    return lambda x: x


@torch.no_grad()
def sum_of_squares(
    param: Tensor, grad: Tensor, row: RowOptions, numerics: str = "torch", inverse_scale: float | None = None
) -> Tensor:
    """A gradient's share of the norm: float64, []."""
    if grad.is_complex():
        param, grad = torch.view_as_real(param.detach()), torch.view_as_real(grad.resolve_conj())
    g = grad.to(OPMATH.get(param.dtype, param.dtype))
    if inverse_scale is not None:
        g = _rounding(param, grad, row, numerics)(torch.mul(g, inverse_scale))
    total = g.double().square().sum()
    return total.full_tensor() if hasattr(total, "full_tensor") else total


@torch.no_grad()
def zero(grad: Tensor) -> None:
    """Fills a gradient with zeros, elements that several indices share as well."""
    with where_writable(grad):
        try:
            grad.zero_()
        except RuntimeError:
            last = sum((size - 1) * stride for size, stride in zip(grad.shape, grad.stride(), strict=True))
            memory = grad.as_strided((last + 1,), (1,))
            places = torch.arange(last + 1, device=grad.device).as_strided(grad.shape, grad.stride())
            memory[places.flatten()] = 0


def where_writable(tensor: Tensor) -> AbstractContextManager[Any]:
    """A mode in which it can be written: what was made in inference mode can be nowhere else."""
    return torch.inference_mode() if tensor.is_inference() else nullcontext()


# The elements of a parameter in the order in which they lie in memory, which int8 blocks and random numbers follow.


def memory_order(param: Tensor) -> list[int] | None:
    """The dimensions with the largest stride first; None for a subclass, whose elements are left in their places."""
    return by_stride(param.shape, param.stride()) if is_plain(param) else None


def by_stride(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    return sorted(range(len(shape)), key=lambda d: -strides[d] if shape[d] != 1 else -math.inf)


def is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


def flat(tensor: Tensor, order: list[int] | None) -> Tensor:
    """A tensor's elements, [numel], with the dimensions in this order.

    Contiguous, because ATen's loop over an expanded tensor (stride 0) rounds its last elements by another rule.
    """
    tensor = tensor.detach()
    return tensor.contiguous() if order is None else tensor.permute(order).contiguous().view(-1)


def put(tensor: Tensor, values: Tensor, order: list[int] | None) -> None:
    """Writes what flat() has read, rounded to the tensor's dtype."""
    tensor = tensor.detach()
    if order is None:
        tensor.copy_(values)
    else:
        tensor = tensor.permute(order)
        tensor.copy_(values.view(tensor.shape))


# Weights


def load_weights(param: Tensor, extra: Tensor | None, weights: str, order: list[int] | None) -> Tensor:
    """The weights in opmath, of a parameter and its master, remainder or compensation."""
    p = flat(param, order)
    w = p.to(OPMATH.get(p.dtype, p.dtype))
    if extra is None or weights == "parameter":
        return w
    extra = flat(extra, order)
    if weights == "kahan":
        return w + extra.to(w.dtype)
    if weights == "full":  # unless somebody has written the parameter since
        return torch.where(extra.to(p.dtype).view(torch.int16) == p.view(torch.int16), extra, w)
    remainder = extra.to(torch.int64) * (256 if weights == "split24" else 1)
    is_new = (w == 0) & (remainder < 0)  # a zero has no such remainder
    return torch.where(is_new, w, as_float(unsigned(w) + remainder))


def store_weights(param: Tensor, extra: Tensor | None, w: Tensor, weights: str, order: list[int] | None) -> Tensor:
    """Writes the parameter and its master, remainder or compensation; the weights that they now stand for, in opmath.

    split: a float32's bits are those of the nearest bfloat16, ties away from zero, and a signed remainder. Divided, not
    shifted: of a DTensor torch 2.14 shifts nothing, and says nothing.
    """
    if weights in ("split", "split24"):
        m = unsigned(torch.where(w.isnan(), math.nan, w))
        if weights == "split24":
            m = torch.where(w.isnan(), m, (m + 0x7F + ((m // 256) & 1)) & 0xFFFFFF00)
        put(param, as_signed((m + 0x8000) // 0x10000, 16).to(torch.int16).view(torch.bfloat16), order)
        w = as_float(m)
    else:
        put(param, w, order)
    if extra is not None:
        store_beside(param, extra, w, weights, order)
    return w if weights in ("full", "split", "split24") else flat(param, order).to(w.dtype)


def store_beside(param: Tensor, extra: Tensor, w: Tensor, weights: str, order: list[int] | None) -> None:
    """Writes what a parameter lacks of the weights, as far as it can be kept."""
    p = flat(param, order).to(w.dtype)
    if weights == "full":
        put(extra, w, order)
    elif weights == "kahan":
        lost = w - p
        put(extra, torch.where(lost.isfinite(), lost, 0.0), order)
    else:
        remainder = unsigned(w) - unsigned(p)
        if weights == "split24":
            remainder = (remainder + 0x7F + (remainder // 256) % 2) // 256  # the nearest, of two the even one
        reach = 1 << (15 if weights == "split" else 7)
        is_near = (remainder >= -reach - 1) & (remainder <= reach) & ~w.isnan()
        put(extra, torch.where(is_near, remainder.clamp(-reach, reach - 1), 0).to(extra.dtype), order)


def unsigned(x: Tensor) -> Tensor:
    """The bits of float32 numbers, as int64."""
    return x.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def as_signed(x: Tensor, bits: int) -> Tensor:
    """The low bits as a signed number of that many."""
    half = 1 << (bits - 1)
    return ((x + half) & ((1 << bits) - 1)) - half


def as_float(bits: Tensor) -> Tensor:
    return as_signed(bits, 32).to(torch.int32).view(torch.float32)


# Stochastic rounding


def stochastically_rounded(w: Tensor, key: int, position: int, index: Tensor | None = None) -> Tensor:
    """float32 elements, [numel], to a bfloat16 above or below: up as likely as it is near.

    index: each one's place in its parameter, int64; None: they are all of it.
    """
    index = torch.arange(w.numel(), device=w.device) if index is None else index
    up_or_down = as_signed((unsigned(w) + (random_bits(index, key, position) >> 16)) >> 16, 16)
    return torch.where(w.isfinite(), up_or_down.to(torch.int16).view(torch.bfloat16), w.to(torch.bfloat16))


def indices(param: Tensor, place: tuple[int, ...], order: list[int] | None) -> Tensor:
    """Each element's place in the whole that this is a part of, [numel], int64."""
    index = torch.tensor(place[0], device=param.device)
    for size, apart in zip(param.shape, place[1:], strict=True):
        index = index[..., None] + torch.arange(size, device=param.device) * apart
    return flat(index, order)


def random_bits(i: Tensor, key: int, position: int) -> Tensor:
    """32 random bits for each place in a parameter, as int64: the rounds of Chris Wellons' lowbias32, with a key."""
    k0 = _mixed(((key & _U32) + position * 0x9E3779B9) & _U32)
    k1 = _mixed((key >> 32) ^ ((position * 0x85EBCA6B) & _U32))
    x = ((i & _U32) + k0 + (i >> 32) * 0x9E3779B9) & _U32
    x = x ^ (x >> 16)
    x = _product(x, 0x7FEB352D)
    x = x ^ k1
    x = x ^ (x >> 15)
    x = _product(x, 0x846CA68B)
    return x ^ (x >> 16)


_U32 = 0xFFFFFFFF


def _product(x: Tensor, factor: int) -> Tensor:
    """Modulo 2**32, without a product that int64 cannot hold."""
    return ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & _U32


def _mixed(x: int) -> int:
    x ^= x >> 16
    x = (x * 0x7FEB352D) & _U32
    x ^= x >> 15
    x = (x * 0x846CA68B) & _U32
    return x ^ (x >> 16)


# int8 momentum: scale · q · |q| in blocks, so that small values beside a large one keep some digits

BLOCK = 128


def blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def load_momentum(buffer: Tensor, row: RowOptions, order: list[int] | None, opmath: torch.dtype) -> Tensor:
    b = flat(buffer, order)
    return b.to(opmath) if row.momentum_scale is None else dequantized(b, row.momentum_scale)


def store_momentum(buffer: Tensor, b: Tensor, row: RowOptions, order: list[int] | None) -> None:
    if row.momentum_scale is not None:
        b, scale = quantized(b)
        row.momentum_scale.copy_(scale)
    put(buffer, b, order)


def quantized(b: Tensor) -> tuple[Tensor, Tensor]:
    """float32 elements, [numel], as int8, and their scales, [blocks]; a block with a NaN or infinity becomes NaN."""
    padded = torch.nn.functional.pad(b, (0, -b.numel() % BLOCK)).view(-1, BLOCK)
    magnitude = padded.abs()
    # The largest of the bits, in which NaN is above all.
    largest = magnitude.view(torch.int32).amax(1) if b.numel() else magnitude.view(torch.int32)[:, 0]
    scale = largest.view(torch.float32) / 16129.0
    is_usable = ((scale > 0) & (scale < math.inf))[:, None]
    root = (magnitude / scale[:, None]).double().sqrt().float()  # torch's of float32 is not correctly rounded
    q = root.round().clamp(max=127)
    q = torch.where(is_usable, torch.where(padded < 0, -q, q), 0.0)
    return q.to(torch.int8).view(-1)[: b.numel()], scale


def dequantized(q: Tensor, scale: Tensor) -> Tensor:
    value = q.to(torch.float32)
    return scale.repeat_interleave(BLOCK)[: q.numel()] * (value * value.abs())


def averaged(ema: Tensor, x: Tensor, weight: float) -> Tensor:
    """ema + weight · (x − ema), as torch's lerp has it."""
    if weight == 1:
        return x
    e = ema.to(x.dtype)
    difference = x - e
    weight = torch.tensor(weight, dtype=x.dtype, device="cpu").item()
    if abs(weight) < 0.5:
        return torch.add(e, difference, alpha=weight)
    return torch.add(x, difference, alpha=weight - 1)
