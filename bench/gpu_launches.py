"""Stage "launches" of gpu_check: what a steady step asks of the GPU: launches, copies, waits, memory."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch

from bench import cases
from bench.cases import OURS, Case
from bench.gpu_stage import Stage, main
from bench.gpu_trace import profiled

ALLOCATIONS = "allocation.all.allocated"


def counted(case: Case, implementation: str) -> dict[str, Any]:
    """A row: what one steady step of an implementation does."""
    constructors, _ = cases.gpu_optimizers()
    params = cases.parameters(case, "cuda")
    optimizer = constructors[implementation](params)
    for _ in range(3):
        optimizer.step()
    row: dict[str, Any] = {"case": case.name, "title": case.title, "implementation": implementation}
    row["tensors"] = len(params)
    row |= profiled(optimizer.step)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()[ALLOCATIONS]
    optimizer.step()
    row["allocations"] = torch.cuda.memory_stats()[ALLOCATIONS] - before
    row["waits_by_torch"] = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        row["waits_by_torch"] = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if implementation == OURS:
        parts = optimizer._plans.parts  # type: ignore[attr-defined]
        row["plan"] = [launch for part in parts for launch in part.plan.launches()]
    return row


def broken(row: dict[str, Any]) -> list[str]:
    """Sentences for what a steady step of FusedSGD must not do."""
    what = f"{row['case']}: a steady step of {row['implementation']}"
    sentences = []
    for name in ("memcpys", "memsets", "waits", "allocations"):
        if row[name]:
            sentences.append(f"{what} has {row[name]:g} {name}")
    if row["waits_by_torch"] is not None:
        sentences.append(f"{what} waits: {row['waits_by_torch']}")
    if row["kernels"] == 0:
        sentences.append(f"{what}: the profiler saw no kernel, so nothing is counted")
    expected = -(-row["tensors"] // 4_000)  # about so many gradients' addresses fit into a launch's parameters
    if row["kernels"] > expected or len(row["plan"]) > expected:
        sentences.append(f"{what} launches {row['kernels']:g} kernels ({len(row['plan'])} by the plan)")
    return sentences


def run(stage: Stage) -> None:
    profiled(lambda: torch.ones(8, device="cuda"))  # the profiler's own first use
    stage.data["rows"] = []
    chosen = cases.GPU_QUICK if stage.quick else cases.GPU_LAUNCHES
    for case in chosen:
        for implementation in cases.GPU_IMPLEMENTATIONS[:4]:
            if implementation != OURS and case.dtype not in ("float32", "bfloat16"):
                continue
            row = counted(case, implementation)
            stage.data["rows"].append(row)
            if implementation == OURS:
                stage.failures += broken(row)
            stage.save()
            gc.collect()


if __name__ == "__main__":
    sys.exit(main("launches", run))
