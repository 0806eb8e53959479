"""The step's kernel in Triton, a tile a program. Device code only.

The twin of csrc/cuda. What a row's operands are and how they are stored is compiled in (a kernel's constants); numbers
are read from words, laid out by csrc/python/hosted_step. Compiled and launched by launcher.py.
"""

import triton
import triton.language as tl

from .update import (
    FIRST,
    KIND,
    MAXIMIZE,
    RUNNING,
    averaged,
    from_int8,
    option_scalars,
    random_bits,
    row_key,
    sgd_scalars,
    sgd_update,
    stored,
    to_int8,
    weight_of,
)

# A tile, the work of one program, has at most this many bytes of each operand. A full one is read at once, its loads
# all under way together; another, or a strided one, in so many pieces.
TILE_BYTES = 8192
PIECES = 4
WARPS = 4
BLOCK = tl.constexpr(128)  # elements of an int8 momentum buffer that share a scale

# Tiles and layouts are csrc/plan/table.h's: DeviceTile, OptionsTile and PackedLayouts, in words of 8 bytes. So are a
# group's words, CudaGroupOptions of csrc/plan/group_words.h, and one more: where its coefficient lies.
WORDS_OF_GROUP = tl.constexpr(12)

# A row's word is its gradient's address and, in the bits above, its kind: FIRST or RUNNING, or that the row has no
# gradient, but an average. 0: the row is not stepped.
KIND_AT = tl.constexpr(60)
ONLY_AVERAGED = tl.constexpr(1)
ADDRESS = tl.constexpr((1 << 60) - 1)


@triton.jit
def _there(here, flag):
    """The elements that `here` marks (None: all), where the flag holds for all of them."""
    if here is None:
        return flag
    else:
        return here & flag


@triton.jit
def _loaded(at, here):
    """0 where `here` does not mark; None: all."""
    if here is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=here, other=0.0)


@triton.jit
def _step(at, here, kind, factor, group, options_group, coefficients, key, begin, place, blocks_here,
          storage: tl.constexpr, opmath: tl.constexpr, rounds_each: tl.constexpr, options: tl.constexpr,
          weights: tl.constexpr, stochastic: tl.constexpr, momentum: tl.constexpr, extra: tl.constexpr,
          averages: tl.constexpr, zeroes: tl.constexpr, placed: tl.constexpr):  # fmt: skip
    """Steps the elements at these pointers, place `place` after `begin` in the parameter, those that `here` marks."""
    p_at, g_at, b_at, extra_at, average_at, scale_at = at
    momentum_kind = kind & (FIRST | RUNNING)
    steps = True
    written = here  # and not _there(): Triton 3.6 cannot return None
    if averages:
        steps = (kind & ONLY_AVERAGED) == 0
        written = _there(here, steps)
    g = _loaded(g_at, written)
    p = tl.load(p_at, mask=here)
    b = tl.load(b_at, mask=_there(here, momentum_kind == RUNNING), other=0)
    beside = p
    if weights != "parameter":
        beside = tl.load(extra_at, mask=here)
    if averages:
        average = tl.load(average_at, mask=here)
    if momentum == tl.int8:
        scale = tl.load(scale_at, mask=_there(blocks_here, momentum_kind == RUNNING), other=0.0)
        b = from_int8(b, scale, opmath)
    scalars = sgd_scalars(group, opmath)  # after the loads: they need not wait for it
    numbers = None
    average_weight = None
    if options:
        numbers, average_weight = option_scalars(options_group, group[4] & KIND, scalars[0], coefficients, opmath)
    # Without a gradient, what the next forward pass sees is averaged.
    w = weight_of(p, beside, steps, weights, opmath)
    w_new, b_new = sgd_update(w, g.to(opmath), b.to(opmath), momentum_kind, factor, scalars, storage, rounds_each,
                              numbers)  # fmt: skip
    random = place
    if stochastic:
        random = random_bits(key, begin, place, placed)
    p_new, beside, x = stored(w_new, random, storage, weights, stochastic, extra)
    tl.store(p_at, p_new, mask=written)
    if weights != "parameter":
        tl.store(extra_at, beside, mask=written)
    if momentum == tl.int8:
        if here is not None:
            b_new = tl.where(here, b_new, 0.0)
        q, scale = to_int8(b_new)
        tl.store(b_at, q, mask=_there(here, momentum_kind != 0))
        tl.store(scale_at, scale, mask=_there(blocks_here, momentum_kind != 0))
    else:
        tl.store(b_at, b_new.to(momentum), mask=_there(here, momentum_kind != 0))
    if averages:
        mixed = averaged(average.to(opmath), tl.where(steps, x, w), average_weight)
        tl.store(average_at, mixed.to(average.dtype), mask=here)
    if zeroes:
        tl.store(g_at, tl.zeros_like(g), mask=written)


