"""Stage "options" of gpu_check: FusedSGD's options in one pass, against the torch calls in sequence that do the same.

torch's are foreach clipping, fused SGD and foreach lerp, each the fastest that torch has; nothing waits for the GPU.
Times as in the stage "speed".
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import cases
from bench.cases import OPTIONS, Case
from bench.cases import options as option_cases
from bench.cases.implementations import OURS
from bench.cases.options import GRAD_SCALE, OptionSet
from bench.gpu import cases as gpu_cases
from bench.gpu.cases import OWN
from bench.gpu.goals import TORCH_IN_SEQUENCE
from bench.gpu.speed import Measurement, row_of
from bench.gpu.stage import Stage, main
from bench.gpu.timing import SWEEP, Timer
from bench.gpu.tools import output_of
from bench.gpu.trace import profiled

# Half precision beside what `make bench` has: there a GPU rounds each product by its slow unit, or does not.
CLIP_BFLOAT16 = OptionSet(
    "clip-bfloat16", "bfloat16, clip, SGD", option_cases.BY_NAME["clip"].options, dtype="bfloat16"
)
OPTION_SETS = (*(chosen for chosen in option_cases.OPTION_SETS if chosen.options), CLIP_BFLOAT16)
BY_NAME = {chosen.name: chosen for chosen in OPTION_SETS}
CASES = tuple(case for case in gpu_cases.GPU_STEP if case.name in ("1x1G", "resnet50", "161x8"))


def steps_of(chosen: OptionSet, params: list[Tensor]) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Everybody's step over the same parameters, and our optimizers."""
    from wd_fused import FusedSGD, backends
    from wd_fused.build import extension

    extension.load()
    steps: dict[str, Callable[[], object]] = {}
    optimizers = {}
    for name, backend in OWN.items():
        if backends.FUSED[backend].unavailable() is None:
            optimizer = FusedSGD(params, **OPTIONS, **chosen.options, backend=backend)
            if chosen.unscales:
                optimizer.grad_scale = torch.full((), GRAD_SCALE, device=gpu_cases.DEVICE)
            optimizers[name], steps[name] = optimizer, optimizer.step
    steps[TORCH_IN_SEQUENCE] = option_cases.stepper(chosen, option_cases.TORCH, params).step
    for step in steps.values():
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    return steps, optimizers


def measured(chosen: OptionSet, case: Case, timer: Timer) -> dict[str, Any]:
    case = dataclasses.replace(case, dtype=chosen.dtype)
    params = cases.parameters(case, gpu_cases.DEVICE)
    steps, optimizers = steps_of(chosen, params)
    measurement = Measurement(case, timer, steps, case.rounds)
    cold = case.bytes_held <= 4 * timer.l2_bytes
    rows = []
    for name, step in steps.items():
        row = row_of(name, measurement, case)
        del row["bytes_per_second"]  # of SGD alone
        profile = profiled(step, 3, before=timer.sweep_l2 if cold else None, ignored=SWEEP)
        row |= {"kernels": profile["kernels"], "kernel_us": profile["kernel_us"], "waits": profile["waits"]}
        if name in optimizers:
            row["plan"] = [one for part in optimizers[name]._plans.parts for one in part.plan.launches()]
        rows.append(row)
    return {"case": case.name, "options": chosen.name, "title": f"{case.title}: {chosen.title}", "rows": rows}


def compile_ahead() -> float:
    """Seconds for the Triton kernels of all options, each set's in a process: they lie in Triton's cache afterwards."""
    began = time.perf_counter()
    commands = [[sys.executable, "-m", "bench.gpu.options", "compile", chosen.name] for chosen in OPTION_SETS]
    with concurrent.futures.ThreadPoolExecutor(len(commands)) as pool:
        list(pool.map(lambda command: output_of(command, 100), commands))  # what fails there is told where it is needed
    return time.perf_counter() - began


def step_once(chosen: OptionSet) -> None:
    """A step of a small tensor on the Triton backend, for the kernels that it compiles."""
    from wd_fused import FusedSGD

    case = dataclasses.replace(cases.many(1, 8), dtype=chosen.dtype)
    FusedSGD(cases.parameters(case, gpu_cases.DEVICE), **OPTIONS, **chosen.options, backend="triton").step()
    torch.cuda.synchronize()


def run(stage: Stage) -> None:
    from wd_fused import backends

    stage.data |= {"cases": [], "left_out": []}
    if backends.FUSED["triton"].unavailable() is None:
        stage.data["compiled_in_seconds"] = round(compile_ahead(), 1)
    timer = Timer()
    profiled(lambda: torch.ones(8, device=gpu_cases.DEVICE))  # the profiler's own first use
    for wanted in gpu_cases.GPU_QUICK if stage.quick else CASES:
        for chosen in OPTION_SETS:
            free, _ = torch.cuda.mem_get_info()
            case = gpu_cases.fitting(wanted, free)
            if case is None:
                stage.data["left_out"].append(f"{wanted.title}: {free / 2**30:.0f} GiB of memory free")
                continue
            try:
                found = measured(chosen, case, timer)
            except torch.OutOfMemoryError as error:
                stage.data["left_out"].append(f"{case.title}, {chosen.title}: {str(error).splitlines()[0]}")
            else:
                stage.data["cases"].append(found | {"instead_of": wanted.name})
                stage.failures += broken(found)
            stage.save()
            gc.collect()
            torch.cuda.empty_cache()


def broken(found: dict[str, Any]) -> list[str]:
    """Sentences for what a steady step of the CUDA backend must not do."""
    (row,) = [row for row in found["rows"] if row["implementation"] == OURS] or [None]
    if row is None:
        return []
    most = 2 if "max_grad_norm" in BY_NAME[found["options"]].options else 1
    sentences = []
    if len(row["plan"]) > most or row["kernels"] > most:
        sentences.append(f"{found['title']}: {row['kernels']:g} kernels ({len(row['plan'])} by the plan), not {most}")
    if row["waits"]:
        sentences.append(f"{found['title']}: waits for the GPU")
    return sentences


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        step_once(BY_NAME[sys.argv[2]])
    else:
        sys.exit(main("options", run))
