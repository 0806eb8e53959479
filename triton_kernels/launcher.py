"""Compiles the kernels, brings memory to a GPU and launches.

Every launch takes integers only, so that no argument's value is a reason to compile again. Knows nothing of optimizers;
called by device_step.py and wd_fused/backends.
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

from . import kernels, norm

STORAGES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
TYPES: dict[torch.dtype, Any] = STORAGES | {torch.int8: tl.int8, torch.int16: tl.int16}


def tile_elements(dtype: torch.dtype, options: bool, has_int8_momentum: bool) -> int:
    """As many as an operand's share of a tile has room for. With options as many as their opmath has, half of that
    where blocks are quantised, in registers."""
    if not options:
        return kernels.TILE_BYTES // dtype.itemsize
    return kernels.TILE_BYTES // max(dtype.itemsize, 4) // (2 if has_int8_momentum else 1)


class Kernel(NamedTuple):
    """One of the kernels that are compiled from sgd_kernel: of rows with the same operands, stored alike."""

    dtype: torch.dtype  # of the parameter
    rounds_each: bool  # every intermediate to the dtype: float16 and bfloat16 with numerics="torch"
    strided: bool = False  # takes rows that are not flat, and no others
    options: bool = False  # some option of FusedSGD's is on; if not, what follows says nothing
    weights: str = "parameter"  # wd_fused.options.spec.RowOptions's, as the following
    stochastic: bool = False
    gradient: torch.dtype | None = None  # None: the parameter's, as in the following
    momentum: torch.dtype | None = None
    average: torch.dtype | None = None
    averages: bool = False
    zeroes: bool = False
    placed: bool = False  # rows are shards: random numbers are those of elements' places in the whole parameter

    @property
    def operands(self) -> dict[str, torch.dtype]:
        """How gradient, momentum buffer, what lies beside the parameter, and average are stored; the parameter's dtype
        stands for what is not there."""
        beside = {"full": torch.float32, "split": torch.int16, "split24": torch.int8}.get(self.weights)
        stored = {"gradient": self.gradient, "momentum": self.momentum, "extra": beside, "average": self.average}
        return {name: self.dtype if dtype is None else dtype for name, dtype in stored.items()}

    @property
    def vector(self) -> int:
        """The elements that a thread takes at once: 16 bytes of the widest operand. Of the others it takes as many, so
        that no operand has to change threads."""
        return 16 // max(dtype.itemsize for dtype in (self.dtype, *self.operands.values()))

    @property
    def name(self) -> str:
        parts = [_name_of(self.dtype)]
        parts += ["torch" if self.rounds_each else "opmath"] if self.dtype.itemsize == 2 else []
        parts += ["options"] if self.options else []
        parts += [self.weights] if self.weights != "parameter" else []
        stored = {name: dtype for name, dtype in self.operands.items() if name != "extra" and dtype != self.dtype}
        parts += [f"{name} {_name_of(dtype)}" for name, dtype in stored.items()]
        flags = ("stochastic", "averages", "zeroes", "strided", "placed")
        return f"sgd_kernel<{', '.join(parts + [flag for flag in flags if getattr(self, flag)])}>"

    def constants(self) -> dict[str, Any]:
        elements = tile_elements(self.dtype, self.options, self.operands["momentum"] == torch.int8)
        own = ("rounds_each", "options", "weights", "stochastic", "averages", "zeroes", "strided", "placed", "vector")
        return {name: getattr(self, name) for name in own} | {
            "storage": TYPES[self.dtype],
            "opmath": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "tile_elements": elements,
            # Half as many where a program computes indices for them; as of the norm.
            "piece_elements": elements // kernels.PIECES // (2 if self.strided else 1),
            **{name: TYPES[dtype] for name, dtype in self.operands.items()},
        }


class NormKernel(NamedTuple):
    """One of the kernels that are compiled from norm_kernel."""

    gradient: torch.dtype
    in_double: bool  # opmath: the parameters are float64
    rounds_each: bool
    strided: bool = False

    @property
    def name(self) -> str:
        parts = [_name_of(self.gradient), *(["for float64"] if self.in_double else [])]
        parts += ["rounded"] if self.rounds_each else []
        return f"norm_kernel<{', '.join([*parts, 'strided'] if self.strided else parts)}>"

    def constants(self) -> dict[str, Any]:
        return {
            "gradient": TYPES[self.gradient],
            "opmath": tl.float64 if self.in_double else tl.float32,
            "rounds_each": self.rounds_each,
            "strided": self.strided,
            "piece_elements": kernels.TILE_BYTES // max(self.gradient.itemsize, 4) // (2 if self.strided else 1),
        }


AnyKernel = Kernel | NormKernel

# Those without options: in float32 and float64 nothing lies between storage and opmath, both numerics are one kernel.
KERNELS = tuple(
    Kernel(dtype, rounds_each, strided)
    for dtype in STORAGES
    for rounds_each in ((True, False) if dtype.itemsize == 2 else (False,))
    for strided in (False, True)
)


def plain_kernel(dtype: torch.dtype) -> Kernel:
    """Of flat rows without options, with numerics="torch"."""
    return Kernel(dtype, rounds_each=dtype.itemsize == 2)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compiled(kernel: AnyKernel, target: GPUTarget) -> CompiledKernel:
    """The kernel for a GPU, from Triton's cache or compiled into it; needs no GPU to be there."""
    function = norm.norm_kernel if isinstance(kernel, NormKernel) else kernels.sgd_kernel
    constants = kernel.constants()
    signature = {name: "constexpr" if name in constants else "i64" for name in function.arg_names}
    # Without contraction: the compiler must have no say in the bits.
    options = {"num_warps": kernels.WARPS, "enable_fp_fusion": False}
    return triton.compile(ASTSource(function, signature, constants), target=target, options=options)