@triton.jit
def _places(elements: tl.constexpr, in_blocks: tl.constexpr):
    """0, 1, 2, …: in lines of a block each, where there are blocks."""
    if in_blocks:
        return tl.arange(0, elements // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    else:
        return tl.arange(0, elements)


@triton.jit
def offset_of_gradient(index, row):
    """Of a strided row's elements, by their places in the row."""
    dims = tl.load(row)
    offset = tl.zeros_like(index)
    d = dims - 1
    while d >= 0:  # the innermost first
        dim = row + 1 + d
        size = tl.load(dim)
        whole = index // size
        offset += (index - whole * size) * tl.load(dim + dims * 2)
        index = whole
        d -= 1
    return offset


@triton.jit
def _zero(g_at, row, begin, count, strided: tl.constexpr, piece_elements: tl.constexpr):
    """Sets a tile's gradient to zero, and does nothing else: of a step that is skipped."""
    start = tl.full((), 0, tl.int32)
    while start < count:
        place = start + tl.arange(0, piece_elements)
        start += piece_elements
        offset = begin + place
        if strided:
            offset = offset_of_gradient(offset, row)
        tl.store(g_at + offset, tl.zeros_like(offset).to(g_at.dtype.element_ty), mask=place < count)


@triton.jit
def int64_at(address):
    return address.to(tl.int64).to(tl.pointer_type(tl.int64))


@triton.jit
def word_of_scaler(address, other):
    """torch.amp.GradScaler's word at an address, or `other` where that is 0."""
    address = address.to(tl.int64)
    return tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=other)


