"""The machine code of the CUDA kernels, for the GPUs it is meant for: wide accesses, no spills, no double precision
where none is due. bench/sass.py reads it out of what nvcc makes of csrc/cuda/*.cu. Needs no GPU. Run by pytest.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import sass  # noqa: E402

WIDTH = {"float32": 4, "float64": 2, "float16": 8, "bfloat16": 8}  # elements of 16 bytes
THREADS = 256
BLOCKS = 3  # on a multiprocessor
FEWER_BLOCKS = {("sm_75", f"sgd_kernel<float16, torch, {size}>"): 2 for size in (4096, 32760)}


def registers_for(blocks: int) -> int:
    """That a thread may have: a multiprocessor's 65,536 are given out in steps of 8 a thread."""
    return 65536 // (blocks * THREADS) // 8 * 8


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step of one vector, or of one of its elements, takes: sgd_update.h, and unscaling before it."""

    loads: int
    stores: int
    multiply_adds: int
    multiplications: int


STEPS = (
    Step(loads=2, stores=1, multiply_adds=2, multiplications=1),  # no momentum: weight decay and p; unscaling
    Step(loads=2, stores=2, multiply_adds=3, multiplications=1),  # a first step: Nesterov's term too; b is written
    Step(loads=3, stores=2, multiply_adds=4, multiplications=2),  # momentum: b, too, and b·momentum, which is rounded
)
UNITS = 2 + 1  # in the code of each: update_all_units has two vectors at a time, then one
OF_TILE = 2  # wide loads of a CudaTile, 32 bytes


def needed(storages: list[str], name: str, per_element: bool) -> int:
    units = sum(WIDTH[storage] if per_element else 1 for storage in storages) * UNITS
    return units * sum(getattr(step, name) for step in STEPS)


def faults(kernel: sass.Kernel, storages: list[str]) -> Iterator[str]:
    """What is wrong with a kernel that steps rows of these storages."""
    in_float = [storage for storage in storages if storage != "float64"]
    in_double = [storage for storage in storages if storage == "float64"]
    at_least = {
        "128-bit loads": (kernel.wide_loads, needed(storages, "loads", False) + OF_TILE),
        "128-bit stores": (kernel.wide_stores, needed(storages, "stores", False)),
        # More than one vector's three: ptxas finds no registers for all six in bfloat16 with every rounding.
        "128-bit loads in flight": (kernel.loads_in_flight, 4),
        "FFMA": (kernel.multiply_adds, needed(in_float, "multiply_adds", True)),
        "FMUL": (kernel.multiplications, needed(in_float, "multiplications", True)),
        "DFMA": (kernel.opcodes["DFMA"], needed(in_double, "multiply_adds", True)),
        "DMUL": (kernel.opcodes["DMUL"], needed(in_double, "multiplications", True)),
    }
    at_most = {
        "registers": (kernel.registers, registers_for(FEWER_BLOCKS.get((kernel.target, kernel.name), BLOCKS))),
        "bytes of stack": (kernel.stack, 0),
        "bytes spilled": (kernel.spilled, 0),
        "local accesses": (kernel.local, 0),
        "generic accesses": (kernel.generic, 0),
        "FP64 instructions": (kernel.doubles, sys.maxsize if in_double else 0),
    }
    for what, (count, least) in at_least.items():
        if count < least:
            yield f"{kernel.target} {kernel.name}: {count} {what}, at least {least} are needed"
    for what, (count, most) in at_most.items():
        if count > most:
            yield f"{kernel.target} {kernel.name}: {count} {what}, at most {most} are allowed"


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    try:
        sass.nvcc()
        sass.cuobjdump()
    except sass.Missing as missing:
        pytest.skip(str(missing))


# --- what is shipped ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", sass.TARGETS)
def test_machine_code(target: str) -> None:
    found = {kernel.name: kernel for kernel in sass.shipped()[target]}
    numerics = {"float32": ("torch",), "float64": ("torch",)}  # where nothing lies between storage and opmath
    storages = {
        f"sgd_kernel<{storage}, {of}, {size}>": list(WIDTH) if storage == "mixed" else [storage]
        for storage in (*WIDTH, "mixed")
        for of in numerics.get(storage, ("torch", "opmath"))
        for size in (4096, 32760)
    }
    assert set(found) == set(storages) | set(TAIL)
    assert [
        fault for name, kernel in found.items() if name in storages for fault in faults(kernel, storages[name])
    ] == []


@dataclasses.dataclass(frozen=True)
class TailKernel:
    """What the machine code of a kernel for rows with a tail must and may have."""

    blocks: int  # on a multiprocessor
    loads: int = 0  # of 128 bits, at least
    stores: int = 0
    in_flight: int = 0
    multiply_adds: int = 0
    doubles: bool = False


# A vector of everything in float32, of which the code has two at a time, then one: gradient, parameter, momentum buffer
# and average; without the average; and both without momentum and in a first step, which reads no buffer.
_FLOAT_LOADS = UNITS * ((4 + 3) + 2 * (3 + 2)) + 2  # and most of a CudaTailTile
_FLOAT_STORES = UNITS * 2 * ((3 + 2) + (2 + 1))  # at least: zeros for the gradient come on top
# An element: weight decay, l1, w; with momentum b; Nesterov's term; the average's.
_FLOAT_MULTIPLY_ADDS = 4 * UNITS * (3 + 4 + 5 + 4 + 5 + 6)
TAIL = {
    f"{name}, {size}>" if "<" in name else f"{name}<{size}>": of
    for size in (4096, 32760)
    for name, of in {
        "tail_kernel<float32": TailKernel(3, _FLOAT_LOADS, _FLOAT_STORES, 6, _FLOAT_MULTIPLY_ADDS),
        # Each operand in one place, however it is stored. From sm_100 on ptxas has a wait between two of three loads.
        "tail_kernel<opmath float": TailKernel(4, 5 + 3, 4, 2, 4 * 27),
        "tail_kernel<any": TailKernel(2, 5 + 3, 4, 3, 4 * 27, doubles=True),
        "norm_kernel": TailKernel(4, 4 * (4 + 1), 0, 4, doubles=True),
    }.items()
}


@pytest.mark.parametrize("target", sass.TARGETS)
def test_machine_code_of_the_tail(target: str) -> None:
    for kernel in sass.shipped()[target]:
        if kernel.name not in TAIL:
            continue
        wanted = TAIL[kernel.name]
        name = f"{target} {kernel.name}"
        assert kernel.registers <= registers_for(wanted.blocks), name
        assert (kernel.stack, kernel.spilled, kernel.local, kernel.generic) == (0, 0, 0, 0), name
        assert kernel.wide_loads >= wanted.loads and kernel.wide_stores >= wanted.stores, name
        assert kernel.loads_in_flight >= wanted.in_flight, name
        assert kernel.multiply_adds >= wanted.multiply_adds, name
        assert wanted.doubles or kernel.doubles == 0, name


def test_the_table_shows_every_kernel() -> None:
    kernels = sass.shipped()["sm_90"]
    lines = sass.table(kernels).splitlines()
    assert [re.split(r"  +", line)[0] for line in lines] == ["kernel", *(kernel.name for kernel in kernels)]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert [int(cell) for cell in re.split(r"  +", lines[1])[1:]] == [
        getattr(kernels[0], name) for name in sass.COLUMNS.values()
    ]


# --- the check itself --------------------------------------------------------------------------------------------

# Each does something that no kernel here may.
BAD = """
template <int kValues>
__device__ __forceinline__ void keep_many(float* x) {
    float values[kValues];
    for (int i = 0; i < kValues; ++i) values[i] = x[threadIdx.x + i * 1024];
    __syncthreads();
    for (int i = 0; i < kValues; ++i) x[threadIdx.x + i * 1024] = values[kValues - 1 - i] * values[i];
}
extern "C" {
__global__ void __launch_bounds__(1024, 2) spills(float* x) { keep_many<64>(x); }
__global__ void many_registers(float* x) { keep_many<200>(x); }
__global__ void local_array(float* x, const int* order) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[order[i]] = x[i];
    for (int i = 0; i < 16; ++i) x[i] = values[order[i + 16]];
}
__global__ void in_double(float* x) { x[threadIdx.x] = static_cast<float>(x[threadIdx.x] * 1.1); }
__global__ void reciprocal_in_double(double* x) { x[threadIdx.x] = 1 / x[threadIdx.x]; }
__global__ void any_memory(float* x, int choice) {
    __shared__ float shared[1024];
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    float* either = threadIdx.x % choice == 0 ? shared : x;
    either[choice] += 1;
    __syncthreads();
    x[threadIdx.x] = shared[threadIdx.x];
}
__global__ void plain_formula(const float4* x, float4* y, float a) {
    const float4 value = x[threadIdx.x];
    float4 sum = y[threadIdx.x];
    sum.x = a * value.x + sum.x;
    sum.y = a * value.y + sum.y;
    sum.z = a * value.z + sum.z;
    sum.w = a * value.w + sum.w;
    y[threadIdx.x] = sum;
}
}
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, sass.Kernel]:
    folder = tmp_path_factory.mktemp("bad")
    source = folder / "bad.cu"
    source.write_text(BAD, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sass, "CACHE", folder)
        cubins = sass.compiled([source], ["sm_90"])
    return {kernel.name: kernel for kernel in sass.kernels(cubins["sm_90"][0], "sm_90")}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("spills", "bytes spilled"),
        ("spills", "local accesses"),
        ("many_registers", "registers"),
        ("local_array", "bytes of stack"),
        ("local_array", "local accesses"),
        ("in_double", "FP64 instructions"),
        ("reciprocal_in_double", "FP64 instructions"),
        ("any_memory", "generic accesses"),
        ("any_memory", "128-bit loads"),
        ("any_memory", "128-bit stores"),
        ("plain_formula", "128-bit loads in flight"),
        ("plain_formula", "FFMA"),  # none: contraction is off, a fused one must be written so
    ],
)
def test_a_bad_kernel_is_seen(bad: dict[str, sass.Kernel], name: str, fault: str) -> None:
    found = list(faults(bad[name], ["float32"]))
    assert any(re.search(rf": \d+ {fault}, ", text) for text in found), found


