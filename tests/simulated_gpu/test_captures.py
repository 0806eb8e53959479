"""Captures and graphs of the simulated device: what CUDA forbids meanwhile, by mode and thread, and what a replay does.
Run on it, by `make simulated-gpu`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from ctypes import byref, c_size_t, c_void_p
from typing import Any

import pytest

from tests.simulated_gpu import control
from tests.simulated_gpu.cuda_support import (
    D2H,
    GLOBAL,
    H2D,
    RELAXED,
    THREAD_LOCAL,
    CudaError,
    begin_capture,
    call,
    copy,
    drain,
    end_capture,
    enqueue,
    event,
    exchange_mode,
    found,
    library,
    memory,
    pinned,
    ran,
    ready,
    record,
    status,
    stream,
    synchronize,
    wait,
)

pytestmark = pytest.mark.skipif(control.LIBRARY not in os.environ, reason="runs on the simulated GPU alone")
SEEDS = range(8)


@pytest.fixture(autouse=True)
def recorded():
    library().simulated_gpu_record(1)
    yield
    library().simulated_gpu_record(0)
    control.reset()


def test_nothing_runs_in_a_capture_and_all_of_it_at_every_replay():
    on = stream()
    begin_capture(on)
    for name in "abc":
        enqueue(on, name)
    graph = end_capture(on)
    drain()
    assert ran() == []
    replayed = ready(graph)
    call("cudaGraphDestroy", graph)
    call("cudaGraphLaunch", replayed, on)
    call("cudaGraphLaunch", replayed, on)
    call("cudaGraphExecDestroy", replayed)  # what is launched still runs
    synchronize(on)
    assert ran() == [*"abc", *"abc"]


@pytest.mark.parametrize("order", range(2))
def test_branches_run_in_any_order_that_their_events_allow(order):
    orders = set()
    for seed in SEEDS:
        control.set_seed(seed)
        on, side, fork, joined = stream(), stream(), event(), event()
        begin_capture(on)
        enqueue(on, "first")
        record(fork, on)
        wait(side, fork)
        for which, branch in [("here", on), ("there", side)][:: 1 if order else -1]:
            enqueue(branch, which)
        record(joined, side)
        wait(on, joined)
        enqueue(on, "last")
        call("cudaGraphLaunch", ready(end_capture(on)), on)
        synchronize(on)
        run = ran()
        assert run[0] == "first" and run[3] == "last"
        orders.add(tuple(run))
    assert len(orders) == 2


def test_branches_that_touch_the_same_bytes_race_and_replays_do_not():
    data = memory(64).value
    on, side, fork, joined = stream(), stream(), event(), event()
    begin_capture(on)
    enqueue(on, "write", writes=[(data, 64)])
    replayed = ready(end_capture(on))
    call("cudaGraphLaunch", replayed, on)
    call("cudaGraphLaunch", replayed, side)  # of one graph: one after the other
    assert found() == ""

    begin_capture(on)
    record(fork, on)
    wait(side, fork)
    enqueue(on, "here", writes=[(data, 64)])
    enqueue(side, "there", reads=[(data, 64)])
    record(joined, side)
    wait(on, joined)
    replayed = ready(end_capture(on))
    faults = found(lambda: call("cudaGraphLaunch", replayed, on))
    assert "race: " in faults and "here on graph" in faults and "there on graph" in faults


def test_a_replay_reads_pinned_memory_as_it_is_then():
    on, target, source, back = stream(), memory(8), pinned(8), ctypes.create_string_buffer(8)
    begin_capture(on)
    copy(target, source, 8, H2D, on)
    replayed = ready(end_capture(on))
    for word in (b"the once", b"the next"):
        ctypes.memmove(source, word, 8)
        call("cudaGraphLaunch", replayed, on)
        copy(back, target, 8, D2H, on)
        assert back.raw == word
    call("simulated_gpu_hold", on, 0)
    call("cudaGraphLaunch", replayed, on)
    ctypes.memmove(source, b"too soon", 8)
    assert "wrote again between the call and the copy" in found()


def arguments_done() -> tuple[Any, ...]:
    mark = event()
    record(mark)
    synchronize()
    return (mark,)


UNSAFE: dict[str, Callable[[], tuple[Any, ...]]] = {
    "cudaMalloc": lambda: (byref(c_void_p()), c_size_t(8)),
    "cudaFree": lambda: (memory(8),),
    "cudaHostAlloc": lambda: (byref(c_void_p()), c_size_t(8), 0),
    "cudaEventQuery": arguments_done,
    "cudaEventSynchronize": arguments_done,
    "cudaStreamSynchronize": lambda: (stream(),),
    "cudaMemcpy": lambda: (memory(8), memory(8), c_size_t(8), 3),
}


@pytest.mark.parametrize("function", UNSAFE)
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
@pytest.mark.parametrize("own_mode", [GLOBAL, THREAD_LOCAL, RELAXED])
def test_unsafe_calls_break_a_capture_by_its_mode_and_the_threads(function, elsewhere, mode, own_mode):
    arguments = UNSAFE[function]()
    on = stream()
    forbidden = own_mode != RELAXED and mode != RELAXED and (not elsewhere or mode == own_mode == GLOBAL)

    def unsafe() -> None:
        was = exchange_mode(own_mode)
        try:
            call(function, *arguments)
        except CudaError as error:
            errors.append(str(error))
        exchange_mode(was)

    errors: list[str] = []
    begin_capture(on, mode)
    if elsewhere:
        thread = threading.Thread(target=unsafe)
        thread.start()
        thread.join()
    else:
        unsafe()
    if forbidden:
        assert len(errors) == 1 and errors[0].startswith("cudaErrorStreamCaptureUnsupported") and function in errors[0]
        assert status(on) == "invalidated"
        with pytest.raises(CudaError, match="cudaErrorStreamCaptureInvalidated"):
            enqueue(on, "too late")
        with pytest.raises(CudaError, match="cudaErrorStreamCaptureInvalidated"):
            end_capture(on)
    else:
        assert errors == []
        end_capture(on)
    assert status(on) == "none"


@pytest.mark.parametrize("function", ["cudaStreamSynchronize", "cudaStreamQuery", "cudaDeviceSynchronize"])
def test_waiting_for_what_is_captured_breaks_it_in_every_mode(function):
    on = stream()
    begin_capture(on, RELAXED)
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureUnsupported"):
        call(function, *([] if function == "cudaDeviceSynchronize" else [on]))
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureInvalidated"):
        end_capture(on)


def test_a_captured_event_stands_for_no_time():
    on, mark = stream(), event()
    begin_capture(on, RELAXED)
    record(mark, on)
    with pytest.raises(CudaError, match="cudaErrorCapturedEvent"):
        call("cudaEventQuery", mark)
    assert status(on) == "invalidated"


def test_work_from_outside_and_other_captures_stay_outside():
    on, other, mark, inner = stream(), stream(), event(), event()
    enqueue(other, "outside")
    record(mark, other)
    begin_capture(on)
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureIsolation"):
        wait(on, mark)
    control.reset()

    begin_capture(on)
    begin_capture(other)
    record(inner, other)
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureMerge"):
        wait(on, inner)
    assert status(on) == status(other) == "invalidated"


def test_a_capture_ends_where_it_began_with_all_that_joined_it():
    on, side, fork = stream(), stream(), event()
    begin_capture(on)
    record(fork, on)
    wait(side, fork)
    enqueue(side, "left behind")
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureUnjoined"):
        end_capture(on)
    assert status(side) == "none"

    begin_capture(on)
    record(fork, on)
    wait(side, fork)
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureUnmatched"):
        end_capture(side)
    control.reset()

    begin_capture(on, THREAD_LOCAL)
    errors = []

    def end_elsewhere() -> None:
        try:
            end_capture(on)
        except CudaError as error:
            errors.append(str(error))

    thread = threading.Thread(target=end_elsewhere)
    thread.start()
    thread.join()
    assert errors and errors[0].startswith("cudaErrorStreamCaptureWrongThread")
    end_capture(on)


def test_the_default_stream_is_not_captured_and_not_made_to_wait_for_a_capture():
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureUnsupported"):
        begin_capture(None)
    blocking = stream(0)
    begin_capture(blocking)
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureImplicit"):
        status(None)
    assert status(blocking) == "active"
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureImplicit"):
        enqueue(None, "waits for all blocking streams")
    assert status(blocking) == "invalidated"
    control.reset()
    other = stream()
    begin_capture(other)
    enqueue(None, "waits for no other stream")
    end_capture(other)


def test_pageable_memory_is_not_captured():
    on, target = stream(), memory(8)
    begin_capture(on)
    with pytest.raises(CudaError, match=r"cudaErrorStreamCaptureUnsupported.*pageable"):
        copy(target, ctypes.create_string_buffer(8), 8, H2D, on)
    assert status(on) == "invalidated"


def test_a_graph_launched_in_a_capture_becomes_a_part_of_it():
    on = stream()
    begin_capture(on)
    enqueue(on, "inner")
    inner = ready(end_capture(on))
    begin_capture(on)
    enqueue(on, "before")
    call("cudaGraphLaunch", inner, on)
    enqueue(on, "after")
    call("cudaGraphLaunch", ready(end_capture(on)), on)
    synchronize(on)
    assert ran() == ["before", "inner", "after"]


def test_external_events_are_marks_of_each_replay():
    on, other, mark = stream(), stream(), event()
    begin_capture(on)
    enqueue(on, "in the graph")
    call("cudaEventRecordWithFlags", mark, on, 1)
    replayed = ready(end_capture(on))
    for _ in range(2):
        call("cudaGraphLaunch", replayed, on)
        wait(other, mark)
        enqueue(other, "outside")
        synchronize(other)
        assert ran() == ["in the graph", "outside"]


def test_a_graph_keeps_user_objects_until_it_and_what_it_became_are_gone():
    destroyed = []
    kind = ctypes.CFUNCTYPE(None, c_void_p)
    function = kind(lambda _: destroyed.append(1))
    on, held = stream(), c_void_p()
    begin_capture(on)
    enqueue(on, "a")
    graph = end_capture(on)
    call("cudaUserObjectCreate", byref(held), None, function, 1, 1)
    call("cudaGraphRetainUserObject", graph, held, 1, 1)  # moved into the graph
    replayed = ready(graph)
    call("cudaGraphDestroy", graph)
    assert destroyed == []
    call("cudaGraphExecDestroy", replayed)
    assert destroyed == [1]
