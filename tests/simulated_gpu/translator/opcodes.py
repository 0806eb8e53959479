"""What each opcode that only computes does: a function of runtime/arithmetic.h or halves.h, and its types.

A row stands for all types of a set: `add.{int}` is add.s16, add.s32 and so on. T is the type, W the one twice as wide.
What touches memory, control flow or other threads is in writer.py.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

SETS = {
    "int": "u16 s16 u32 s32 u64 s64",
    "wide": "u32 s32 u64 s64",
    "narrow": "u16 s16 u32 s32",
    "signed": "s16 s32 s64",
    "unsigned": "u16 u32 u64",
    "bits": "b16 b32 b64",
    "any": "pred b16 b32 b64",
    "words": "b32 b64",
    "float": "f32 f64",
    "halves": "f16 bf16 f16x2 bf16x2",
    "packed": "f32x2",
    "all": "b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64",
    "compared": "b16 b32 b64 u16 u32 u64 s16 s32 s64 f16 bf16 f32 f64",
    "floating": "f16 bf16 f32 f64",
}

# opcode, function, its result and operands
TABLE = """
add.{int}                   add             T T T
sub.{int}                   sub             T T T
mul.lo.{int}                mul             T T T
mul.hi.{int}                mul_hi          T T T
mul.wide.{narrow}           mul_wide        W T T
mad.lo.{int}                mad             T T T T
mad.hi.{wide}               mad_hi          T T T T
mad.wide.{narrow}           mad_wide        W T T W
div.{int}                   divide          T T T
rem.{int}                   remainder       T T T
min.{int}                   minimum         T T T
max.{int}                   maximum         T T T
abs.{signed}                absolute        T T
neg.{signed}                negative        T T
and.{any}                   bit_and         T T T
or.{any}                    bit_or          T T T
xor.{any}                   bit_xor         T T T
not.{any}                   bit_not         T T
cnot.{bits}                 is_zero         T T
shl.{bits}                  shift_left      T T u32
shr.{bits}                  shift_right     T T u32
shr.{int}                   shift_right     T T u32
popc.{words}                population      u32 T
clz.{words}                 leading_zeros   u32 T
brev.{words}                reversed        T T
bfind.{wide}                highest         u32 T
bfind.shiftamt.{wide}       above_highest   u32 T
bfe.{wide}                  extract         T T u32 u32
bfi.{words}                 insert          T T T u32 u32
prmt.b32                    permute         b32 b32 b32 b32
lop3.b32                    table_of_three  b32 b32 b32 b32 u32
shf.l.wrap.b32              funnel_left     b32 b32 b32 b32
shf.r.wrap.b32              funnel_right    b32 b32 b32 b32
shf.l.clamp.b32             funnel_left_clamped   b32 b32 b32 b32
shf.r.clamp.b32             funnel_right_clamped  b32 b32 b32 b32
selp.{all}                  select          T T T pred
slct.{all}.s32              select_by_sign  T T T s32
testp.finite.{float}        is_finite       pred T
testp.infinite.{float}      is_infinite     pred T
testp.number.{float}        is_number       pred T
testp.notanumber.{float}    is_nan          pred T

add.{float}                 add             T T T
add.rn.{float}              add             T T T
sub.{float}                 sub             T T T
sub.rn.{float}              sub             T T T
mul.{float}                 mul             T T T
mul.rn.{float}              mul             T T T
fma.rn.{float}              fused           T T T T
div.rn.{float}              divide          T T T
rcp.rn.{float}              reciprocal      T T
sqrt.rn.{float}             square_root     T T
neg.{float}                 negative        T T
abs.{float}                 absolute        T T
min.{float}                 minimum         T T T
max.{float}                 maximum         T T T
min.NaN.f32                 minimum_or_nan  f32 f32 f32
max.NaN.f32                 maximum_or_nan  f32 f32 f32
copysign.{float}            copy_sign       T T T

add.{halves}                add             T T T
add.rn.{halves}             add             T T T
sub.{halves}                sub             T T T
sub.rn.{halves}             sub             T T T
mul.{halves}                mul             T T T
mul.rn.{halves}             mul             T T T
fma.rn.{halves}             fused           T T T T
neg.{halves}                negative        T T
abs.{halves}                absolute        T T
min.{halves}                minimum         T T T
max.{halves}                maximum         T T T
min.NaN.{halves}            minimum_or_nan  T T T
max.NaN.{halves}            maximum_or_nan  T T T

add.rn.{packed}             add             T T T
sub.rn.{packed}             sub             T T T
mul.rn.{packed}             mul             T T T
fma.rn.{packed}             fused           T T T T

