"""Compiles the kernels and launches them: on a GPU, or in Triton's interpreter on the CPU where TRITON_INTERPRET=1.

Every launch takes integers only, so that no argument's value is a reason to compile again. Knows nothing of optimizers;
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

from . import sgd_kernel, tail_kernel

# Whether the kernel runs in Triton's interpreter: decided by TRITON_INTERPRET when this package is imported.
INTERPRETED: bool = not isinstance(sgd_kernel.sgd_kernel, triton.JITFunction)
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"  # a ROCm build of torch calls its GPUs "cuda" too

STORAGES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
TYPES: dict[torch.dtype, Any] = STORAGES | {torch.int8: tl.int8, torch.int16: tl.int16}


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


class TailKernel(NamedTuple):
    """One of the kernels that are compiled from tail_kernel: of rows with the same options and dtypes."""

    dtype: torch.dtype  # of the parameter
    rounds_each: bool
    strided: bool
    weights: str  # RowTail's, as the following
    stochastic: bool
    gradient: torch.dtype
    momentum: torch.dtype
    average: torch.dtype  # the parameter's where there is none
    averages: bool
    zeroes: bool

    @property
    def extra(self) -> torch.dtype:
        """What lies beside the parameter, if anything does."""
        own = {"full": torch.float32, "split": torch.int16, "split24": torch.int8}
        return own.get(self.weights, self.dtype)

    @property
    def vector(self) -> int:
        """The elements that a thread takes at once: 16 bytes of the widest operand. Of the others it takes as many, so
        that no operand has to change threads."""
        widest = [self.dtype, self.gradient, self.momentum]
        widest += [self.extra] if self.weights != "parameter" else []
        widest += [self.average] if self.averages else []
        return 16 // max(dtype.itemsize for dtype in widest)

    @property
    def elements(self) -> int:
        """Of a tile: as many as their opmath has room for, half of that where blocks are quantised, in registers."""
        return sgd_kernel.TILE_BYTES // max(self.dtype.itemsize, 4) // (2 if self.momentum == torch.int8 else 1)

    @property
    def name(self) -> str:
        parts = [_name_of(self.dtype)]
        parts += ["torch" if self.rounds_each else "opmath"] if self.dtype.itemsize == 2 else []
        parts += [self.weights] if self.weights != "parameter" else []
        parts += [f"gradient {_name_of(self.gradient)}"] if self.gradient != self.dtype else []
        parts += [f"momentum {_name_of(self.momentum)}"] if self.momentum != self.dtype else []
        parts += [f"average {_name_of(self.average)}"] if self.average != self.dtype else []
        flags = ("stochastic", "averages", "zeroes", "strided")
        return f"tail_kernel<{', '.join(parts + [flag for flag in flags if getattr(self, flag)])}>"


class NormKernel(NamedTuple):
    """One of the kernels that are compiled from norm_kernel."""

    gradient: torch.dtype
    in_double: bool  # opmath: the parameters are float64
    rounds_each: bool
    strided: bool
    norm_in_double: bool

    @property
    def elements(self) -> int:
        """That a program reads at once; half as many where it computes indices for them."""
        return sgd_kernel.TILE_BYTES // max(self.gradient.itemsize, 4) // (2 if self.strided else 1)

    @property
    def tile_elements(self) -> int:
        return sgd_kernel.TILE_BYTES // max(self.gradient.itemsize, 4) * tail_kernel.NORM_PIECES

    @property
    def name(self) -> str:
        parts = [_name_of(self.gradient), *(["for float64"] if self.in_double else [])]
        parts += ["rounded"] if self.rounds_each else []
        parts += ["strided"] if self.strided else []
        return f"norm_kernel<{', '.join([*parts, 'norm in float64'] if self.norm_in_double else parts)}>"


AnyKernel = Kernel | TailKernel | NormKernel


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _constants(kernel: AnyKernel) -> dict[str, Any]:
    if isinstance(kernel, TailKernel):
        own = {name: getattr(kernel, name) for name in ("weights", "stochastic", "averages", "zeroes", "vector")}
        dtypes = {name: TYPES[getattr(kernel, name)] for name in ("gradient", "momentum", "extra", "average")}
        return _update_constants(kernel, kernel.elements) | own | dtypes
    if isinstance(kernel, NormKernel):
        return {
            "gradient": TYPES[kernel.gradient],
            "opmath": tl.float64 if kernel.in_double else tl.float32,
            "rounds_each": kernel.rounds_each,
            "strided": kernel.strided,
            "in_double": kernel.norm_in_double,
            "piece_elements": kernel.elements,
        }
    return _update_constants(kernel, tile_elements(kernel.dtype))


def _update_constants(kernel: Kernel | TailKernel, elements: int) -> dict[str, Any]:
    return {
        "storage": STORAGES[kernel.dtype],
        "opmath": tl.float64 if kernel.dtype == torch.float64 else tl.float32,
        "rounds_each": kernel.rounds_each,
        "strided": kernel.strided,
        "tile_elements": elements,
        "piece_elements": elements // sgd_kernel.PIECES,
    }


def _function(kernel: AnyKernel) -> Any:
    if isinstance(kernel, TailKernel):
        return tail_kernel.tail_kernel
    return tail_kernel.norm_kernel if isinstance(kernel, NormKernel) else sgd_kernel.sgd_kernel


def compiled(kernel: AnyKernel, target: GPUTarget) -> CompiledKernel:
    """The kernel for a GPU, from Triton's cache or compiled into it; needs no GPU to be there."""
    function, constants = _function(kernel), _constants(kernel)
    signature = {name: "constexpr" if name in constants else "i64" for name in function.arg_names}
    # Without contraction: the compiler must have no say in the bits.
    options = {"num_warps": sgd_kernel.WARPS, "enable_fp_fusion": False}
    return triton.compile(ASTSource(function, signature, constants), target=target, options=options)


