"""Each opcode that computes, run on random and special values, against exact arithmetic written another way."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from tests.simulated_gpu import kernel_support
from tests.simulated_gpu.exact_arithmetic import FORMATS, expected, width
from tests.simulated_gpu.translator.opcodes import OPERATIONS, Operation

pytestmark = pytest.mark.skipif(kernel_support.COMPILER is None, reason="no g++ on PATH")

SAMPLES = 192
GROUPS = ("int", "float", "half", "setp", "cvt.int", "cvt.to_int", "cvt.of_int", "cvt.float")


def group_of(opcode: str, operation: Operation) -> str:
    if opcode.startswith("setp"):
        return "setp"
    is_real = [any(name in kind for name in FORMATS) for kind in (operation.result, operation.operands[0])]
    if opcode.startswith("cvt"):
        return {(0, 0): "cvt.int", (0, 1): "cvt.to_int", (1, 0): "cvt.of_int", (1, 1): "cvt.float"}[tuple(is_real)]
    if not any(is_real) or opcode.startswith(("selp", "slct")):
        return "int"
    return "float" if operation.operands[0] in ("f32", "f64") else "half"


def samples(kind: str, generator: random.Random) -> Iterator[int]:
    size = width(kind)
    if kind in FORMATS:
        pattern = FORMATS[kind]
        ones = [pattern.encode(Fraction(each)) for each in (1, 3, Fraction(1, 3), 2**15, Fraction(5, 2))]
        special = [0, 1, 2**pattern.fraction - 1, 2**pattern.fraction, pattern.encode(math.inf) - 1]
        special += [pattern.encode(math.inf), pattern.nan, pattern.nan ^ 2, *ones]
        special += [bits | 1 << (size - 1) for bits in special]
    else:
        special = [0, 1, 2, 31, 32, 33, 63, 64, 2**size - 1, 2 ** (size - 1), 2 ** (size - 1) - 1, 0x0505, 0xA5]
    while True:
        bits = generator.getrandbits(size)
        if kind in FORMATS and generator.random() < 0.7:  # numbers that meet: near 1
            exponent = FORMATS[kind].bias + generator.randint(-12, 12)
            bits = bits & ~((2 * FORMATS[kind].bias + 1) << FORMATS[kind].fraction) | exponent << FORMATS[kind].fraction
        yield (generator.choice(special) if generator.random() < 0.3 else bits) % 2**size


REGISTERS = {1: ("pred", "p"), 8: ("b32", "r"), 16: ("b16", "h"), 32: ("b32", "r"), 64: ("b64", "q")}


def kernel(opcodes: list[str]) -> str:
    """Operands of each from in[3·opcode·…], results to out, 64 bits each."""
    body = []
    for number, opcode in enumerate(opcodes):
        operation = OPERATIONS[opcode]
        names = []
        for i, kind in enumerate(operation.operands):
            name = f"%{REGISTERS[width(kind)][1]}{i}"
            names.append(name)
            body.append(f"ld.global.b64 %w, [%in + {8 * SAMPLES * (4 * number + i)}];")
            how = {"p": "setp.ne.u64 {}, %w, 0;", "q": "mov.b64 {}, %w;", "h": "cvt.u16.u64 {}, %w;"}
            body.append(how.get(name[1], "cvt.u32.u64 {}, %w;").format(name))
        result = f"%{REGISTERS[width(operation.result)][1]}9"
        body.append(f"{opcode} {result}, {', '.join(names)};")
        how = {"p": "selp.u64 %w, 1, 0, {};", "q": "mov.b64 %w, {};", "h": "cvt.u64.u16 %w, {};"}
        body.append(how.get(result[1], "cvt.u64.u32 %w, {};").format(result))
        body.append(f"st.global.b64 [%out + {8 * SAMPLES * number}], %w;")
    return "\n".join(
        [
            ".version 8.0\n.target sm_90\n.address_size 64",
            ".visible .entry all(.param .u64 in, .param .u64 out)\n{",
            *(f".reg .{kind} %{letter}<10>;" for kind, letter in set(REGISTERS.values())),
            ".reg .b64 %in, %out, %w, %at; .reg .b32 %tid;",
            "ld.param.u64 %in, [in]; ld.param.u64 %out, [out];",
            "mov.u32 %tid, %tid.x; mul.wide.u32 %at, %tid, 8;",
            "add.s64 %in, %in, %at; add.s64 %out, %out, %at;",
            *body,
            "ret;\n}\n",
        ]
    )


@pytest.mark.parametrize("group", GROUPS)
def test_opcodes_are_what_the_manual_says(group: str, tmp_path: Path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    opcodes = [opcode for opcode, operation in OPERATIONS.items() if group_of(opcode, operation) == group]
    ptx = tmp_path / "all.ptx"
    ptx.write_text(kernel(opcodes))
    given = []
    for opcode in opcodes:
        kinds = OPERATIONS[opcode].operands
        sources = [samples(kind, generator) for kind in kinds]
        given.append([[next(source) for _ in range(SAMPLES)] for source in sources])
    words = [word for one in given for column in [*one, *([[0] * SAMPLES] * (4 - len(one)))] for word in column]
    memory = kernel_support.Memory(struct.pack(f"<{len(words)}Q", *words))
    out = kernel_support.Memory(bytes(8 * SAMPLES * len(opcodes)))
    kernel_support.launch(ptx, "all", struct.pack("<QQ", memory.address, out.address), block=(SAMPLES,))
    results = struct.unpack(f"<{SAMPLES * len(opcodes)}Q", out.read())
    wrong = []
    for number, opcode in enumerate(opcodes):
        operation = OPERATIONS[opcode]
        for i in range(SAMPLES):
            operands = [column[i] for column in given[number]]
            right = expected(opcode, operation, operands)
            result = results[SAMPLES * number + i]
            if not _is_right(result, right, operation.result):
                wrong.append(f"{opcode} of {[hex(each) for each in operands]}: {result:#x}, not {right}")
                break
    assert not wrong, "\n".join([f"{len(wrong)} of {len(opcodes)}", *wrong[:30]])


def _is_right(result: int, right: int | tuple[float, str], kind: str) -> bool:
    if not isinstance(right, tuple):
        if kind == "f64" and FORMATS[kind].decode(right % 2**64) != FORMATS[kind].decode(right % 2**64):
            value = FORMATS[kind].decode(result)
            return value != value  # which NaN is left open
        size = max(width(kind), 32) if width(kind) == 8 else width(kind)
        return result == right % 2**size
    about, mode = right
    number = float(FORMATS[kind].decode(result))
    if math.isnan(about):
        return math.isnan(number)
    if mode == "ftz" and abs(about) < 2**-126:
        return number == 0
    limit = float(FORMATS[kind].decode(FORMATS[kind].encode(math.inf) - 1))
    if abs(about) > limit:
        return number == math.copysign(math.inf, about) or abs(number) >= limit * 0.999
    return number == about or abs(number - about) <= max(abs(about) * 2**-21, 2.0**-148)
