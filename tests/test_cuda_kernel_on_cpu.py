"""The CUDA kernels' own source, run on the CPU under AddressSanitizer and UBSan, bit for bit: the update against the
reference, rows with a tail against the CPU's loops.

csrc/sgd_cuda.cuh is compiled as C++ under cuda_on_cpu/cuda_on_cpu.h and linked with the table that the host cuts for a
GPU (csrc/cuda_table.cpp). A test writes cases to a file, cuda_on_cpu/run_cases.cpp steps each once, with every tensor's
memory in a malloc block of its own that ends with the tensor's last byte, and all of that memory is compared. Needs no
GPU and no CUDA toolkit. Run by pytest.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import math
import os
import random
import secrets
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import FLOATS, GRADIENT_LAYOUTS, HALVES, LAYOUTS, assert_same_bits, laid_out, memory, numbers
from torch import Tensor

from wd_fused import reference

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "tests/cuda_on_cpu/sgd_cuda_on_cpu.cpp",  # takes longest
    "tests/cuda_on_cpu/run_tail_cases.cpp",
    "tests/cuda_on_cpu/run_cases.cpp",
    *(f"csrc/cpu/{name}.cpp" for name in ("options_cpu", "half_cpu", "flat_cpu", "norm_cpu", "walk")),
    *(f"csrc/plan/{name}.cpp" for name in ("cuda_table", "options_table", "tensor_table")),
)
# -g1: lines for the stack traces of the sanitizers; all of -g takes a third longer to compile.
# -fno-strict-aliasing: that a vector of bytes is read as tiles is the GPU's business, and nvcc has no such rule.
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)

DTYPES = FLOATS + HALVES
STORAGE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # sgd_update.h's Storage
KIND = {torch.float32: 1, torch.float64: 2, torch.float16: 3, torch.bfloat16: 4}  # cuda_launch.h's ScalarKind
NUMERICS = ("torch", "opmath")
ORDERS = ("forwards", "backwards", "scattered")
FIRST, RUNNING = "first", "running"  # of a row in a group with momentum: does it fill its buffer, or update it?

# Around a vector's width (2, 4 or 8 elements), a warp's vectors, a warp's tile (1,024) and a block's (4,096, 8,192 or
# 16,384); the last is several tiles for all.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 100, 127, 129, 255, 257, 511, 1023, 1024, 1025, 2049)
LARGE_SIZES = (4095, 4096, 4097, 8191, 8192, 8193, 16383, 16384, 16385, 40001)


# --- cases -------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """lr and weight_decay that are tensors are read in "device" memory."""

    lr: float | Tensor = 0.1
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float | Tensor = 0.0
    nesterov: bool = False
    maximize: bool = False

    def options(self) -> dict[str, Any]:
        """As the reference takes them."""
        return {name: value.item() if isinstance(value, Tensor) else value for name, value in vars(self).items()}


@dataclass
class Row:
    """A tensor to step. Each operand's whole storage becomes a block of memory; operands may share one."""

    param: Tensor
    gradient: Tensor | None
    buffer: Tensor | None = None
    group: int = 0
    momentum: str = RUNNING
    off: tuple[int, int, int] = (0, 0, 0)  # elements that the storages begin behind an address of 16 bytes' alignment
    serial: bool = False
    as_strided: bool = False  # even where it is flat

    def operands(self) -> Iterator[tuple[Tensor, int]]:
        for tensor, off in zip((self.param, self.gradient, self.buffer), self.off, strict=True):
            if tensor is not None:
                yield tensor, off