ex2.approx.f32              exp2_of         f32 f32
lg2.approx.f32              log2_of         f32 f32
rcp.approx.f32              reciprocal      f32 f32
sqrt.approx.f32             square_root     f32 f32
rsqrt.approx.{float}        reciprocal_root T T
sin.approx.f32              sine            f32 f32
cos.approx.f32              cosine          f32 f32
tanh.approx.f32             tangent         f32 f32
div.approx.f32              divide          f32 f32 f32
div.full.f32                divide          f32 f32 f32
ex2.approx.ftz.f32          flushed_exp2    f32 f32
lg2.approx.ftz.f32          flushed_log2    f32 f32
rcp.approx.ftz.f32          flushed_reciprocal  f32 f32
sqrt.approx.ftz.f32         flushed_root    f32 f32
rsqrt.approx.ftz.f32        flushed_reciprocal_root  f32 f32
"""

COMPARISONS = {
    "eq": "equal",
    "ne": "unequal",
    "lt": "less",
    "le": "at_most",
    "gt": "greater",
    "ge": "at_least",
}
OF_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
ROUNDING = {"rn": "nearest", "rz": "zero", "rm": "down", "rp": "up"}


@dataclass(frozen=True)
class Operation:
    function: str
    result: str
    operands: tuple[str, ...]


def _wider(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def _rows() -> dict[str, Operation]:
    found = {}
    for line in TABLE.split("\n"):
        if not line.strip():
            continue
        opcode, function, result, *operands = line.split()
        match = re.search(r"\{(\w+)\}", opcode)
        for kind in SETS[match[1]].split() if match else [""]:

            def typed(name: str, kind: str = kind) -> str:
                return {"T": kind, "W": _wider(kind) if name == "W" else ""}.get(name, name)

            full = opcode.replace(match[0], kind) if match else opcode
            found[full] = Operation(function, typed(result), tuple(map(typed, operands)))
    return found


def _comparisons() -> dict[str, Operation]:
    found = {}
    for kind in SETS["compared"].split():
        names = dict(COMPARISONS)
        if kind in SETS["floating"].split():
            names |= {f"{name}u": f"{function}_or_nan" for name, function in COMPARISONS.items()}
            names |= {"num": "both_numbers", "nan": "any_nan"}
        elif kind[0] == "u":
            names |= {name: COMPARISONS[same] for name, same in OF_UNSIGNED.items()}
        elif kind[0] == "b":
            names = {name: COMPARISONS[name] for name in ("eq", "ne")}
        for name, function in names.items():
            found[f"setp.{name}.{kind}"] = Operation(function, "pred", (kind, kind))
    return found


def _conversions() -> dict[str, Operation]:
    found = {}
    integers = [f"{sign}{size}" for sign in "us" for size in (8, 16, 32, 64)]
    floats = ("f16", "bf16", "f32", "f64")
    size = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}

    def define(opcode: str, function: str, result: str, operand: str) -> None:
        found[f"cvt.{opcode}.{result}.{operand}"] = Operation(function, result, (operand,))

    for result, operand in itertools.product(integers, integers):
        found[f"cvt.{result}.{operand}"] = Operation(c_type(result), result, (operand,))
        if result != operand:
            define("sat", f"saturated<{c_type(result)}>", result, operand)
    for (short, mode), integer, real in itertools.product(ROUNDING.items(), integers, floats):
        define(f"{short}i", f"to_integer<{c_type(integer)}, Rounding::{mode}>", integer, real)
        define(short, f"of_integer<{c_type(real)}, Rounding::{mode}>", real, integer)
    for (short, mode), result, operand in itertools.product(ROUNDING.items(), floats, floats):
        if size[result] < size[operand] or {result, operand} == {"f16", "bf16"}:
            define(short, f"narrow<{c_type(result)}, Rounding::{mode}>", result, operand)
        elif result == operand:
            define(f"{short}i", f"integral<Rounding::{mode}>", result, operand)
        elif short == "rn":
            found[f"cvt.{result}.{operand}"] = Operation(f"widen<{c_type(result)}>", result, (operand,))
    for (short, mode), half in itertools.product((("rn", "nearest"), ("rz", "zero")), ("f16", "bf16")):
        found[f"cvt.{short}.{half}x2.f32"] = Operation(
            f"narrow_two<{c_type(half)}, Rounding::{mode}>", f"{half}x2", ("f32", "f32")
        )
    for kind in ("f32", "f64"):
        found[f"cvt.sat.{kind}.{kind}"] = Operation("saturated_to_one", kind, (kind,))
    return found


def c_type(kind: str) -> str:
    names = {
        "pred": "bool",
        "f16": "Half",
        "bf16": "BFloat",
        "f32": "float",
        "f64": "double",
        "f16x2": "Two<Half>",
        "bf16x2": "Two<BFloat>",
        "f32x2": "Two<float>",
    }
    return names.get(kind) or f"{'int' if kind[0] == 's' else 'uint'}{kind[1:]}_t"


OPERATIONS = _rows() | _comparisons() | _conversions()
