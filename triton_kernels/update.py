"""The SGD step of one element in Triton, with FusedSGD's options. Device code only; kernels.py calls it.

The twin of csrc/update: the same roundings in the same order, every multiply-add written as tl.fma and compiled without
contraction.
"""

import triton
import triton.language as tl

# What a row's step does with its momentum buffer.
FIRST = tl.constexpr(2)  # fills it
RUNNING = tl.constexpr(4)  # updates it

# A group's words are a CudaGroupOptions of csrc/plan/group_words.h and one more: lr, weight_decay, momentum,
# 1 - dampening (opmath's bits), flags; then, with options, l1, what decoupled decay keeps (the coefficient of the decay
# instead, where lr is on the device), the weight of the new value in the average, what clips, the key of stochastic
# rounding; one that is not read; where the coefficient lies that the norm's kernel forms, in bytes from the first, -1:
# what clips is the word above.
# The flags' first byte tells what lr is read as: 0, the word is minus lr; else the word is the address of lr, and the
# byte is the place of its dtype here plus 1. The second byte tells it of weight_decay.
SCALAR_DTYPES = ("float32", "float64", "float16", "bfloat16")
KIND = tl.constexpr(0xFF)
WEIGHT_DECAY_KIND = tl.constexpr(8)  # a shift
DECAYS = tl.constexpr(1 << 25)
NESTEROV = tl.constexpr(1 << 26)
MAXIMIZE = tl.constexpr(1 << 27)


@triton.jit
def rounded(x, storage: tl.constexpr, rounds_each: tl.constexpr):
    """x as numerics="torch" keeps it between two operations: rounded to the storage dtype."""
    if rounds_each:
        return x.to(storage).to(x.dtype)
    return x


@triton.jit
def sgd_update(p, g, b, momentum_kind, factor, scalars, storage: tl.constexpr, rounds_each: tl.constexpr,
               options=None):  # fmt: skip
    """One SGD step of parameter p with gradient g and momentum buffer b, all in opmath: the new p and b.

    factor: of the gradient, float32: 1 / grad_scale as torch.amp.GradScaler's unscale_() has it, negative to maximize.
    options: in opmath, what clips the gradient, the L1 penalty, what decoupled decay keeps of p; None: no option is on.
    """
    minus_lr, momentum, one_minus_dampening, weight_decay, decays, nesterov = scalars
    g = rounded(g * factor.to(g.dtype), storage, rounds_each)
    if options is not None:
        g = rounded(g * options[0], storage, rounds_each)
    g = tl.where(decays, rounded(tl.fma(weight_decay, p, g), storage, rounds_each), g)
    if options is not None:
        sign = tl.where(p > 0, 1.0, tl.where(p < 0, -1.0, 0.0)).to(p.dtype)
        g = tl.where(options[1] != 0, rounded(tl.fma(options[1], sign, g), storage, rounds_each), g)
        p = rounded(p * options[2], storage, rounds_each)
    kept = rounded(b * momentum, storage, rounds_each)
    running = rounded(tl.fma(one_minus_dampening, g, kept), storage, rounds_each)
    b = tl.where(momentum_kind == RUNNING, running, g)
    ahead = rounded(tl.fma(momentum, b, g), storage, rounds_each)
    g = tl.where(momentum_kind == 0, g, tl.where(nesterov, ahead, b))
    return tl.fma(minus_lr, g, p), b


# --- a group's numbers ---


