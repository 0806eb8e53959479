"""A kernel as C++: one function that runs one thread. Registers are unsigned integers, branches are goto."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from . import threads
from .opcodes import OPERATIONS, SETS, Operation, c_type
from .ptx import BYTES, Address, Instruction, Kernel, Label, Operand, Unsupported, is_number, number

SPECIAL = {
    f"%{name}.{axis}": f"thread.{name}[{i}]"
    for name in ("tid", "ntid", "ctaid", "nctaid")
    for i, axis in enumerate("xyz")
} | {
    "%laneid": "thread.lane",
    "%warpid": "thread.warp",
    "%nwarpid": "((thread.ntid[0] * thread.ntid[1] * thread.ntid[2] + 31) / 32)",
    "%lanemask_eq": "lane_mask(thread, 0)",
    "%lanemask_lt": "lane_mask(thread, 1)",
    "%lanemask_le": "lane_mask(thread, 2)",
    "%lanemask_gt": "lane_mask(thread, 3)",
    "%lanemask_ge": "lane_mask(thread, 4)",
}
FLOATS = {kind for name in ("floating", "halves", "packed") for kind in SETS[name].split()}
WINDOWS = {"shared": "kSharedWindow", "local": "kLocalWindow", "param": "kParameterWindow", "const": "kConstantWindow"}


def store_type(kind: str) -> str:
    """What a register of this type is in C++."""
    if kind == "pred":
        return "bool"
    if kind not in BYTES:
        raise Unsupported(f"registers of type .{kind}")
    return f"uint{8 * BYTES[kind]}_t"


@dataclass
class Layout:
    """Where a kernel's variables lie in their spaces."""

    addresses: dict[str, tuple[str, int]]  # space and offset by name
    sizes: dict[str, int]
    alignment: int  # of shared memory that the launch asks for
    constants: bytes
    parameter_bytes: int


