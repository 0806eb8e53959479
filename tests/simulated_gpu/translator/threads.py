"""Instructions that touch memory or other threads: what modifiers they have, and the calls of runtime/thread.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .opcodes import c_type
from .ptx import BYTES, Instruction, Operand, Unsupported

if TYPE_CHECKING:
    from .writer import Writer

SPACES = ("global", "shared", "local", "param", "const")
ORDERINGS = ("relaxed", "acquire", "release", "acq_rel", "volatile")
SCOPES = ("cta", "cluster", "gpu", "sys")
# of caches: of no meaning here
HINTS = ("ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "L1::", "L2::", "unified")


class Modifiers:
    """Of an access: ld.volatile.shared::cta.v2.b32."""

    def __init__(self, opcode: str, operations: tuple[str, ...] = ()) -> None:
        self.space = "generic"
        self.ordering = "weak"
        self.scope = "gpu"
        self.width = 1
        self.operation = ""
        *parts, self.type = opcode.split(".")[1:]
        for part in parts:
            if part.split("::")[0] in SPACES and part.split("::")[1:] in ([], ["cta"], ["entry"]):
                self.space = part.split("::")[0]
            elif part in ORDERINGS:
                self.ordering = part
            elif part in SCOPES:
                self.scope = part
            elif part in ("v2", "v4", "v8"):
                self.width = int(part[1:])
            elif part in operations and not self.operation:
                self.operation = part
            elif part != "weak" and not part.startswith(HINTS):
                raise Unsupported(f"the modifier .{part} of {opcode}")
        if self.type not in BYTES or (operations and not self.operation):
            raise Unsupported(f"the opcode {opcode}")
        if self.scope in ("cta", "cluster") and self.space != "shared":
            raise Unsupported(f"the scope .{self.scope} of {opcode}")  # what it orders is not modelled
        self.bytes = BYTES[self.type] * self.width

    @property
    def cpp_ordering(self) -> str:
        name = {"acq_rel": "acquire_release", "volatile": "relaxed"}.get(self.ordering, self.ordering)
        return f"Ordering::{name}"


def _generic(modifiers: Modifiers, address: str) -> str:
    return f"{address} + kSharedWindow" if modifiers.space == "shared" else address


def _reading(writer: Writer, one: Instruction, modifiers: Modifiers, address: str) -> str:
    site, size = writer.site(one), modifiers.bytes
    if modifiers.ordering != "weak" and modifiers.space not in ("local", "param", "const"):
        where = _generic(modifiers, address)
        return f"simulated_gpu_strong(thread, {where}, {size}, {site}, true, false, {modifiers.cpp_ordering})"
    if one.used_bytes is not None and modifiers.space in ("global", "shared", "generic"):
        return f"simulated_gpu_read_some(thread, {_generic(modifiers, address)}, {size}, {site}, {one.used_bytes}u)"
    return f"simulated_gpu_read_{modifiers.space}(thread, {address}, {size}, {site})"


def load(writer: Writer, one: Instruction) -> str:
    modifiers = Modifiers(one.opcode)
    target, where = one.operands
    targets = target if isinstance(target, tuple) else (target,)
    if len(targets) != modifiers.width:
        raise Unsupported(f"{len(targets)} destinations")
    element = stored(modifiers.type)
    address = writer.address(where)
    # `ld.param` of a thread's own parameters needs no help
    if modifiers.space == "param":
        site = writer.site(one)
        values = [
            f"read_parameter<{element}>(thread, {address}, {modifiers.bytes}, {site}, {i})" for i in range(len(targets))
        ]
        if len(targets) == 1:
            return _into(writer, targets[0], modifiers.type, values[0])
        names = [f"const auto e{i} = {value};" for i, value in enumerate(values)]
        codes = [_into(writer, each, modifiers.type, f"e{i}") for i, each in enumerate(targets)]
        return f"{{ {' '.join(names)} {' '.join(codes)} }}"
    codes = [_into(writer, each, modifiers.type, f"get<{element}>(at, {i})") for i, each in enumerate(targets)]
    return f"{{ const void* at = {_reading(writer, one, modifiers, address)}; {' '.join(codes)} }}"


def store(writer: Writer, one: Instruction) -> str:
    modifiers = Modifiers(one.opcode)
    where, source = one.operands
    sources = source if isinstance(source, tuple) else (source,)
    if len(sources) != modifiers.width:
        raise Unsupported(f"{len(sources)} sources")
    if modifiers.space in ("param", "const"):
        raise Unsupported(f"the opcode {one.opcode}")
    address, site = writer.address(where), writer.site(one)
    element, size = stored(modifiers.type), BYTES[modifiers.type]
    values = [f"{element}({writer.bits(each, size)})" for each in sources]
    if modifiers.ordering != "weak" and modifiers.space != "local":
        call = (
            f"simulated_gpu_strong(thread, {_generic(modifiers, address)}, {modifiers.bytes}, {site}, false, true,"
            f" {modifiers.cpp_ordering})"
        )
        codes = [f"put<{element}>(at, {i}, {value});" for i, value in enumerate(values)]
        return f"{{ void* at = {call}; {' '.join(codes)} }}"
    call = f"simulated_gpu_write_{modifiers.space}(thread, {address}, values, {modifiers.bytes}, {site});"
    return f"{{ const {element} values[] = {{{', '.join(values)}}}; {call} }}"


def stored(kind: str) -> str:
    """How an element lies in memory: with a sign only where it is to be carried on into a wider register."""
    return c_type(kind) if kind[0] == "s" else f"uint{8 * BYTES[kind]}_t"


def _into(writer: Writer, target: Operand, kind: str, value: str) -> str:
    return writer.assign(target, "s" + kind[1:] if kind[0] == "s" else f"u{8 * BYTES[kind]}", value)


ATOMICS = {
    "add": "add",
    "min": "minimum",
    "max": "maximum",
    "and": "bit_and",
    "or": "bit_or",
    "xor": "bit_xor",
    "inc": "atomic_inc",
    "dec": "atomic_dec",
    "exch": "atomic_exchange",
    "cas": "atomic_compare",
}


def atomic(writer: Writer, one: Instruction) -> str:
    """atom.global.add.u32 d, [a], b; without d as red."""
    modifiers = Modifiers(one.opcode.replace(".noftz", ""), tuple(ATOMICS))
    operands = list(one.operands)
    target = operands.pop(0) if one.opcode.startswith("atom") else "_"
    where, *values = operands
    kind = modifiers.type
    if len(values) != 1 + (modifiers.operation == "cas") or modifiers.space not in ("global", "shared", "generic"):
        raise Unsupported(f"the opcode {one.opcode}")
    if modifiers.ordering == "weak":
        modifiers.ordering = "relaxed"
    typed = ", ".join(writer.typed(each, kind) for each in values)
    of = c_type(kind)
    call = (
        f"simulated_gpu_strong(thread, {_generic(modifiers, writer.address(where))}, {modifiers.bytes},"
        f" {writer.site(one)}, true, true, {modifiers.cpp_ordering})"
    )
    return (
        f"{{ void* at = {call}; const auto old = get<{of}>(at, 0);"
        f" put<{of}>(at, 0, {ATOMICS[modifiers.operation]}(old, {typed})); {writer.assign(target, kind, 'old')} }}"
    )


def fence(writer: Writer, one: Instruction) -> str:
    scope = one.opcode.split(".")[-1]
    scopes = {"cta": "block", "gl": "device", "gpu": "device", "sys": "device"}
    kinds = {"membar": True, "fence.sc": True, "fence.acq_rel": False, "fence": False}
    kind = one.opcode.removesuffix(f".{scope}")
    if kind not in kinds or scope not in scopes:
        raise Unsupported(f"the opcode {one.opcode}")
    return f"simulated_gpu_fence(thread, {str(kinds[kind]).lower()}, Scope::{scopes[scope]});"


def barrier(writer: Writer, one: Instruction) -> str:
    """bar.sync a{, b}; bar.arrive a, b; bar.red.popc.u32 d, a{, b}, c; bar.warp.sync mask."""
    writer.waits = True
    opcode = one.opcode.replace("barrier.", "bar.").replace(".cta", "").replace(".aligned", "")
    site = writer.site(one)
    if opcode == "bar.warp.sync":
        return f"simulated_gpu_warp_barrier(thread, {writer.bits(one.operands[0], 4)}, {site});"
    operands = list(one.operands)
    if opcode in ("bar.sync", "bar.arrive"):
        numbers = [writer.bits(each, 4) for each in operands] + ["0"]
        waits = str(opcode == "bar.sync").lower()
        return f"simulated_gpu_barrier(thread, {numbers[0]}, {numbers[1]}, {site}, {waits});"
    results = {
        "bar.red.popc.u32": ("u32", "count"),
        "bar.red.and.pred": ("pred", "count == thread.ntid[0] * thread.ntid[1] * thread.ntid[2]"),
        "bar.red.or.pred": ("pred", "count != 0"),
    }
    if opcode not in results or len(operands) != 3:
        raise Unsupported(f"the opcode {one.opcode}")
    kind, value = results[opcode]
    target, which, given = operands
    call = f"simulated_gpu_barrier_count(thread, {writer.bits(which, 4)}, 0, {site}, {writer.typed(given, 'pred')})"
    return f"{{ const uint32_t count = {call}; {writer.assign(target, kind, value)} }}"


def shuffle(writer: Writer, one: Instruction) -> str:
    """shfl.sync.bfly.b32 d{|p}, a, b, c, mask."""
    kinds = {"up": "up", "down": "down", "bfly": "butterfly", "idx": "index"}
    parts = one.opcode.split(".")
    if len(parts) != 4 or parts[1] != "sync" or parts[2] not in kinds or parts[3] != "b32":
        raise Unsupported(f"the opcode {one.opcode}")
    writer.waits = True
    target, *operands = one.operands
    values = ", ".join(writer.bits(each, 4) for each in operands)
    result, *predicate = str(target).split("|")
    call = f"shuffle<Shuffle::{kinds[parts[2]]}>(thread, {values}, {writer.site(one)}, in)"
    codes = [writer.assign(result, "b32", call), *(writer.assign(each, "pred", "in") for each in predicate)]
    return f"{{ bool in; {' '.join(codes)} }}"


def redux(writer: Writer, one: Instruction) -> str:
    operations = {name: ATOMICS[name] for name in ("add", "min", "max", "and", "or", "xor")}
    parts = one.opcode.split(".")
    if len(parts) != 4 or parts[1] != "sync" or parts[2] not in operations or parts[3] not in ("u32", "s32", "b32"):
        raise Unsupported(f"the opcode {one.opcode}")
    writer.waits = True
    target, value, mask = one.operands
    of = c_type(parts[3])
    function = f"[]({of} a, {of} b) {{ return {operations[parts[2]]}(a, b); }}"
    given = f"{writer.typed(value, parts[3])}, {writer.bits(mask, 4)}, {writer.site(one)}"
    return writer.assign(target, parts[3], f"reduce<{of}>(thread, {given}, {function})")


def vote(writer: Writer, one: Instruction) -> str:
    writer.waits = True
    target, value, mask = one.operands
    mask = writer.bits(mask, 4)
    call = f"ballot(thread, {writer.typed(value, 'pred')}, {mask}, {writer.site(one)})"
    results = {
        "vote.sync.ballot.b32": ("b32", "votes"),
        "vote.sync.all.pred": ("pred", f"votes == {mask}"),
        "vote.sync.any.pred": ("pred", "votes != 0"),
        "vote.sync.uni.pred": ("pred", f"votes == 0 || votes == {mask}"),
    }
    if one.opcode not in results:
        raise Unsupported(f"the opcode {one.opcode}")
    kind, result = results[one.opcode]
    return f"{{ const uint32_t votes = {call}; {writer.assign(target, kind, result)} }}"


def match(writer: Writer, one: Instruction) -> str:
    writer.waits = True
    target, value, mask = one.operands
    kind = one.opcode.split(".")[-1]
    if one.opcode not in ("match.any.sync.b32", "match.any.sync.b64"):
        raise Unsupported(f"the opcode {one.opcode}")
    call = f"match_any(thread, {writer.typed(value, kind)}, {writer.bits(mask, 4)}, {writer.site(one)})"
    return writer.assign(target, "b32", call)


def active_mask(writer: Writer, one: Instruction) -> str:
    """Which lanes run together is open: here each by itself."""
    return writer.assign(one.operands[0], "b32", "lane_mask(thread, 0)")


HANDLERS: dict[str, Callable[[Writer, Instruction], str]] = {
    "ld": load,
    "ldu": load,
    "st": store,
    "atom": atomic,
    "red": atomic,
    "membar": fence,
    "fence": fence,
    "bar": barrier,
    "barrier": barrier,
    "shfl": shuffle,
    "redux": redux,
    "vote": vote,
    "match": match,
    "activemask": active_mask,
}
