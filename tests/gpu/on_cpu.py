"""A plugin of pytest that runs these tests without a GPU, so that what can be wrong with them is not found out on one:

    cd tests/gpu && TRITON_INTERPRET=1 PYTHONPATH=..:../.. python -m pytest -p on_cpu --confcutdir=. .

The GPU is the CPU: the "cuda" backend's kernel is compiled for it (tests/cuda_on_cpu_backend.py), that of "triton" is
interpreted. Streams and events do nothing; a graph records the launches and copies of the Triton backend and nothing
else. It shows nothing about a GPU. tests/test_gpu_check.py runs some of it, and bench's stages in the same way.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import cuda_on_cpu_backend
import gpu_support
import pytest
import quick_interpreter
import torch

from wd_fused import backends

# What only a GPU has: torch's own kernels in a graph, its allocator's figures, more memory than a test may take.
NEEDS_A_GPU = (
    "test_backward_and_step_are_captured_together",
    "test_a_scalers_whole_step_and_update_in_a_graph",
    "test_a_model_of_make_graphed_callables_is_stepped",
    "test_a_whole_iteration_of_a_model_is_captured",
    "test_the_first_step_takes_the_momentum_buffers_and_one_table",
    "test_out_of_memory_at_the_first_step_changes_nothing_and_the_next_step_works",
    "test_a_tensor_of_more_than_2_to_the_31_elements",
    "test_a_strided_tensor_that_reaches_past_2_to_the_31_elements",
    "test_the_extension_was_built_for_this_gpu",
    "profilers_account",
    "test_a_parameter_on_the_cpu_and_one_on_the_gpu_in_a_group",
    "test_a_model_moved_to_the_gpu_after_the_optimizer_was_made_is_stepped_there",
    "test_an_explicit_backend_of_gpus_refuses_a_parameter_on_the_cpu",
    "test_a_kernel_is_compiled_once_a_process",
    "test_a_step_on_another_stream_does_not_break_a_capture_of_the_same_thread",
    "test_a_captured_step_has_every_kernel_that_a_norm_in_double_takes",
)

# On the CPU torch's own operators round half precision otherwise.
TORCHS_HALVES = ("test_bits_and_scale_are_torchs", "test_half_precision_bits_are_torchs")
SIZES = (0, 1, 257, 2_500)  # the interpreter is slow


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [
        item
        for item in items
        if any(name in item.name for name in NEEDS_A_GPU)
        or (item.path.stem == "test_gpu_graphs" and item.get_closest_marker("triton") is None)
        or (any(name in item.name for name in TORCHS_HALVES) and "float16" in item.name)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@contextlib.contextmanager
def graph(captured: Graph, stream: Stream | None = None) -> Iterator[None]:
    Graph.recording = captured
    try:
        with Stream() if stream is None else stream:
            yield
    finally:
        Graph.recording = None


COUNTS: Counter[str] = Counter()  # of the Triton backend's launches and copies to the device


def run_or_record(what: str, call: Callable[[], object]) -> None:
    if Graph.recording is None:
        COUNTS[what] += 1
        call()
    else:
        Graph.recording.calls.append(call)


class Stream:
    entered: ClassVar[list[Stream]] = []
    handles = itertools.count(1)

    def __init__(self) -> None:
        self.cuda_stream = next(self.handles)

    @classmethod
    def current(cls) -> Stream:
        return cls.entered[-1]

    def __enter__(self) -> None:
        self.entered.append(self)

    def __exit__(self, *raised: object) -> None:
        self.entered.pop()

    def wait_stream(self, other: object) -> None:
        pass


Stream.entered.append(Stream())


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * max(later.at - self.at, 1e-9)

    def query(self) -> bool:
        return False


def nothing(*arguments: Any, **options: Any) -> None:
    pass


def stand_in_for_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.Event, cuda.Stream = Graph, Event, Stream
    cuda.graph, cuda.stream, cuda.device = graph, lambda stream: stream, contextlib.nullcontext
    cuda.current_stream = Stream.current
    cuda.is_current_stream_capturing = lambda: Graph.recording is not None
    cuda.current_device = lambda: 0
    for name in ("_sleep", "synchronize", "empty_cache", "set_sync_debug_mode"):
        setattr(cuda, name, nothing)
    cuda.memory_stats = lambda: {"allocation.all.allocated": 0}
    cuda.mem_get_info = lambda: (8 << 30, 8 << 30)
    cuda.get_device_properties = lambda index: SimpleNamespace(L2_cache_size=1 << 16)


def interpret_triton() -> None:
    """The interpreted backend with uploads that copy, and launches and copies that a graph records."""
    launcher = gpu_support.triton_module("launcher")
    assert launcher.INTERPRETED, "TRITON_INTERPRET=1 must be in the environment"
    quick_interpreter.install(pytest.MonkeyPatch())  # for as long as the process lives
    launcher_of = launcher.launcher_of

    def recorded(*arguments: Any) -> Callable[..., None]:
        run = launcher_of(*arguments)
        return lambda *addresses, stream: run_or_record("launches", lambda: run(*addresses, stream=stream))

    kept = []  # by a graph, for as long as it lives

    def upload(words: torch.Tensor, device: torch.device) -> torch.Tensor:
        on_host, memory = words.clone(), torch.full_like(words, -1)
        if Graph.recording is not None:
            kept.append((on_host, memory))
        run_or_record("copies", lambda: memory.copy_(on_host))
        return memory

    def note_use(memory: torch.Tensor, *others: Any) -> None:
        if Graph.recording is not None:
            kept.append((memory, memory))

    launcher.launcher_of, launcher.upload, launcher.note_use = recorded, upload, note_use
    launcher.is_capturing = lambda: Graph.recording is not None
    launcher.current_stream = lambda device: Stream.current().cuda_stream


def install() -> None:
    gpu_support.DEVICE = torch.device("cpu")
    gpu_support.SIZES = SIZES
    gpu_support.why_skipped = lambda: None
    backends.FUSED["cuda"] = cuda_on_cpu_backend.CudaOnCpu()
    stand_in_for_cuda()
    interpret_triton()


install()