@triton.jit
def sgd_kernel(tiles, layouts, words, grad_scale, found_inf, coefficients, storage: tl.constexpr,
               opmath: tl.constexpr, rounds_each: tl.constexpr, options: tl.constexpr, weights: tl.constexpr,
               stochastic: tl.constexpr, gradient: tl.constexpr, momentum: tl.constexpr, extra: tl.constexpr,
               average: tl.constexpr, averages: tl.constexpr, zeroes: tl.constexpr, strided: tl.constexpr,
               placed: tl.constexpr, tile_elements: tl.constexpr, piece_elements: tl.constexpr,
               vector: tl.constexpr):  # fmt: skip
    """One step of a tile a program. The first six arguments are addresses on the device; those of GradScaler's
    grad_scale and found_inf (float32, one element each) may be 0: there is none. words: before it lie the rows', from
    the last on, behind it the groups'. coefficients: of the float64 ones that clip, then the float32 ones, where some
    group's are read there."""
    words_of_tile: tl.constexpr = 8 if options else 4
    tile = int64_at(tiles) + tl.program_id(0).to(tl.int64) * words_of_tile
    coefficients = coefficients.to(tl.int64)
    skips = word_of_scaler(found_inf, 0.0) != 0
    scale = word_of_scaler(grad_scale, 1.0)
    p_address = tl.load(tile)
    b_address = tl.load(tile + 1)
    extra_address = p_address
    average_address = p_address
    scale_address = p_address
    position = p_address
    if weights != "parameter":
        extra_address = tl.load(tile + 4)
    if averages:
        average_address = tl.load(tile + 5)
    in_blocks: tl.constexpr = momentum == tl.int8
    if in_blocks:
        scale_address = tl.load(tile + 6)
    piece_and_row = tl.load(tile + 2)
    rest = tl.load(tile + 3)  # layout, count, group
    begin = piece_and_row.to(tl.int32).to(tl.int64) * tile_elements
    count = ((rest >> 32) & 0xFFFF).to(tl.int32)
    word = tl.load(int64_at(words) - 1 - (piece_and_row >> 32))
    group_at = int64_at(words) + ((rest >> 48) & 0xFFFF) * WORDS_OF_GROUP
    # Here, so as not to wait behind the branch for the word first; the compilers move these loads there all the same.
    group = (tl.load(group_at), tl.load(group_at + 1), tl.load(group_at + 2), tl.load(group_at + 3),
             tl.load(group_at + 4).to(tl.int32))  # fmt: skip
    options_group = group
    if options:
        options_group = (tl.load(group_at + 5), tl.load(group_at + 6), tl.load(group_at + 7), tl.load(group_at + 8),
                         tl.load(group_at + 11))  # fmt: skip
    key = (position.to(tl.uint32), position.to(tl.uint32))
    if stochastic:
        key = row_key(tl.load(group_at + 9), tl.load(tile + 7))
    row = int64_at(layouts) + rest.to(tl.int32)  # of a strided row
    first = begin  # of the tile, or of a strided row, in the whole parameter
    if placed:
        if strided:
            first = tl.load(row - 1)
        else:
            first += tl.load(int64_at(layouts) - 2 - rest.to(tl.int32))
    g_pointer: tl.constexpr = tl.pointer_type(gradient)
    if zeroes:
        if skips & ((word & ADDRESS) != 0):
            _zero((word & ADDRESS).to(g_pointer), row, begin, count, strided, piece_elements)
    if (word != 0) & (skips == 0):
        sign = tl.where((group[4] & MAXIMIZE) != 0, -1.0, 1.0).to(tl.float32)
        factor = tl.div_rn(sign, scale)
        kind = (word >> KIND_AT).to(tl.int32)
        p_pointer: tl.constexpr = tl.pointer_type(storage)
        b_pointer: tl.constexpr = tl.pointer_type(momentum)
        extra_pointer: tl.constexpr = tl.pointer_type(extra)
        average_pointer: tl.constexpr = tl.pointer_type(average)
        scales = scale_address.to(tl.pointer_type(tl.float32))
        if not strided:
            g_address = (word & ADDRESS) + begin * (gradient.primitive_bitwidth // 8)
            # What each operand's address must be a multiple of, that a thread takes `vector` elements at once.
            p_bytes: tl.constexpr = vector * storage.primitive_bitwidth // 8
            g_bytes: tl.constexpr = vector * gradient.primitive_bitwidth // 8
            b_bytes: tl.constexpr = vector * momentum.primitive_bitwidth // 8
            extra_bytes: tl.constexpr = vector * extra.primitive_bitwidth // 8
            average_bytes: tl.constexpr = vector * average.primitive_bitwidth // 8
            odd = (p_address & (p_bytes - 1)) | (g_address & (g_bytes - 1)) | (b_address & (b_bytes - 1))
            if weights != "parameter":
                odd |= extra_address & (extra_bytes - 1)
            if averages:
                odd |= average_address & (average_bytes - 1)
            if (count == tile_elements) & (odd == 0):
                place = _places(tile_elements, in_blocks)
                at = (tl.multiple_of(p_address.to(p_pointer), p_bytes) + place,
                      tl.multiple_of(g_address.to(g_pointer), g_bytes) + place,
                      tl.multiple_of(b_address.to(b_pointer), b_bytes) + place,
                      tl.multiple_of(extra_address.to(extra_pointer), extra_bytes) + place,
                      tl.multiple_of(average_address.to(average_pointer), average_bytes) + place,
                      scales + tl.arange(0, tile_elements // BLOCK))  # fmt: skip
                _step(at, None, kind, factor, group, options_group, coefficients, key, first, place, None, storage,
                      opmath, rounds_each, options, weights, stochastic, momentum, extra, averages, zeroes,
                      placed)  # fmt: skip
            else:
                start = tl.full((), 0, tl.int32)
                while start < count:  # range() of a tensor: Triton 3.6 cannot
                    place = start + _places(piece_elements, in_blocks)
                    block = start // BLOCK + tl.arange(0, piece_elements // BLOCK)
                    at = (p_address.to(p_pointer) + place, g_address.to(g_pointer) + place,
                          b_address.to(b_pointer) + place, extra_address.to(extra_pointer) + place,
                          average_address.to(average_pointer) + place, scales + block)  # fmt: skip
                    start += piece_elements
                    _step(at, place < count, kind, factor, group, options_group, coefficients, key, first, place,
                          block * BLOCK < count, storage, opmath, rounds_each, options, weights, stochastic,
                          momentum, extra, averages, zeroes, placed)  # fmt: skip
        else:
            start = tl.full((), 0, tl.int32)
            while start < count:
                dims = tl.load(row)  # here, or float64's kernel spills
                place = start + _places(piece_elements, in_blocks)
                block = start // BLOCK + tl.arange(0, piece_elements // BLOCK)
                start += piece_elements
                index = begin + place
                p_offset = tl.zeros_like(index)
                g_offset = tl.zeros_like(index)
                b_offset = tl.zeros_like(index)
                extra_offset = tl.zeros_like(index)
                average_offset = tl.zeros_like(index)
                in_whole = place
                if placed:
                    in_whole = tl.zeros_like(index)
                d = dims - 1
                while d >= 0:  # the innermost first
                    dim = row + 1 + d
                    size = tl.load(dim)
                    whole = index // size
                    inside = index - whole * size
                    index = whole
                    p_offset += inside * tl.load(dim + dims)
                    g_offset += inside * tl.load(dim + dims * 2)
                    b_offset += inside * tl.load(dim + dims * 3)
                    if weights != "parameter":
                        extra_offset += inside * tl.load(dim + dims * 4)
                    if averages:
                        average_offset += inside * tl.load(dim + dims * 5)
                    if placed:
                        in_whole += inside * tl.load(dim + dims * 6)
                    d -= 1
                at = (p_address.to(p_pointer) + p_offset, (word & ADDRESS).to(g_pointer) + g_offset,
                      b_address.to(b_pointer) + b_offset, extra_address.to(extra_pointer) + extra_offset,
                      average_address.to(average_pointer) + average_offset, scales + block)  # fmt: skip
                _step(at, place < count, kind, factor, group, options_group, coefficients, key, first, in_whole,
                      block * BLOCK < count, storage, opmath, rounds_each, options, weights, stochastic,
                      momentum, extra, averages, zeroes, placed)  # fmt: skip