# Launches a kernel: launcher(tiles, layouts, words, ..., stream=...), all of them addresses or other integers, and the
# stream's handle. The kernel's device must be the current one.
Launcher = Callable[..., None]


def launcher_of(kernel: AnyKernel, device: torch.device, programs: int) -> Launcher:
    if INTERPRETED:
        return functools.partial(_interpret, kernel, programs)
    run = _loaded(kernel, device.index)[(programs, 1, 1)]
    constants = [None] * len(_constants(kernel))  # they are compiled in, but have their places
    return lambda *addresses, stream: run(*addresses, *constants, stream=stream)


@functools.cache
def _loaded(kernel: AnyKernel, index: int) -> CompiledKernel:
    """The kernel in the memory of a GPU: each has its own copy."""
    with torch.cuda.device(index):
        made = compiled(kernel, triton.runtime.driver.active.get_current_target())
        with _relaxed():
            _ = made.run  # loads it, so that no step has to
        return made


@contextlib.contextmanager
def _relaxed() -> Iterator[None]:
    """Within it this thread may load a kernel and take memory, even where one of its streams is being captured."""
    if INTERPRETED or torch.version.hip is not None:
        yield
        return
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED; then what it was
    _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _interpret(kernel: AnyKernel, programs: int, *addresses: int, stream: int) -> None:
    from .exact_interpreter import exact  # here, for it needs NumPy, which nothing else does

    with exact():
        _function(kernel)[(programs,)](*addresses, **_constants(kernel))


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


_kept: list[Tensor] = []  # what graphs use: nobody tells when one is gone, so for ever


def upload(words: Tensor, device: torch.device) -> Tensor:
    """Memory of the device in which int64 words will lie when what is now put on its current stream runs.

    Does not wait for that stream: torch's allocator of pinned memory keeps what the copy reads until it has. For a
    graph that is being captured they lie there at once, for every replay.
    """
    if INTERPRETED:
        return words
    with _relaxed():
        pinned = torch.empty(words.shape, dtype=words.dtype, device="cpu", pin_memory=True).copy_(words)
        if not is_capturing():
            return pinned.to(device, non_blocking=True)
        with _aside(device):
            memory = pinned.to(device, non_blocking=True)
    _kept.append(memory)
    return memory


def zeroed(words: int, device: torch.device) -> Tensor:
    """So many float64 words of the device's memory, zero: kept for ever where a graph uses them."""
    is_aside = is_capturing() and not INTERPRETED
    with _relaxed(), _aside(device) if is_aside else contextlib.nullcontext():
        memory = torch.zeros(words, dtype=torch.float64, device=device)
    keep_if_captured(memory)
    return memory


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Within it the current stream is one of our own, which is waited for at the end: what is put on it becomes no part
    of the graph that is being captured, and memory does not come out of that graph's pool, 2 MiB at a time."""
    stream = _own_stream(device.index)
    with torch.cuda.stream(stream):
        yield
    if torch.version.hip is not None:
        stream.synchronize()
    elif (error := _driver().cuStreamSynchronize(ctypes.c_void_p(stream.cuda_stream))) != 0:  # torch's may be forbidden
        raise RuntimeError(f"CUDA error {error} in a copy to {device}")


@functools.cache
def _own_stream(index: int) -> Any:
    """None of torch's pool: it might be the one that is being captured. The device must be the current one."""
    cuda: Any = torch.cuda
    if torch.version.hip is not None:
        return cuda.Stream(index)
    handle = ctypes.c_void_p()
    if (error := _driver().cuStreamCreate(ctypes.byref(handle), 1)) != 0:  # CU_STREAM_NON_BLOCKING
        raise RuntimeError(f"CUDA error {error}: no stream on cuda:{index}")
    return cuda.ExternalStream(handle.value, device=index)


def keep_if_captured(memory: Tensor) -> None:
    """Keeps for ever what a graph that is being captured uses."""
    if is_capturing():
        _kept.append(memory)


def note_reading(memory: Tensor) -> None:
    """Has the current stream read memory that may have come by another: it is not given away before."""
    if memory.is_cuda and not is_capturing():
        memory.record_stream(torch.cuda.current_stream(memory.device))
    keep_if_captured(memory)


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
