"""`python -m bench.ptx` (`make ptx`): what Triton made of the kernels of triton_kernels/, instruction by instruction.

Compiles each for the targets below, reads PTX, machine code and registers, prints what decides bits and speed, and ends
with 1 where something is not as it must be: needed() and faults() say what that is. Needs no GPU. Wants Triton, whose
package has the cuobjdump, too. tests/kernels/test_ptx.py runs it.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from bench import sass
from wd_fused import backends

NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)
REGISTERS = 512  # of a lane of a quarter of a multiprocessor, which its warps share: in NVIDIA's and AMD's GPUs
GRANULE = 8  # they are given out in

OPTIONS_TARGETS = ("sm_80", "sm_90", "gfx942")  # of with_options(): too many kernels to compile all of them everywhere

# What sgd_update does to an element: weight decay, dampening, Nesterov and p; unscaling and b·momentum, rounded.
MULTIPLY_ADDS = 4
PRODUCTS = 2
# And with options: the L1 penalty; clipping, decoupled decay. In the average, both sides of torch's lerp. Of
# int8 momentum, scale·(q·|q|). Of a norm, unscaling and the square.
OPTIONS_MULTIPLY_ADDS = 1
OPTIONS_PRODUCTS = 2
AVERAGE_MULTIPLY_ADDS = 2
INT8_PRODUCTS = 2
NORM_PRODUCTS = 2


# --- what must be ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needed:
    """What the code of a kernel must have."""

    wide_loads: int  # of 16 bytes, of a thread's, where the tile is full
    wide_stores: int
    multiply_adds: int  # in the code of all its ways
    products: int
    in_double: bool  # opmath is float64
    warps: int  # of a block
    blocks: int  # that a multiprocessor has room for at once: while one waits for its tile's words, others load
    is_norm: bool = False
    has_options: bool = False  # or is a norm: it adds, and what blocks of threads share is added up or compared

    @property
    def registers(self) -> int:
        return REGISTERS // self.blocks // GRANULE * GRANULE


def with_options() -> list[Any]:
    """Kernels that stand for those with options: float32 clipped and averaged, masters, quantised momentum; a norm."""
    import torch

    launcher = _launcher()
    f32, bf16 = torch.float32, torch.bfloat16
    return [
        launcher.Kernel(f32, False, options=True, averages=True),
        launcher.Kernel(bf16, False, options=True, weights="full", momentum=f32, average=f32, averages=True),
        launcher.Kernel(bf16, False, options=True, weights="split"),
        launcher.Kernel(bf16, False, options=True, stochastic=True, momentum=torch.int8),
        launcher.NormKernel(f32, False, False),
    ]


def needed(kernel: Any, lanes: int) -> Needed:
    """Computed from the tiles of a launcher's kernel, for a GPU whose warps have so many lanes."""
    if not hasattr(kernel, "weights"):
        return _needed_by_norm(kernel, lanes)
    device_code = _launcher().kernels
    threads = lanes * device_code.WARPS
    full, piece = (kernel.constants()[name] // threads for name in ("tile_elements", "piece_elements"))
    ways = 1 if kernel.strided else 2  # a full tile, a piece of another one; with strides, only a piece
    elements = piece if kernel.strided else full + piece
    stored = kernel.operands
    both = [kernel.dtype, stored["momentum"]]
    both += ([stored["extra"]] if kernel.weights != "parameter" else []) + ([stored["average"]] * kernel.averages)

    def wide(operands: list[Any]) -> int:
        """Of the operands that are as wide as any; of the others a thread takes as many elements at once."""
        if kernel.strided:
            return 0
        return sum(full // kernel.vector for dtype in operands if dtype.itemsize * kernel.vector == 16)

    multiply_adds, products = MULTIPLY_ADDS * elements, PRODUCTS * elements
    if kernel.options:
        in_lerp = AVERAGE_MULTIPLY_ADDS if kernel.averages else 0
        multiply_adds += (OPTIONS_MULTIPLY_ADDS + in_lerp) * elements + ways  # and one for an lr on the GPU
        is_int8 = stored["momentum"].itemsize == 1
        products += (OPTIONS_PRODUCTS + (INT8_PRODUCTS if is_int8 else 0)) * elements
    # A thread has twice the elements of 16 bits, all of them in float at once.
    blocks = 4 if kernel.options or kernel.dtype.itemsize == 2 else 6
    return Needed(
        wide_loads=wide([*both, stored["gradient"]]),
        wide_stores=wide(both + [stored["gradient"]] * kernel.zeroes),
        multiply_adds=multiply_adds,
        products=products,
        in_double=kernel.dtype.itemsize == 8,
        warps=device_code.WARPS,
        blocks=blocks,
        has_options=kernel.options,
    )


def _needed_by_norm(kernel: Any, lanes: int) -> Needed:
    device_code = _launcher().kernels
    elements = kernel.constants()["piece_elements"] // (lanes * device_code.WARPS)
    ways = 1 if kernel.strided else 2
    return Needed(
        wide_loads=0 if kernel.strided else elements * kernel.gradient.itemsize // 16,
        wide_stores=0,
        multiply_adds=0,
        products=NORM_PRODUCTS * elements * ways + 2,  # and a coefficient's, in float32 and in float64
        in_double=True,
        warps=device_code.WARPS,
        blocks=8,
        is_norm=True,
        has_options=True,
    )


# What PTX may not have, as opcodes.
REFUSED = {
    "multiply-adds not rounded to nearest": r"fma\.(?!rn\.).*|mad\..*f(16|32|64).*",
    "additions, which a compiler could fuse": r"(add|sub)\..*f(16|32|64).*",
    "multiplications without .rn, which a compiler could fuse": r"mul\.(?!rn\.).*f(16|32|64).*",
    "divisions not rounded to nearest": r"div\.(?!rn\.).*f(16|32|64).*",
    "approximations": r".*\.(approx|full)\b.*",
    "instructions that flush to zero": r".*\.ftz\b.*",
    "accesses to local memory": r".*\.local\b.*",
    "accesses to shared memory": r".*\.shared\b.*",
    "barriers": r"(bar|barrier|mbarrier)\b.*",
    "calls": r"call\b.*",
}
REFUSED_DOUBLES = {"FP64 instructions": r".*f64.*"}
# Options add, each time rounded by itself, and threads add up norms and compare magnitudes.
ALLOWED_WITH_OPTIONS = {"additions, which a compiler could fuse", "accesses to shared memory", "barriers"}
REFUSED_WITH_OPTIONS = {"additions without .rn, which a compiler could fuse": r"(add|sub)\.(?!rn\.).*f(16|32|64).*"}
# What else PTX may do with floats: choose, compare, flip the sign, move, widen, round what is stored.
WITH_FLOATS = re.compile(
    r"(fma|mul)\.rn\.f(32|32x2|64)|div\.rn\.f32|(neg|abs|selp|mov)\.f(32|64)|setp\.\w+\.f(32|64)"
    r"|cvt\.f(32|64)\.(f16|bf16|f32)|cvt\.rn\.b?f16(x2)?\.f32|(ld|st)\..*"
)
WITH_FLOATS_AND_OPTIONS = re.compile(
    r"(add|sub)\.rn\.f(32|64)|(sqrt|div)\.rn\.f(32|64)|min\.f32|cvt\.rzi\.s(8|16|32)\.f32|cvt\.rn\.f32\.(f64|[su]\d+)"
    r"|setp\.\w+\.bf16"
)

# The same of AMD's assembly. v_fma_mix* compute in float; a division, of integers too, takes v_rcp and v_fma.
REFUSED_BY_AMD = {
    "multiply-adds that round twice": r"v_(pk_)?ma[dc]\w*_f(16|32|64).*",
    "additions, which a compiler could fuse": r"v_(pk_)?(add|sub|subrev)_f(16|32|64).*",
    "operations in float16": r"v_(pk_)?(fma|fmac|mul)_f16.*",
    "generic accesses": r"flat_.*",
    "accesses to private memory": r"scratch_.*",
    "accesses to shared memory": r"ds_.*",
    "barriers": r"s_barrier.*",
    "calls": r"s_(swappc|call)_b64",
}
REFUSED_DOUBLES_BY_AMD = {"FP64 instructions": r"v_\w*f64.*"}
# To nearest, ties to even; subnormal numbers are kept.
AMD_MODES = {
    "float_round_mode_32": 0,
    "float_round_mode_16_64": 0,
    "float_denorm_mode_32": 3,
    "float_denorm_mode_16_64": 3,
}


def _refused(opcodes: Counter[str], rules: dict[str, str]) -> Iterator[str]:
    for what, pattern in rules.items():
        if found := {opcode: count for opcode, count in opcodes.items() if re.fullmatch(pattern, opcode)}:
            yield f"{sum(found.values())} {what} ({', '.join(sorted(found))}), none is allowed"


def _bounds(
    exactly: dict[str, tuple[int, int]], at_least: dict[str, tuple[int, int]], at_most: dict[str, tuple[int, int]]
) -> Iterator[str]:
    """Each: what it is, its number, the bound."""
    for what, (number, right) in exactly.items():
        if number != right:
            yield f"{number} {what}, it must be {right}"
    for what, (number, least) in at_least.items():
        if number < least:
            yield f"{number} {what}, at least {least} are needed"
    for what, (number, most) in at_most.items():
        if number > most:
            yield f"{number} {what}, at most {most} are allowed"


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nvidia:
    """A compiled kernel in numbers."""

    opcodes: Counter[str]  # of PTX, with modifiers: "ld.global.v4.b32"
    variables: Counter[str]  # of PTX, by where they lie: "local", "shared"
    lost_addresses: int  # of loads whose result is written to before they read their address from the same register
    registers: int  # of a thread; this and the following are the machine code's
    stack: int  # bytes of a thread: where there are spills, they are here
    local: int
    shared: int  # bytes of a block
    loads_in_flight: int  # the most 128-bit loads that are under way before one of them is waited for
    instructions: int

    most_blocks: ClassVar[int] = 16  # of 4 warps
    columns: ClassVar[dict[str, str]] = {
        "registers": "registers",
        "stack": "stack",
        "local": "local",
        "shared": "shared",
        "loads 128": "wide_loads",
        "stores 128": "wide_stores",
        "in flight": "loads_in_flight",
        "fma.rn": "multiply_adds",
        "mul.rn": "products",
        "FP64": "doubles",
        "instructions": "instructions",
    }

    @property
    def wide_loads(self) -> int:
        return self._count(r"ld\.global\..*v(4\.b32|2\.b64)")

    @property
    def wide_stores(self) -> int:
        return self._count(r"st\.global\..*v(4\.b32|2\.b64)")

    @property
    def multiply_adds(self) -> int:
        return self._count(r"fma\.rn\..*") + self._count(r"fma\.rn\..*x2")  # those do two

    @property
    def products(self) -> int:
        return self._count(r"mul\.rn\..*") + self._count(r"mul\.rn\..*x2")

    @property
    def doubles(self) -> int:
        return self._count(r".*f64.*")

    def _count(self, pattern: str) -> int:
        return sum(count for opcode, count in self.opcodes.items() if re.fullmatch(pattern, opcode))

    def faults(self, needed: Needed) -> Iterator[str]:
        rules = REFUSED
        if needed.has_options:
            rules = {
                what: rule for what, rule in REFUSED.items() if what not in ALLOWED_WITH_OPTIONS
            } | REFUSED_WITH_OPTIONS
        known = re.compile("|".join(rules.values()))
        yield from _refused(self.opcodes, rules if needed.in_double else rules | REFUSED_DOUBLES)
        others = Counter(
            {
                opcode: count
                for opcode, count in self.opcodes.items()
                if re.search(r"\.b?f(16|32|64)", opcode)
                and not known.fullmatch(opcode)
                and not WITH_FLOATS.fullmatch(opcode)
                and not (needed.has_options and WITH_FLOATS_AND_OPTIONS.fullmatch(opcode))
            }
        )
        yield from _refused(others, {"instructions with floats that the step has no use for": ".*"})
        yield from _bounds(
            exactly={
                "loads from an address that was overwritten": (self.lost_addresses, 0),
                "128-bit loads": (self.wide_loads, needed.wide_loads),
                "128-bit stores": (self.wide_stores, needed.wide_stores),
                "fused multiply-adds": (self.multiply_adds, needed.multiply_adds),
                "multiplications": (self.products, needed.products),
            },
            at_least={"128-bit loads in flight": (self.loads_in_flight, needed.wide_loads)},
            at_most={
                "registers": (self.registers, needed.registers),
                "bytes of stack": (self.stack, 0),
                "bytes of local memory": (self.local, 0),
                "variables in local memory": (self.variables["local"], 0),
            }
            | (
                {}
                if needed.has_options
                else {
                    "bytes of shared memory": (self.shared, 0),
                    "variables in shared memory": (self.variables["shared"], 0),
                }
            ),
        )


# @%p44 ld.global.v4.b32 { %r112, %r113, %r114, %r115 }, [ %rd166 + 0 ];
_PTX_INSTRUCTION = re.compile(r"(?:^|[;{}])[ \t]*(?:@!?%\w+[ \t]+)?([a-z][\w.:]*)", re.MULTILINE)
_PTX_VARIABLE = re.compile(r"^\s*(?:\.(?:visible|extern|weak)\s+)*\.(local|shared)\b", re.MULTILINE)


def ptx_opcodes(ptx: str) -> Counter[str]:
    return Counter(_PTX_INSTRUCTION.findall(re.sub("//.*", "", ptx)))


def ptx_variables(ptx: str) -> Counter[str]:
    return Counter(_PTX_VARIABLE.findall(ptx))


# Triton loads by inline assembly that writes zero to the result first, for where a predicate is false:
#     mov.u64 %rd25, 0x0;  ld.global.b64 { %rd25 }, [ %rd25 + 0 ];
_PTX_LOST_ADDRESS = re.compile(
    r"\bmov\.u64\s+(%rd\d+), 0x0;\s*(?:mov\.u64\s+%rd\d+, 0x0;\s*)*(?:@!?%\w+\s+)?ld\.[^;]*\[\s*\1\b"
)


def lost_addresses(ptx: str) -> int:
    return len(_PTX_LOST_ADDRESS.findall(re.sub(r"//.*|^\s*\.loc\b.*", "", ptx, flags=re.MULTILINE)))


def read_nvidia(ptx: str, cubin: Path) -> Nvidia:
    """From what Triton made, and what ptxas made of that."""
    said = sass._run(sass.cuobjdump(), "-res-usage", "-sass", cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    code = [(m[3], (m[2] or "") + m[4]) for m in sass._INSTRUCTION.finditer(said)]
    if usage is None or not code:
        raise RuntimeError(f"cuobjdump does not show the kernel in {cubin}:\n{said[-4000:]}")
    registers, stack, shared, local = map(int, usage.groups())
    return Nvidia(
        opcodes=ptx_opcodes(ptx),
        variables=ptx_variables(ptx),
        lost_addresses=lost_addresses(ptx),
        registers=registers,
        stack=stack,
        local=local,
        shared=shared,
        loads_in_flight=sass._loads_in_flight(code),
        instructions=sum(opcode != "NOP" for opcode, _ in code),  # which fills the last line of code
    )


@dataclass(frozen=True)
class Amd:
    """A compiled kernel in numbers."""

    opcodes: Counter[str]  # without what only tells the encoding: "v_fma_f32" for "v_fma_f32_e64"
    metadata: dict[str, int]  # as the assembly names it
    loads_in_flight: int  # the most 128-bit loads that are under way before one of them is waited for

    most_blocks: ClassVar[int] = 8  # of 4 warps
    columns: ClassVar[dict[str, str]] = {
        "registers": "registers",
        "scalar ones": "scalar_registers",
        "spilled": "spilled",
        "private": "private",
        "shared": "shared",
        "loads 128": "wide_loads",
        "stores 128": "wide_stores",
        "in flight": "loads_in_flight",
        "FP64": "doubles",
        "instructions": "instructions",
        "multiply-adds": "multiply_adds",
        "by name": "multiply_adds_by_name",
    }

    @property
    def registers(self) -> int:
        return self.metadata["vgpr_count"]

    @property
    def scalar_registers(self) -> int:
        return self.metadata["sgpr_count"]

    @property
    def spilled(self) -> int:
        """Registers, not bytes."""
        return self.metadata["vgpr_spill_count"] + self.metadata["sgpr_spill_count"]

    @property
    def private(self) -> int:
        return self.metadata["private_segment_fixed_size"]

    @property
    def shared(self) -> int:
        return self.metadata["group_segment_fixed_size"]

    @property
    def wide_loads(self) -> int:
        """Those of a tile: where they are loads from a buffer, the global ones are of layouts and tiles' words."""
        return self.opcodes["buffer_load_dwordx4"] or self.opcodes["global_load_dwordx4"]

    @property
    def wide_stores(self) -> int:
        return self.opcodes["buffer_store_dwordx4"] or self.opcodes["global_store_dwordx4"]

    @property
    def multiply_adds(self) -> int:
        """Division's are among them, and products that are computed as multiply-adds of 0."""
        return sum(count * (2 if "_pk_" in opcode else 1) for opcode, count in self._multiply_adds().items())

    @property
    def multiply_adds_by_name(self) -> str:
        return ", ".join(f"{count} {opcode}" for opcode, count in sorted(self._multiply_adds().items()))

    def _multiply_adds(self) -> dict[str, int]:
        return {opcode: count for opcode, count in self.opcodes.items() if re.match(r"v_(pk_)?fma", opcode)}

    @property
    def doubles(self) -> int:
        return sum(count for opcode, count in self.opcodes.items() if re.match(r"v_\w*f64", opcode))

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    def faults(self, needed: Needed) -> Iterator[str]:
        rules = REFUSED_BY_AMD
        if needed.has_options:  # whose additions are told from fused ones by nothing but the number of those
            rules = {what: rule for what, rule in REFUSED_BY_AMD.items() if what not in ALLOWED_WITH_OPTIONS}
        yield from _refused(self.opcodes, rules if needed.in_double else rules | REFUSED_DOUBLES_BY_AMD)
        # The sums of a norm's tiles are read so, too.
        loads = {} if needed.is_norm else {"128-bit loads": (self.wide_loads, needed.wide_loads)}
        yield from _bounds(
            exactly=loads
            | {"128-bit stores": (self.wide_stores, needed.wide_stores)}
            | {f"for {mode}": (self.metadata[f"amdhsa_{mode}"], right) for mode, right in AMD_MODES.items()},
            at_least={
                "128-bit loads in flight": (self.loads_in_flight, needed.wide_loads),
                "fused multiply-adds": (self.multiply_adds, needed.multiply_adds),
            },
            at_most={
                "registers": (self.registers, needed.registers),
                "spilled registers": (self.spilled, 0),
                "bytes of private memory": (self.private, 0),
            }
            | ({} if needed.has_options else {"bytes of shared memory": (self.shared, 0)}),
        )


#     buffer_load_dwordx4 v[12:15], v26, s[24:27], 0 offen
_AMD_INSTRUCTION = re.compile(
    r"^\s+((?:v|s|buffer|global|flat|scratch|ds)_\w+?)(?:_e32|_e64|_sdwa|_dpp)?(?:$|\s([^;\n]*))", re.MULTILINE
)
_AMD_NUMBER = re.compile(r"^\s*(?:- )?\.(\w+):?\s+(\d+)\s*$", re.MULTILINE)
_AMD_NUMBERS = {
    *("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count"),
    *("private_segment_fixed_size", "group_segment_fixed_size"),
    *(f"amdhsa_{mode}" for mode in AMD_MODES),
}


def read_amd(assembly: str) -> Amd:
    code = [(m[1], m[2] or "") for m in _AMD_INSTRUCTION.finditer(assembly)]
    metadata = {name: int(number) for name, number in _AMD_NUMBER.findall(assembly) if name in _AMD_NUMBERS}
    if missing := _AMD_NUMBERS - set(metadata):
        raise RuntimeError(f"the assembly does not tell {', '.join(sorted(missing))}")
    return Amd(Counter(opcode for opcode, _ in code), metadata, _amd_loads_in_flight(code))


def _amd_loads_in_flight(code: Iterable[tuple[str, str]]) -> int:
    most = under_way = 0
    for opcode, operands in code:
        if re.fullmatch(r"(buffer|global)_load_dwordx4", opcode):
            under_way += 1
            most = max(most, under_way)
        elif opcode == "s_waitcnt" and (left := re.search(r"vmcnt\((\d+)\)", operands)):
            under_way = min(under_way, int(left[1]))
    return most


# --- compiling ---------------------------------------------------------------------------------------------------


def _launcher() -> ModuleType:
    try:
        backends.triton_kernels()
    except ImportError as error:
        raise sass.Missing(f"Triton cannot be imported ({error}): pip install triton") from error
    return importlib.import_module("wd_fused.triton_kernels.launcher")


@dataclass(frozen=True)
class Compiled:
    """A kernel for a target, and what it must be."""

    name: str
    target: str
    code: Nvidia | Amd
    needed: Needed

    @property
    def warps(self) -> int:
        """Of a multiprocessor at once."""
        of_a_lane = -(-self.code.registers // GRANULE) * GRANULE
        return self.needed.warps * min(REGISTERS // of_a_lane, self.code.most_blocks)

    def faults(self) -> list[str]:
        return [f"{self.target} {self.name}: {fault}" for fault in self.code.faults(self.needed)]


def gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


def can_compile(target: str) -> bool:
    from triton.backends import backends as of_triton

    return ("nvidia" if target.startswith("sm_") else "amd") in of_triton


def read(made: Any, stem: Path) -> Nvidia | Amd:
    """What a triton.compiler.CompiledKernel is; writes it to files that begin so."""
    if "ptx" not in made.asm:
        stem.with_suffix(".s").write_text(made.asm["amdgcn"], encoding="utf-8")
        return read_amd(made.asm["amdgcn"])
    stem.with_suffix(".ptx").write_text(made.asm["ptx"], encoding="utf-8")
    cubin = stem.with_suffix(".cubin")
    cubin.write_bytes(made.asm["cubin"])
    return read_nvidia(made.asm["ptx"], cubin)


def shipped(targets: Iterable[str], folder: Path) -> dict[str, list[Compiled]]:
    """The kernels of launcher.KERNELS for each target, and with_options() for some, their code in files in the folder;
    two at a time."""
    launcher = _launcher()

    def one(target: str, kernel: Any) -> Compiled:
        gpu = gpu_target(target)
        stem = folder / f"{target}-{re.sub(r'[^a-z0-9]+', '-', kernel.name).strip('-')}"
        code = read(launcher.compiled(kernel, gpu), stem)
        return Compiled(kernel.name, target, code, needed(kernel, gpu.warp_size))

    pairs = [
        (target, kernel)
        for target in targets
        for kernel in (*launcher.KERNELS, *(with_options() if target in OPTIONS_TARGETS else ()))
    ]
    found: dict[str, list[Compiled]] = {}
    with ThreadPoolExecutor(2) as pool:
        for each in pool.map(lambda pair: one(*pair), pairs):
            found.setdefault(each.target, []).append(each)
    return found


# --- telling -----------------------------------------------------------------------------------------------------


def table(of_target: Sequence[Compiled]) -> str:
    columns = of_target[0].code.columns
    rows = [("kernel", "warps", *columns)]
    rows += [
        (each.name, str(each.warps), *(str(getattr(each.code, name)) for name in columns.values()))
        for each in of_target
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        if columns.get("by name"):
            cells[-1] = row[-1]
        lines.append("  ".join(cells))
    return "\n".join(lines)


LEGEND = """
warps: of a multiprocessor at once, by registers (of a thread). stack, local, private: bytes of a thread; shared: of a
block; spilled: registers. loads, stores 128: of a thread, of a full tile. in flight: the most of them under way before
one is waited for, in the machine code. All others are counts of instructions, of PTX (a packed one counted twice);
"instructions": of the machine code. AMD's multiply-adds have the division's among them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    targets = (*NVIDIA, *AMD)
    parser.add_argument("targets", nargs="*", default=targets, help=f"{' '.join(targets)} if none is named")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="leave PTX, cubins and AMD's assembly there")
    arguments = parser.parse_args()
    for target in set(arguments.targets) - set(targets):
        parser.error(f"no target {target}: choose from {' '.join(targets)}")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder: Path = arguments.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            launcher = _launcher()
            usable = [target for target in arguments.targets if can_compile(target)]
            print(f"Triton {launcher.triton.__version__}\n{sass.cuobjdump()}")
            found = shipped(usable, folder)
    except (sass.Missing, RuntimeError) as error:
        sys.exit(str(error))
    for target in arguments.targets:
        print(f"\n{target}\n{table(found[target]) if target in found else 'this Triton cannot compile for it'}")
    print(LEGEND)
    faults = [fault for of_target in found.values() for each in of_target for fault in each.faults()]
    if faults:
        sys.exit("\n".join(["not as they must be:", *faults]))
    print(f"{sum(map(len, found.values()))} kernels are as they must be")


if __name__ == "__main__":
    main()
