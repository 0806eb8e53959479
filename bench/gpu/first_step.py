"""Stage "first-step" of gpu_check: how long the first step of a process takes, where Triton has to compile its kernel.

Each row is of a process of its own, with torch and the GPU awake before anything is timed: the import of wd_fused, the
first step, which makes the plan and loads or compiles the kernel, the second and the third. Triton's cache is an empty
folder at first, and then what the first process has left there. Last, all of Triton's kernels are compiled into the
cache that the later stages use.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from bench.cases import OPTIONS, many
from bench.cases.implementations import OURS, TRITON
from bench.gpu import cases as gpu_cases
from bench.gpu.cases import OWN
from bench.gpu.environment import without_paths
from bench.gpu.stage import Stage, main
from bench.gpu.tools import output_of

CASE = many(161, 8)
SECONDS = 60  # for a process, at most


def first_steps(backend: str) -> dict[str, float]:
    """Seconds of a process that steps for the first time."""
    import torch

    from bench import cases

    params = cases.parameters(CASE, gpu_cases.DEVICE)
    torch.cuda.synchronize()
    marks = [time.perf_counter()]
    from wd_fused import FusedSGD

    optimizer = FusedSGD(params, **OPTIONS, backend=backend)
    marks.append(time.perf_counter())
    for _ in range(3):
        optimizer.step()
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
    names = ("import_seconds", "first_step_seconds", "second_step_seconds", "third_step_seconds")
    return {name: round(b - a, 6) for name, a, b in zip(names, marks, marks[1:], strict=False)}


def all_kernels() -> dict[str, float]:
    """Seconds for all of Triton's kernels, for the GPU that is here."""
    import importlib

    from wd_fused import backends

    backends.triton_kernels()
    launcher = importlib.import_module("wd_fused.triton_kernels.launcher")
    import triton

    target = triton.runtime.driver.active.get_current_target()
    began = time.perf_counter()
    for kernel in launcher.KERNELS:
        launcher.compiled(kernel, target)
    return {"kernels": len(launcher.KERNELS), "seconds": round(time.perf_counter() - began, 3)}


def in_a_process(what: str, **environment: str) -> dict[str, Any]:
    """What a process of this program found; its last lines instead if it failed."""
    command = [sys.executable, "-m", "bench.gpu.first_step", what]
    status, said = output_of(command, SECONDS, **environment)
    lines = [line for line in said.splitlines() if line.strip()]
    if status == 0 and lines and lines[-1].startswith("{"):
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    return {"failed": without_paths("\n".join(lines[-12:])) or f"exit status {status}"}


def run(stage: Stage) -> None:
    constructors, absent = gpu_cases.gpu_optimizers()
    stage.data["left_out"] = {name: reason for name, reason in absent.items() if name in OWN}
    stage.data["rows"] = []

    def add(name: str, cache: str, **environment: str) -> None:
        row = {"implementation": name, "cache": cache} | in_a_process(OWN[name], **environment)
        stage.data["rows"].append(row)
        if "failed" in row:
            stage.failures.append(f"the first step of {name} ({cache}): {row['failed'].splitlines()[-1]}")
        stage.save()

    if OURS in constructors:
        add(OURS, "built before")
    if TRITON not in constructors:
        return
    with tempfile.TemporaryDirectory(prefix="triton-cache-") as folder:
        add(TRITON, "empty", TRITON_CACHE_DIR=folder)
        add(TRITON, "filled", TRITON_CACHE_DIR=folder)
    stage.data["all_kernels"] = in_a_process("kernels")
    stage.save()


if __name__ == "__main__":
    if sys.argv[1:] == ["kernels"]:
        print(json.dumps(all_kernels()))
    elif sys.argv[1:] in (["cuda"], ["triton"]):
        print(json.dumps(first_steps(sys.argv[1])))
    else:
        sys.exit(main("first_step", run))