@dataclass
class Case:
    rows: list[Row]
    groups: list[Group] = field(default_factory=lambda: [Group()])
    numerics: str = "torch"
    order: str = "forwards"
    grad_scale: float | None = None
    found_inf: float | None = None
    name: str = ""

    def step(self) -> None:
        """By the reference, in place."""
        if self.found_inf:
            return
        # In float, as torch.amp.GradScaler does it.
        inverse = None if self.grad_scale is None else (1 / torch.tensor(self.grad_scale, dtype=torch.float32))
        # The rows that may share memory run last, in order.
        for row in sorted(self.rows, key=lambda row: row.serial):
            if row.gradient is None or row.param.numel() == 0:
                continue
            group = self.groups[row.group]
            gradient = row.gradient
            if inverse is not None:
                opmath = reference.OPMATH.get(gradient.dtype, gradient.dtype)
                gradient = gradient.to(opmath) * inverse.to(opmath)
                gradient = gradient.to(row.gradient.dtype) if self.numerics == "torch" else gradient
            buffers = [row.buffer if row.momentum == RUNNING else None]
            reference.sgd([row.param], [gradient], buffers, **group.options(), numerics=self.numerics)
            if group.momentum != 0 and row.momentum == FIRST:
                row.buffer.copy_(buffers[0])


@dataclass
class Launch:
    kernel: str  # empty: it had nothing to do
    blocks: int
    rows: int


class Memory:
    """The storages of a case, each once."""

    def __init__(self, case: Case) -> None:
        self.tensors: list[Tensor] = []
        self.offs: list[int] = []
        self.index: dict[int, int] = {}  # by address
        for row in case.rows:
            for tensor, off in row.operands():
                self.add(tensor, off)
        for group in case.groups:
            for value in (group.lr, group.weight_decay):
                if isinstance(value, Tensor):
                    self.add(value, 0)
        self.scalars = {
            name: None if value is None else torch.tensor([value], dtype=torch.float32)
            for name, value in (("grad_scale", case.grad_scale), ("found_inf", case.found_inf))
        }
        for scalar in self.scalars.values():
            if scalar is not None:
                self.add(scalar, 0)

    def add(self, tensor: Tensor, off: int) -> None:
        # An empty storage has no address to know it by, and nothing to share.
        address = tensor.untyped_storage().data_ptr() or -id(tensor)
        if address not in self.index:
            self.index[address] = len(self.tensors)
            self.tensors.append(memory(tensor))
            self.offs.append(off * tensor.itemsize)

    def place(self, tensor: Tensor | None) -> tuple[int, int]:
        if tensor is None:
            return -1, 0
        address = tensor.untyped_storage().data_ptr() or -id(tensor)
        return self.index[address], tensor.storage_offset() * tensor.itemsize


