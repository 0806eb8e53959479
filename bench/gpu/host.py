"""Stage "host" of gpu_check: how long step() keeps the host, as training has it: gradients that moved, a new lr.

The GPU is idle before each step, so that the queue is empty. All implementations step the same parameters, in rounds
interleaved as in the stage "speed"; what is changed between two steps is changed outside the time that is taken.
"""

from __future__ import annotations

import gc
import itertools
import random
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.cases import OPTIONS, Case
from bench.gpu import cases as gpu_cases
from bench.gpu.goals import RATIOS
from bench.gpu.speed import LAUNCH_A_TENSOR, TENSORS_OF_A_SLOW_LOOP, Workload
from bench.gpu.stage import Stage, main, ratio_of_rounds, spread
from bench.gpu.timing import Timer

STEADY, MOVED, NEW_LR = "steady", "moved", "new_lr"


def changes(workload: Workload) -> dict[str, Callable[[], object]]:
    """What happens before a step, by name."""
    rates = itertools.cycle((OPTIONS["lr"], OPTIONS["lr"] / 2))

    def new_lr() -> None:
        lr = next(rates)
        for optimizer in workload.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    return {STEADY: lambda: None, MOVED: gpu_cases.Gradients(workload.params).move, NEW_LR: new_lr}


def measured(case: Case, timer: Timer) -> dict[str, Any]:
    workload = Workload(case, timer)
    is_slow = len(case.shapes) > TENSORS_OF_A_SLOW_LOOP
    names = [name for name in workload.steps if not (is_slow and name in LAUNCH_A_TENSOR)]
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    shuffle = random.Random(0).shuffle
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for what, change in changes(workload).items():
            for _ in range(case.rounds):
                shuffle(names)
                for name in names:
                    for _ in range(2):  # the caches hold what this implementation leaves in them
                        change()
                        host, _ = timer.host_and_whole(workload.steps[name])
                    seconds[name].setdefault(what, []).append(host)
    finally:
        if was_enabled:
            gc.enable()
    rows = [row_of(name, seconds) for name in seconds]
    return {"case": case.name, "title": case.title, "tensors": len(case.shapes), "rows": rows}


def row_of(name: str, seconds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"implementation": name}
    for what, own in seconds[name].items():
        row[f"{what}_us"] = spread([s * 1e6 for s in own])
        for unit, suffix in RATIOS.items():
            if unit != name and unit in seconds:
                row[f"{what}_{suffix}"] = ratio_of_rounds(own, seconds[unit][what])
    return row


def run(stage: Stage) -> None:
    timer = Timer()
    stage.data["cases"] = []
    for case in gpu_cases.GPU_QUICK[1:] if stage.quick else gpu_cases.GPU_HOST:
        stage.data["cases"].append(measured(case, timer))
        stage.save()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main("host", run))
