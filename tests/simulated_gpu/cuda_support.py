"""CUDA's own functions and the simulated device's queues, for its tests: called by ctypes, with no torch between."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

from . import control

H2D, D2H, D2D = 1, 2, 3
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
NON_BLOCKING = 1


class CudaError(Exception):
    """Its text is the error's name and CUDA's words for it."""


def library() -> ctypes.CDLL:
    found = ctypes.CDLL(os.environ[control.LIBRARY])
    found.cudaGetErrorName.restype = found.cudaGetErrorString.restype = c_char_p
    found.simulated_gpu_ran.restype = c_char_p
    return found


def code_of(function: str, *arguments: Any) -> int:
    return int(getattr(library(), function)(*arguments))


def call(function: str, *arguments: Any) -> None:
    code = code_of(function, *arguments)
    if code != 0:
        library().cudaGetLastError()
        name, words = (getattr(library(), f"cudaGetError{part}")(code).decode() for part in ("Name", "String"))
        raise CudaError(f"{name}: {words}")


def made(function: str, *arguments: Any) -> Any:
    """What the function puts into its first argument."""
    handle = c_void_p()
    call(function, byref(handle), *arguments)
    return handle


def stream(flags: int = NON_BLOCKING) -> Any:
    return made("cudaStreamCreateWithFlags", flags)


def event() -> Any:
    return made("cudaEventCreateWithFlags", 2)


def memory(size: int) -> Any:
    return made("cudaMalloc", c_size_t(size))


def pinned(size: int) -> Any:
    return made("cudaHostAlloc", c_size_t(size), 0)


def copy(to: Any, source: Any, size: int, kind: int, on: Any = None) -> None:
    call("cudaMemcpyAsync", to, source, c_size_t(size), kind, on)


def record(mark: Any, on: Any = None) -> None:
    call("cudaEventRecord", mark, on)


def wait(on: Any, mark: Any) -> None:
    call("cudaStreamWaitEvent", on, mark, 0)


def synchronize(on: Any = None) -> None:
    call("cudaStreamSynchronize", on)


_kept: list[Any] = []  # ctypes' callbacks, which queues still call
_RUN = ctypes.CFUNCTYPE(c_void_p, c_void_p)


class Range(ctypes.Structure):
    _fields_ = (("begin", c_uint64), ("end", c_uint64), ("writes", c_int))


def enqueue(
    on: Any,
    name: str,
    run: Callable[[], object] = lambda: None,
    reads: Sequence[tuple[int, int]] = (),
    writes: Sequence[tuple[int, int]] = (),
) -> None:
    """An entry that calls ``run``, and is taken to touch these ranges: (first byte, size)."""

    def called(_: Any) -> None:
        run()

    ranges = [Range(at, at + size, 0) for at, size in reads] + [Range(at, at + size, 1) for at, size in writes]
    callback = _RUN(called)
    _kept.append(callback)
    call("simulated_gpu_enqueue", on, 0, name.encode(), callback, None, None, (Range * len(ranges))(*ranges),
         c_size_t(len(ranges)))  # fmt: skip


def ran() -> list[str]:
    """The names of what has run since this was called last; recorded from the first call on."""
    lines = library().simulated_gpu_ran().decode().splitlines()
    return [line.split("\t")[1] for line in lines]


def drain() -> None:
    """Runs all that is queued, whatever comes of it."""
    code_of("simulated_gpu_drain")


def found(program: Callable[[], object] = lambda: None) -> str:
    """The faults of the program and of all that is queued; the device is usable again afterwards."""
    with contextlib.suppress(CudaError):  # a fault is the next call's error, too
        program()
    drain()
    faults = control.take_faults()
    control.reset()
    return faults


def begin_capture(on: Any, mode: int = GLOBAL) -> None:
    call("cudaStreamBeginCapture", on, mode)


def end_capture(on: Any) -> Any:
    graph = c_void_p()
    call("cudaStreamEndCapture", on, byref(graph))
    return graph


def ready(graph: Any) -> Any:
    return made("cudaGraphInstantiate", graph, ctypes.c_ulonglong(0))


def status(on: Any) -> str:
    found = c_int()
    call("cudaStreamIsCapturing", on, byref(found))
    return ("none", "active", "invalidated")[found.value]


def exchange_mode(mode: int) -> int:
    was = c_int(mode)
    call("cudaThreadExchangeStreamCaptureMode", byref(was))
    return was.value