class Encoder:
    """Writes a case as run_cases.cpp reads it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def integers(self, *values: int) -> None:
        self.parts.append(struct.pack(f"={len(values)}q", *values))

    def case(self, case: Case, memory: Memory) -> None:
        self.integers(NUMERICS.index(case.numerics), ORDERS.index(case.order), len(memory.tensors))
        for tensor, off in zip(memory.tensors, memory.offs, strict=True):
            content = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""
            self.integers(off, len(content))
            self.parts.append(content)
        for scalar in memory.scalars.values():
            self.integers(*memory.place(scalar))
        self.integers(len(case.groups))
        for group in case.groups:
            options = group.options()
            values = (options[name] for name in ("lr", "momentum", "dampening", "weight_decay"))
            self.parts.append(struct.pack("=4d", *values))
            self.integers(group.nesterov, group.maximize)
            for value in (group.lr, group.weight_decay):
                on_device = isinstance(value, Tensor)
                self.integers(KIND[value.dtype] if on_device else 0, *memory.place(value if on_device else None))
        self.integers(len(case.rows))
        for row in case.rows:
            self.row(row, case.groups[row.group], memory)

    def row(self, row: Row, group: Group, memory: Memory) -> None:
        momentum = 0 if group.momentum == 0 else 1 if row.momentum == FIRST else 2
        self.integers(STORAGE[row.param.dtype], row.param.numel(), row.group, momentum, row.serial)
        for tensor in (row.param, row.gradient, row.buffer):
            self.integers(*memory.place(tensor))
        self.integers(row.param.dim(), not row.as_strided, *row.param.shape)
        for tensor in (row.param, row.gradient, row.buffer):
            self.integers(*(row.param if tensor is None else tensor).stride())


class Program:
    """The compiled run_cases."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder

    def start(self, *arguments: object) -> str:
        # Whether memory leaks is not the question, and cannot be asked under a debugger or in some containers.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        done = subprocess.run(
            [self.path, *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment, text=True, errors="replace", timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    def step(self, cases: Sequence[Case]) -> list[list[Launch]]:
        """Steps every case, and compares all memory with what the reference makes of it."""
        encoder = Encoder()
        encoder.integers(len(cases))
        memories = [Memory(case) for case in cases]
        for case, of_case in zip(cases, memories, strict=True):
            encoder.case(case, of_case)
        path = self.folder / "cases"
        path.write_bytes(b"".join(encoder.parts))
        result_path = self.folder / "results"
        self.start(path, result_path)
        results = bytearray(result_path.read_bytes())
        at = 0

        def integer() -> int:
            nonlocal at
            at += 8
            return int(struct.unpack_from("=q", results, at - 8)[0])

        launches = []
        for case, of_case in zip(cases, memories, strict=True):
            launches.append([])
            for _ in range(integer()):
                length = integer()
                at += length
                launches[-1].append(Launch(results[at - length : at].decode(), integer(), integer()))
            expected = copy.deepcopy(case)
            expected.step()
            names = dict(_names(case, of_case))
            for i, other in enumerate(Memory(expected).tensors):
                ours = torch.empty_like(other)
                if other.nbytes:
                    ctypes.memmove(ours.data_ptr(), bytes(results[at : at + other.nbytes]), other.nbytes)
                at += other.nbytes
                assert_same_bits(ours, other, f"{case.name}: {names.get(i, 'a scalar')}")
        assert at == len(results)
        return launches


def _names(case: Case, of_case: Memory) -> Iterator[tuple[int, str]]:
    for r, row in enumerate(case.rows):
        what = f"row {r} ({row.param.dtype}, {list(row.param.shape)}, {row.momentum}, off {row.off})"
        for name, tensor in (("parameter", row.param), ("gradient", row.gradient), ("momentum buffer", row.buffer)):
            if tensor is not None:
                yield of_case.place(tensor)[0], f"{name} of {what}"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of run_cases and run_tail_cases, which share most of what takes long to compile."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")

    def compiled(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [compiler, *FLAGS, *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n", encoding="utf-8")
    done = compiled(probe, "-o", folder / "probe")
    if done.returncode != 0 or subprocess.run([folder / "probe"], check=False).returncode != 0:
        pytest.skip(f"{compiler} has no AddressSanitizer or no UBSan here: {done.stdout.strip()[-200:]}")
    commands = [("-c", "-Icsrc", source, "-o", folder / f"{Path(source).stem}.o") for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda command: compiled(*command), commands):
            assert done.returncode == 0, done.stdout
    for name, other in (("run_cases", "run_tail_cases"), ("run_tail_cases", "run_cases")):
        objects = [folder / f"{Path(source).stem}.o" for source in SOURCES if Path(source).stem != other]
        done = compiled(*objects, "-o", folder / name)
        assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def program(programs: Path) -> Program:
    return Program(programs / "run_cases", programs)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch: threads that wait for each other take longer than these tensors do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def torch_fuses_multiply_add() -> None:
    # (1 + e)(1 + e) - 1 = 2e + e², whose e² is lost where the product is rounded first.
    e = 2.0**-12
    x, minus_one = torch.full((64,), 1 + e), torch.full((64,), -1.0)
    if (torch.add(minus_one, x, alpha=1 + e) == 2 * e).any():
        pytest.skip("torch multiplies and adds with two roundings here, a GPU with one: nothing to compare with")


class Source:
    """Numbers from a seed: pieces of one long tensor a dtype, because thousands of small ones take long to draw."""

    POOL = 2**17

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.choose = random.Random(seed)
        self.pools: dict[torch.dtype, Tensor] = {}

    def tensor(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        if dtype not in self.pools:
            self.pools[dtype] = numbers((self.POOL,), dtype, self.generator, special=0.02)
        begin = self.choose.randrange(self.POOL - math.prod(shape))
        return self.pools[dtype][begin : begin + math.prod(shape)].clone().view(shape)

    def row(self, shape: int | tuple[int, ...], dtype: torch.dtype, momentum: str = RUNNING, **of_row: Any) -> Row:
        return Row(*(self.tensor(shape, dtype) for _ in range(3)), momentum=momentum, **of_row)


# Options that take every branch of the update. The momentum buffers of the first two are not to be touched.
GROUPS = (
    Group(lr=0.1),
    Group(lr=0.1, weight_decay=0.01, maximize=True),
    Group(lr=0.1, momentum=0.9, weight_decay=5e-4),
    Group(lr=1 / 3, momentum=0.9, dampening=0.3, maximize=True),
    Group(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
)


def kernels(launches: Sequence[Launch]) -> list[str]:
    return [launch.kernel for launch in launches]


# --- sizes and addresses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_and_tiles(program: Program, dtype: torch.dtype, numerics: str) -> None:
    source = Source(1)
    cases = []
    for order in ORDERS:
        sizes = SIZES + (LARGE_SIZES if order == "scattered" else ())
        rows = [
            source.row(size, dtype, momentum, group=g)
            for size in sizes
            for g, group in enumerate(GROUPS)
            for momentum in ((RUNNING, FIRST) if group.momentum and size < 10_000 else (RUNNING,))
        ]
        # Small ones not all at the end.
        rows = rows[::2] + rows[1::2]
        cases.append(Case(rows, list(GROUPS), numerics, order, name=f"{order}"))
    for launches in program.step(cases):
        # Nothing lies between storage and opmath in float32 and float64: both numerics are one kernel.
        used = numerics if dtype in (torch.float16, torch.bfloat16) else "torch"
        assert kernels(launches) == [f"sgd_kernel<{str(dtype)[6:]}, {used}, 4096>"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination_of_misaligned_operands(program: Program, dtype: torch.dtype) -> None:
    """Each operand at each distance from 16 bytes' alignment."""
    source = Source(2)
    sizes = itertools.cycle((1, 2, 7, 9, 31, 100, 130, 517))
    offs = list(itertools.product(range(16 // dtype.itemsize), repeat=3))
    cases = []
    for numerics, momentum, group in (("torch", RUNNING, GROUPS[2]), ("opmath", FIRST, GROUPS[4])):
        rows = [source.row(next(sizes), dtype, momentum, off=off) for off in offs]
        cases.append(Case(rows, [group], numerics, name=f"{numerics}, {momentum}"))
    # Without a momentum buffer two operands are left.
    pairs = sorted({(p, g, 0) for p, g, _ in offs})
    rows = [
        Row(*(source.tensor(size, dtype) for _ in range(2)), off=off) for size, off in zip(sizes, pairs, strict=False)
    ]
    cases.append(Case(rows, [GROUPS[1]], order="backwards", name="no momentum"))
    program.step(cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_rows_of_several_tiles(program: Program, dtype: torch.dtype) -> None:
    source = Source(3)
    last = 16 // dtype.itemsize - 1
    offs = [(0, 0, 0), (1, 1, 1), (last, last, last), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, last, 1)]
    sizes = itertools.cycle((40_001, 16_385, 8_193, 1_025))
    rows = [source.row(next(sizes), dtype, momentum, off=off) for off in offs for momentum in (RUNNING, FIRST)]
    program.step([Case(rows, [GROUPS[4]], numerics) for numerics in NUMERICS])


def test_more_elements_than_fit_into_32_bits(program: Program) -> None:
    """All tiles' places, and the last tile stepped, in memory of which nothing else is touched."""
    assert program.start("--many-elements") == "5 billion elements cut into tiles\n"


# --- rows that are not stepped, or not yet -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_rows_missing_gradients_and_first_steps(program: Program, dtype: torch.dtype) -> None:
    source = Source(4)
    sizes = (0, 1, 40, 0, 1500, 9000, 17, 0, *(8,) * 9)
    rows = [source.row(size, dtype, (FIRST, RUNNING)[i % 2], group=i % 3) for i, size in enumerate(sizes)]
    for row in rows[::3]:
        row.gradient = None
    groups = [GROUPS[0], GROUPS[2], GROUPS[4]]
    # As on the first step of a model of which a part is frozen: no buffer yet where there is no gradient.
    bare = [source.row(size, dtype, FIRST) for size in (5, 2000, 3)]
    bare[1].gradient = bare[1].buffer = None
    launches = program.step([Case(rows, groups, name="mixed"), Case(bare, [GROUPS[2]], name="no buffer")])
    assert [len(of_case) for of_case in launches] == [1, 1]
    assert launches[0][0].rows == 14  # the empty ones are not in it


def test_nothing_to_do_is_no_launch(program: Program) -> None:
    source = Source(5)
    without = source.row(100, torch.float32)
    without.gradient = None
    empty = Case([source.row(0, torch.float32), source.row((3, 0, 2), torch.float32)], [GROUPS[2]])
    launches = program.step([Case([without], [GROUPS[2]]), empty, Case([], [GROUPS[2]]), Case([], [])])
    assert [kernels(of_case) for of_case in launches] == [[""], [], [], []]


# --- many rows and groups ----------------------------------------------------------------------------------------


def test_five_thousand_tensors_of_several_launches(program: Program) -> None:
    source = Source(6)
    rows = [source.row(1 + i % 9, torch.float32, (FIRST, RUNNING)[i % 7 > 0], group=i % 2) for i in range(5000)]
    for row in rows[::11]:
        row.gradient = None
    rows[2500] = source.row(20_000, torch.float32)
    (launches,) = program.step([Case(rows, [GROUPS[2], GROUPS[4]])])
    assert sum(launch.rows for launch in launches) == 5000
    assert kernels(launches) == ["sgd_kernel<float32, torch, 32760>"] * 2


@pytest.mark.parametrize("numerics", NUMERICS)
def test_a_group_a_tensor(program: Program, numerics: str) -> None:
    """Hyperparameters, all different, in the parameters of small and large launches."""
    cases = []
    for count in (9, 82, 83, 84, 700):  # 84 is about what a small launch holds, 681 what a large one does
        source, choose = Source(count), random.Random(count)
        groups, rows = [], []
        for i in range(count):
            nesterov = choose.random() < 0.3
            groups.append(
                Group(
                    lr=choose.uniform(0, 1),
                    momentum=choose.choice((0.0, choose.uniform(0, 1))) or 0.5 * nesterov,
                    dampening=0.0 if nesterov else choose.uniform(0, 1),
                    weight_decay=choose.choice((0.0, choose.uniform(0, 1))),
                    nesterov=nesterov,
                    maximize=choose.random() < 0.5,
                )
            )
            rows.append(source.row(choose.choice((1, 6, 33)), torch.bfloat16, choose.choice((FIRST, RUNNING)), group=i))
        cases.append(Case(rows, groups, numerics, name=f"{count} groups"))
    launches = program.step(cases)
    small, large = (f"sgd_kernel<bfloat16, {numerics}, {size}>" for size in (4096, 32760))
    assert kernels(launches[0]) == [small]
    assert kernels(launches[-1])[0] == large and len(launches[-1]) > 1
    # All of the words before the last launch are in use.
    for of_case in launches:
        for launch in of_case[:-1]:
            assert launch.rows * 6 > (32760 - 48) // 8 - 6


@pytest.mark.parametrize("numerics", NUMERICS)
def test_all_dtypes_in_one_launch(program: Program, numerics: str) -> None:
    source = Source(7)
    rows = [
        source.row(size, dtype, momentum, group=g)
        for size in (1, 5, 130, 1025, 8193, 17_000)
        for g in range(len(GROUPS))
        for dtype in DTYPES
        for momentum in ((RUNNING, FIRST) if GROUPS[g].momentum else (RUNNING,))
    ]
    case = Case(rows, list(GROUPS), numerics, "scattered")
    many = [source.row(3, DTYPES[i % 4], group=i % 5) for i in range(900)]
    launches = program.step([case, Case(many, list(GROUPS), numerics)])
    assert [kernels(of_case) for of_case in launches] == [
        [f"sgd_kernel<mixed, {numerics}, 4096>"],
        [f"sgd_kernel<mixed, {numerics}, 32760>"],
    ]


# --- strides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(program: Program, dtype: torch.dtype) -> None:
    source = Source(8)
    shapes = ((7,), (17, 5), (2, 3, 5, 7), (4, 3, 5), (1, 33, 1), (8, 3, 3, 3), (2, 1, 3, 2, 4))
    rows = []
    for shape in shapes:
        for i, layout in enumerate(LAYOUTS):
            for gradient_layout in (
                GRADIENT_LAYOUTS[(i + 1) % len(LAYOUTS)],
                *GRADIENT_LAYOUTS[len(LAYOUTS) :],
                layout,
            ):
                rows.append(
                    Row(
                        laid_out(source.tensor(shape, dtype), layout),
                        laid_out(source.tensor(shape, dtype), gradient_layout),
                        laid_out(source.tensor(shape, dtype), LAYOUTS[(i + len(rows)) % len(LAYOUTS)]),
                        momentum=(RUNNING, FIRST)[len(rows) % 2],
                        group=len(rows) % len(GROUPS),
                    )
                )
    # Dimensions that a plan would have joined; a scalar has none.
    rows += [source.row(shape, dtype, as_strided=True, group=2) for shape in ((), (5,), *shapes)]
    program.step([Case(rows, list(GROUPS), numerics, order) for numerics, order in zip(NUMERICS, ORDERS, strict=False)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_of_several_tiles(program: Program, dtype: torch.dtype) -> None:
    source = Source(9)
    rows = []
    for shape, layout, gradient_layout in (
        ((129, 257), "reversed", "contiguous"),
        ((40_001,), "column gaps", "expanded"),
        ((3, 5, 1031), "rotated", "expanded last"),
        ((2, 5, 83, 21), "channels_last", "row gaps"),
    ):
        row = source.row(shape, dtype, group=len(rows) % 2)
        row.param, row.gradient = laid_out(row.param, layout), laid_out(row.gradient, gradient_layout)
        rows.append(row)
    program.step([Case(rows, [GROUPS[4], GROUPS[2]], numerics) for numerics in NUMERICS])


# --- memory that operands share ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_that_is_its_parameter(program: Program, dtype: torch.dtype) -> None:
    source = Source(10)
    rows = []
    for size in (1, 9, 100, 1025, 20_001):
        for off in (0, 1):
            row = source.row(size, dtype, (RUNNING, FIRST)[off], off=(off, off, 0))
            row.gradient = row.param.view(-1)
            rows.append(row)
    program.step([Case(rows, [group], order=order) for group in GROUPS for order in ORDERS])


def test_rows_that_share_memory_run_in_order_in_launches_of_their_own(program: Program) -> None:
    source = Source(11)
    base, buffer = source.tensor(3000, torch.float32), source.tensor(2000, torch.float32)
    shared = [
        Row(base[i * 500 :][:2000], source.tensor(2000, torch.float32), buffer, serial=True, group=i % 2)
        for i in range(3)
    ]
    apart = [source.row(700, torch.float32) for _ in range(3)]
    rows = [shared[0], apart[0], shared[1], apart[1], apart[2], shared[2]]
    (launches,) = program.step([Case(rows, [GROUPS[2], GROUPS[4]])])
    assert [launch.rows for launch in launches] == [3, 1, 1, 1]


# --- scalars in device memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KIND, ids=str)
def test_lr_and_weight_decay_read_on_the_device(program: Program, kind: torch.dtype) -> None:
    """With numbers that float32 and the halves must round, and that are subnormal there; and with 0 and infinity."""
    source, generator = Source(12), torch.Generator().manual_seed(12)
    cases = []
    for _ in range(12):
        exponents = torch.randint(-140, 20, (2,), generator=generator)
        lr, wd = (torch.rand(2, generator=generator, dtype=torch.float64) * torch.exp2(exponents.double())).to(kind)
        numerics = NUMERICS[len(cases) % 2]
        groups = [
            Group(lr=lr.clone(), weight_decay=wd.clone(), momentum=0.9),
            Group(lr=lr.clone(), weight_decay=0.1),
            Group(lr=0.1, weight_decay=wd.clone(), momentum=0.9, nesterov=True, maximize=True),
            Group(lr=0.1, weight_decay=0.0 * wd),
        ]
        rows = [source.row(33, dtype, group=g) for dtype in DTYPES for g in range(len(groups))]
        if len(cases) % 3 == 0:
            rows = [row for row in rows if row.param.dtype == DTYPES[len(cases) // 3]]
        cases.append(Case(rows, groups, numerics, name=f"lr {lr.item()}, weight decay {wd.item()}"))
    infinite = torch.tensor(float("inf"), dtype=kind)
    rows = [source.row(33, dtype) for dtype in DTYPES]
    cases.append(Case(rows, [Group(lr=infinite, weight_decay=infinite.clone())], name="infinite"))
    program.step(cases)


def test_a_weight_decay_on_the_device_too_small_for_float32_is_still_added(program: Program) -> None:
    """0·p makes 0 of −0 and NaN of infinity."""
    rows = [
        Row(torch.tensor([1.0, float("inf"), 2.0]), torch.tensor([-0.0, 1.0, -0.0]), torch.zeros(3), momentum=FIRST)
    ]
    weight_decay = torch.tensor(1e-46, dtype=torch.float64)
    program.step([Case(rows, [Group(lr=1.0, momentum=0.9, weight_decay=weight_decay)])])


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_gradients(program: Program, dtype: torch.dtype, numerics: str) -> None:
    source = Source(13)
    cases = []
    for i, grad_scale in enumerate((65536.0, 1.0, 3.0, 1e-3, 1.7e38, 2.0**-140)):
        rows = [source.row(size, dtype, group=g) for size in (1, 9, 130, 2000) for g in range(len(GROUPS))]
        if grad_scale > 1:
            for row in rows:
                row.gradient *= grad_scale
        case = Case(rows, list(GROUPS), numerics, grad_scale=grad_scale, name=f"grad_scale {grad_scale}")
        case.found_inf = (None, 0.0)[i % 2]
        cases.append(case)
    program.step(cases)


@pytest.mark.parametrize("found_inf", [1.0, 2.0, float("inf"), float("nan")])
def test_an_overflow_writes_nothing(program: Program, found_inf: float) -> None:
    """torch adds up what was found; anything but 0 is an overflow."""
    source = Source(14)
    rows = [source.row(size, dtype, FIRST, group=g) for size in (9, 2000) for dtype in DTYPES for g in range(5)]
    untouched = copy.deepcopy(rows)
    program.step([Case(rows, list(GROUPS), grad_scale=2.0, found_inf=found_inf)])
    for row, before in zip(rows, untouched, strict=True):  # the test's own expectation: the reference did nothing
        assert_same_bits(row.param, before.param, "parameter")


# --- random ------------------------------------------------------------------------------------------------------


def random_case(seed: int) -> Case:
    choose, source = random.Random(seed), Source(seed)

    def scalar(value: float) -> float | Tensor:
        return choose.choice((value, value, torch.tensor(value, dtype=choose.choice(DTYPES))))

    groups = []
    for _ in range(choose.randint(1, 6)):
        nesterov = choose.random() < 0.4
        groups.append(
            Group(
                lr=scalar(choose.choice((0.1, 1.0, choose.uniform(0, 2)))),
                momentum=choose.choice((0.9, choose.uniform(0.01, 1))) if nesterov else choose.choice((0.0, 0.9)),
                dampening=0.0 if nesterov else choose.choice((0.0, choose.uniform(-1, 2))),
                weight_decay=scalar(choose.choice((0.0, 5e-4, choose.uniform(0, 2)))),
                nesterov=nesterov,
                maximize=choose.random() < 0.5,
            )
        )
    dtypes = choose.choice((DTYPES, *((dtype,) for dtype in DTYPES)))
    rows = []
    for _ in range(choose.choice((0, 1, 2, 10, 60, 60, 700))):
        dtype = choose.choice(dtypes)
        shape: tuple[int, ...] = (choose.choice((0, choose.choice(SIZES), choose.randint(1, 300))),)
        if choose.random() < 0.03:
            shape = (choose.choice((*LARGE_SIZES, choose.randint(1, 20_000))),)
        if choose.random() < 0.2:
            shape = tuple(choose.randint(0 if choose.random() < 0.1 else 1, 9) for _ in range(choose.randint(0, 4)))
        row = source.row(shape, dtype, choose.choice((FIRST, RUNNING, RUNNING)), group=choose.randrange(len(groups)))
        if choose.random() < 0.25:
            row.param = laid_out(row.param, choose.choice(LAYOUTS))
            row.gradient = laid_out(row.gradient, choose.choice(GRADIENT_LAYOUTS))
            row.buffer = laid_out(row.buffer, choose.choice(LAYOUTS))
            row.as_strided = choose.random() < 0.2
        width = 16 // dtype.itemsize
        off = choose.randrange(width)
        row.off = choose.choice(((0, 0, 0), (off, off, off), tuple(choose.randrange(width) for _ in range(3))))
        if choose.random() < 0.1:
            row.gradient = None
        rows.append(row)
    return Case(
        rows,
        groups,
        numerics=choose.choice(NUMERICS),
        order=choose.choice(ORDERS),
        grad_scale=choose.choice((None, None, 65536.0, choose.uniform(0.1, 9))),
        found_inf=choose.choice((None, 0.0, 0.0, 0.0, 1.0)),
        name=f"random_case({seed})",
    )


def test_random_cases(program: Program) -> None:
    seed = secrets.randbelow(2**31)
    print(f"random_case({seed}) to random_case({seed + 49})")
    program.step([random_case(seed + i) for i in range(50)])


# --- scalars as integers -----------------------------------------------------------------------------------------


def test_conversions_of_scalars_are_the_processors(program: Program) -> None:
    """to_opmath<float> of a double's bits: every power of two, ties, subnormals, a million random numbers of each of
    three kinds, and what lies next to them. And a gradient's unscaling."""
    seed = secrets.randbelow(2**31)
    said = program.start("--conversions", seed)
    assert "numbers and their neighbours converted" in said, f"seed {seed}"


# --- the comparison itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["param", "gradient", "buffer"])
def test_an_access_behind_a_tensor_is_seen(program: Program, what: str) -> None:
    case = Case([Source(15).row(33, torch.float16)], [GROUPS[2]])
    memory = Memory(case)
    block, _ = memory.place(getattr(case.rows[0], what))
    memory.tensors[block] = memory.tensors[block][:-1]  # the kernel is told of 33 elements
    encoder = Encoder()
    encoder.integers(1)
    encoder.case(case, memory)
    path = program.folder / "cases"
    path.write_bytes(b"".join(encoder.parts))
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):
        program.start(path, program.folder / "results")


def test_a_planted_difference_of_one_unit_is_seen(program: Program) -> None:
    case = Case([Source(16).row(40, torch.float32, group=0)], [Group(momentum=0.9)])
    step: Callable[[], None] = Case.step

    def other(self: Case) -> None:
        step(self)  # type: ignore[call-arg]
        self.rows[0].buffer.view(torch.int32)[39] ^= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "step", other)
        with pytest.raises(
            AssertionError, match=r"momentum buffer of row 0 .*1 of 40 elements differ, first at \(39,\)"
        ):
            program.step([case])


# --- rows with a tail --------------------------------------------------------------------------------------------


def test_random_rows_with_a_tail_are_stepped_as_the_cpus_loops_step_them(programs: Path) -> None:
    """Sizes around units and tiles, odd addresses, strides, every storage, missing gradients, shuffled threads."""
    run_tail_cases = Program(programs / "run_tail_cases", programs)
    for seed in (1, secrets.randbits(40)):
        print(f"run_tail_cases {seed} 150")
        assert "150 cases" in run_tail_cases.start(seed, 150)
