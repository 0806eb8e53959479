"""Stage "launches" of gpu_check: what a steady step asks of the GPU: launches, copies, waits, memory.

Of FusedSGD's backends also where gradients lie elsewhere than in the step before, as in training.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch

from bench import cases
from bench.cases import Case
from bench.cases.implementations import OPTIMI, OURS, TRITON
from bench.gpu import cases as gpu_cases
from bench.gpu.cases import OWN
from bench.gpu.stage import Stage, main
from bench.gpu.trace import profiled

ALLOCATIONS = "allocation.all.allocated"


def counted(case: Case, implementation: str, move: bool = False) -> dict[str, Any]:
    """A row: what one steady step of an implementation does."""
    constructors, _ = gpu_cases.gpu_optimizers()
    params = cases.parameters(case, gpu_cases.DEVICE)
    optimizer = constructors[implementation](params)
    make_ready = gpu_cases.Gradients(params).move if move else lambda: None
    for _ in range(4):
        make_ready()
        optimizer.step()
    row: dict[str, Any] = {"case": case.name, "title": case.title, "implementation": implementation}
    row["tensors"] = len(params)
    row["gradients_move"] = move
    make_ready()
    row |= profiled(optimizer.step)
    make_ready()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()[ALLOCATIONS]
    optimizer.step()
    row["allocations"] = torch.cuda.memory_stats()[ALLOCATIONS] - before
    row["waits_by_torch"] = None
    make_ready()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        row["waits_by_torch"] = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if implementation in OWN:
        parts = optimizer._plans.parts  # type: ignore[attr-defined]
        row["plan"] = [launch for part in parts for launch in part.plan.launches()]
    return row


def broken(row: dict[str, Any]) -> list[str]:
    """Sentences for what a steady step of FusedSGD must not do."""
    what = f"{row['case']}: a steady step of {row['implementation']}"
    what += " with gradients that move" if row["gradients_move"] else ""
    # Triton's gradients' addresses lie in the GPU's memory, the CUDA backend's in the launch.
    brings = {"memcpys": 1, "allocations": 1} if row["implementation"] == TRITON and row["gradients_move"] else {}
    sentences = []
    for name in ("memcpys", "memsets", "waits", "allocations"):
        if row[name] > brings.get(name, 0):
            sentences.append(f"{what} has {row[name]:g} {name}")
    if row["waits_by_torch"] is not None:
        sentences.append(f"{what} waits: {row['waits_by_torch']}")
    if row["kernels"] == 0:
        sentences.append(f"{what}: the profiler saw no kernel, so nothing is counted")
    # About 4,000 gradients' addresses fit into the CUDA backend's launch.
    expected = -(-row["tensors"] // 4_000) if row["implementation"] == OURS else 1
    if row["kernels"] > expected or len(row["plan"]) > expected:
        sentences.append(f"{what} launches {row['kernels']:g} kernels ({len(row['plan'])} by the plan)")
    return sentences


def run(stage: Stage) -> None:
    profiled(lambda: torch.ones(8, device=gpu_cases.DEVICE))  # the profiler's own first use
    stage.data["rows"] = []
    constructors, stage.data["left_out"] = gpu_cases.gpu_optimizers()
    for case in gpu_cases.GPU_QUICK if stage.quick else gpu_cases.GPU_LAUNCHES:
        for implementation in constructors:
            is_own = implementation in OWN
            if not is_own and (case.dtype not in ("float32", "bfloat16") or implementation == OPTIMI):
                continue
            for move in (False, True) if is_own else (False,):
                row = counted(case, implementation, move)
                stage.data["rows"].append(row)
                stage.failures += broken(row) if is_own else []
                stage.save()
                gc.collect()


if __name__ == "__main__":
    sys.exit(main("launches", run))
