"""`python -m bench.sass` (`make sass`): what nvcc made of the CUDA kernels, instruction by instruction. Needs no GPU.

Reads the module that was built ahead of time of these sources, or compiles them as a build does where it lacks one of
the targets below, and counts in the machine code what decides the speed: wide and narrow accesses, loads under way
together, spills, fused multiply-adds, double precision. tests/kernels/test_sass.py says what the counts must be. Wants
nvcc, and cuobjdump: the toolkit's, else the one that Triton's package carries.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wd_fused.build import config as build_config
from wd_fused.build import toolchain

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "sass"  # a target takes a while to compile: kept until a source, a flag or nvcc changes
TARGETS = tuple(f"sm_{major}{minor}" for major, minor in toolchain.DEFAULT_TARGETS)
FLAGS = ("-std=c++17", f"-I{CSRC}", *build_config.nvcc_flags(""))


class Missing(Exception):
    """A program that is not on this machine. The message says which, and what to do."""


# --- programs ----------------------------------------------------------------------------------------------------


def nvcc() -> str:
    home, how = toolchain.cuda_home()
    path = home and shutil.which(os.path.join(home, "bin", "nvcc"))
    if not path:
        raise Missing(f"no nvcc ({how}): install the CUDA toolkit, or set CUDA_HOME to its folder")
    return path


def cuobjdump() -> str:
    """It calls nvdisasm, which must lie beside it."""
    folders = [os.path.join(home, "bin")] if (home := toolchain.cuda_home()[0]) else []
    folders += os.environ.get("PATH", "").split(os.pathsep)
    triton = importlib.util.find_spec("triton")
    for place in triton.submodule_search_locations or () if triton else ():
        folders.append(os.path.join(place, "backends", "nvidia", "bin"))
    for folder in folders:
        if all(os.access(os.path.join(folder, name), os.X_OK) for name in ("cuobjdump", "nvdisasm")):
            return os.path.join(folder, "cuobjdump")
    raise Missing(
        "no cuobjdump with nvdisasm beside it, neither in the CUDA toolkit, nor on PATH, nor in Triton's package: "
        "pip install triton"
    )


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}")
    return done.stdout


# --- compiling ---------------------------------------------------------------------------------------------------


def compiled(sources: Sequence[Path], targets: Iterable[str], flags: Sequence[str] = FLAGS) -> dict[str, list[Path]]:
    """For each target a cubin of each source, with what ptxas said in a .txt beside it; two at a time."""
    compiler = nvcc()
    version = _run(compiler, "--version")
    pairs = [(target, source) for target in targets for source in sources]
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda pair: _cubin(compiler, version, pair[1], pair[0], flags), pairs))
    result: dict[str, list[Path]] = {}
    for (target, _), cubin in zip(pairs, cubins, strict=True):
        result.setdefault(target, []).append(cubin)
    return result


def _cubin(compiler: str, version: str, source: Path, target: str, flags: Sequence[str]) -> Path:
    command = (compiler, *flags, f"-arch={target}", "-Xptxas=-v", "-cubin")
    digest = hashlib.sha256(repr((command, version)).encode())
    for path in _with_includes(source):
        digest.update(path.read_bytes())
    stem = f"{source.stem}-{target}-"
    cubin = CACHE / f"{stem}{digest.hexdigest()[:16]}.cubin"
    if cubin.is_file():
        return cubin
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = cubin.with_suffix(f".{os.getpid()}")
    said = _run(*command, "-o", unfinished, source)
    cubin.with_suffix(".txt").write_text(said, encoding="utf-8")
    unfinished.rename(cubin)
    for old in CACHE.glob(f"{stem}*"):
        if old.stem != cubin.stem:
            old.unlink(missing_ok=True)
    return cubin


def _with_includes(source: Path) -> list[Path]:
    """The source and the files of csrc that it includes, directly or not."""
    found = [source]
    for path in found:
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            included = CSRC / name
            if included.is_file() and included not in found:
                found.append(included)
    return found


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel in numbers."""

    name: str  # as name_of(CudaKernel) in csrc/cuda/cuda_parameters.cpp gives it
    target: str
    registers: int  # of a thread
    stack: int  # bytes of a thread
    spilled: int  # bytes that ptxas had no register for, written and read; of a module's cubin all of local memory
    opcodes: Counter[str]  # as nvdisasm writes them, with modifiers: "LDG.E.128"
    loads_in_flight: int  # the most 128-bit loads that are under way before one of them is waited for

    loop: tuple[int, int] = (0, 0)  # of the step's loop: its instructions, and the gradient's 16-byte loads among them

    @property
    def for_128(self) -> int:
        """The most instructions that a warp issues for 128 elements, whatever options are on: all of the loop, what
        hardly ever runs included."""
        instructions, loads = self.loop
        width = {"float32": 4, "float64": 2}.get(self.name.partition("<")[2].partition(",")[0], 8)
        return round(instructions * 4 / (loads * width)) if loads else 0

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values()) - self.opcodes["NOP"]  # which fills the last line of code

    @property
    def local(self) -> int:
        return self._count(r"(LDL|STL)")

    @property
    def wide_loads(self) -> int:
        return self._count(r"LDG.*\.(128|256)")

    @property
    def wide_stores(self) -> int:
        return self._count(r"STG.*\.(128|256)")

    @property
    def narrow(self) -> int:
        return self._count(r"(LDG|STG)") - self.wide_loads - self.wide_stores

    @property
    def generic(self) -> int:
        """Accesses to memory that could be global, shared or local, which the chip decides each time."""
        return self._count(r"(LD|ST|ATOM)(\.|$)")

    @property
    def multiply_adds(self) -> int:
        """Fused, in float32."""
        return self._count(r"FFMA")

    @property
    def multiplications(self) -> int:
        return self._count(r"FMUL")

    @property
    def doubles(self) -> int:
        """Instructions of double precision, conversions included."""
        return self._count(r"(D(ADD|MUL|FMA|SETP|SET|MNMX|MMA)(\.|$)|.*\.F64|MUFU.*64H)")

    def _count(self, pattern: str) -> int:
        return sum(count for opcode, count in self.opcodes.items() if re.match(pattern, opcode))