@triton.jit
def _narrowed(bits):
    """The float nearest to the double with these bits, by integer arithmetic: no float32 kernel shall need doubles."""
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    exponent = magnitude >> 52
    # Below float's normal numbers (exponent 897 of a double) the significand is shifted to their last place, 2**-149.
    below = tl.maximum(897 - exponent, 0)
    significand = (magnitude & 0xFFFFFFFFFFFFF) | (tl.minimum(exponent, 1) << 52)
    kept = tl.where(below == 0, magnitude - (896 << 52), significand)
    shift = 29 + tl.minimum(below, 32)
    half = (tl.full((), 1, tl.int64) << (shift - 1)) - 1 + ((kept >> shift) & 1)
    nearest = tl.minimum((kept + half) >> shift, 0x7F800000)
    nearest = tl.where(magnitude > 0x7FF0000000000000, 0x7FC00000, nearest)
    return (nearest | ((bits >> 32) & 0x80000000)).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def from_word(word, opmath: tl.constexpr):
    if opmath == tl.float64:
        return word.to(tl.float64, bitcast=True)
    else:
        return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _bits_of_double(address):
    """By halves: Triton writes zero to what it loads into before it loads, and LLVM may have put an address that is not
    used again into the same register, where both have 64 bits."""
    half = address.to(tl.pointer_type(tl.int32))
    return (tl.load(half + 1).to(tl.int64) << 32) | (tl.load(half).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _scalar(word, kind, opmath: tl.constexpr):
    """A hyperparameter in opmath, wherever it is; and whether it is 0 in its own dtype."""
    value = from_word(word, opmath)
    is_zero = value == 0
    if kind != 0:
        if kind == 2:
            bits = _bits_of_double(word)
            if opmath == tl.float64:
                value = from_word(bits, opmath)
            else:
                value = _narrowed(bits)
            is_zero = (bits << 1) == 0
        else:
            if kind == 1:
                value = tl.load(word.to(tl.pointer_type(tl.float32))).to(opmath)
            if kind == 3:
                value = tl.load(word.to(tl.pointer_type(tl.float16))).to(opmath)
            if kind == 4:
                value = tl.load(word.to(tl.pointer_type(tl.bfloat16))).to(tl.float32).to(opmath)
            is_zero = value == 0
    return value, is_zero


@triton.jit
def sgd_scalars(group, opmath: tl.constexpr):
    """What sgd_update takes, from a group's words."""
    lr, weight_decay, momentum, one_minus_dampening, flags = group
    lr_kind = flags & KIND
    minus_lr, _ = _scalar(lr, lr_kind, opmath)
    minus_lr *= tl.where(lr_kind == 0, 1.0, -1.0).to(opmath)
    decay_kind = (flags >> WEIGHT_DECAY_KIND) & KIND
    weight_decay, is_zero = _scalar(weight_decay, decay_kind, opmath)
    decays = tl.where(decay_kind == 0, (flags & DECAYS) != 0, is_zero == 0)
    return (minus_lr, from_word(momentum, opmath), from_word(one_minus_dampening, opmath), weight_decay, decays,
            (flags & NESTEROV) != 0)  # fmt: skip


@triton.jit
def option_scalars(group, lr_kind, minus_lr, coefficients, opmath: tl.constexpr):
    """What sgd_update takes for options, from a group's words behind the flags; and the weight of the average."""
    l1, keep, average_weight, clip, place = group
    if opmath == tl.float64:
        at = (coefficients + place).to(tl.pointer_type(tl.float64))
    else:
        at = (coefficients + place).to(tl.pointer_type(tl.float32))
    coefficient = tl.where(place < 0, from_word(clip, opmath), tl.load(at, mask=place >= 0, other=1.0))
    kept = from_word(keep, opmath)
    on_device = tl.where(kept == 0, tl.full((), 1.0, opmath), tl.fma(minus_lr, kept, tl.full((), 1.0, opmath)))
    kept = tl.where(lr_kind == 0, kept, on_device)
    return (coefficient, from_word(l1, opmath), kept), from_word(average_weight, opmath)


# --- what is stored otherwise than in opmath ---


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _is_nan(bits):
    return (bits & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def weight_of(p, extra, takes_extra, weights: tl.constexpr, opmath: tl.constexpr):
    """The weight in opmath, of a parameter as stored and what is stored beside it."""
    if weights == "full":
        # Where the master does not round to the parameter, somebody has written that.
        is_known = extra.to(p.dtype).to(tl.int16, bitcast=True) == p.to(tl.int16, bitcast=True)
        return tl.where(is_known, extra, p.to(tl.float32))
    elif weights == "split" or weights == "split24":
        high = p.to(tl.int16, bitcast=True).to(tl.int32)
        # A zero has no negative remainder: somebody has written the parameter.
        remainder = tl.where(((high & 0x7FFF) == 0) & (extra < 0), 0, extra.to(tl.int32))
        if weights == "split24":
            remainder = remainder << 8
        return _float_of((high << 16) + remainder)
    elif weights == "kahan":
        return tl.where(takes_extra, p.to(opmath) + extra.to(opmath), p.to(opmath))  # -0 stays that
    else:
        return p.to(opmath)


@triton.jit
def stored(w, random, storage: tl.constexpr, weights: tl.constexpr, stochastic: tl.constexpr, extra: tl.constexpr):
    """A new weight in opmath as it is stored: the parameter, what is beside it, and the value of both in opmath."""
    p = w.to(storage)
    if weights == "full":
        return p, w, w
    elif weights == "split" or weights == "split24":
        bits = _bits(w)
        if weights == "split24":  # the last 8 bits go, to nearest, ties to even
            bits = tl.where(_is_nan(bits), bits, (bits + 0x7F + ((bits >> 8) & 1)) & -256)
        bits = tl.where(_is_nan(bits), 0x7FC00000, bits)
        p = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        low = bits & 0xFFFF
        if weights == "split24":
            low = low >> 8
        return p, low.to(extra), _float_of(bits)
    elif weights == "kahan":
        lost = w - p.to(w.dtype)
        is_finite = (_bits(lost) & 0x7F800000) != 0x7F800000
        return p, tl.where(is_finite, lost, 0.0).to(storage), p.to(w.dtype)
    elif stochastic:
        bits = _bits(w)
        is_finite = (bits & 0x7F800000) != 0x7F800000
        some = ((bits + (random >> 16).to(tl.int32)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        p = tl.where(is_finite, some, p)
        return p, p, p.to(w.dtype)
    else:
        return p, p, p.to(w.dtype)


@triton.jit
def _mixed(x):
    """Chris Wellons' lowbias32, a bijection of 32 bits."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_key(key, position):
    """The two halves of a row's key, from its group's 64 bits and its place there."""
    place = position.to(tl.uint32)
    return _mixed(key.to(tl.uint32) + place * 0x9E3779B9), _mixed((key >> 32).to(tl.uint32) ^ (place * 0x85EBCA6B))


@triton.jit
def random_bits(key, begin, at, placed: tl.constexpr):
    """32 random bits for each element, whose place in its parameter is begin + at. Where a row is a whole parameter, a
    tile lies within one multiple of 2**32."""
    if placed:
        index = begin + at
        x = index.to(tl.uint32) + (key[0] + (index >> 32).to(tl.uint32) * 0x9E3779B9)
    else:
        x = at.to(tl.uint32) + (key[0] + begin.to(tl.uint32) + (begin >> 32).to(tl.uint32) * 0x9E3779B9)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ key[1]
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def from_int8(q, scale, opmath: tl.constexpr):
    q = q.to(tl.float32)
    return (scale[:, None] * (q * tl.abs(q))).to(opmath)


@triton.jit
def to_int8(b):
    """Blocks of momentum, a line each, as q and scale: b = scale * q * |q|, that small values keep some digits."""
    b = b.to(tl.float32)
    # As integers, magnitudes are ordered as the floats are, NaN above all.
    scale = tl.div_rn(_float_of(tl.max(_bits(b) & 0x7FFFFFFF, axis=1)), 16129.0)
    is_usable = (scale > 0) & (scale < float("inf"))
    root = tl.sqrt_rn(tl.div_rn(tl.abs(b), tl.where(is_usable, scale, 1.0)[:, None]))
    q = (root + 12582912.0) - 12582912.0  # to an integer: the last place of 1.5 * 2**23 is 1
    q = tl.where(q < 127.0, q, 127.0)
    q = tl.where(b < 0, -q, q)
    return tl.where(is_usable[:, None], q, 0.0).to(tl.int8), scale


@triton.jit
def averaged(average, x, weight):
    """average + weight * (x - average), as torch's lerp has it; with weight 1 that is x."""
    difference = x - average
    mixed = tl.where(weight < 0.5, tl.fma(weight, difference, average), tl.fma(weight - 1, difference, x))
    return tl.where(weight == 1, x, mixed)
