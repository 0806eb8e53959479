"""Streams, events, memory and errors of the simulated device: what CUDA promises holds, and nothing beyond it.
Run on it, by `make simulated-gpu`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from ctypes import byref, c_size_t, c_void_p

import pytest

from tests.simulated_gpu import control
from tests.simulated_gpu.cuda_support import (
    D2D,
    D2H,
    H2D,
    CudaError,
    call,
    code_of,
    copy,
    drain,
    enqueue,
    event,
    found,
    library,
    made,
    memory,
    pinned,
    ran,
    record,
    stream,
    synchronize,
    wait,
)

pytestmark = pytest.mark.skipif(control.LIBRARY not in os.environ, reason="runs on the simulated GPU alone")
NOT_READY = 600
SEEDS = range(8)


@pytest.fixture(autouse=True)
def recorded():
    library().simulated_gpu_record(1)
    yield
    library().simulated_gpu_record(0)


def order_at(seed: int, default_flags: int = 1) -> list[str]:
    """In which order two streams' entries run, while nothing orders them."""
    control.set_seed(seed)
    streams = [stream(default_flags), stream(default_flags)]
    for number in range(6):
        for which, on in enumerate(streams):
            enqueue(on, f"{which}.{number}")
    call("cudaDeviceSynchronize")
    return ran()


def test_streams_run_in_their_own_order_and_the_seed_draws_which_goes_on():
    orders = [order_at(seed) for seed in SEEDS]
    assert orders == [order_at(seed) for seed in SEEDS]
    assert len({tuple(order) for order in orders}) > 1
    for order in orders:
        for which in "01":
            assert [name for name in order if name[0] == which] == [f"{which}.{number}" for number in range(6)]


@pytest.mark.parametrize("seed", SEEDS)
def test_an_entry_waits_for_the_event_as_it_was_at_the_call(seed):
    control.set_seed(seed)
    first, second, mark = stream(), stream(), event()
    enqueue(first, "before")
    record(mark, first)
    wait(second, mark)
    enqueue(second, "after")
    enqueue(first, "later")
    record(mark, first)  # moves the event, not the wait
    call("simulated_gpu_hold", first, 0)
    synchronize(second)
    order = ran()
    assert order.index("before") < order.index("after")
    drain()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("flags", [0, 1])
def test_blocking_streams_are_ordered_with_the_default_stream_and_others_are_not(seed, flags):
    control.set_seed(seed)
    data = memory(64).value
    side = stream(flags)

    def program() -> None:
        enqueue(side, "side", writes=[(data, 64)])
        enqueue(None, "default", writes=[(data, 64)])
        enqueue(side, "side again", writes=[(data, 64)])

    faults = found(program)
    if flags == 0:
        assert ran() == ["side", "default", "side again"]
        assert faults == ""
    else:
        assert "race: " in faults


def test_what_follows_a_hold_runs_when_it_is_released_or_waited_for():
    on, mark = stream(), event()
    enqueue(on, "before")
    call("simulated_gpu_hold", on, 0)
    enqueue(on, "after")
    record(mark, on)
    assert {code_of("cudaEventQuery", mark) for _ in range(50)} == {NOT_READY}
    assert "after" not in ran()
    call("simulated_gpu_release", on, 0)
    assert any(code_of("cudaEventQuery", mark) == 0 for _ in range(200)), "queries must let a queue go on"
    call("simulated_gpu_hold", on, 0)
    enqueue(on, "last")
    synchronize(on)
    assert ran()[-1] == "last"
    library().cudaGetLastError()


def test_a_pageable_source_is_read_at_the_call_and_a_pinned_one_when_the_copy_runs():
    on, target, source, back = stream(), memory(8), pinned(8), ctypes.create_string_buffer(8)
    call("simulated_gpu_hold", on, 0)
    pageable = ctypes.create_string_buffer(b"pageable", 8)
    copy(target, pageable, 8, H2D, on)
    pageable[:8] = b"........"
    synchronize(on)
    copy(back, target, 8, D2H, on)
    assert back.raw == b"pageable"

    ctypes.memmove(source, b"a pinned", 8)
    call("simulated_gpu_hold", on, 0)
    copy(target, source, 8, H2D, on)
    ctypes.memmove(source, b"too soon", 8)
    assert "wrote again between the call and the copy" in found()