def kernels(cubin: Path, target: str) -> list[Kernel]:
    """The kernels of a cubin that compiled() made, or that a module has."""
    program = cuobjdump()
    said = cubin.with_suffix(".txt").read_text(encoding="utf-8") if cubin.with_suffix(".txt").is_file() else None
    usage = {
        function: (int(registers), int(stack))
        for function, registers, stack in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", _run(program, "--dump-resource-usage", cubin)
        )
    }
    found = []
    for text in _run(program, "-sass", cubin).split("Function : ")[1:]:
        function = text.partition("\n")[0].strip()
        placed = [(int(m[1], 16), m[3], (m[2] or "") + m[4]) for m in _INSTRUCTION.finditer(text)]
        code = [(opcode, operands) for _, opcode, operands in placed]
        spilled = sum(_local_bytes(opcode) for opcode, _ in code) if said is None else _spilled(function, said)
        if function not in usage:
            raise RuntimeError(f"cuobjdump tells no resource usage of {function}")
        found.append(
            Kernel(
                name=kernel_name(function),
                target=target,
                registers=usage[function][0],
                stack=usage[function][1],
                spilled=spilled,
                opcodes=Counter(opcode for opcode, _ in code),
                loads_in_flight=_loads_in_flight(code),
                loop=_loop(placed),
            )
        )
    if len(found) != len(usage):
        raise RuntimeError(f"cuobjdump shows {len(found)} of {len(usage)} kernels")
    return sorted(found, key=lambda kernel: kernel.name)


def _spilled(function: str, said: str) -> int:
    found = re.search(
        rf"Function properties for {re.escape(function)}\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    if found is None:
        raise RuntimeError(f"cuobjdump and ptxas do not say the same functions: {function}")
    return int(found[1]) + int(found[2])


def _local_bytes(opcode: str) -> int:
    if not opcode.startswith(("LDL", "STL")):
        return 0
    bits = re.search(r"\.[SU]?(8|16|64|128)\b", opcode)
    return int(bits[1]) // 8 if bits else 4


# /*0190*/  @!P0 LDG.E.128 R12, desc[UR4][R2.64+0x10] ;
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)
# Of a gradient: nobody reads it again.
_GRADIENT = re.compile(r"LDG\.E\.(EF\.(LTC128B\.)?)128")
_STOPS = re.compile(r"(BRA|BRX|JMP|CALL|RET|EXIT|BSYNC|BSSY|WARPSYNC|BAR)")


