"""Faults of a program that a GPU would often forgive, planted: the simulated one finds each of them at every seed, and
nothing where the program is right. Run on it, by `make simulated-gpu`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.simulated_gpu import control

pytestmark = pytest.mark.skipif(control.LIBRARY not in os.environ, reason="runs on the simulated GPU alone")

DEVICE = torch.device("cuda")


def faults_of(program: Callable[[], object]) -> str:
    """What the device says of it. It is usable again afterwards."""
    torch.cuda.synchronize()
    assert control.take_faults() == ""
    with contextlib.suppress(RuntimeError):  # a fault is the next call's error, too
        program()
    control.finish()
    faults = control.take_faults()
    control.reset()
    return faults


@pytest.fixture(params=range(3))
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    control.set_seed(request.param)
    yield request.param


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("waits", [True, False])
def test_a_missing_wait_on_an_event(waits):
    written, read = torch.zeros(1_000, device=DEVICE), torch.zeros(1_000, device=DEVICE)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()

    def program():
        with torch.cuda.stream(first):
            written.fill_(1.0)
            event = first.record_event()
        with torch.cuda.stream(second):
            if waits:
                second.wait_event(event)
            read.add_(written)

    found = faults_of(program)
    assert found == "" if waits else ("nothing orders" in found and "aten::fill_" in found and "aten::add_" in found), (
        found
    )


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("waits", [True, False])
def test_memory_freed_under_a_queued_kernel(waits):
    """CUDA's cudaFree() waits, as a rule, but does not promise it: here it does not."""
    gc.collect()
    torch.cuda.empty_cache()  # or the table lies in memory that is kept for other tensors, too
    kept = torch.zeros(1 << 20, device=DEVICE)
    stream = torch.cuda.Stream()
    control.free_waits(False)

    def program():
        table = torch.ones(8 << 20, device=DEVICE)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000)
            kept.add_(table[: kept.numel()])
        if waits:
            stream.synchronize()
        del table
        torch.cuda.empty_cache()

    try:
        found = faults_of(program)
    finally:
        control.free_waits(True)
    assert found == "" if waits else "freed" in found, found


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("waits", [True, False])
def test_a_pinned_buffer_written_again_too_early(waits):
    pinned = torch.ones(1_000, pin_memory=True)
    on_device = torch.zeros(1_000, device=DEVICE)

    def program():
        torch.cuda._sleep(1_000)
        on_device.copy_(pinned, non_blocking=True)
        if waits:
            torch.cuda.current_stream().synchronize()
        pinned.fill_(2.0)

    found = faults_of(program)
    assert found == "" if waits else "pinned" in found, found


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("records", [True, False])
def test_a_missing_record_stream(records):
    result = torch.zeros(1_000, device=DEVICE)
    stream = torch.cuda.Stream()

    def program():
        given = torch.ones(1_000, device=DEVICE)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result.add_(given)
        if records:
            given.record_stream(stream)
        del given
        torch.ones(1_000, device=DEVICE)  # of the same size, and so in the same place

    found = faults_of(program)
    assert found == "" if records else "nothing orders" in found, found


def test_an_allocation_in_a_capture_is_refused_and_breaks_it():
    library = ctypes.CDLL(os.environ[control.LIBRARY])
    graph = torch.cuda.CUDAGraph()
    values = torch.zeros(10, device=DEVICE)
    with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(graph):
        values.add_(1.0)
        address = ctypes.c_void_p()
        assert library.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(4096)) != 0
    control.reset()
    torch.cuda.synchronize()
    assert values.sum().item() == 0
