"""Stage "roofline" of gpu_check: how fast this GPU's memory is, for plain kernels that move what a step moves.

Compiles kernels.cu with nvcc into a library of its own, which has no torch in it, times all of its kernels in
interleaved rounds, and a copy from device to device. The fastest kernel is what speed.py measures a step against,
in the rounds of the step itself.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import DEVICE
from bench.gpu.stage import ROOT, Stage, main, spread
from bench.gpu.timing import Timer
from wd_fused.build import toolchain

SOURCE = Path(__file__).with_name("kernels.cu")
LIBRARY = "gpu_kernels.so"
ROUNDS = 7


class CannotBuild(Exception):
    """There is no nvcc, or it fails. The message says which."""


def build(folder: Path, capability: tuple[int, int]) -> Path:
    """The compiled library, for this GPU, or as PTX where nvcc does not know the GPU."""
    home, how = toolchain.cuda_home()
    nvcc = toolchain.nvcc() if home is None else str(Path(home, "bin", "nvcc"))
    if nvcc is None:
        raise CannotBuild(f"no nvcc ({how})")
    library = folder / LIBRARY
    said = ""
    for target in (f"-arch=sm_{capability[0]}{capability[1]}", "-gencode=arch=compute_80,code=compute_80"):
        command = [nvcc, "-O3", "-std=c++17", target, "-shared", "-Xcompiler", "-fPIC", "-o", str(library), str(SOURCE)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise CannotBuild(f"nvcc does not run ({type(error).__name__})") from error
        if done.returncode == 0:
            return library
        said = said or done.stdout
    raise CannotBuild(f"nvcc fails: {said.strip()[-400:]}")


class Streams:
    """The kernels of the library, called on torch's tensors and current stream."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.variant_name.restype = ctypes.c_char_p
        self._library.error_text.restype = ctypes.c_char_p
        self._library.stream.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32,
            ctypes.c_void_p,
        ]  # fmt: skip
        self.names = [self._library.variant_name(v).decode() for v in range(self._library.variants())]

    def of_width(self, width: int) -> list[int]:
        """The kernels whose accesses have as many bytes, or fewer."""
        return [v for v in range(len(self.names)) if self._library.variant_bytes(v) <= width]

    def run(self, variant: int, p: Tensor, g: Tensor, b: Tensor) -> None:
        """Moves all of three tensors of one size; changes nothing."""
        stream = torch.cuda.current_stream().cuda_stream
        size = p.numel() * p.element_size()
        error = self._library.stream(variant, p.data_ptr(), g.data_ptr(), b.data_ptr(), size, 0, stream)
        if error:
            raise RuntimeError(f"{self.names[variant]}: {self._library.error_text(error).decode()}")


def measured(streams: Streams, variants: list[int], elements: int, dtype: torch.dtype, timer: Timer) -> dict[str, Any]:
    """Bytes a second of every kernel over three tensors of so many elements, and of a copy."""
    p, g, b = (torch.empty(elements, dtype=dtype, device=DEVICE).uniform_(-1, 1) for _ in range(3))
    before = p[:1000].clone()
    seconds: dict[int, list[float]] = {variant: [] for variant in variants}
    copies = []
    order = list(variants)
    shuffle = random.Random(0).shuffle
    for variant in order:
        streams.run(variant, p, g, b)  # loads it
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        shuffle(order)
        for variant in order:
            seconds[variant].append(timer.device(lambda v=variant: streams.run(v, p, g, b), 2e-5))
        copies.append(timer.device(lambda: b.copy_(g), 2e-5))
    assert torch.equal(p[:1000], before), "a streaming kernel changed what it moved"
    size = elements * p.element_size()
    rows = [
        {"kernel": streams.names[v], "variant": v} | {"bytes_per_second": spread([5 * size / s for s in seconds[v]])}
        for v in variants
    ]
    rows.sort(key=lambda row: -row["bytes_per_second"]["median"])
    return {
        "elements": elements,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": 5 * size,
        "best": rows[0],
        "copy_bytes_per_second": spread([2 * size / s for s in copies]),
        "kernels": rows,
    }


def run(stage: Stage) -> None:
    capability = torch.cuda.get_device_capability()
    streams = Streams(build(stage.folder, capability))
    variants = streams.of_width(32 if capability[0] >= 10 else 16)
    timer = Timer()
    free, _ = torch.cuda.mem_get_info()
    elements = 1 << (24 if stage.quick else 30)
    while 13 * elements > free:  # what float32 needs, and some room
        elements //= 2
    stage.data["runs"] = []
    for dtype in (torch.float32, torch.bfloat16):
        stage.data["runs"].append(measured(streams, variants, elements, dtype, timer))
        torch.cuda.empty_cache()
        stage.save()
    best = statistics.median(run["best"]["bytes_per_second"]["median"] for run in stage.data["runs"])
    stage.data["bytes_per_second"] = best


if __name__ == "__main__":
    sys.exit(main("roofline", run))