def test_a_pinned_buffer_that_entries_write_is_no_fault():
    on, a, b, buffer = stream(), memory(8), memory(8), pinned(8)
    call("cudaMemsetAsync", a, 7, c_size_t(8), on)
    ctypes.memset(buffer, 1, 8)
    call("simulated_gpu_hold", on, 0)
    copy(buffer, a, 8, D2H, on)
    copy(b, buffer, 8, H2D, on)
    assert found() == ""
    back = ctypes.create_string_buffer(8)
    copy(back, b, 8, D2H)
    assert back.raw == bytes([7]) * 8


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ordered_by", ["event", "host", "stream", None])
@pytest.mark.parametrize("writes", [(True, True), (True, False), (False, True), (False, False)])
def test_a_race_is_two_entries_that_touch_the_same_bytes_unordered_one_writing(seed, ordered_by, writes):
    control.set_seed(seed)
    data = memory(64).value
    one, mark = stream(), event()
    other = one if ordered_by == "stream" else stream()

    def program() -> None:
        for which, on, at in (("the first", one, data), ("the second", other, data + 32)):
            first = which == "the first"
            enqueue(on, which, **{"writes" if writes[not first] else "reads": [(at, 33 if first else 32)]})
            if first and ordered_by == "event":
                record(mark, one)
                wait(other, mark)
            elif first and ordered_by == "host":
                synchronize(one)
        enqueue(other, "beside", writes=[(data + 33, 31)])

    faults = found(program)
    if ordered_by is None and any(writes):
        assert faults.startswith("race: ")
        assert "the first on stream" in faults
        assert "the second on stream" in faults
        assert "bytes 32 to 33 of allocation" in faults
        assert "64 bytes on cuda:0" in faults
    else:
        assert faults == ""


def test_a_race_is_found_through_whatever_ran_between():
    """The last write alone would not tell: the reads since have to be ordered before the next one too."""
    data = memory(64).value
    one, two, three = stream(), stream(), stream()
    written, read = event(), event()

    def program() -> None:
        enqueue(one, "write", writes=[(data, 64)])
        record(written, one)
        wait(two, written)
        wait(three, written)
        enqueue(two, "read", reads=[(data, 64)])
        enqueue(three, "read too", reads=[(data, 64)])
        record(read, two)
        wait(one, read)  # but not for the other
        enqueue(one, "write again", writes=[(data, 64)])

    faults = found(program)
    assert "read too on stream" in faults
    assert "write again on stream" in faults


def test_memory_taken_from_the_allocator_is_used_on_its_stream():
    data = memory(64)
    one, two = stream(), stream()

    def program() -> None:
        enqueue(one, "still reads", reads=[(data.value, 64)])
        call("simulated_gpu_allocated", two, 0, ctypes.c_uint64(data.value), ctypes.c_uint64(64))

    faults = found(program)
    assert "still reads" in faults and "allocation of a tensor of 64 bytes" in faults


def test_fresh_memory_is_garbage_and_no_address_is_given_twice():
    seen = set()
    for _ in range(20):
        at = memory(1_000)
        assert at.value not in seen
        seen.add(at.value)
        back = ctypes.create_string_buffer(1_000)
        copy(back, at, 1_000, D2H)
        assert any(back.raw)
        call("cudaFree", at)
    with pytest.raises(CudaError, match=r"cudaErrorInvalidValue.*freed"):
        call("cudaMemset", at, 0, c_size_t(4))
    with pytest.raises(CudaError, match=r"cudaErrorInvalidValue.*freed before"):
        call("cudaFree", at)


def test_free_waits_for_the_device_unless_it_is_told_not_to():
    on, data = stream(), memory(64)
    enqueue(on, "in time", reads=[(data.value, 64)])
    call("cudaFree", data)
    assert found() == ""
    data = memory(64)
    control.free_waits(False)
    try:
        call("simulated_gpu_hold", on, 0)
        enqueue(on, "too late", reads=[(data.value, 64)])
        call("cudaFree", data)
    finally:
        control.free_waits(True)
    faults = found()
    assert "too late touches bytes 0 to 64 of allocation" in faults and "freed before it ran" in faults


