"""The fused tail in Triton: what an optimizer does beyond SGD while an element is in registers; the norm that clips.

Device code only: the twin of csrc/tail.h. sgd_kernel.sgd_update does the step itself. Which option is on decides the
code (constants), by how much is read from words: compiled and launched by launcher.py, laid out by tail_table.py.
"""

import triton
import triton.language as tl

from .sgd_kernel import (
    FIRST,
    MAXIMIZE,
    RUNNING,
    _from_word,
    _rounded,
    _scalars,
    sgd_update,
)

# A tile's words, all int64: the addresses of its first elements (of the row's, where the row is strided): parameter,
# momentum buffer, extra (master, remainder, compensation), average; that of the row's momentum scales; where it begins
# in the row; its elements; where its row's word and its group's words lie; where its layout lies, -1 if flat; the row's
# place in its group. 0 is the address of what is not there.
WORDS_OF_TAIL_TILE = tl.constexpr(11)
# A strided row's layout: its dimensions, then of each, the innermost first, its size and five operands' strides.
OPERANDS = tl.constexpr(5)
PARAM = tl.constexpr(0)
GRADIENT = tl.constexpr(1)
BUFFER = tl.constexpr(2)
EXTRA = tl.constexpr(3)
AVERAGE = tl.constexpr(4)

# A row's word is as sgd_kernel.py has it, with one bit more: the row has no gradient, but an average.
ONLY_AVERAGED = tl.constexpr(1 << 60)
TAIL_ADDRESS = tl.constexpr((1 << 60) - 1)

# A group's words: those of sgd_kernel.py, then, in opmath's bits: l1, what decoupled decay keeps (the coefficient of
# the decay instead, where lr is on the device), the weight of the new value in the average; the key of stochastic
# rounding; where the coefficient that clips lies, in bytes from the first, -1: the group does not clip.
WORDS_OF_TAIL_GROUP = 10

BLOCK = tl.constexpr(128)  # elements of an int8 momentum buffer that share a scale

# A tile of the norm: where it begins in its row, its elements, where its row's word and its layout lie, where its sum
# goes. It is many times a tile of the step: a sum for each of those would take the one program that adds them long.
WORDS_OF_NORM_TILE = tl.constexpr(5)
NORM_PIECES = 16  # of as many elements as a tile of the step has
SUMMED_AT_ONCE = tl.constexpr(1024)

# The words that the norm is formed in, 8 bytes each: the programs that are done; whether a norm is not finite
# (float32); then, a word a group, the norms (of the norm's dtype, packed), what clips (float64, then again in float32,
# packed), the sums of squares; then the tiles' sums.
NORM_DONE = 0
NORM_FLAG = tl.constexpr(1)
NORM_NORMS = tl.constexpr(2)


# --- what is stored otherwise than in opmath ---------------------------------------------------------------------


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
def _weight(p, extra, has_extra, weights: tl.constexpr, opmath: tl.constexpr):
    """The weight in opmath, of a parameter as stored and what is stored beside it; 0 where there is nothing yet."""
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
        return tl.where(has_extra, p.to(opmath) + extra.to(opmath), p.to(opmath))  # -0 stays that
    else:
        return p.to(opmath)


@triton.jit
def _mixed(x):
    """Chris Wellons' lowbias32, a bijection of 32 bits."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row_key(key, position):
    """The two halves of a row's key, from its group's 64 bits and its place there."""
    place = position.to(tl.uint32)
    return _mixed(key.to(tl.uint32) + place * 0x9E3779B9), _mixed((key >> 32).to(tl.uint32) ^ (place * 0x85EBCA6B))


@triton.jit
def _random(key, begin, at):
    """32 random bits for each element of a row, from begin on; a tile lies within one multiple of 2**32."""
    x = at.to(tl.uint32) + (key[0] + begin.to(tl.uint32) + (begin >> 32).to(tl.uint32) * 0x9E3779B9)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ key[1]
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _stored(w, random, storage: tl.constexpr, weights: tl.constexpr, stochastic: tl.constexpr, extra: tl.constexpr):
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
def _from_int8(q, scale, opmath: tl.constexpr):
    q = q.to(tl.float32)
    return (scale[:, None] * (q * tl.abs(q))).to(opmath)


@triton.jit
def _to_int8(b):
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
def _averaged(average, x, weight):
    """average + weight * (x - average), as torch's lerp has it; with weight 1 that is x."""
    difference = x - average
    mixed = tl.where(weight < 0.5, tl.fma(weight, difference, average), tl.fma(weight - 1, difference, x))
    return tl.where(weight == 1, x, mixed)


