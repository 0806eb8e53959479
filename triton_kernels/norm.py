"""The norm of the gradients that clips, in Triton. Device code only; the twin of csrc/cuda's, before a step."""

import triton
import triton.language as tl

from .kernels import ADDRESS, int64_at, offset_of_gradient, word_of_scaler
from .update import rounded

# Tiles are csrc/plan/table.h's: NormTile, in words of 8 bytes.
WORDS_OF_TILE = tl.constexpr(4)

# The words that the norm is formed in, 8 bytes each: the programs that are done; whether a norm is not finite
# (float32); then, a word a group, the norms (of the norm's dtype, packed), what clips (float64, then again in float32,
# packed), the sums of squares; then the tiles' sums.
FLAG = tl.constexpr(1)
NORMS = tl.constexpr(2)
# Groups with few sums are added up so many at once; those with more one after another, so many sums at once.
GROUPS_AT_ONCE = tl.constexpr(32)
FEW_SUMS = tl.constexpr(32)
SUMMED_AT_ONCE = tl.constexpr(1024)
TOTALLED_AT_ONCE = tl.constexpr(8)


@triton.jit
def _squares(g, inverse_scale, opmath: tl.constexpr, rounds_each: tl.constexpr):
    """The squares of gradients as the step takes them, in double."""
    x = rounded(g.to(opmath) * inverse_scale.to(opmath), g.dtype, rounds_each).to(tl.float64)
    return x * x


@triton.jit
def _range(group):
    """Where a group's sums begin, and how many there are."""
    begin = group.to(tl.int32).to(tl.int64)
    return begin, tl.maximum((group >> 32) - begin, 0)


@triton.jit
def _sum_groups(partials, ranges, sums, groups, large, count):
    """Adds up the tiles' sums of each group. ranges: csrc/plan/table.h's NormGroup of each; large: the `count` groups
    that have more than FEW_SUMS."""
    first = tl.full((), 0, tl.int64)
    while first < groups:
        g = first + tl.arange(0, GROUPS_AT_ONCE)
        begin, number = _range(tl.load(ranges + g, mask=g < groups, other=0))
        which = tl.arange(0, FEW_SUMS)[None, :]
        # Past the first cache, in which something of an earlier step may lie.
        few = tl.load(partials + begin[:, None] + which, mask=which < number[:, None], other=0.0, cache_modifier=".cg")
        tl.store(sums + g, tl.sum(few, axis=1), mask=(g < groups) & (number <= FEW_SUMS))
        first += GROUPS_AT_ONCE
    place = tl.full((), 0, tl.int64)
    while place < count:
        g = tl.load(large + place)
        begin, number = _range(tl.load(ranges + g))
        of_group = tl.zeros((SUMMED_AT_ONCE,), tl.float64)
        i = tl.full((), 0, tl.int64)
        while i < number:
            which = i + tl.arange(0, SUMMED_AT_ONCE)
            of_group += tl.load(partials + begin + which, mask=which < number, other=0.0, cache_modifier=".cg")
            i += SUMMED_AT_ONCE
        tl.store(sums + g, tl.sum(of_group, axis=0))
        place += 1


@triton.jit
def _total(sums, groups):
    """The sum of all groups, one after another as the host adds them."""
    total = tl.full((), 0.0, tl.float64)
    g = tl.full((), 0, tl.int64)
    while g < groups:
        for i in tl.static_range(TOTALLED_AT_ONCE):  # whose loads do not wait for one another
            total += tl.load(sums + g + i, mask=g + i < groups, other=0.0, cache_modifier=".cg")
        g += TOTALLED_AT_ONCE
    return total


@triton.jit
def _norm_and_coefficient(sum_of_squares, max_norm, in_double):
    """As torch.nn.utils.clip_grad_norm_ has them: in float64, or in float32 and then widened."""
    norm = tl.sqrt(sum_of_squares)
    one = tl.full((), 1.0, tl.float64)
    coefficient = (one / (norm + tl.full((), 1e-6, tl.float64))) * max_norm
    narrow = norm.to(tl.float32)
    narrow_coefficient = tl.div_rn(one.to(tl.float32), narrow + 1e-6) * max_norm.to(tl.float32)
    if in_double == 0:
        norm = narrow.to(tl.float64)
        coefficient = narrow_coefficient.to(tl.float64)
    return norm, tl.where(coefficient > 1, 1.0, coefficient)


