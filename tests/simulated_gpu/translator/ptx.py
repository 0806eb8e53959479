"""PTX read into statements: what a kernel declares and what it does, in order. Knows the syntax, not the opcodes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Unsupported(Exception):
    """What the translator does not know. It says where it stands."""


BYTES = (
    {"pred": 1}
    | {f"{kind}{8 * size}": size for kind in "busf" for size in (1, 2, 4, 8)}
    | {
        "bf16": 2,
        "f16x2": 4,
        "bf16x2": 4,
        "f32x2": 8,
    }
)


@dataclass(frozen=True)
class Variable:
    """In memory: a parameter, or what is declared .shared, .local or .const."""

    space: str
    name: str
    alignment: int
    bytes: int  # 0: as many as the launch asks for
    contents: bytes = b""


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Address:
    base: str | None  # a register or a variable
    offset: int


Operand = str | Address | tuple["Operand", ...]  # the last: {a, b, c}


@dataclass(frozen=True)
class Instruction:
    line: int  # of the file
    text: str
    predicate: str | None  # "%p1" or "!%p1"
    opcode: str
    operands: tuple[Operand, ...]
    used_bytes: int | None = None  # of a load whose other bytes are not looked at: a mask


@dataclass
class Kernel:
    name: str
    parameters: list[Variable]
    max_threads: int
    registers: dict[str, str] = field(default_factory=dict)  # type by name
    variables: list[Variable] = field(default_factory=list)  # those it names, in the order of their declarations
    statements: list[Label | Instruction] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)  # of .branchtargets


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_OF_ONE_LINE = re.compile(r"^[ \t]*\.(?:version|target|address_size|file|loc)\b[^\n]*", re.MULTILINE)
_NAME = r"[$%A-Za-z_][\w$]*"
# "{" or "}" of a scope; a label; a statement, in which braces are vectors or initial values
_STATEMENT = re.compile(rf"\s*(?:([{{}}])|({_NAME})\s*:(?!:)|([^;{{}}]+(?:\{{[^{{}}]*\}}[^;{{}}]*)*;))")
_INSTRUCTION = re.compile(rf"(?:@(!?{_NAME})\s+)?([a-z][\w.:]*)\s*(.*);", re.DOTALL)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*);", re.DOTALL)
_VARIABLE = re.compile(
    rf"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|local|const|global|param)\s+(?:\.align\s+(\d+)\s+)?"
    rf"(?:\.attribute\([^)]*\)\s+)?\.(?:v([248])\s+\.)?(\w+)\s+(?:\.ptr\b[^,;]*?(?=\s{_NAME}\s*$)\s+)?({_NAME})"
    rf"\s*((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_ENTRY = re.compile(rf"\.entry\s+({_NAME})\s*")
_MASK = re.compile(r"used_bytes_mask\s+(\w+)")


def without_comments(text: str) -> str:
    """Nor with directives that end with their line, not with a semicolon. Lines stay where they are."""
    return _OF_ONE_LINE.sub("", _COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), text))


def kernel_names(text: str) -> list[str]:
    return _ENTRY.findall(without_comments(text))


def _closing(text: str, start: int, pair: str) -> int:
    """Where what opens at ``start`` closes."""
    depth = 0
    for found in re.compile("[" + re.escape(pair) + "]").finditer(text, start):
        depth += 1 if found[0] == pair[0] else -1
        if depth == 0:
            return found.start()
    raise Unsupported(f"a {pair[0]} is not closed")


@dataclass(frozen=True)
class Source:
    """The text of a kernel, and the module's variables."""

    name: str
    header: str  # parameters
    directives: str
    body: str
    first_line: int
    module: list[Variable]


def find(text: str, name: str) -> Source:
    text = without_comments(text)
    outside, found, position = [], None, 0
    for entry in re.finditer(rf"(?:\.(?:visible|weak)\s+)*\.(?:entry|func)\b[^{{;]*?({_NAME})\s*(?=\()", text):
        if entry.start() < position:
            continue
        after = entry.end()
        header = ""
        if text[after : after + 1] == "(":
            closing = _closing(text, after, "()")
            header, after = text[after + 1 : closing], closing + 1
        opening = re.compile("[{;]").search(text, after)
        if opening is None:
            raise Unsupported(f"{entry[1]} has no body")
        end = _closing(text, opening.start(), "{}") if opening[0] == "{" else opening.start()
        outside.append(text[position : entry.start()])
        position = end + 1
        if entry[1] == name and ".entry" in entry[0]:
            body = text[opening.start() + 1 : end]
            found = (header, text[after : opening.start()], body, text.count("\n", 0, opening.start()) + 1)
    outside.append(text[position:])
    if found is None:
        raise Unsupported(f"no kernel {name}; there are {', '.join(kernel_names(text)) or 'none'}")
    variables = [
        _variable(statement.strip())
        for statement in "".join(outside).split(";")
        if re.search(r"\.(shared|const|global)\b", statement)
    ]
    return Source(name, *found, variables)


def _variable(declaration: str) -> Variable:
    match = _VARIABLE.fullmatch(declaration.strip())
    if match is None:
        raise Unsupported(f"a declaration that is not understood: {declaration.strip()}")
    space, alignment, vector, kind, name, dimensions, initial = match.groups()
    element = BYTES.get(kind)
    if element is None:
        raise Unsupported(f"a variable of type .{kind}: {declaration.strip()}")
    size = element * int(vector or 1)
    least = size
    for extent in re.findall(r"\[\s*(\d*)\s*\]", dimensions):
        size *= int(extent or 0)
    contents = b""
    if initial is not None:
        values = [number(each.strip()) for each in initial.strip("{} \n").split(",") if each.strip()]
        contents = b"".join((value % 2 ** (8 * element)).to_bytes(element, "little") for value in values)
    return Variable(space, name, int(alignment or least), size, contents)