def test_an_allocation_beyond_the_device_is_out_of_memory():
    total, free = c_size_t(), c_size_t()
    call("cudaMemGetInfo", byref(free), byref(total))
    with pytest.raises(CudaError, match="cudaErrorMemoryAllocation: out of memory"):
        memory(total.value + 1)
    large = memory(free.value - 4096)  # costs nothing
    call("cudaFree", large)
    after = c_size_t()
    call("cudaMemGetInfo", byref(after), byref(total))
    assert after.value == free.value


def test_the_host_that_touches_device_memory_dies():
    script = (
        "import ctypes, os; library = ctypes.CDLL(os.environ['SIMULATED_GPU_LIBRARY']); at = ctypes.c_void_p();"
        "library.cudaMalloc(ctypes.byref(at), ctypes.c_size_t(8)); print('allocated', flush=True);"
        "ctypes.string_at(at, 1)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "allocated\n" and done.returncode == -11, done


def test_a_fault_is_every_later_calls_error_with_its_text():
    on, data = stream(), memory(64)
    call("simulated_gpu_hold", on, 0)  # or the first may run before the second is there
    enqueue(on, "a careless entry", reads=[(data.value, 65)])
    enqueue(on, "never")
    with pytest.raises(CudaError, match=r"cudaErrorIllegalAddress: an illegal.*careless entry touches.*beyond its end"):
        synchronize(on)
    with pytest.raises(CudaError, match="cudaErrorIllegalAddress"):
        memory(8)
    assert "never" not in ran()
    assert "careless" in control.take_faults()
    control.reset()
    call("cudaFree", memory(8))


def test_a_copy_that_its_pointers_contradict_is_refused():
    data, host = memory(8), ctypes.create_string_buffer(8)
    with pytest.raises(CudaError, match=r"cudaErrorInvalidValue.*called otherwise"):
        copy(host, data, 8, H2D)
    with pytest.raises(CudaError, match=r"cudaErrorInvalidValue.*go beyond its end"):
        copy(data, host, 9, H2D)
    with pytest.raises(CudaError, match="cudaErrorInvalidValue"):
        copy(c_void_p(data.value + 8), host, 1, H2D)


def test_what_belongs_to_another_device_is_refused():
    mark = event()
    call("cudaSetDevice", 1)
    try:
        other = stream()
        with pytest.raises(CudaError, match=r"cudaErrorInvalidResourceHandle.*event of cuda:0"):
            record(mark, other)
        there = memory(8)
    finally:
        call("cudaSetDevice", 0)
    here = memory(8)
    copy(there, here, 8, D2D, other)
    synchronize(other)
    with pytest.raises(CudaError, match=r"cudaErrorInvalidDevice: .*device 2 of 2"):
        call("cudaSetDevice", 2)


def test_what_is_not_simulated_says_so():
    with pytest.raises(CudaError, match=r"cudaErrorNotSupported.*cudaMallocManaged is not simulated"):
        made("cudaMallocManaged", c_size_t(8), 1)


def test_host_functions_run_in_their_turn_and_may_not_wait():
    on, seen = stream(), []
    kind = ctypes.CFUNCTYPE(None, c_void_p)
    function = kind(lambda _: seen.append(code_of("cudaStreamSynchronize", None)))
    call("cudaLaunchHostFunc", on, function, None)
    assert not seen or ran()
    synchronize(on)
    assert seen == [800]  # cudaErrorNotPermitted


def test_threads_may_use_the_device_at_once():
    """None waits for another for ever, whoever happens to run an entry; and no entry is lost or run twice."""
    counted, errors = [0] * 4, []

    def use(which: int) -> None:
        def count() -> None:
            counted[which] += 1

        try:
            on, mark = stream(), event()
            for number in range(60):
                enqueue(on, f"{which}.{number}", count)
                record(mark, on)
                if number % 7 == which:
                    synchronize(on)
                elif number % 5 == which:
                    call("cudaFree", memory(64))
                elif number % 3 == 0:
                    code_of("cudaEventQuery", mark)
            synchronize(on)
        except CudaError as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(which,), daemon=True) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert counted == [60] * 4
