"""Stage "speed" of gpu_check: FusedSGD's two backends against torch.optim.SGD and the GPU's memory, on the cases of the
goals.

All implementations step the same parameters with the same gradients and momentum buffers, in interleaved rounds, in an
order shuffled anew. Three times are taken apart: the host's, until step() returns on an idle GPU; the whole step's,
until the GPU is done with it; the device's, between two events while the host is ahead. Kernel time, the sum of the
kernels' own times by the profiler, leaves out what lies between launches; the replay of a CUDA graph of the step, where
one can be captured, what the host does between them. Where all of a case's data fit into the L2, device, kernel and
graph time are taken with something else in it.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from bench import cases
from bench.cases import Case
from bench.cases.implementations import LIMIT, LOOP, OPTIMI
from bench.cases.lineup import Lineup
from bench.gpu import cases as gpu_cases
from bench.gpu.cases import OWN
from bench.gpu.goals import RATIOS
from bench.gpu.roofline import LIBRARY, Streams
from bench.gpu.stage import Stage, main, ratio_of_rounds, spread
from bench.gpu.timing import QUEUE, SWEEP, Timer
from bench.gpu.trace import profiled
from bench.measure import interleaved

COPY = "device copy"
DEVICE_SECONDS = 2e-3  # of device time that one sample takes at least, where the data are cold anyway
# A launch a tensor and more, over so many, takes a tenth of a second and more: fewer rounds tell as much.
LAUNCH_A_TENSOR = (LOOP, OPTIMI)
TENSORS_OF_A_SLOW_LOOP = 5_000


class Workload(Lineup):
    """A case's tensors on the GPU, every implementation's optimizer over them, and what times them."""

    def __init__(self, case: Case, timer: Timer) -> None:
        super().__init__(case, "cuda", gpu_cases.GPU_IMPLEMENTATIONS)
        self.timer = timer


def add_streams(steps: dict[str, Callable[[], object]], workload: Workload, streams: Streams, variant: int) -> None:
    """The plain kernel and the copy as two more implementations, over the same memory."""
    p, b = workload.params[0].detach(), workload.buffers[0]
    g = workload.params[0].grad
    assert g is not None
    steps[LIMIT] = lambda: streams.run(variant, p, g, b)
    steps[COPY] = lambda: b.copy_(g)


class Measurement:
    """The samples of a case: seconds, per implementation and round."""

    def __init__(self, case: Case, timer: Timer, steps: dict[str, Callable[[], object]], rounds: int) -> None:
        self._steps = steps
        self._timer = timer
        self._cold = case.bytes_held <= 4 * timer.l2_bytes
        self._counts = {name: self._calibrated(step) for name, step in steps.items()}
        samples = interleaved.interleave(steps, rounds, self._sample)
        self.host, self.whole, self.device = (
            {name: [sample[i] for sample in own] for name, own in samples.items()} for i in range(3)
        )

    def _calibrated(self, step: Callable[[], object]) -> int:
        """How many steps make a sample of device time."""
        step()
        _, whole = min(self._timer.host_and_whole(step) for _ in range(2))
        return 1 if self._cold else max(1, min(10, math.ceil(DEVICE_SECONDS / whole)))

    def _sample(self, name: str) -> tuple[float, float, float]:
        step = self._steps[name]
        step()  # the host's caches hold what this implementation leaves in them
        host, whole = self._timer.host_and_whole(step)
        return host, whole, self._timer.device(step, host, self._counts[name], self._cold)


def by_graph(optimizer: Optimizer, timer: Timer, rounds: int, cold: bool) -> dict[str, Any]:
    """Device time of the step as a CUDA graph, or why there is none."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            optimizer.step()
    except Exception as error:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return {"not_captured": str(error).splitlines()[0][:200]}
    graph.replay()
    torch.cuda.synchronize()
    return spread([timer.device(graph.replay, 1e-4, 1, cold) for _ in range(rounds)])