# --- the step ----------------------------------------------------------------------------------------------------


@triton.jit
def _there(here, flag):
    """The elements that `here` marks (None: all), where the flag holds for all of them."""
    if here is None:
        return flag
    else:
        return here & flag


@triton.jit
def _tail_scalars(group, minus_lr, coefficients, opmath: tl.constexpr):
    """What sgd_update takes for a tail; group: its words, from l1 on; and the weight of the average."""
    l1, keep, average_weight, _, place, lr_kind = group
    if opmath == tl.float64:
        at = (coefficients + place).to(tl.pointer_type(tl.float64))
    else:
        at = (coefficients + place).to(tl.pointer_type(tl.float32))
    coefficient = tl.load(at, mask=(place >= 0) & (coefficients != 0), other=1.0)
    kept = _from_word(keep, opmath)
    on_device = tl.where(kept == 0, tl.full((), 1.0, opmath), tl.fma(minus_lr, kept, tl.full((), 1.0, opmath)))
    kept = tl.where(lr_kind == 0, kept, on_device)
    return (coefficient, _from_word(l1, opmath), kept), _from_word(average_weight, opmath)


@triton.jit
def _tail(at, here, kind, factor, group, tail_group, coefficients, key, begin, place, blocks_here,
          storage: tl.constexpr, opmath: tl.constexpr, rounds_each: tl.constexpr, weights: tl.constexpr,
          stochastic: tl.constexpr, momentum: tl.constexpr, extra: tl.constexpr, averages: tl.constexpr,
          zeroes: tl.constexpr):  # fmt: skip
    """Steps the elements at these pointers, place `place` after `begin` in the row, those that `here` marks."""
    p_at, g_at, b_at, extra_at, average_at, scale_at, has_extra = at
    momentum_kind = kind & (FIRST | RUNNING)
    steps = (kind & ONLY_AVERAGED) == 0
    g = tl.load(g_at, mask=_there(here, steps), other=0.0)
    p = tl.load(p_at, mask=here)
    b = tl.load(b_at, mask=_there(here, momentum_kind == RUNNING), other=0)
    beside = p
    if weights != "parameter":
        beside = tl.load(extra_at, mask=_there(here, has_extra), other=0)
    if averages:
        average = tl.load(average_at, mask=here)
    if momentum == tl.int8:
        scale = tl.load(scale_at, mask=_there(blocks_here, momentum_kind == RUNNING), other=0.0)
        b = _from_int8(b, scale, opmath)
    if weights == "kahan":  # without a gradient, what the next forward pass sees is averaged
        has_extra = has_extra & steps
    scalars = _scalars(group, opmath)  # after the loads: they need not wait for it
    tail, average_weight = _tail_scalars(tail_group, scalars[0], coefficients, opmath)
    w = _weight(p, beside, has_extra, weights, opmath)
    w_new, b_new = sgd_update(w, g.to(opmath), b.to(opmath), momentum_kind, factor, scalars, storage, rounds_each, tail)
    random = place
    if stochastic:
        random = _random(key, begin, place)
    p_new, beside, x = _stored(w_new, random, storage, weights, stochastic, extra)
    tl.store(p_at, p_new, mask=_there(here, steps))
    if weights != "parameter":
        tl.store(extra_at, beside, mask=_there(here, steps))
    if momentum == tl.int8:
        if here is not None:
            b_new = tl.where(here, b_new, 0.0)
        q, scale = _to_int8(b_new)
        tl.store(b_at, q, mask=_there(here, momentum_kind != 0))
        tl.store(scale_at, scale, mask=_there(blocks_here, momentum_kind != 0))
    else:
        tl.store(b_at, b_new.to(momentum), mask=_there(here, momentum_kind != 0))
    if averages:
        mixed = _averaged(average.to(opmath), tl.where(steps, x, w), average_weight)
        tl.store(average_at, mixed.to(average.dtype), mask=here)
    if zeroes:
        tl.store(g_at, tl.zeros_like(g), mask=_there(here, steps))


