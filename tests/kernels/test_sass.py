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

from bench import sass

ROOT = Path(__file__).resolve().parents[2]

WIDTH = {"float32": 4, "float64": 2, "float16": 8, "bfloat16": 8}  # elements of 16 bytes
BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int8": 1}
EXTRA = {"full": 4, "split": 2, "split24": 1, "kahan": 2}
THREADS = 256

PLAIN = tuple(
    f"{storage}, {numerics}, {size}"
    for storage in WIDTH
    for numerics in (("torch", "opmath") if storage.endswith("16") else ("torch",))
    for size in (4096, 32760)
)
# The kinds with options that have kernels of their own, csrc/cuda/cuda_launch.h, and the most instructions that a warp
# may issue for 128 elements on sm_90, whatever is on.
OPTIONS = {
    "float32": 120,
    "float32, average float32": 150,
    "float32, momentum bfloat16": 125,
    "float32, momentum int8": 350,
    "float64": 200,
    "float64, average float64": 250,
    "float16": 170,
    "float16, average float32": 200,
    "float16, full, momentum float32": 170,
    "float16, full, momentum float32, average float32": 170,
    "float16, kahan": 230,
    "bfloat16": 230,
    "bfloat16, average float32": 290,
    "bfloat16, average bfloat16": 290,
    "bfloat16, full, momentum float32": 170,
    "bfloat16, full, momentum float32, average float32": 170,
    "bfloat16, full": 170,
    "bfloat16, full, momentum int8": 420,
    "bfloat16, split, momentum float32": 200,
    "bfloat16, split, momentum float32, average float32": 200,
    "bfloat16, split, momentum int8": 420,
    "bfloat16, split24, momentum float32": 200,
    "bfloat16, split24, momentum int8": 420,
    "bfloat16, kahan": 230,
    "bfloat16, stochastic": 230,
    "bfloat16, stochastic, momentum float32": 230,
}
OF_PLAIN = {"float32": 58, "float64": 120, "float16": 108, "bfloat16": 108}  # float16 took 108 when they came


def with_options(kind: str) -> str:
    storage, *words = kind.split(", ")
    return f"sgd_kernel<{', '.join([storage, 'options', *words])}, 4096>"


def registers_for(blocks: int) -> int:
    """That a thread may have: a multiprocessor's 65,536 are given out in steps of 8 a thread."""
    return 65536 // (blocks * THREADS) // 8 * 8


@dataclasses.dataclass(frozen=True)
class Needed:
    """What the fast loops of a kernel take: 128-bit accesses of a piece, a number of fused multiply-adds an element."""

    loads: int
    stores: int
    in_flight: int
    multiply_adds: int
    blocks: int  # on a multiprocessor