def lay_out(kernel: Kernel) -> Layout:
    addresses: dict[str, tuple[str, int]] = {}
    sizes = {"param": 0, "shared": 0, "local": 0, "const": 0}
    constants = bytearray()
    alignment = 1
    # what the launch sizes comes after everything else
    for variable in [*kernel.parameters, *sorted(kernel.variables, key=lambda variable: variable.bytes == 0)]:
        if variable.space not in sizes:
            raise Unsupported(f"the variable {variable.name} in .{variable.space}")
        begin = -(-sizes[variable.space] // variable.alignment) * variable.alignment
        addresses[variable.name] = (variable.space, begin)
        if variable.bytes or variable.space != "shared":
            sizes[variable.space] = begin + variable.bytes
        else:
            alignment = max(alignment, variable.alignment)
        if variable.space == "const":
            constants.extend(bytes(begin - len(constants)) + variable.contents.ljust(variable.bytes, b"\0"))
    return Layout(addresses, sizes, alignment, bytes(constants), sizes["param"])


class Writer:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.layout = lay_out(kernel)
        self.used: dict[str, str] = {}  # registers: type by name
        self.sites: list[str] = []
        self.opcodes: dict[str, int] = {}
        self.waits = False
        self.labels = {
            target
            for statement in kernel.statements
            if isinstance(statement, Instruction) and statement.opcode.startswith("bra")
            for target in statement.operands
        } | {target for targets in kernel.tables.values() for target in targets}

    # --- operands

    def register(self, name: str) -> str:
        self.used[name] = self.kernel.registers[name]
        return "r_" + name.lstrip("%").replace("$", "_")

    def kind_of(self, operand: Operand) -> str | None:
        """The type of a register; none: the operand is not one."""
        return self.kernel.registers.get(operand) if isinstance(operand, str) else None

    def bits(self, operand: Operand, size: int | None = None) -> str:
        """An operand's bits as an unsigned integer, of so many bytes if it is told."""
        if not isinstance(operand, str):
            raise Unsupported(f"the operand {operand}")
        if operand.startswith("!"):
            return f"!{self.bits(operand[1:])}"
        if operand in self.kernel.registers:
            value = self.register(operand)
        elif operand in SPECIAL:
            value = SPECIAL[operand]
        elif is_number(operand):
            value = f"{number(operand) % 2**64}ull"
        elif operand in self.layout.addresses:
            value = f"{self.layout.addresses[operand][1]}ull"
        else:
            raise Unsupported(f"{operand}, which is not declared")
        return f"uint{8 * size}_t({value})" if size else value

    def typed(self, operand: Operand, kind: str) -> str:
        if kind == "pred":
            return f"bool({self.bits(operand)})" if is_number(str(operand)) else self.bits(operand)
        if kind in FLOATS:
            return f"of<{c_type(kind)}>({self.bits(operand, BYTES[kind])})"
        return f"{c_type(kind)}({self.bits(operand)})"

    def assign(self, operand: Operand, kind: str, value: str) -> str:
        """A value of a type into a register that may be wider: its sign goes with it, if it has one."""
        if operand == "_":
            return f"(void)({value});"
        if not isinstance(operand, str) or operand not in self.kernel.registers:
            raise Unsupported(f"the destination {operand}")
        if kind in FLOATS:
            value = f"bits_of({value})"
        return f"{self.register(operand)} = {value};"

    def address(self, operand: Operand) -> str:
        if not isinstance(operand, Address):
            raise Unsupported(f"{operand}, which is no address")
        if operand.base is None:
            return f"{operand.offset % 2**64}ull"
        if operand.base in self.layout.addresses:
            return f"{(self.layout.addresses[operand.base][1] + operand.offset) % 2**64}ull"
        base = self.bits(operand.base)
        return f"uint64_t({base} + {operand.offset})" if operand.offset else f"uint64_t({base})"

    def site(self, instruction: Instruction) -> int:
        self.sites.append(f"line {instruction.line}: {instruction.text}")
        return len(self.sites) - 1

    def count(self, opcode: str) -> int:
        return self.opcodes.setdefault(opcode, len(self.opcodes))

    # --- instructions

    def instruction(self, one: Instruction) -> str:
        base = one.opcode.split(".")[0]
        if base in self.HANDLERS:
            code = self.HANDLERS[base](self, one)
        elif one.opcode in OPERATIONS:
            code = self.operation(one, OPERATIONS[one.opcode])
        else:
            raise Unsupported(f"the opcode {one.opcode}")
        code = f"COUNT({self.count(one.opcode)}) {code}"
        return f"if ({self.bits(one.predicate)}) {{ {code} }}" if one.predicate else code

    def operation(self, one: Instruction, operation: Operation) -> str:
        result, *operands = one.operands
        if len(operands) != len(operation.operands):
            raise Unsupported(f"{len(operands)} operands instead of {len(operation.operands)}")
        values = ", ".join(self.typed(each, kind) for each, kind in zip(operands, operation.operands, strict=True))
        return self.assign(result, operation.result, f"{operation.function}({values})")

    def setp(self, one: Instruction) -> str:
        """setp.lt.s32 p, a, b; setp.lt.s32 p|q, a, b, of which q is the opposite; setp.lt.and.s32 p, a, b, c. Of two
        halves p is the low one's, q the high one's."""
        parts = one.opcode.split(".")
        joined = parts.pop(2) if len(parts) == 4 and parts[2] in ("and", "or", "xor") else None
        of_two = parts[-1].endswith("x2")
        operation = OPERATIONS.get(".".join(parts).removesuffix("x2"))
        if operation is None or (of_two and parts[-1] not in SETS["halves"].split()):
            raise Unsupported(f"the opcode {one.opcode}")
        target, a, b, *rest = one.operands
        if len(rest) != (joined is not None) or not isinstance(target, str):
            raise Unsupported("the operands")
        a, b = self.typed(a, parts[-1]), self.typed(b, parts[-1])
        values = [f"{operation.function}({a}{half}, {b}{half})" for half in ((".low", ".high") if of_two else ("",))]
        sign = {"and": "&", "or": "|", "xor": "^", None: ""}[joined]
        more = f" {sign} {self.bits(rest[0])}" if joined else ""
        targets = target.split("|")
        if of_two and len(targets) != 2:
            raise Unsupported("the operands")
        names = ("first", "second") if of_two else ("first", "!first")
        given = " ".join(f"const bool {name} = {value};" for name, value in zip(names, values, strict=False))
        codes = [self.assign(each, "pred", f"{name}{more}") for each, name in zip(targets, names, strict=False)]
        return f"{{ {given} {' '.join(codes)} }}"

    def mov(self, one: Instruction) -> str:
        kind = one.opcode.removeprefix("mov.")
        if kind not in (*SETS["all"].split(), "pred"):
            raise Unsupported(f"the opcode {one.opcode}")
        target, source = one.operands
        if isinstance(target, tuple):  # taken apart
            part = 8 * BYTES[kind] // len(target)
            pieces = [
                f"{self.register(str(each))} = uint{part}_t(all >> {part * i});"
                for i, each in enumerate(target)
                if each != "_"
            ]
            return f"{{ const auto all = {self.bits(source, BYTES[kind])}; {' '.join(pieces)} }}"
        if isinstance(source, tuple):  # put together
            part = 8 * BYTES[kind] // len(source)
            whole = f"uint{8 * BYTES[kind]}_t"
            value = " | ".join(
                f"{whole}(uint{part}_t({self.bits(each)})) << {part * i}" for i, each in enumerate(source)
            )
            return self.assign(target, f"b{kind[1:]}", value)
        if kind == "pred":
            return self.assign(target, "pred", self.typed(source, "pred"))
        return self.assign(target, f"b{kind[1:]}", self.bits(source, BYTES[kind]))

    def cvta(self, one: Instruction) -> str:
        """Between a space's addresses and generic ones."""
        _, *parts = one.opcode.split(".")
        to = parts[0] == "to"
        space, size = parts[to].split("::")[0], parts[-1]
        if len(parts) != 2 + to or space not in (*WINDOWS, "global") or size not in ("u32", "u64"):
            raise Unsupported(f"the opcode {one.opcode}")
        target, source = one.operands
        value = self.bits(source, 8)
        if space != "global":
            value += f" {'-' if to else '+'} {WINDOWS[space]}"
        return self.assign(target, "b64", value)

    def bra(self, one: Instruction) -> str:
        if one.opcode not in ("bra", "bra.uni"):
            raise Unsupported(f"the opcode {one.opcode}")
        return f"goto {label(str(one.operands[0]))};"

    def brx(self, one: Instruction) -> str:
        if one.opcode not in ("brx.idx", "brx.idx.uni"):
            raise Unsupported(f"the opcode {one.opcode}")
        index, table = one.operands
        if table not in self.kernel.tables:
            raise Unsupported(f"the table {table}")
        targets = self.kernel.tables[str(table)]
        cases = " ".join(f"case {i}: goto {label(target)};" for i, target in enumerate(targets))
        wrong = f'simulated_gpu_fault(thread, {self.site(one)}, "an index outside of the table");'
        return f"switch ({self.bits(index, 4)}) {{ {cases} default: {wrong} }}"

    def end(self, one: Instruction) -> str:
        if one.opcode not in ("ret", "ret.uni", "exit"):
            raise Unsupported(f"the opcode {one.opcode}")
        return "return;"

    def trap(self, one: Instruction) -> str:
        return f'simulated_gpu_fault(thread, {self.site(one)}, "a trap");'

    HANDLERS: ClassVar[dict[str, Callable[[Writer, Instruction], str]]] = {
        "mov": mov,
        "setp": setp,
        "cvta": cvta,
        "bra": bra,
        "brx": brx,
        "ret": end,
        "exit": end,
        "trap": trap,
        "brkpt": trap,
        **threads.HANDLERS,
    }

    # --- the whole

    def write(self) -> str:
        lines = []
        for statement in self.kernel.statements:
            if isinstance(statement, Label):
                if statement.name in self.labels:
                    lines.append(f"{label(statement.name)}:;")
                continue
            try:
                lines.append(f"  {self.instruction(statement)}")
            except (Unsupported, ValueError, KeyError) as error:
                raise Unsupported(
                    f"{self.kernel.name}, line {statement.line}: {error} is not known to the translator, in"
                    f" {statement.text!r} (tests/simulated_gpu/README.md: how to add an opcode)"
                ) from error
        registers = [
            f"  {store_type(kind)} {', '.join(f'{self.register(name)} = {garbage(kind)}' for name, _ in names)};"
            for kind, names in itertools.groupby(
                sorted(self.used.items(), key=lambda item: item[1]), lambda item: item[1]
            )
        ]
        return "\n".join(
            [
                '#include "halves.h"',
                '#include "thread.h"',
                "using namespace simulated_gpu;",
                "#ifdef COUNTING",
                "#define COUNT(opcode) ++thread.counts[opcode];",
                "#else",
                "#define COUNT(opcode)",
                "#endif",
                "static void run(Thread& thread) {",
                *registers,
                *lines,
                "}",
                *self.table(),
                "",
            ]
        )

    def table(self) -> list[str]:
        def strings(name: str, values: list[str]) -> str:
            return f"static const char* const {name}[] = {{{', '.join([*map(json.dumps, values), 'nullptr'])}}};"

        layout = self.layout
        registers = sum(BYTES[kind] for kind in self.used.values())
        return [
            strings("sites", self.sites),
            strings("opcodes", list(self.opcodes)),
            f"static const unsigned char constants[] = {{{', '.join(map(str, [*layout.constants, 0]))}}};",
            'extern "C" const KernelTable simulated_gpu_kernel = {',
            f"    run, sites, {len(self.sites)}, opcodes, {len(self.opcodes)}, {str(self.waits).lower()},",
            f"    {layout.sizes['shared']}, {layout.alignment}, {layout.sizes['local']}, {registers},",
            f"    constants, {len(layout.constants)}}};",
        ]


def label(name: str) -> str:
    return "l_" + name.replace("$", "_").replace("%", "_")


def garbage(kind: str) -> str:
    return "thread.garbage & 1" if kind == "pred" else "thread.garbage"