@triton.jit
def _places(elements: tl.constexpr, in_blocks: tl.constexpr):
    """0, 1, 2, …: in lines of a block each, where there are blocks."""
    if in_blocks:
        return tl.arange(0, elements // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    else:
        return tl.arange(0, elements)


@triton.jit
def _zero(g_at, row, begin, count, is_strided, pieces: tl.constexpr):
    """Sets a tile's gradient to zero, and does nothing else: of a step that is skipped."""
    start = tl.full((), 0, tl.int32)
    while start < count:
        place = start + tl.arange(0, pieces)
        start += pieces
        index = begin + place
        offset = index
        if is_strided:
            offset = tl.zeros_like(index)
            dims = tl.load(row)
            d = tl.full((), 0, tl.int64)
            while d < dims:
                dim = row + 1 + d * (OPERANDS + 1)
                size = tl.load(dim)
                offset += (index % size) * tl.load(dim + 2)
                index = index // size
                d += 1
        tl.store(g_at + offset, tl.zeros_like(offset).to(g_at.dtype.element_ty), mask=place < count)


@triton.jit
def tail_kernel(tiles, layouts, words, grad_scale, found_inf, coefficients, storage: tl.constexpr,
                opmath: tl.constexpr, rounds_each: tl.constexpr, weights: tl.constexpr, stochastic: tl.constexpr,
                gradient: tl.constexpr, momentum: tl.constexpr, extra: tl.constexpr, average: tl.constexpr,
                averages: tl.constexpr, zeroes: tl.constexpr, strided: tl.constexpr, tile_elements: tl.constexpr,
                piece_elements: tl.constexpr, vector: tl.constexpr):  # fmt: skip
    """One step of a tile a program, with what the constants say beyond SGD. As sgd_kernel's, the arguments are
    addresses; coefficients: of the float64 ones that clip, then the float32 ones; 0: there are none."""
    tile = tiles.to(tl.int64).to(tl.pointer_type(tl.int64)) + tl.program_id(0).to(tl.int64) * WORDS_OF_TAIL_TILE
    words = words.to(tl.int64).to(tl.pointer_type(tl.int64))
    found_inf = found_inf.to(tl.int64)
    grad_scale = grad_scale.to(tl.int64)
    coefficients = coefficients.to(tl.int64)
    skips = tl.load(found_inf.to(tl.pointer_type(tl.float32)), mask=found_inf != 0, other=0.0) != 0
    scale = tl.load(grad_scale.to(tl.pointer_type(tl.float32)), mask=grad_scale != 0, other=1.0)
    p_address = tl.load(tile)
    b_address = tl.load(tile + 1)
    extra_address = tl.load(tile + 2)
    average_address = tl.load(tile + 3)
    scale_address = tl.load(tile + 4)
    begin = tl.load(tile + 5)
    count = tl.load(tile + 6).to(tl.int32)
    word = tl.load(words + tl.load(tile + 7))
    group_at = words + tl.load(tile + 8)
    layout = tl.load(tile + 9)
    position = tl.load(tile + 10)
    # Here, so as not to wait behind the branch for the word first; the compilers move these loads there all the same.
    group = (tl.load(group_at), tl.load(group_at + 1), tl.load(group_at + 2), tl.load(group_at + 3),
             tl.load(group_at + 4))  # fmt: skip
    tail_group = (tl.load(group_at + 5), tl.load(group_at + 6), tl.load(group_at + 7), tl.load(group_at + 8),
                  tl.load(group_at + 9), group[4] & 0xFF)  # fmt: skip
    if zeroes:
        if (word != 0) & skips & ((word & ONLY_AVERAGED) == 0):
            row = layouts.to(tl.int64).to(tl.pointer_type(tl.int64)) + tl.maximum(layout, 0)
            _zero((word & TAIL_ADDRESS).to(tl.pointer_type(gradient)), row, begin, count, layout >= 0, piece_elements)
    if (word != 0) & (skips == 0):
        sign = tl.where((group[4] & MAXIMIZE) != 0, -1.0, 1.0).to(tl.float32)
        factor = tl.div_rn(sign, scale)
        kind = word & (FIRST | RUNNING | ONLY_AVERAGED)
        key = _row_key(tail_group[3], position)
        has_extra = extra_address != 0
        p_pointer: tl.constexpr = tl.pointer_type(storage)
        g_pointer: tl.constexpr = tl.pointer_type(gradient)
        b_pointer: tl.constexpr = tl.pointer_type(momentum)
        extra_pointer: tl.constexpr = tl.pointer_type(extra)
        average_pointer: tl.constexpr = tl.pointer_type(average)
        in_blocks: tl.constexpr = momentum == tl.int8
        scales = scale_address.to(tl.pointer_type(tl.float32)) + begin // BLOCK
        is_flat = True
        if strided:
            is_flat = layout < 0
        if is_flat:
            g_address = (word & TAIL_ADDRESS) + begin * (gradient.primitive_bitwidth // 8)
            # What each operand's address must be a multiple of, that a thread takes `vector` elements at once.
            p_bytes: tl.constexpr = vector * storage.primitive_bitwidth // 8
            g_bytes: tl.constexpr = vector * gradient.primitive_bitwidth // 8
            b_bytes: tl.constexpr = vector * momentum.primitive_bitwidth // 8
            extra_bytes: tl.constexpr = vector * extra.primitive_bitwidth // 8
            average_bytes: tl.constexpr = vector * average.primitive_bitwidth // 8
            odd = (p_address & (p_bytes - 1)) | (g_address & (g_bytes - 1)) | (b_address & (b_bytes - 1))
            odd |= (extra_address & (extra_bytes - 1)) | (average_address & (average_bytes - 1))
            if (count == tile_elements) & (odd == 0):
                place = _places(tile_elements, in_blocks)
                at = (tl.multiple_of(p_address.to(p_pointer), p_bytes) + place,
                      tl.multiple_of(g_address.to(g_pointer), g_bytes) + place,
                      tl.multiple_of(b_address.to(b_pointer), b_bytes) + place,
                      tl.multiple_of(extra_address.to(extra_pointer), extra_bytes) + place,
                      tl.multiple_of(average_address.to(average_pointer), average_bytes) + place,
                      scales + tl.arange(0, tile_elements // BLOCK), has_extra)  # fmt: skip
                _tail(at, None, kind, factor, group, tail_group, coefficients, key, begin, place, None, storage,
                      opmath, rounds_each, weights, stochastic, momentum, extra, averages, zeroes)  # fmt: skip
            else:
                start = tl.full((), 0, tl.int32)
                while start < count:
                    place = start + _places(piece_elements, in_blocks)
                    block = start // BLOCK + tl.arange(0, piece_elements // BLOCK)
                    at = (p_address.to(p_pointer) + place, g_address.to(g_pointer) + place,
                          b_address.to(b_pointer) + place, extra_address.to(extra_pointer) + place,
                          average_address.to(average_pointer) + place, scales + block, has_extra)  # fmt: skip
                    start += piece_elements
                    _tail(at, place < count, kind, factor, group, tail_group, coefficients, key, begin, place,
                          block * BLOCK < count, storage, opmath, rounds_each, weights, stochastic, momentum, extra,
                          averages, zeroes)  # fmt: skip
        if strided:
            if layout >= 0:
                row = layouts.to(tl.int64).to(tl.pointer_type(tl.int64)) + layout
                start = tl.full((), 0, tl.int32)
                while start < count:
                    place = start + _places(piece_elements, in_blocks)
                    block = start // BLOCK + tl.arange(0, piece_elements // BLOCK)
                    start += piece_elements
                    index = begin + place
                    p_offset = tl.zeros_like(index)
                    g_offset = tl.zeros_like(index)
                    b_offset = tl.zeros_like(index)
                    extra_offset = tl.zeros_like(index)
                    average_offset = tl.zeros_like(index)
                    dims = tl.load(row)
                    d = tl.full((), 0, tl.int64)
                    while d < dims:
                        dim = row + 1 + d * (OPERANDS + 1)
                        size = tl.load(dim)
                        inside = index % size
                        index = index // size
                        p_offset += inside * tl.load(dim + 1)
                        g_offset += inside * tl.load(dim + 2)
                        b_offset += inside * tl.load(dim + 3)
                        extra_offset += inside * tl.load(dim + 4)
                        average_offset += inside * tl.load(dim + 5)
                        d += 1
                    at = (p_address.to(p_pointer) + p_offset, (word & TAIL_ADDRESS).to(g_pointer) + g_offset,
                          b_address.to(b_pointer) + b_offset, extra_address.to(extra_pointer) + extra_offset,
                          average_address.to(average_pointer) + average_offset, scales + block,
                          has_extra)  # fmt: skip
                    _tail(at, place < count, kind, factor, group, tail_group, coefficients, key, begin, place,
                          block * BLOCK < count, storage, opmath, rounds_each, weights, stochastic, momentum, extra,
                          averages, zeroes)  # fmt: skip


# --- the norm ----------------------------------------------------------------------------------------------------


@triton.jit
def _squares(g, inverse_scale, opmath: tl.constexpr, rounds_each: tl.constexpr):
    """The squares of gradients as the step takes them, in double."""
    x = _rounded(g.to(opmath) * inverse_scale.to(opmath), g.dtype, rounds_each).to(tl.float64)
    return x * x


@triton.jit
def _norm_and_coefficient(sum_of_squares, max_norm, in_double: tl.constexpr):
    """As torch.nn.utils.clip_grad_norm_ has them: in float32 or float64. max_norm: a double's bits."""
    norm = tl.sqrt(sum_of_squares)
    limit = max_norm.to(tl.float64, bitcast=True)
    if in_double:
        coefficient = (tl.full((), 1.0, tl.float64) / (norm + tl.full((), 1e-6, tl.float64))) * limit
    else:
        norm = norm.to(tl.float32)
        coefficient = tl.div_rn(tl.full((), 1.0, tl.float32), norm + 1e-6) * limit.to(tl.float32)
    return norm, tl.where(coefficient > 1, 1.0, coefficient).to(norm.dtype)


@triton.jit
def _write_coefficient(workspace, groups, g, sum_of_squares, max_norm, in_double: tl.constexpr):
    """A group's norm and what clips it; whether that is a group whose norm is not finite."""
    norm, coefficient = _norm_and_coefficient(sum_of_squares, max_norm, in_double)
    clips = (max_norm & 0x7FFFFFFFFFFFFFFF) <= 0x7FF0000000000000
    norms = workspace + NORM_NORMS
    in_float = (workspace + (NORM_NORMS + 2 * groups)).to(tl.pointer_type(tl.float32))
    tl.store((norms + groups + g).to(tl.pointer_type(tl.float64)), tl.where(clips, coefficient, 1.0).to(tl.float64))
    tl.store(in_float + g, tl.where(clips, coefficient, 1.0).to(tl.float32))
    tl.store(norms.to(tl.pointer_type(norm.dtype)) + g, tl.where(clips, norm, float("nan")).to(norm.dtype))
    return clips & ((norm - norm) != 0)


@triton.jit
def norm_kernel(tiles, layouts, words, grad_scale, workspace, ranges, max_norms, groups, programs, per_group,
                gradient: tl.constexpr, opmath: tl.constexpr, rounds_each: tl.constexpr, strided: tl.constexpr,
                in_double: tl.constexpr, piece_elements: tl.constexpr):  # fmt: skip
    """The sum of squares of a tile a program; the last one to be done adds them up and forms what clips.

    Always in one order, whichever program is the last. workspace: see NORM_FLAG; ranges: of each group the first of its
    tiles' sums and their number; max_norms: float64, NaN: the group does not clip; programs: of all launches of this
    step; per_group: each group has a norm of its own, if not 0.
    """
    tile = tiles.to(tl.int64).to(tl.pointer_type(tl.int64)) + tl.program_id(0).to(tl.int64) * WORDS_OF_NORM_TILE
    words = words.to(tl.int64).to(tl.pointer_type(tl.int64))
    workspace = workspace.to(tl.int64).to(tl.pointer_type(tl.int64))
    groups = groups.to(tl.int64)
    grad_scale = grad_scale.to(tl.int64)
    ranges = ranges.to(tl.int64).to(tl.pointer_type(tl.int64))
    max_norms = max_norms.to(tl.int64).to(tl.pointer_type(tl.int64))
    scale = tl.load(grad_scale.to(tl.pointer_type(tl.float32)), mask=grad_scale != 0, other=1.0)
    inverse_scale = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    begin = tl.load(tile)
    count = tl.load(tile + 1).to(tl.int32)
    word = tl.load(words + tl.load(tile + 2))
    layout = tl.load(tile + 3)
    partial = tl.load(tile + 4)
    address = word & TAIL_ADDRESS
    if address == 0:  # no gradient
        count = tl.full((), 0, tl.int32)
    pointer: tl.constexpr = tl.pointer_type(gradient)
    is_flat = True
    if strided:
        is_flat = layout < 0
    made = tl.zeros((piece_elements,), tl.float64)
    start = tl.full((), 0, tl.int32)
    if is_flat:
        first = address + begin * (gradient.primitive_bitwidth // 8)
        if (first & 15) == 0:
            at = tl.multiple_of(first.to(pointer), 16) + tl.arange(0, piece_elements)
            while start + piece_elements <= count:
                g = tl.load(at)
                made += _squares(g, inverse_scale, opmath, rounds_each)
                at += piece_elements
                start += piece_elements
        while start < count:
            place = start + tl.arange(0, piece_elements)
            g = tl.load(first.to(pointer) + place, mask=place < count, other=0.0)
            made += _squares(g, inverse_scale, opmath, rounds_each)
            start += piece_elements
    if strided:
        if layout >= 0:
            row = layouts.to(tl.int64).to(tl.pointer_type(tl.int64)) + layout
            dims = tl.load(row)
            while start < count:
                place = start + tl.arange(0, piece_elements)
                index = begin + place
                offset = tl.zeros_like(index)
                d = tl.full((), 0, tl.int64)
                while d < dims:
                    dim = row + 1 + d * (OPERANDS + 1)
                    size = tl.load(dim)
                    offset += (index % size) * tl.load(dim + 1 + GRADIENT)
                    index = index // size
                    d += 1
                g = tl.load(address.to(pointer) + offset, mask=place < count, other=0.0)
                made += _squares(g, inverse_scale, opmath, rounds_each)
                start += piece_elements
    sums = (workspace + (NORM_NORMS + 3 * groups)).to(tl.pointer_type(tl.float64))
    partials = sums + groups
    tl.store(partials + partial, tl.sum(made, axis=0))
    done = workspace.to(tl.pointer_type(tl.int32))
    if tl.atomic_add(done, 1, sem="acq_rel") == programs.to(tl.int32) - 1:
        tl.store(done, 0)  # for the next step
        total = tl.full((), 0.0, tl.float64)
        is_bad = tl.full((), 0, tl.int32)
        g = tl.full((), 0, tl.int64)
        while g < groups:
            first_sum = tl.load(ranges + 2 * g)
            number = tl.load(ranges + 2 * g + 1)
            of_group = tl.zeros((SUMMED_AT_ONCE,), tl.float64)
            i = tl.full((), 0, tl.int64)
            while i < number:
                which = i + tl.arange(0, SUMMED_AT_ONCE)
                # Past the first cache, in which something of an earlier step may lie.
                of_group += tl.load(partials + first_sum + which, mask=which < number, other=0.0, cache_modifier=".cg")
                i += SUMMED_AT_ONCE
            added = tl.sum(of_group, axis=0)
            tl.store(sums + g, added)
            total += added
            if per_group.to(tl.int64) != 0:
                bad = _write_coefficient(workspace, groups, g, added, tl.load(max_norms + g), in_double)
                is_bad = is_bad | bad.to(tl.int32)
            g += 1
        if per_group.to(tl.int64) == 0:
            g = tl.full((), 0, tl.int64)
            while g < groups:
                bad = _write_coefficient(workspace, groups, g, total, tl.load(max_norms + g), in_double)
                is_bad = is_bad | bad.to(tl.int32)
                g += 1
        flag = (workspace + NORM_FLAG).to(tl.pointer_type(tl.float32))
        tl.store(flag, is_bad.to(tl.float32))
