"""What the tests of the Triton backend share: a stand-in for the GPU behind its launcher, the two readers of a step,
parameters and their twins. Used by test_triton_plan.py, test_triton_numbers.py and test_triton_choice.py.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import quick_interpreter
import torch
from plan_support import OPTIONS, parameters, twins
from strategies import assert_same_bits
from torch import Tensor, nn

from wd_fused import FusedSGD, backends, extension

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")


def kernels(name: str) -> Any:
    """A module of the Triton backend."""
    backends.triton_kernels()
    return importlib.import_module(f"wd_fused.triton_kernels.{name}")


launcher, device_step = kernels("launcher"), kernels("device_step")


# --- what stands for the GPU -------------------------------------------------------------------------------------


class Memory(NamedTuple):
    words: Tensor
    number: int  # what is brought first has 0
    brought_by: int
    streams: set[int]  # that may read it
    graph: list[Any] | None  # whose replay fills it


class Gpu:
    """Stands for what launcher.py does with a GPU: memory of its own, streams, and a graph that is being captured.

    What is brought there and launched is done at once, or put into `graph` where that is a list: replay() does it. A
    launch that reads what it may not is an AssertionError: memory that came by another stream and had no note_use(),
    that only the replay of a graph fills, or, in a capture, that is not kept for the graph.
    """

    def __init__(self) -> None:
        self.stream = 1
        self.graph: list[Callable[[], object]] | None = None
        self.tables: list[Any] = []  # made
        self.brought: list[str] = []  # "table" or "words"
        self.words: list[int] = []  # those brought last
        self.noted = 0
        self.is_idle = False  # it runs no kernel
        self.kernels: list[str] = []  # asked for
        self.launched: list[tuple[str, int]] = []  # kernel and programs
        self.before: Callable[[str], None] = lambda what: None  # called before anything is done: may raise
        self._memory: dict[int, Memory] = {}  # by address
        self._kept: list[tuple[list[Any], Tensor]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        make_table, launcher_of = device_step.table, launcher.launcher_of

        def recorded_table(*arguments: Any) -> Any:
            self.tables.append(make_table(*arguments))
            return self.tables[-1]

        def upload(words: Tensor, device: torch.device) -> Tensor:
            assert device == CPU and words.dtype == torch.int64
            kind = "table" if any(words is table.words for table in self.tables) else "words"
            self.before(kind)
            self.brought.append(kind)
            if kind == "words":
                self.words = words.tolist()
            memory, copy = torch.zeros_like(words), words.clone()
            self._memory[memory.data_ptr()] = Memory(memory, len(self._memory), self.stream, {self.stream}, self.graph)
            self._do(lambda: memory.copy_(copy))
            return memory

        def event(device: torch.device) -> tuple[int, int]:
            return self.stream, len(self._memory)

        def note_use(words: Tensor, uploaded: tuple[int, int]) -> None:
            self.noted += 1
            memory = self._memory[words.data_ptr()]
            if self.graph is None:
                stream, brought = uploaded
                assert stream == memory.brought_by and brought > memory.number, "an event before the words are there"
            else:
                self._kept.append((self.graph, words))
            memory.streams.add(self.stream)

        def asked(kernel: Any, device: torch.device, programs: int) -> Callable[..., None]:
            self.before("kernel")
            self.kernels.append(kernel.name)
            run = launcher_of(kernel, device, programs)

            def launch(*addresses: int, stream: int) -> None:
                assert stream == self.stream
                self.before("launch")
                for address in (addresses[0], addresses[2]):
                    self._check(address)
                self.launched.append((kernel.name, programs))
                self._do(lambda: self.is_idle or run(*addresses, stream=0))

            return launch

        patch.setattr(device_step, "table", recorded_table)
        patch.setattr(launcher, "upload", upload)
        patch.setattr(launcher, "event", event)
        patch.setattr(launcher, "note_use", note_use)
        patch.setattr(launcher, "launcher_of", asked)
        patch.setattr(launcher, "current_stream", lambda device: self.stream)
        patch.setattr(launcher, "is_capturing", lambda: self.graph is not None)

    def _do(self, call: Callable[[], object]) -> None:
        if self.graph is None:
            call()
        else:
            self.graph.append(call)

    def _check(self, address: int) -> None:
        (memory,) = [m for begin, m in self._memory.items() if begin <= address < begin + 8 * len(m.words)]
        assert self.stream in memory.streams, "memory of another stream, which may be given away before this launch"
        assert memory.graph is None or memory.graph is self.graph, "memory that only the replay of a graph fills"
        if self.graph is not None and memory.graph is None:
            kept = any(graph is self.graph and words is memory.words for graph, words in self._kept)
            assert kept, "memory that may be given away while the graph lives"

    @contextlib.contextmanager
    def capture(self, stream: int) -> Iterator[list[Callable[[], object]]]:
        before, self.stream, self.graph = self.stream, stream, []
        try:
            yield self.graph
        finally:
            self.stream, self.graph = before, None

    def taken(self) -> list[str]:
        """What was brought since it was asked last."""
        taken, self.brought = self.brought, []
        return taken


def replay(graph: Sequence[Callable[[], object]]) -> None:
    for call in graph:
        call()


# --- fixtures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickly_interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        quick_interpreter.install(patch)
        yield


@pytest.fixture
def interpreted(quickly_interpreted: None) -> None:
    if not launcher.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is not set: there is a GPU to test on")
    torch.manual_seed(7)


def read_by(name: str, patch: pytest.MonkeyPatch) -> None:
    """Has steps read in "Python" or in "C++"."""
    extension_module = extension.load()
    if extension_module is not None and extension_module.multiply_add_rule() != "fused":
        pytest.skip("torch's own code does not fuse multiply-adds in this process, as a GPU does")
    if name == "C++" and extension_module is None:
        pytest.skip(f"no C++ extension here: {extension.status().reason}")
    chosen = None if name == "Python" else extension_module
    patch.setattr(backends.TritonBackend, "module", lambda self: chosen)


@pytest.fixture(params=["Python", "C++"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    read_by(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    read_by("Python", monkeypatch)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    made.install(monkeypatch)
    return made


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that backend="auto" takes for CPU tensors."""
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("triton",))