def number(text: str) -> int:
    """An immediate as PTX writes it; floats are their bits."""
    if match := re.fullmatch(r"(-?)0[fFdD]([0-9a-fA-F]+)", text):
        bits = int(match[2], 16)
        return bits ^ 1 << (4 * len(match[2]) - 1) if match[1] else bits
    plain = text.rstrip("uU")
    if re.fullmatch(r"-?0[0-7]+", plain):
        return int(plain, 8)
    return int(plain, 0)


def is_number(text: str) -> bool:
    return re.match(r"-?\d", text) is not None


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for found in re.finditer(r"[\[\]{}(),]", text):
        if found[0] in "[{(":
            depth += 1
        elif found[0] in "]})":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : found.start()].strip())
            start = found.end()
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


_ADDRESS = re.compile(rf"({_NAME})?\s*(?:(\+)?\s*(-?\s*\w+))?")


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(each) for each in _split(text[1:-1]))
    if text.startswith("["):
        match = _ADDRESS.fullmatch(text[1:-1].strip())
        if match is None:
            raise Unsupported(f"an address that is not understood: {text}")
        return Address(match[1], number(match[3].replace(" ", "")) if match[3] else 0)
    return text


class _Body:
    """Of a kernel: names in inner scopes become names of their own."""

    def __init__(self, kernel: Kernel, module: list[Variable]) -> None:
        self.kernel = kernel
        self.declared = {variable.name: variable for variable in module}
        self.scopes: list[dict[str, str]] = [{}]
        self.renamed = 0
        self.mask: int | None = None

    def read(self, body: str, line: int) -> None:
        body = body.rstrip()
        position = 0
        while position < len(body):
            match = _STATEMENT.match(body, position)
            if match is None:
                raise Unsupported(f"line {line}: {body[position : position + 80].strip()!r}")
            brace, label, statement = match.groups()
            line += body.count("\n", position, match.start(match.lastindex or 0))
            if brace == "{":
                self.scopes.append({})
            elif brace == "}":
                self.scopes.pop()
            elif label:
                self.kernel.statements.append(Label(label))
            else:
                self.statement(" ".join(statement.split()), line)
            line += body.count("\n", match.start(match.lastindex or 0), match.end())
            position = match.end()

    def statement(self, text: str, line: int) -> None:
        if match := _REGISTERS.fullmatch(text):
            self.registers(match[1], match[2])
        elif text.startswith(".branchtargets"):
            label = self.kernel.statements.pop()
            assert isinstance(label, Label)
            self.kernel.tables[label.name] = _split(text.removeprefix(".branchtargets").rstrip(";"))
        elif text.startswith(".pragma"):
            if mask := _MASK.search(text):
                self.mask = int(mask[1], 0)
        elif text.startswith("."):
            variable = _variable(text.rstrip(";"))
            self.declared[variable.name] = variable
        else:
            match = _INSTRUCTION.fullmatch(text)
            if match is None:
                raise Unsupported(f"line {line}: {text}")
            predicate, opcode, operands = match.groups()
            read = tuple(self.known(_operand(each)) for each in _split(operands))
            self.kernel.statements.append(
                Instruction(line, text, self.name(predicate) if predicate else None, opcode, read, self.mask)
            )
            self.mask = None

    def registers(self, kind: str, names: str) -> None:
        for each in _split(names):
            match = re.fullmatch(rf"({_NAME})\s*(?:<(\d+)>)?", each)
            if match is None:
                raise Unsupported(f".reg .{kind} {names}")
            for name in [match[1]] if match[2] is None else [f"{match[1]}{i}" for i in range(int(match[2]))]:
                unique = name
                if len(self.scopes) > 1:
                    self.renamed += 1
                    unique = f"{name}__{self.renamed}"
                self.scopes[-1][name] = unique
                self.kernel.registers[unique] = kind

    def name(self, text: str) -> str:
        bare = text.lstrip("!-")
        for scope in reversed(self.scopes):
            if bare in scope:
                return text[: len(text) - len(bare)] + scope[bare]
        if (variable := self.declared.get(bare)) and variable not in self.kernel.variables:
            self.kernel.variables.append(variable)
        return text

    def known(self, operand: Operand) -> Operand:
        if isinstance(operand, tuple):
            return tuple(self.known(each) for each in operand)
        if isinstance(operand, Address):
            return Address(self.name(operand.base) if operand.base else None, operand.offset)
        return "|".join(self.name(each.strip()) for each in operand.split("|"))


def _max_threads(directives: str) -> int:
    found = re.search(r"\.(?:maxntid|reqntid)\s+([\d\s,]+)", directives)
    threads = 1
    for extent in found[1].split(",") if found else ["1024"]:
        threads *= int(extent)
    return threads


def parse(text: str, name: str) -> Kernel:
    source = find(text, name)
    parameters = [_variable(each) for each in _split(source.header)]
    kernel = Kernel(name, parameters, _max_threads(source.directives))
    _Body(kernel, source.module).read(source.body, source.first_line)
    return kernel
