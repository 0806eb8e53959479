"""What each opcode that computes gives, written another way than runtime/ does: integers bit by bit, exact fractions,
and one rounding. For test_opcodes.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from tests.simulated_gpu.translator.opcodes import Operation
from tests.simulated_gpu.translator.ptx import BYTES


@dataclass(frozen=True)
class Format:
    bits: int
    fraction: int
    nan: int  # what an instruction gives

    @property
    def bias(self) -> int:
        return 2 ** (self.bits - self.fraction - 2) - 1

    def decode(self, bits: int) -> Fraction | float:
        """Exactly; a float for what is no number, and for -0."""
        sign = -1 if bits >> (self.bits - 1) else 1
        exponent = bits >> self.fraction & (2 * self.bias + 1)
        rest = bits & (2**self.fraction - 1)
        if exponent == 2 * self.bias + 1:
            return math.nan if rest else sign * math.inf
        if exponent == 0 and rest == 0:
            return 0.0 * sign
        if exponent:
            rest |= 2**self.fraction
        return sign * rest * Fraction(2) ** (max(exponent, 1) - self.bias - self.fraction)

    def encode(self, value: Fraction | float, mode: str = "rn") -> int:
        if isinstance(value, float):
            if math.isnan(value):
                return self.nan
            sign = int(math.copysign(1, value) < 0) << (self.bits - 1)
            if math.isinf(value):
                return sign | (2 * self.bias + 1) << self.fraction
            value = Fraction(value)
            if value == 0:
                return sign
        if value == 0:
            return 0
        sign = int(value < 0) << (self.bits - 1)
        magnitude = abs(value)
        exponent = max(_log2(magnitude), 1 - self.bias)
        unit = Fraction(2) ** (exponent - self.fraction)
        count = _rounded(magnitude / unit, mode if value > 0 else {"rm": "rp", "rp": "rm"}.get(mode, mode))
        if count * unit >= Fraction(2) ** (self.bias + 1):
            away = mode == "rn" or mode == ("rm" if value < 0 else "rp")
            return sign | ((2 * self.bias + 1) << self.fraction) - (not away)
        return sign | (count + ((exponent + self.bias - 1) << self.fraction) if count >> self.fraction else count)


def _log2(value: Fraction) -> int:
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def _rounded(value: Fraction, mode: str) -> int:
    down = value.numerator // value.denominator
    if mode == "rz":
        return down if value >= 0 else -(-value.numerator // value.denominator)
    if mode == "rm" or value == down:
        return down
    if mode == "rp":
        return down + 1
    rest = value - down
    return down + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and down % 2 == 1))


FORMATS = {
    "f16": Format(16, 10, 0x7FFF),
    "bf16": Format(16, 7, 0x7FFF),
    "f32": Format(32, 23, 0x7FFFFFFF),
    "f64": Format(64, 52, 0x7FF8000000000000),
}


def width(kind: str) -> int:
    return 1 if kind == "pred" else 8 * BYTES[kind]


def signed(bits: int, kind: str) -> int:
    return bits - 2 ** width(kind) if kind[0] == "s" and bits >> (width(kind) - 1) else bits


# --- what each opcode is


def integer(opcode: str, operation: Operation, given: list[int]) -> int:
    """As the manual describes it, bit by bit where it does."""
    base, *more = opcode.split(".")
    kind = operation.operands[0]
    size, top = width(kind), width(kind) - 1
    a, b, c = ([signed(bits, each) for bits, each in zip(given, operation.operands, strict=False)] + [0, 0])[:3]

    def bit(value: int, at: int) -> int:
        return value >> at & 1

    if base in ("mul", "mad"):
        product = a * b >> (size if more[0] == "hi" else 0)
        return product + (c if base == "mad" else 0)
    if base in ("div", "rem"):
        quotient = abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1) if b else -1
        return quotient if base == "div" else a - b * quotient if b else a
    if base in ("shl", "shr"):
        return a << min(b, size) if base == "shl" else a >> min(b, size)
    if base == "bfind":
        interesting = [i for i in range(size) if bit(a, i) != (a < 0)]
        highest = max(interesting, default=-1)
        return size - 1 - highest if more[0] == "shiftamt" and highest >= 0 else highest
    if base == "bfe":
        position, length = b & 255, c & 255
        sign = bit(a, min(position + length - 1, top)) if kind[0] == "s" and length else 0
        return sum((bit(a, position + i) if i < length and position + i <= top else sign) << i for i in range(size))
    if base == "bfi":
        position, length = c & 255, given[3] & 255
        taken = {position + i: bit(a, i) for i in range(length) if position + i <= top}
        return sum(taken.get(i, bit(b, i)) << i for i in range(size))
    if base == "prmt":
        found = 0
        for i in range(4):
            which = c >> (4 * i) & 15
            byte = (b << 32 | a) >> (8 * (which & 7)) & 255
            found |= (255 * (byte >> 7) if which & 8 else byte) << (8 * i)
        return found
    if base == "lop3":
        return sum(bit(given[3], 4 * bit(a, i) + 2 * bit(b, i) + bit(c, i)) << i for i in range(32))
    if base == "shf":
        by = c & 31 if "wrap" in more else min(c, 32)
        return (b << 32 | a) >> by if more[0] == "r" else (b << 32 | a) << by >> 32
    simple = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "min": lambda: min(a, b),
        "max": lambda: max(a, b),
        "abs": lambda: abs(a),
        "neg": lambda: -a,
        "and": lambda: a & b,
        "or": lambda: a | b,
        "xor": lambda: a ^ b,
        "not": lambda: ~a,
        "cnot": lambda: a == 0,
        "popc": lambda: bin(a).count("1"),
        "clz": lambda: size - a.bit_length(),
        "brev": lambda: int(f"{a:0{size}b}"[::-1], 2),
        "selp": lambda: a if c else b,
        "slct": lambda: a if c >= 0 else b,
    }
    return simple[base]()


def real(base: str, values: list[Fraction | float], pattern: Format) -> Fraction | float:
    """Before it is rounded."""
    a, b, c = [*values, 0.0, 0.0][:3]
    if base == "fma":
        return _sum(_product(a, b), c)
    if base in ("add", "sub"):
        return _sum(a, b if base == "add" else -b)
    if base == "mul":
        return _product(a, b)
    if base in ("div", "rcp"):
        over, under = (a, b) if base == "div" else (Fraction(1), a)
        if under == 0:
            return math.nan if over == 0 or over != over else math.copysign(math.inf, _sign(over) * _sign(under))
        if isinstance(under, float) and math.isinf(under):
            return math.nan if isinstance(over, float) and over != 0 else 0.0 * _sign(over) * _sign(under)
        return _product(over, under if under != under else 1 / Fraction(under))
    if base == "sqrt":
        if isinstance(a, float):
            return math.nan if a < 0 else a
        if a < 0:
            return math.nan
        shift = 4 * pattern.bits * 4
        root = math.isqrt(int(a * 4**shift))  # with bits enough that one more decides no tie
        return Fraction(2 * root + (root * root != a * 4**shift), 2 * 2**shift)
    smaller = base.startswith("min")
    if a != a or b != b:
        return math.nan if base.endswith("NaN") or (a != a and b != b) else b if a != a else a
    key = [(_sign(each) * math.inf if isinstance(each, float) and math.isinf(each) else Fraction(each), _sign(each))
           for each in (a, b)]  # fmt: skip
    return a if (key[0] <= key[1]) == smaller else b


def _sign(value: Fraction | float) -> int:
    return int(math.copysign(1, value)) if isinstance(value, float) else (1 if value >= 0 else -1)


def _is_special(value: Fraction | float) -> bool:
    return isinstance(value, float) and value - value != 0


def _product(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    if _is_special(a) or _is_special(b):
        if a != a or b != b or a == 0 or b == 0:
            return math.nan
        return math.inf * _sign(a) * _sign(b)
    exact = Fraction(a) * Fraction(b)
    return exact if exact else 0.0 * _sign(a) * _sign(b)


def _sum(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    if _is_special(a) or _is_special(b):
        special = [value for value in (a, b) if _is_special(value)]
        return float(sum(special))
    exact = Fraction(a) + Fraction(b)
    if exact:
        return exact
    return -0.0 if _sign(a) < 0 and _sign(b) < 0 and a == 0 and b == 0 else 0.0


def _exact(value: float) -> Fraction | float:
    return value if value == 0 or value - value != 0 else Fraction(value)


APPROXIMATE = {
    "ex2": lambda a: math.inf if a >= 128 else 2.0**a,
    "lg2": lambda a: math.log2(a) if a > 0 else -math.inf if a == 0 else math.nan,
    "rsqrt": lambda a: 1 / math.sqrt(a) if a > 0 else math.copysign(math.inf, a) if a == 0 else math.nan,
    "sin": lambda a: math.sin(a) if math.isfinite(a) else math.nan,
    "cos": lambda a: math.cos(a) if math.isfinite(a) else math.nan,
    "tanh": math.tanh,
    "rcp": lambda a: 1 / a if a else math.copysign(math.inf, a),
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "div": lambda a, b: float(real("div", [_exact(a), _exact(b)], FORMATS["f64"])),
}


def conversion(opcode: str, given: int) -> int:
    _, *modifiers, to, of = opcode.split(".")
    mode = next((each for each in modifiers if each[:2] in ("rn", "rz", "rm", "rp")), "")
    if to not in FORMATS and of not in FORMATS:
        value = signed(given, of)
        low, high = (-(2 ** (width(to) - 1)), 2 ** (width(to) - 1) - 1) if to[0] == "s" else (0, 2 ** width(to) - 1)
        return min(max(value, low), high) if "sat" in modifiers else signed(value % 2 ** width(to), to)
    if of not in FORMATS:
        return FORMATS[to].encode(Fraction(signed(given, of)), mode)
    if (of, to) == ("bf16", "f32"):  # a shift, with the payload of a NaN
        return given << 16
    value = FORMATS[of].decode(given)
    if to not in FORMATS:
        low, high = (-(2 ** (width(to) - 1)), 2 ** (width(to) - 1) - 1) if to[0] == "s" else (0, 2 ** width(to) - 1)
        if value != value:
            return 2 ** (width(to) - 1) * (-1 if to[0] == "s" else 1) if of == "f64" or width(to) == 64 else 0
        if _is_special(value):
            return high if value > 0 else low
        return min(max(_rounded(Fraction(value), mode[:2]), low), high)
    if "sat" in modifiers:
        return FORMATS[to].encode(0.0 if value != value or value <= 0 else min(value, Fraction(1)))
    if mode.endswith("i") and not _is_special(value):
        whole = Fraction(_rounded(Fraction(value), mode[:2]))
        return FORMATS[to].encode(whole if whole else 0.0 * _sign(value))
    return FORMATS[to].encode(value, mode or "rn")


def expected(opcode: str, operation: Operation, given: list[int]) -> int | tuple[float, str]:
    """The register's bits; of an approximation, about which number."""
    base = opcode.split(".")[0]
    kinds = operation.operands
    if base == "cvt" and operation.result.endswith("x2"):
        half = operation.result[:-2]
        high, low = (conversion(f"{opcode.split('.f32')[0].removesuffix('x2')}.f32", bits) for bits in given)
        assert half in opcode
        return high << 16 | low
    if base == "cvt":
        return conversion(opcode, given[0])
    if kinds[0].endswith("x2"):
        one, part = kinds[0][:-2], width(kinds[0]) // 2
        inner = Operation("", one, (one,) * len(kinds))
        name = opcode.removesuffix("x2")
        halves = [[bits >> shift & (2**part - 1) for bits in given] for shift in (0, part)]
        low, high = (expected(name, inner, each) for each in halves)
        assert isinstance(low, int) and isinstance(high, int)
        return high << part | low
    if base in ("selp", "slct", "mov") or (kinds[0] not in FORMATS and base != "setp"):
        return integer(opcode, operation, given)
    if base == "setp":
        return comparison(opcode.split(".")[1], kinds[0], given)
    pattern = FORMATS[kinds[0]]
    values = [pattern.decode(bits) for bits in given]
    if base == "testp":
        a = values[0]
        is_finite = not _is_special(a)
        return {"finite": is_finite, "infinite": not is_finite and a == a, "number": a == a, "notanumber": a != a}[
            opcode.split(".")[1]
        ]
    if base in ("neg", "abs", "copysign"):
        sign = 2 ** (pattern.bits - 1)
        a = given[0]
        return {"neg": a ^ sign, "abs": a & ~sign, "copysign": (given[-1] & ~sign) | (a & sign)}[base]
    if ".approx" in opcode or ".full" in opcode:
        numbers = [float(value) for value in values]
        if ".ftz" in opcode:
            numbers = [math.copysign(0, value) if abs(value) < 2**-126 else value for value in numbers]
        return APPROXIMATE[base](*numbers), "ftz" if ".ftz" in opcode else ""
    return pattern.encode(real(base + (".NaN" if ".NaN" in opcode else ""), values, pattern))


def comparison(name: str, kind: str, given: list[int]) -> int:
    if kind in FORMATS:
        a, b = (FORMATS[kind].decode(bits) for bits in given)
        if a != a or b != b:
            return name == "nan" or (name.endswith("u") and len(name) == 3)
        name = name[:2] if name not in ("num", "nan") else name
    else:
        a, b = (signed(bits, kind) for bits in given)
    return {
        **{"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b},
        **{"lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b, "num": True, "nan": False},
    }[name]
