"""Compiles sgd_kernel and launches it: on a GPU, or in Triton's interpreter on the CPU where TRITON_INTERPRET=1.

Every launch takes five integers, so that no argument's value is a reason to compile again. Knows nothing of optimizers;
called by plan.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from . import exact_interpreter, sgd_kernel

# Whether the kernel runs in Triton's interpreter: decided by TRITON_INTERPRET when this package is imported.
INTERPRETED: bool = not isinstance(sgd_kernel.sgd_kernel, triton.JITFunction)
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"  # a ROCm build of torch calls its GPUs "cuda" too

STORAGES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class Kernel(NamedTuple):
    """One of the kernels that are compiled from sgd_kernel."""

    dtype: torch.dtype
    rounds_each: bool  # every intermediate to the dtype: float16 and bfloat16 with numerics="torch"
    strided: bool  # takes rows that are not flat, too

    @property
    def name(self) -> str:
        numerics = [] if self.dtype.itemsize > 2 else ["torch" if self.rounds_each else "opmath"]
        strided = ["strided"] if self.strided else []
        return f"sgd_kernel<{', '.join([str(self.dtype).removeprefix('torch.'), *numerics, *strided])}>"


def kernel_for(dtype: torch.dtype, numerics: str, strided: bool) -> Kernel:
    """In float32 and float64 nothing lies between storage and opmath: both numerics are one kernel."""
    return Kernel(dtype, numerics == "torch" and dtype.itemsize == 2, strided)


KERNELS = tuple(
    dict.fromkeys(
        kernel_for(dtype, numerics, strided)
        for dtype in STORAGES
        for numerics in ("torch", "opmath")
        for strided in (False, True)
    )
)


def tile_elements(dtype: torch.dtype) -> int:
    return sgd_kernel.TILE_BYTES // dtype.itemsize


def _constants(kernel: Kernel) -> dict[str, Any]:
    return {
        "storage": STORAGES[kernel.dtype],
        "opmath": tl.float64 if kernel.dtype == torch.float64 else tl.float32,
        "rounds_each": kernel.rounds_each,
        "strided": kernel.strided,
        "tile_elements": tile_elements(kernel.dtype),
        "piece_elements": tile_elements(kernel.dtype) // sgd_kernel.PIECES,
    }


_ARGUMENTS = ("tiles", "layouts", "words", "grad_scale", "found_inf")


def compiled(kernel: Kernel, target: GPUTarget) -> CompiledKernel:
    """The kernel for a GPU, from Triton's cache or compiled into it; needs no GPU to be there."""
    constants = _constants(kernel)
    signature = dict.fromkeys(_ARGUMENTS, "i64") | dict.fromkeys(constants, "constexpr")
    # Without contraction: the compiler must have no say in the bits.
    options = {"num_warps": sgd_kernel.WARPS, "enable_fp_fusion": False}
    return triton.compile(ASTSource(sgd_kernel.sgd_kernel, signature, constants), target=target, options=options)


# Launches a kernel: launcher(tiles, layouts, words, grad_scale, found_inf, stream=...), all of them addresses, and the
# stream's handle. The kernel's device must be the current one.
Launcher = Callable[..., None]


def launcher_of(kernel: Kernel, device: torch.device, programs: int) -> Launcher:
    if INTERPRETED:
        return functools.partial(_interpret, kernel, programs)
    run = _loaded(kernel, device.index)[(programs, 1, 1)]
    constants = [None] * len(_constants(kernel))  # they are compiled in, but have their places
    return lambda *addresses, stream: run(*addresses, *constants, stream=stream)


@functools.cache
def _loaded(kernel: Kernel, index: int) -> CompiledKernel:
    """The kernel in the memory of a GPU: each has its own copy."""
    with torch.cuda.device(index):
        made = compiled(kernel, triton.runtime.driver.active.get_current_target())
        with _allowed_in_a_capture():
            _ = made.run  # loads it, so that no step has to
        return made


@contextlib.contextmanager
def _allowed_in_a_capture() -> Iterator[None]:
    """Within it the driver loads a kernel even where this thread is capturing a graph."""
    if not is_capturing() or torch.version.hip is not None:
        yield
        return
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED; then what it was
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def _interpret(kernel: Kernel, programs: int, *addresses: int, stream: int) -> None:
    with exact_interpreter.exact():
        sgd_kernel.sgd_kernel[(programs,)](*addresses, **_constants(kernel))


_failures: dict[tuple[Kernel, int], tuple[float, str]] = {}
_ASKED_AGAIN = 10.0  # seconds: some failures pass, such as a GPU without free memory


def why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton has no kernel for this dtype on this device, with the remedy; None if it has. Compiles it to know."""
    if device.type != DEVICE_TYPE:
        where = f"it is on {device}"
        return f"{where}: Triton's interpreter (TRITON_INTERPRET=1) takes CPU tensors" if INTERPRETED else where
    if INTERPRETED:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    key = kernel_for(dtype, "torch", strided=False), index
    failed, reason = _failures.get(key, (-math.inf, ""))
    if time.monotonic() - failed < _ASKED_AGAIN:
        return reason
    try:
        _loaded(*key)
    except Exception as error:  # of the compiler, of the C compiler that Triton calls, of the driver
        _failures[key] = (
            time.monotonic(),
            (
                f"Triton {triton.__version__} cannot build its kernel for {torch.cuda.get_device_name(index)}: "
                f"{type(error).__name__}: {error}"
            ),
        )
        return _failures[key][1]
    return None


# --- devices, streams, memory ------------------------------------------------------------------------------------


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it the device is the current one."""
    if INTERPRETED or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """The handle of the stream that a launch goes to."""
    if INTERPRETED:
        return 0
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream


def is_capturing() -> bool:
    """Whether the current device's current stream is being captured in a graph."""
    return not INTERPRETED and torch.cuda.is_current_stream_capturing()


_kept: list[Tensor] = []


def upload(words: Tensor, device: torch.device) -> Tensor:
    """Memory of the device in which int64 words will lie when what is now put on its current stream runs.

    Does not wait: torch's allocator of pinned memory keeps what the copy reads until it has. A captured copy is made at
    every replay, and nobody tells when a graph is gone: what it reads and writes, some kilobytes, is kept for ever.
    """
    if INTERPRETED:
        return words
    pinned = torch.empty(words.shape, dtype=words.dtype, device="cpu", pin_memory=True).copy_(words)
    memory = pinned.to(device, non_blocking=True)
    if is_capturing():
        _kept.extend((pinned, memory))
    return memory


def event(device: torch.device) -> Any:
    """What another stream must wait for, to find what has been uploaded on the current one."""
    return None if INTERPRETED else torch.cuda.current_stream(device).record_event()


def note_use(memory: Tensor, uploaded: Any) -> None:
    """Has the current stream read memory that came by another: not before it is there, nor after it is freed."""
    if INTERPRETED:
        return
    if is_capturing():  # which begins with waiting for all streams
        _kept.append(memory)
    else:
        stream = torch.cuda.current_stream(memory.device)
        stream.wait_event(uploaded)
        memory.record_stream(stream)
