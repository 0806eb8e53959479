"""The simulated GPU that this process runs on, asked from Python: runtime/control.h."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import NamedTuple

LIBRARY = "SIMULATED_GPU_LIBRARY"  # the environment variable with its path; there in every process that runs on it
WHY_NOT = "SIMULATED_GPU_UNAVAILABLE"  # likewise: the reason, where it could not be built and pytest runs all the same


class Counts(NamedTuple):
    """Of what was put on streams so far, on all devices: replays of graphs count what they run."""

    kernels: int
    copies: int
    fills: int
    waits: int  # of the host, for a stream, an event or a device
    operators: int  # of torch's own
    allocations: int
    graphs: int  # launched


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ[LIBRARY])
    for name in ("kernels_run", "take_faults"):
        getattr(library, f"simulated_gpu_{name}").restype = ctypes.c_char_p
    library.simulated_gpu_set_seed.argtypes = [ctypes.c_uint64]
    library.simulated_gpu_first_block.argtypes = [ctypes.c_uint64]
    library.simulated_gpu_hold.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.simulated_gpu_hash.argtypes, library.simulated_gpu_hash.restype = (
        [ctypes.c_char_p, ctypes.c_size_t],
        ctypes.c_uint64,
    )
    return library


def counts() -> Counts:
    numbers = (ctypes.c_uint64 * len(Counts._fields))()
    _library().simulated_gpu_counters(numbers)
    return Counts(*numbers)


def kernels_run() -> list[str]:
    """The names of the kernels that were launched since this was asked last."""
    return str(_library().simulated_gpu_kernels_run().decode()).splitlines()


def take_faults() -> str:
    """What went wrong since this was asked last: faults of kernels and operators, and races."""
    return str(_library().simulated_gpu_take_faults().decode())


def hold(stream: int, device: int) -> None:
    """What is put on the stream from now on does not run before the host waits for it."""
    _library().simulated_gpu_hold(stream, device)


def free_waits(waits: bool) -> None:
    """Whether cudaFree() waits for the device, as CUDA's does without promising it."""
    _library().simulated_gpu_free_waits(waits)


def fail_kernel(error: int, after: int = 0, times: int = 1) -> None:
    """Of the calls to come that launch a kernel or ask about one, so many return this error, after so many others."""
    _library().simulated_gpu_fail_kernel(error, after, times)


@contextlib.contextmanager
def only_blocks_from(first: int) -> Iterator[None]:
    """Of what is launched in it only these blocks run: the end of a tensor that would take too long as a whole."""
    _library().simulated_gpu_first_block(first)
    try:
        yield
        finish()
    finally:
        _library().simulated_gpu_first_block(0)


def has_context(device: int) -> bool:
    return bool(_library().simulated_gpu_has_context(device))


def finish() -> None:
    """Runs all that is queued. What goes wrong there is told by :func:`take_faults`."""
    import torch

    for device in range(torch.cuda.device_count()):
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(device)


def take_last_error() -> int:
    """The calling thread's, as the next check of torch's would find it: 0, or one that somebody has left."""
    return int(_library().cudaGetLastError())


def reset() -> None:
    """After a fault: forgets what is queued, captured or broken. The memory stays as it is."""
    _library().simulated_gpu_reset()


def set_seed(seed: int) -> None:
    """Of the order in which queues, blocks and threads go on, and of the garbage in memory."""
    _library().simulated_gpu_set_seed(seed)


def digest(cubin: bytes) -> int:
    """By which the driver finds what a cubin was made of."""
    return int(_library().simulated_gpu_hash(cubin, len(cubin)))
