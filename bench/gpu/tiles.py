"""Stage "tiles" of gpu_check: which tile and how many warps the Triton kernel should be compiled with.

A tile is the work of one program: so many bytes of each operand, read at once. Every pair steps one large tensor, in
interleaved rounds, beside the CUDA backend and the best plain kernel; what is shipped stands in
triton_kernels/kernels.py, and is marked.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import OPTIONS, Case
from bench.cases import parameters as parameters_of
from bench.cases.implementations import LIMIT, OURS, TRITON
from bench.gpu import cases as gpu_cases
from bench.gpu.roofline import LIBRARY, Streams
from bench.gpu.stage import Stage, main, spread
from bench.gpu.timing import Timer
from wd_fused import FusedSGD, backends, reference

TILE_BYTES = (4096, 8192, 16384, 32768)
WARPS = (2, 4, 8)
PAIRS = [(tile_bytes, warps) for tile_bytes in TILE_BYTES for warps in WARPS]
DTYPES = ("float32", "bfloat16")
ELEMENTS, FEW_ELEMENTS = 1 << 28, 1 << 22
ROUNDS = 15
CHECKED = 100_003  # elements of which the bits are compared: tiles that are full, and one that is not


@contextlib.contextmanager
def compiled_with(tile_bytes: int, warps: int) -> Iterator[None]:
    """Within it Triton's plans are made with this tile and as many warps; they keep them."""
    backends.triton_kernels()
    launcher, kernels = (importlib.import_module(f"wd_fused.triton_kernels.{n}") for n in ("launcher", "kernels"))
    before = kernels.TILE_BYTES, kernels.WARPS
    kernels.TILE_BYTES, kernels.WARPS = tile_bytes, warps
    launcher._loaded.cache_clear()
    try:
        yield
    finally:
        kernels.TILE_BYTES, kernels.WARPS = before
        launcher._loaded.cache_clear()


def shipped() -> tuple[int, int]:
    backends.triton_kernels()
    kernels = importlib.import_module("wd_fused.triton_kernels.kernels")
    return kernels.TILE_BYTES, kernels.WARPS


def compile_all() -> None:
    """Fills Triton's cache: many processes at once, where one after another would take half a minute."""
    import triton

    target = triton.runtime.driver.active.get_current_target()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(16, os.cpu_count() or 1), context) as pool:
        list(pool.map(functools.partial(_compile, target), DTYPES * len(PAIRS), [p for p in PAIRS for _ in DTYPES]))


def _compile(target: Any, dtype: str, pair: tuple[int, int]) -> None:
    with compiled_with(*pair):
        launcher = importlib.import_module("wd_fused.triton_kernels.launcher")
        with contextlib.suppress(Exception):  # it will be told where it is needed
            launcher.compiled(launcher.plain_kernel(getattr(torch, dtype)), target)


def optimizer_over(param: Tensor, buffer: Tensor, backend: str) -> FusedSGD:
    """One whose plan is made, and whose kernel is loaded."""
    optimizer = FusedSGD([param], **OPTIONS, backend=backend)
    optimizer.state[param]["momentum_buffer"] = buffer
    for _ in range(2):
        optimizer.step()
    return optimizer


def has_right_bits(dtype: torch.dtype) -> bool:
    """Whether steps with the tile and warps of the moment have the reference's bits."""
    generator = torch.Generator().manual_seed(3)
    values, gradient = (
        torch.randn(CHECKED, generator=generator, dtype=torch.float64).to(dtype).to(gpu_cases.DEVICE) for _ in range(2)
    )
    param = values.clone().requires_grad_()
    param.grad = gradient
    optimizer = FusedSGD([param], **OPTIONS, backend="triton")
    buffers: list[Tensor | None] = [None]
    for _ in range(2):
        optimizer.step()
        reference.sgd([values], [gradient], buffers, **OPTIONS)
    buffer = optimizer.state[param]["momentum_buffer"]
    assert buffers[0] is not None
    return torch.equal(param.detach(), values) and torch.equal(buffer, buffers[0])


def of_the_kernel(dtype: torch.dtype) -> dict[str, Any]:
    """What the compiler made of it."""
    launcher = importlib.import_module("wd_fused.triton_kernels.launcher")
    made = launcher._loaded(launcher.plain_kernel(dtype), torch.cuda.current_device())
    return {"registers": getattr(made, "n_regs", None), "spills": getattr(made, "n_spills", None)}


def measured(dtype: str, timer: Timer, elements: int, streams: tuple[Streams, int] | None) -> dict[str, Any]:
    case = Case("tiles", "", ((elements,),), dtype=dtype)
    (param,) = parameters_of(case, gpu_cases.DEVICE)
    buffer = torch.zeros_like(param)
    torch_dtype = param.dtype
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    steps: list[Callable[[], object]] = []
    for tile_bytes, warps in PAIRS:
        row: dict[str, Any] = {"implementation": TRITON, "tile_bytes": tile_bytes, "warps": warps}
        row["shipped"] = (tile_bytes, warps) == shipped()
        try:
            with compiled_with(tile_bytes, warps):
                row["right_bits"] = has_right_bits(torch_dtype)
                optimizer = optimizer_over(param, buffer, "triton")
                row |= of_the_kernel(torch_dtype)
        except Exception as error:  # of the compiler, for one
            failed.append(row | {"failed": f"{type(error).__name__}: {error}"[:300]})
            continue
        (launch,) = optimizer._plans.parts[0].plan.launches()  # type: ignore[union-attr]
        assert launch["tiles"] == math.ceil(elements * param.element_size() / tile_bytes), "not with this tile"
        rows.append(row)
        steps.append(optimizer.step)
    if backends.FUSED["cuda"].unavailable() is None:
        rows.append({"implementation": OURS})
        steps.append(optimizer_over(param, buffer, "cuda").step)
    if streams is not None:
        kernels, variant = streams
        gradient = param.grad
        assert gradient is not None
        rows.append({"implementation": LIMIT})
        steps.append(lambda: kernels.run(variant, param.detach(), gradient, buffer))
    seconds: list[list[float]] = [[] for _ in steps]
    order = list(range(len(steps)))
    shuffle = random.Random(0).shuffle
    for _ in range(ROUNDS):
        shuffle(order)
        for i in order:
            host, _ = timer.host_and_whole(steps[i])
            seconds[i].append(timer.device(steps[i], host))
    for row, own in zip(rows, seconds, strict=True):
        row["bytes_per_second"] = spread([case.bytes_moved / s for s in own])
    return {"dtype": dtype, "elements": elements, "rows": rows + failed}


def run(stage: Stage) -> None:
    if (reason := backends.FUSED["triton"].unavailable()) is not None:
        stage.data["absent"] = reason
        return
    free, _ = torch.cuda.mem_get_info()
    elements = FEW_ELEMENTS if stage.quick else ELEMENTS
    while 16 * elements > free:
        elements //= 2
    compile_all()
    timer = Timer()
    library = stage.folder / LIBRARY
    best = {r["dtype"]: r["best"]["variant"] for r in stage.given.get("roofline", {}).get("runs", [])}
    stage.data["runs"] = []
    for dtype in DTYPES:
        streams = (Streams(library), best[dtype]) if dtype in best and library.is_file() else None
        found = measured(dtype, timer, elements, streams)
        stage.data["runs"].append(found)
        for row in found["rows"]:
            if row.get("right_bits") is False or (row.get("shipped") and "failed" in row):
                what = row.get("failed", "wrong bits")
                stage.failures.append(f"{dtype}, tiles of {row['tile_bytes']} bytes, {row['warps']} warps: {what}")
        stage.save()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main("tiles", run))