# Launches a kernel: launcher(tiles, layouts, words, ..., stream=...), all of them addresses or other integers, and the
# stream's handle. The kernel's device must be the current one.
Launcher = Callable[..., None]


def launcher_of(kernel: AnyKernel, device: torch.device, programs: int) -> Launcher:
    run = _loaded(kernel, device.index)[(programs, 1, 1)]
    constants = [None] * len(kernel.constants())  # they are compiled in, but have their places
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
    if torch.version.hip is not None:
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


_failures: dict[tuple[Kernel, int], tuple[float, str]] = {}
_ASKED_AGAIN = 10.0  # seconds: some failures pass, such as a GPU without free memory


def why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton has no kernel for this dtype on this GPU; None if it has. Compiles it to know."""
    index = torch.cuda.current_device() if device.index is None else device.index
    key = plain_kernel(dtype), index
    failed, reason = _failures.get(key, (-math.inf, ""))
    if time.monotonic() - failed < _ASKED_AGAIN:
        return reason
    try:
        _loaded(*key)
    except Exception as error:  # of the compiler, of the C compiler that Triton calls, of the driver
        reason = (
            f"Triton {triton.__version__} cannot build its kernel for {torch.cuda.get_device_name(index)}: "
            f"{type(error).__name__}: {error}"
        )
        _failures[key] = time.monotonic(), reason
        return reason
    return None


# --- devices, streams, memory ------------------------------------------------------------------------------------


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it the device is the current one."""
    if torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """The handle of the stream that a launch goes to."""
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream


def is_capturing() -> bool:
    """Whether the current device's current stream is being captured in a graph."""
    return torch.cuda.is_current_stream_capturing()


_kept: list[Tensor] = []  # what graphs use: nobody tells when one is gone, so for ever


def upload(words: bytes, device: torch.device) -> Tensor:
    """Memory of the device in which words will lie when what is now put on its current stream runs.

    Does not wait for that stream: torch's allocator of pinned memory keeps what the copy reads until it has. For a
    graph that is being captured they lie there at once, for every replay.
    """
    with _relaxed():
        pinned = torch.empty(len(words), dtype=torch.uint8, device="cpu", pin_memory=True)
        ctypes.memmove(pinned.data_ptr(), words, len(words))
        if not is_capturing():
            return pinned.to(device, non_blocking=True)
        with _aside(device):
            memory = pinned.to(device, non_blocking=True)
    _kept.append(memory)
    return memory


def zeroed(words: int, device: torch.device) -> Tensor:
    """So many float64 words of the device's memory, zero: kept for ever where a graph uses them."""
    with _relaxed(), _aside(device) if is_capturing() else contextlib.nullcontext():
        memory = torch.zeros(words, dtype=torch.float64, device=device)
    if is_capturing():
        _kept.append(memory)
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


def note_use(memory: Tensor, event: Any = None) -> None:
    """Has the current stream read memory that may have come by another: not before the event, and it is not given away
    before it is read."""
    if is_capturing():  # which begins with waiting for all streams
        _kept.append(memory)
        return
    stream = torch.cuda.current_stream(memory.device)
    if event is not None:
        stream.wait_event(event)
    memory.record_stream(stream)