def row_of(name: str, measurement: Measurement, case: Case) -> dict[str, Any]:
    device = measurement.device[name]
    row: dict[str, Any] = {
        "implementation": name,
        "host_us": spread([s * 1e6 for s in measurement.host[name]]),
        "whole_us": spread([s * 1e6 for s in measurement.whole[name]]),
        "device_us": spread([s * 1e6 for s in device]),
    }
    moved = case.bytes_moved if name != COPY else 2 * case.elements * cases.ITEMSIZE[case.dtype]
    row["bytes_per_second"] = spread([moved / s for s in device])
    for unit, suffix in RATIOS.items():
        for what in ("host", "whole", "device"):
            seconds: dict[str, list[float]] = getattr(measurement, what)
            if unit != name and unit in seconds:
                row[f"{what}_{suffix}"] = ratio_of_rounds(seconds[name], seconds[unit])
    return row


def measured(case: Case, timer: Timer, streams: Streams | None, variant: int) -> dict[str, Any]:
    began = time.perf_counter()
    workload = Workload(case, timer)
    steps = dict(workload.steps)
    is_slow = len(case.shapes) > TENSORS_OF_A_SLOW_LOOP
    slow = {name: steps.pop(name) for name in LAUNCH_A_TENSOR if is_slow and name in steps}
    if streams is not None and len(case.shapes) == 1:
        add_streams(steps, workload, streams, variant)
    measurement = Measurement(case, timer, steps, case.rounds)
    rows = {name: row_of(name, measurement, case) for name in steps}
    if slow:
        own = {name: step for name, step in steps.items() if name in OWN}
        measurement = Measurement(case, timer, own | slow, 3)
        rows |= {name: row_of(name, measurement, case) for name in slow}
    cold = case.bytes_held <= 4 * timer.l2_bytes
    for name, optimizer in workload.optimizers.items():
        repeats = 1 if name in slow else 5
        profile = profiled(optimizer.step, repeats, before=timer.sweep_l2 if cold else None, ignored=SWEEP)
        rows[name]["kernels"] = profile["kernels"]
        rows[name]["kernel_us"] = profile["kernel_us"]
        rows[name]["queued_ahead"] = profile["kernels"] <= QUEUE
        if name not in slow:
            rows[name]["graph_us"] = scaled(by_graph(optimizer, timer, min(case.rounds, 9), cold))
        torch.cuda.empty_cache()
    return {
        "case": case.name,
        "title": case.title,
        "dtype": case.dtype,
        "tensors": len(case.shapes),
        "elements": case.elements,
        "bytes_moved": case.bytes_moved,
        "cold_l2": cold,
        "absent": workload.absent,
        "rows": list(rows.values()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def scaled(seconds: dict[str, Any]) -> dict[str, Any]:
    """A spread in microseconds."""
    return {k: round(v * 1e6, 3) if k in ("median", "low", "high") else v for k, v in seconds.items()}


def run(stage: Stage) -> None:
    streams, variant = None, 0
    library = stage.folder / LIBRARY
    if library.is_file() and stage.given.get("roofline", {}).get("runs"):
        streams = Streams(library)
        best = {r["dtype"]: r["best"]["variant"] for r in stage.given["roofline"]["runs"]}
    timer = Timer()
    empty = [timer.device(lambda: None, 1e-5) for _ in range(21)]
    stage.data |= {"l2_bytes": timer.l2_bytes, "empty_device_us": scaled(spread(empty)), "cases": [], "left_out": []}
    profiled(lambda: torch.ones(8, device=gpu_cases.DEVICE))  # the profiler's own first use
    for wanted in gpu_cases.GPU_QUICK if stage.quick else gpu_cases.GPU_STEP:
        free, _ = torch.cuda.mem_get_info()
        case = gpu_cases.fitting(wanted, free)
        if case is None:
            stage.data["left_out"].append(f"{wanted.title}: {free / 2**30:.0f} GiB of memory free")
            continue
        if streams is not None:
            variant = best.get(case.dtype, 0)
        try:
            stage.data["cases"].append(measured(case, timer, streams, variant) | {"instead_of": wanted.name})
        except torch.OutOfMemoryError as error:
            stage.data["left_out"].append(f"{case.title}: {str(error).splitlines()[0]}")
        stage.save()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main("speed", run))
