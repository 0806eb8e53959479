"""The SGD step in Triton: the arithmetic of one element, and one kernel over a table of tiles. Device code only.

The twin of csrc/sgd_update.h and csrc/sgd_cuda.cuh: the same roundings in the same order, every multiply-add written as
tl.fma and compiled without contraction. Compiled and launched by launcher.py; its arguments are laid out by table.py.
"""

import triton
import triton.language as tl

# A tile, the work of one program, has at most this many bytes of each operand. A full one is read at once, its loads
# all under way together; another, or a strided one, in so many pieces.
TILE_BYTES = 8192
PIECES = 4
WARPS = 4

# A tile's words, all int64: the addresses of its first elements (of the row's, where the row is strided); where it
# begins in the row; its elements; where its row's word and its group's words lie; where its layout lies, -1 if flat.
WORDS_OF_TILE = tl.constexpr(7)

# A row's word is its gradient's address and, in the bits above, what its step does with the momentum buffer. 0: the row
# is not stepped.
FIRST = tl.constexpr(1 << 61)  # fills it
RUNNING = tl.constexpr(1 << 62)  # updates it
ADDRESS = tl.constexpr((1 << 61) - 1)

# A group's words, CudaGroup of csrc/cuda_launch.h: lr, weight_decay, momentum, 1 - dampening (opmath's bits), flags.
# The flags' first byte tells what lr is read as: 0, the word is minus lr; else the word is the address of lr, and the
# byte is the place of its dtype here plus 1. The second byte tells it of weight_decay.
WORDS_OF_GROUP = 5
SCALAR_DTYPES = ("float32", "float64", "float16", "bfloat16")
KIND = tl.constexpr(0xFF)
WEIGHT_DECAY_KIND = tl.constexpr(8)  # a shift
DECAYS = tl.constexpr(1 << 25)
NESTEROV = tl.constexpr(1 << 26)
MAXIMIZE = tl.constexpr(1 << 27)


@triton.jit
def _rounded(x, storage: tl.constexpr, rounds_each: tl.constexpr):
    """x as numerics="torch" keeps it between two operations: rounded to the storage dtype."""
    if rounds_each:
        return x.to(storage).to(x.dtype)
    return x


@triton.jit
def sgd_update(p, g, b, momentum_kind, factor, scalars, storage: tl.constexpr, rounds_each: tl.constexpr, tail=None):
    """One SGD step of parameter p with gradient g and momentum buffer b, all in opmath: the new p and b.

    factor: of the gradient, float32: 1 / grad_scale as torch.amp.GradScaler's unscale_() has it, negative to maximize.
    tail: of tail_kernel.py's rows, in opmath: what clips the gradient, the L1 penalty, what decoupled decay keeps of p.
    """
    minus_lr, momentum, one_minus_dampening, weight_decay, decays, nesterov = scalars
    g = _rounded(g * factor.to(g.dtype), storage, rounds_each)
    if tail is not None:
        g = _rounded(g * tail[0], storage, rounds_each)
    g = tl.where(decays, _rounded(tl.fma(weight_decay, p, g), storage, rounds_each), g)
    if tail is not None:
        sign = tl.where(p > 0, 1.0, tl.where(p < 0, -1.0, 0.0)).to(p.dtype)
        g = tl.where(tail[1] != 0, _rounded(tl.fma(tail[1], sign, g), storage, rounds_each), g)
        p = _rounded(p * tail[2], storage, rounds_each)
    kept = _rounded(b * momentum, storage, rounds_each)
    running = _rounded(tl.fma(one_minus_dampening, g, kept), storage, rounds_each)
    b = tl.where(momentum_kind == RUNNING, running, g)
    ahead = _rounded(tl.fma(momentum, b, g), storage, rounds_each)
    g = tl.where(momentum_kind == 0, g, tl.where(nesterov, ahead, b))
    return tl.fma(minus_lr, g, p), b


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
def _from_word(word, opmath: tl.constexpr):
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
    value = _from_word(word, opmath)
    is_zero = value == 0
    if kind != 0:
        if kind == 2:
            bits = _bits_of_double(word)
            if opmath == tl.float64:
                value = _from_word(bits, opmath)
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
def _scalars(group, opmath: tl.constexpr):
    """What sgd_update takes, from a group's words."""
    lr, weight_decay, momentum, one_minus_dampening, flags = group
    lr_kind = flags & KIND
    minus_lr, _ = _scalar(lr, lr_kind, opmath)
    minus_lr *= tl.where(lr_kind == 0, 1.0, -1.0).to(opmath)
    decay_kind = (flags >> WEIGHT_DECAY_KIND) & KIND
    weight_decay, is_zero = _scalar(weight_decay, decay_kind, opmath)
    decays = tl.where(decay_kind == 0, (flags & DECAYS) != 0, is_zero == 0)
    return (minus_lr, _from_word(momentum, opmath), _from_word(one_minus_dampening, opmath), weight_decay, decays,
            (flags & NESTEROV) != 0)  # fmt: skip


@triton.jit
def _step_all(p_at, g_at, b_at, momentum_kind, factor, group, storage: tl.constexpr, opmath: tl.constexpr,
              rounds_each: tl.constexpr):  # fmt: skip
    """Steps all elements at these pointers."""
    g = tl.load(g_at)
    p = tl.load(p_at)
    b = tl.load(b_at, mask=momentum_kind == RUNNING, other=0.0)
    scalars = _scalars(group, opmath)  # after the loads: they need not wait for it
    p_new, b_new = sgd_update(p.to(opmath), g.to(opmath), b.to(opmath), momentum_kind, factor, scalars, storage,
                              rounds_each)  # fmt: skip
    tl.store(p_at, p_new.to(storage))
    tl.store(b_at, b_new.to(storage), mask=momentum_kind != 0)