def _loop(code: Sequence[tuple[int, str, str]]) -> tuple[int, int]:
    """Of the loops that load gradients the one with the most wide loads, which is that with momentum. What was moved
    out of a loop and jumps back is a part of it."""
    place_of = {at: place for place, (at, _, _) in enumerate(code)}
    before: dict[int, list[int]] = {}
    backwards = []
    for place, (_, opcode, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        if target is not None and int(target[1], 16) in place_of:
            before.setdefault(place_of[int(target[1], 16)], []).append(place)
            if place_of[int(target[1], 16)] < place:
                backwards.append((place_of[int(target[1], 16)], place))
        is_always_taken = re.match(r"(BRA|EXIT|RET)(?!\.DIV)", opcode) and not re.search(r"\b!?U?P\d", operands)
        if not is_always_taken:
            before.setdefault(place + 1, []).append(place)
    best, most = (0, 0), 0
    for head, end in backwards:
        body, reached = {head, end}, [end]
        while reached:
            for other in before.get(reached.pop(), []):
                if other not in body:
                    body.add(other)
                    reached.append(other)
        opcodes = [code[place][1] for place in body]
        wide = sum(bool(re.match(r"LDG.*\.128", opcode)) for opcode in opcodes)
        gradients = sum(bool(_GRADIENT.match(opcode)) for opcode in opcodes)
        if gradients and min(body) == head and wide >= most:
            best, most = (len(body), gradients), wide
    return best


def _loads_in_flight(code: Iterable[tuple[str, str]]) -> int:
    most = 0
    under_way: set[int] = set()  # registers
    loads = 0
    for opcode, operands in code:
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        wide_load = re.match(r"LDG.*\.(128|256)", opcode)
        used = registers[1:] if wide_load else registers
        if _STOPS.match(opcode) or under_way.intersection(used):
            under_way, loads = set(), 0
        if wide_load:
            loads += 1
            under_way.update(range(registers[0], registers[0] + 4))
            most = max(most, loads)
    return most


STORAGES = ("float32", "float64", "float16", "bfloat16", "int8")
_WEIGHTS = ("parameter", "full", "split", "split24", "kahan")
_OF_KIND = re.compile(r"sgd_kernelILj(\d+)ELi(\d+)E")
_OTHER = re.compile(r"(general)_kernelILi(\d+)E|(norm)_kernelE")


def kernel_name(mangled: str) -> str:
    """The name that launches are reported under, or the mangled one where it is another kernel's."""
    if (parts := _OTHER.search(mangled)) is not None:
        return f"general_kernel<{parts[2]}>" if parts[1] else "norm_kernel<4096>"
    if (parts := _OF_KIND.search(mangled)) is None:
        return mangled
    code = int(parts[1])  # Kind::code() in csrc/plan/table.h
    param, momentum, average = (STORAGES[code >> place & 15] for place in (0, 4, 8))
    averages, stochastic, rounds, options = (code >> place & 1 for place in range(16, 20))
    if not options:
        words = ["opmath" if param.endswith("16") and not rounds else "torch"]
    else:
        words = ["options"]
        words += [_WEIGHTS[code >> 12 & 15]] if code >> 12 & 15 else []
        words += ["stochastic"] if stochastic else []
        words += [f"momentum {momentum}"] if momentum != param else []
        words += [f"average {average}"] if averages else []
    return f"sgd_kernel<{', '.join([param, *words, parts[2]])}>"


@functools.cache
def shipped(targets: tuple[str, ...] = TARGETS) -> dict[str, list[Kernel]]:
    """The kernels of csrc/cuda, for each target: as the module has them that was built of these sources ahead of time,
    else compiled."""
    with tempfile.TemporaryDirectory() as folder:
        cubins = _extracted(targets, Path(folder)) or compiled(sorted(CSRC.rglob("*.cu")), targets)
        pairs = [(cubin, target) for target in targets for cubin in cubins[target]]
        found: dict[str, list[Kernel]] = {target: [] for target in targets}
        with ThreadPoolExecutor(2) as pool:
            for (_, target), of_cubin in zip(pairs, pool.map(lambda pair: kernels(*pair), pairs), strict=True):
                found[target] += of_cubin
        return found


def _extracted(targets: Iterable[str], folder: Path) -> dict[str, list[Path]] | None:
    """The cubins of the module; None where it does not have them all."""
    from wd_fused.build import extension

    status = extension.status()
    if status.source != "ahead-of-time" or status.path is None or status.cuda is not None:
        return None
    found = {}
    for target in targets:
        own = folder / target
        own.mkdir()
        program = (cuobjdump(), "-xelf", f"{target}.cubin", status.path)
        subprocess.run(program, cwd=own, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
        found[target] = sorted(own.glob("*.cubin"))
    return found if all(found.values()) else None


# --- telling -----------------------------------------------------------------------------------------------------

COLUMNS = {
    "registers": "registers",
    "stack": "stack",
    "spilled": "spilled",
    "local": "local",
    "loads 128": "wide_loads",
    "stores 128": "wide_stores",
    "in flight": "loads_in_flight",
    "narrower": "narrow",
    "generic": "generic",
    "FFMA": "multiply_adds",
    "FP64": "doubles",
    "instructions": "instructions",
    "for 128": "for_128",
}


def table(of_target: Sequence[Kernel]) -> str:
    rows = [("kernel", *COLUMNS)]
    rows += [(kernel.name, *(str(getattr(kernel, name)) for name in COLUMNS.values())) for kernel in of_target]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


# --- the bandwidth at which instructions, not memory, would be the limit --------------------------------------------

# An H200: 132 multiprocessors of four schedulers, each an instruction of a warp in every cycle of 1,980 MHz; a copy in
# its memory moves 4.3 TB/s.
ISSUED = 132 * 4 * 1.98e9
MEMORY = 4.3e12
BEGIN, END = "<!-- begin: bandwidths -->", "<!-- end: bandwidths -->"
_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int8": 1}
_BESIDE = {"full": 4, "split": 2, "split24": 1}  # bytes beside the parameter; kahan: as many as the parameter


def bytes_for_128(name: str) -> int:
    """What a kernel that steps moves for 128 elements, by its name: the gradient is read, all else read and written."""
    storage, *words = name.partition("<")[2].removesuffix(">").split(", ")
    parameter = _BYTES[storage]
    stored = {kind: dtype for kind, _, dtype in (word.partition(" ") for word in words)}
    momentum = stored.get("momentum", storage)
    beside = [_BESIDE[word] for word in words if word in _BESIDE] + [parameter] * ("kahan" in words)
    both = parameter + _BYTES[momentum] + sum(beside) + (_BYTES[stored["average"]] if "average" in stored else 0)
    return 128 * (parameter + 2 * both) + 2 * 4 * (momentum == "int8")  # and a float32 scale


def bandwidths(of_target: Sequence[Kernel]) -> str:
    """A table in Markdown: of each kernel that steps, the bytes and instructions of 128 elements, and what follows."""
    lines = ["| kernel | bytes | instructions | TB/s | of 4.3 TB/s |", "|---|---|---|---|---|"]
    for kernel in of_target:
        if kernel.for_128 == 0 or kernel.name.endswith(", 32760>"):  # the same code as with the smaller parameter block
            continue
        moved = bytes_for_128(kernel.name)
        limit = ISSUED / kernel.for_128 * moved
        name = kernel.name.removeprefix("sgd_kernel<").removesuffix(", 4096>")
        lines.append(f"| {name} | {moved:,} | {kernel.for_128} | {limit / 1e12:.1f} | {limit / MEMORY:.1f}× |")
    return "\n".join(lines)


def page(text: str, of_target: Sequence[Kernel]) -> str:
    """A document with the table between its markers."""
    how = "<!-- made by `python -m bench.sass sm_90 --write docs/cuda.md`: not edited by hand -->"
    return f"{text.split(BEGIN)[0]}{BEGIN}\n{how}\n\n{bandwidths(of_target)}\n\n{END}{text.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=TARGETS, help=f"of nvcc; {' '.join(TARGETS)} if none is named")
    parser.add_argument("--write", metavar="FILE", type=Path, help="put the bandwidths of sm_90 into this document")
    arguments = parser.parse_args()
    targets = tuple(arguments.targets)
    try:
        print(f"{nvcc()} {' '.join(FLAGS)}\n{cuobjdump()}")
        found = shipped(targets)
    except (Missing, RuntimeError) as error:
        sys.exit(str(error))
    if arguments.write is not None:
        text = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(page(text, found["sm_90"]), encoding="utf-8")
        return
    for target, of_target in found.items():
        print(f"\n{target}\n{table(of_target)}")
    print(
        "\nstack, spilled: bytes of a thread. in flight: the most 128-bit loads under way before one is waited for. All"
        "\nothers but registers are counts of instructions. local: LDL, STL; generic: LD, ST; narrower: global accesses"
        "\nbelow 128 bits; FP64: double precision, conversions included; for 128: the most that a warp issues for 128"
        "\nelements."
    )


if __name__ == "__main__":
    main()