def test_the_counts_are_those_of_the_source(bad: dict[str, sass.Kernel]) -> None:
    formula = bad["plain_formula"]
    counts = (formula.wide_loads, formula.wide_stores, formula.narrow, formula.loads_in_flight)
    assert counts == (2, 1, 0, 2)
    assert (formula.multiply_adds, formula.multiplications, formula.opcodes["FADD"]) == (0, 4, 4)
    assert (formula.stack, formula.spilled, formula.local, formula.generic, formula.doubles) == (0, 0, 0, 0, 0)
    assert bad["many_registers"].narrow == 2 * 200


def test_a_kernel_that_lacks_one_access_is_seen() -> None:
    kernel = next(kernel for kernel in sass.shipped()["sm_90"] if kernel.name == "sgd_kernel<float32, torch, 4096>")
    assert list(faults(kernel, ["float32"])) == []
    spare = kernel.wide_stores - needed(["float32"], "stores", False)
    fewer = dataclasses.replace(kernel, opcodes=kernel.opcodes - Counter({"STG.E.128": spare + 1}))
    assert [text.partition(": ")[2] for text in faults(fewer, ["float32"])] == [
        "14 128-bit stores, at least 15 are needed"
    ]
    assert any("DFMA" in text for text in faults(kernel, ["float32", "float64"]))


# --- missing programs --------------------------------------------------------------------------------------------


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass.toolchain, "cuda_home", lambda: (None, "nothing found"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(sass.Missing, match=r"no nvcc \(nothing found\): install the CUDA toolkit"):
        sass.nvcc()
    with pytest.raises(sass.Missing, match=r"no cuobjdump .*: pip install triton"):
        sass.cuobjdump()
    monkeypatch.setattr(sys, "argv", ["bench.sass"])
    with pytest.raises(SystemExit, match="no nvcc"):
        sass.main()