# --- tensors, optimizers -----------------------------------------------------------------------------------------


def both(params: list[nn.Parameter], **options: Any) -> tuple[FusedSGD, torch.optim.SGD, list[nn.Parameter]]:
    """Ours, torch's, and the parameters of that: of the same values."""
    theirs = twins(params)
    options = OPTIONS | options
    return FusedSGD(params, **options, backend="triton"), torch.optim.SGD(theirs, **options), theirs


def refill_gradients(*lists: list[nn.Parameter]) -> None:
    """New numbers where the gradients are."""
    for same in zip(*lists, strict=True):
        gradient = torch.randn_like(same[0])
        for param in same:
            if param.grad is not None:
                param.grad.copy_(gradient)


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(mine.detach(), other.detach(), f"tensor {i}")


def buffers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    every = [optimizer.state.get(param, {}) for group in optimizer.param_groups for param in group["params"]]
    return [state["momentum_buffer"] for state in every if state.get("momentum_buffer") is not None]


def assert_same(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Parameters and momentum buffers."""
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert_equal(mine["params"], other["params"])
    assert_equal(buffers(ours), buffers(theirs))


def set_scaler(optimizer: FusedSGD, **words: Tensor) -> None:
    for name in ("grad_scale", "found_inf"):
        if name in words:
            setattr(optimizer, name, words[name])
        elif hasattr(optimizer, name):
            delattr(optimizer, name)


def warm(**options: Any) -> tuple[FusedSGD, torch.optim.SGD, list[nn.Parameter], list[nn.Parameter]]:
    params = parameters(30, (3, 4))
    ours, theirs, copies = both(params, **options)
    for _ in range(3):
        ours.step()
        theirs.step()
    return ours, theirs, params, copies