@triton.jit
def _step_some(p_at, g_at, b_at, here, momentum_kind, factor, scalars, storage: tl.constexpr,
               opmath: tl.constexpr, rounds_each: tl.constexpr):  # fmt: skip
    """Steps the elements at these pointers that `here` marks."""
    g = tl.load(g_at, mask=here, other=0.0).to(opmath)
    p = tl.load(p_at, mask=here, other=0.0).to(opmath)
    b = tl.load(b_at, mask=here & (momentum_kind == RUNNING), other=0.0).to(opmath)
    p, b = sgd_update(p, g, b, momentum_kind, factor, scalars, storage, rounds_each)
    tl.store(p_at, p.to(storage), mask=here)
    tl.store(b_at, b.to(storage), mask=here & (momentum_kind != 0))


@triton.jit
def sgd_kernel(tiles, layouts, words, grad_scale, found_inf, storage: tl.constexpr, opmath: tl.constexpr,
               rounds_each: tl.constexpr, strided: tl.constexpr, tile_elements: tl.constexpr,
               piece_elements: tl.constexpr):  # fmt: skip
    """One SGD step of a tile a program. The first five arguments are addresses on the device; those of
    torch.amp.GradScaler's grad_scale and found_inf (float32, one element each) may be 0: there is none."""
    tile = tiles.to(tl.int64).to(tl.pointer_type(tl.int64)) + tl.program_id(0).to(tl.int64) * WORDS_OF_TILE
    words = words.to(tl.int64).to(tl.pointer_type(tl.int64))
    found_inf = found_inf.to(tl.int64)
    grad_scale = grad_scale.to(tl.int64)
    skips = tl.load(found_inf.to(tl.pointer_type(tl.float32)), mask=found_inf != 0, other=0.0) != 0
    scale = tl.load(grad_scale.to(tl.pointer_type(tl.float32)), mask=grad_scale != 0, other=1.0)
    p_address = tl.load(tile)
    b_address = tl.load(tile + 1)
    begin = tl.load(tile + 2)
    count = tl.load(tile + 3).to(tl.int32)
    word = tl.load(words + tl.load(tile + 4))
    group_at = words + tl.load(tile + 5)
    layout = tl.load(tile + 6)
    # Here, so as not to wait behind the branch for the word first; the compilers move these loads there all the same.
    group = (tl.load(group_at), tl.load(group_at + 1), tl.load(group_at + 2), tl.load(group_at + 3),
             tl.load(group_at + 4))  # fmt: skip
    if (word != 0) & (skips == 0):
        sign = tl.where((group[4] & MAXIMIZE) != 0, -1.0, 1.0).to(tl.float32)
        factor = tl.div_rn(sign, scale)
        momentum_kind = word & (FIRST | RUNNING)
        pointer: tl.constexpr = tl.pointer_type(storage)
        is_flat = True
        if strided:
            is_flat = layout < 0
        if is_flat:
            g_address = (word & ADDRESS) + begin * (storage.primitive_bitwidth // 8)
            if (count == tile_elements) & (((p_address | g_address | b_address) & 15) == 0):
                at = tl.arange(0, tile_elements)
                _step_all(tl.multiple_of(p_address.to(pointer), 16) + at,
                          tl.multiple_of(g_address.to(pointer), 16) + at,
                          tl.multiple_of(b_address.to(pointer), 16) + at,
                          momentum_kind, factor, group, storage, opmath, rounds_each)  # fmt: skip
            else:
                scalars = _scalars(group, opmath)
                start = tl.full((), 0, tl.int32)
                while start < count:  # range() of a tensor: Triton 3.6's interpreter cannot with NumPy 2.4
                    at = start + tl.arange(0, piece_elements)
                    start += piece_elements
                    _step_some(p_address.to(pointer) + at, g_address.to(pointer) + at, b_address.to(pointer) + at,
                               at < count, momentum_kind, factor, scalars, storage, opmath,
                               rounds_each)  # fmt: skip
        if strided:
            if layout >= 0:
                scalars = _scalars(group, opmath)
                g_address = word & ADDRESS
                row = layouts.to(tl.int64).to(tl.pointer_type(tl.int64)) + layout
                dims = tl.load(row)
                start = tl.full((), 0, tl.int32)
                while start < count:
                    at = start + tl.arange(0, piece_elements)
                    start += piece_elements
                    index = begin + at
                    p_offset = tl.zeros((piece_elements,), tl.int64)
                    g_offset = tl.zeros((piece_elements,), tl.int64)
                    b_offset = tl.zeros((piece_elements,), tl.int64)
                    d = tl.full((), 0, tl.int64)
                    while d < dims:  # the innermost first
                        dim = row + 1 + d * 4
                        size = tl.load(dim)
                        inside = index % size
                        index = index // size
                        p_offset += inside * tl.load(dim + 1)
                        g_offset += inside * tl.load(dim + 2)
                        b_offset += inside * tl.load(dim + 3)
                        d += 1
                    _step_some(p_address.to(pointer) + p_offset, g_address.to(pointer) + g_offset,
                               b_address.to(pointer) + b_offset, at < count, momentum_kind, factor, scalars,
                               storage, opmath, rounds_each)  # fmt: skip