@triton.jit
def _write_coefficients(workspace, sums, max_norms, groups, per_group, in_double):
    """The groups' norms and what clips them; whether a group that clips has one that is not finite."""
    norms = workspace + NORMS
    in_float = (workspace + (NORMS + 2 * groups)).to(tl.pointer_type(tl.float32))
    total = tl.full((), 0.0, tl.float64)
    if per_group == 0:
        total = _total(sums, groups)
    bad = tl.full((), 0, tl.int32)
    first = tl.full((), 0, tl.int64)
    while first < groups:
        g = first + tl.arange(0, GROUPS_AT_ONCE)
        here = g < groups
        squares = tl.load(sums + g, mask=here & (per_group != 0), other=0.0, cache_modifier=".cg") + total
        limit = tl.load(max_norms + g, mask=here, other=float("nan"))
        norm, coefficient = _norm_and_coefficient(squares, limit, in_double)
        clips = limit == limit
        coefficient = tl.where(clips, coefficient, 1.0)
        norm = tl.where(clips, norm, float("nan"))
        tl.store((norms + groups + g).to(tl.pointer_type(tl.float64)), coefficient, mask=here)
        tl.store(in_float + g, coefficient.to(tl.float32), mask=here)
        if in_double != 0:
            tl.store(norms.to(tl.pointer_type(tl.float64)) + g, norm, mask=here)
        else:
            tl.store(norms.to(tl.pointer_type(tl.float32)) + g, norm.to(tl.float32), mask=here)
        bad |= tl.max((clips & ((norm - norm) != 0)).to(tl.int32), axis=0)
        first += GROUPS_AT_ONCE
    return bad


@triton.jit
def norm_kernel(tiles, layouts, words, grad_scale, workspace, ranges, large, max_norms, groups, large_groups,
                programs, per_group, in_double, gradient: tl.constexpr, opmath: tl.constexpr, rounds_each: tl.constexpr,
                strided: tl.constexpr, piece_elements: tl.constexpr):  # fmt: skip
    """The sum of squares of a tile a program; the last one to be done adds them up and forms what clips.

    Always in one order, whichever program is the last. workspace: see FLAG; ranges, large, of large_groups: see
    _sum_groups(); max_norms: float64, NaN: the group does not clip; programs: of all launches of this step;
    per_group: each group has a norm of its own, if not 0; in_double: the norm is float64, if not 0.
    """
    tile = int64_at(tiles) + tl.program_id(0).to(tl.int64) * WORDS_OF_TILE
    workspace = int64_at(workspace)
    groups = groups.to(tl.int64)
    inverse_scale = tl.div_rn(tl.full((), 1.0, tl.float32), word_of_scaler(grad_scale, 1.0))
    begin = tl.load(tile)
    count_and_row = tl.load(tile + 1)
    count = count_and_row.to(tl.int32)
    address = tl.load(int64_at(words) - 1 - (count_and_row >> 32)) & ADDRESS
    layout_and_slot = tl.load(tile + 2)
    partial = layout_and_slot >> 32
    if address == 0:  # no gradient
        count = tl.full((), 0, tl.int32)
    pointer: tl.constexpr = tl.pointer_type(gradient)
    made = tl.zeros((piece_elements,), tl.float64)
    start = tl.full((), 0, tl.int32)
    if not strided:
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
    else:
        row = int64_at(layouts) + layout_and_slot.to(tl.int32)
        while start < count:
            place = start + tl.arange(0, piece_elements)
            offset = offset_of_gradient(begin + place, row)
            g = tl.load(address.to(pointer) + offset, mask=place < count, other=0.0)
            made += _squares(g, inverse_scale, opmath, rounds_each)
            start += piece_elements
    sums = (workspace + (NORMS + 3 * groups)).to(tl.pointer_type(tl.float64))
    partials = sums + groups
    tl.store(partials + partial, tl.sum(made, axis=0))
    done = workspace.to(tl.pointer_type(tl.int32))
    if tl.atomic_add(done, 1, sem="acq_rel") == programs.to(tl.int32) - 1:
        tl.store(done, 0)  # for the next step
        _sum_groups(partials, int64_at(ranges), sums, groups, int64_at(large), large_groups.to(tl.int64))
        tl.debug_barrier()  # the sums are there for all threads
        limits = max_norms.to(tl.int64).to(tl.pointer_type(tl.float64))
        bad = _write_coefficients(workspace, sums, limits, groups, per_group.to(tl.int64), in_double.to(tl.int64))
        tl.store((workspace + FLAG).to(tl.pointer_type(tl.float32)), bad.to(tl.float32))