def needed(kind: str) -> Needed:
    """Of a kernel by what stands between <>: csrc/cuda/cuda_kind.cuh."""
    storage, *words = kind.split(", ")
    # Gradient, parameter and momentum buffer, twice; then gradient and parameter without momentum; and a tile's two. A
    # step is weight decay, b, Nesterov's term and the parameter: two of them without momentum.
    if "options" not in words:
        once = WIDTH[storage]
        return Needed(2 * 3 + 2 * 2 + 2, 2 * 2 + 2, 4, 2 * once * 4 + 2 * once * 2, 4 if storage == "float32" else 3)
    operands = {"momentum": BYTES[storage]}
    for word in words:
        name, _, of = word.partition(" ")
        if name in ("momentum", "average"):
            operands[name] = BYTES[of]
        elif name in EXTRA:
            operands[name] = EXTRA[name]
    sizes = [16, *(WIDTH[storage] * bytes_ for bytes_ in operands.values())]
    wide = sum(size // 16 for size in sizes)
    blocks = 2 if 16 + sum(sizes) > 96 or (operands["momentum"] == 1 and storage == "bfloat16") else 3
    once = WIDTH[storage] * (5 + ("average" in operands))  # and l1
    return Needed(wide + 1 + 4, wide, min(wide + 1, 3), once, blocks)


def faults(kernel: sass.Kernel, kind: str) -> Iterator[str]:
    """What is wrong with a kernel of a kind."""
    wanted = needed(kind)
    in_double = kind.startswith("float64")
    at_least = {
        "128-bit loads": (kernel.wide_loads, wanted.loads),
        "128-bit stores": (kernel.wide_stores, wanted.stores),
        "128-bit loads in flight": (kernel.loads_in_flight, wanted.in_flight),
        "DFMA" if in_double else "FFMA": (
            kernel.opcodes["DFMA"] if in_double else kernel.multiply_adds,
            wanted.multiply_adds,
        ),
    }
    # Where a number is too near a tie, int8 momentum takes it out of an array: rare. Of a built module it is not told
    # whether local memory is an array or spilled.
    is_int8 = "int8" in kind
    has_three = kernel.target == "sm_90" or (kernel.target == "sm_80" and "split24" not in kind)
    at_most = {
        "registers": (kernel.registers, registers_for(wanted.blocks if has_three else 2)),
        "bytes of stack": (kernel.stack, 16 * is_int8),
        "bytes spilled": (kernel.spilled, 128 * is_int8),
        "local accesses": (kernel.local, 32 * is_int8),
        "generic accesses": (kernel.generic, 8 * is_int8),
        "FP64 instructions": (kernel.doubles, sys.maxsize if in_double else 0),
    }
    for what, (count, least) in at_least.items():
        if count < least:
            yield f"{kernel.target} {kernel.name}: {count} {what}, at least {least} are needed"
    for what, (count, most) in at_most.items():
        if count > most:
            yield f"{kernel.target} {kernel.name}: {count} {what}, at most {most} are allowed"


def kind_of(name: str) -> str:
    return name.removeprefix("sgd_kernel<").removesuffix(">").rpartition(", ")[0]


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
    of_kinds = {f"sgd_kernel<{kind}>" for kind in PLAIN} | {with_options(kind) for kind in OPTIONS}
    assert set(found) == of_kinds | {"general_kernel<4096>", "norm_kernel<4096>"}
    assert [fault for name in sorted(of_kinds) for fault in faults(found[name], kind_of(name))] == []
    for name, blocks in (("general_kernel<4096>", 2), ("norm_kernel<4096>", 4)):
        kernel = found[name]
        assert kernel.registers <= registers_for(blocks), name
        assert (kernel.stack, kernel.spilled, kernel.local) == (0, 0, 0), name
    assert found["norm_kernel<4096>"].generic == 0
    assert found["norm_kernel<4096>"].loads_in_flight >= 4


def test_instructions_for_128_elements() -> None:
    found = {kernel.name: kernel.for_128 for kernel in sass.shipped()["sm_90"]}
    most = {with_options(kind): count for kind, count in OPTIONS.items()}
    most |= {f"sgd_kernel<{kind}>": OF_PLAIN[kind.partition(",")[0]] for kind in PLAIN}
    assert {name: found[name] for name, count in most.items() if not 0 < found[name] <= count} == {}


def test_instructions_leave_room_for_more_than_the_memorys_bandwidth() -> None:
    for kernel in sass.shipped()["sm_90"]:
        if kernel.for_128 and "int8" not in kernel.name:
            limit = sass.ISSUED / kernel.for_128 * sass.bytes_for_128(kernel.name)
            assert limit >= 1.3 * sass.MEMORY, (kernel.name, limit)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd_kernel<float32, torch, 4096>", 128 * 20),
        ("sgd_kernel<bfloat16, options, full, momentum float32, average float32, 4096>", 128 * (2 + 4 + 8 + 8 + 8)),
        ("sgd_kernel<bfloat16, options, split24, momentum int8, 4096>", 128 * (2 + 4 + 2 + 2) + 8),
        ("sgd_kernel<bfloat16, options, kahan, 4096>", 128 * (2 + 4 + 4 + 4)),
    ],
)
def test_bytes_of_128_elements(name: str, expected: int) -> None:
    assert sass.bytes_for_128(name) == expected


def test_the_page_has_the_table_of_this_code() -> None:
    text = (sass.ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")
    assert sass.page(text, sass.shipped()["sm_90"]) == text, "python -m bench.sass sm_90 --write docs/cuda.md"


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
    found = list(faults(bad[name], "float32, torch"))
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
    assert list(faults(kernel, "float32, torch")) == []
    spare = kernel.wide_stores - needed("float32, torch").stores
    fewer = dataclasses.replace(kernel, opcodes=kernel.opcodes - Counter({"STG.E.128": spare + 1}))
    assert [text.partition(": ")[2] for text in faults(fewer, "float32, torch")] == [
        "5 128-bit stores, at least 6 are needed"
    ]
    assert any("DFMA" in text for text in faults(kernel, "float64, torch"))


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
