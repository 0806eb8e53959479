"""`python stages_on_cpu.py FOLDER`: gpu_check's stages that step, over tiny cases without a GPU, as JSON in the last
line. Run by tests/test_gpu_check.py; on_cpu.py tells what stands for a GPU. The times are of nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import on_cpu
import torch

from bench import cases, gpu_cases, gpu_trace

gpu_cases.DEVICE = "cpu"
CASE = cases.Case("2x5", "2 of 5 elements", ((5,),) * 2, rounds=2)
gpu_cases.GPU_QUICK = (cases.Case("1x2500", "one of 2,500 elements", ((2_500,),), rounds=2), CASE)


def profiled(step: Callable[[], object], steps: int = 1, **ignored: Any) -> dict[str, Any]:
    """Counts what the Triton backend does; of the others, a launch."""
    on_cpu.COUNTS.clear()
    for _ in range(steps):
        step()
    counts = {"kernels": on_cpu.COUNTS["launches"] / steps or 1.0, "memcpys": on_cpu.COUNTS["copies"] / steps}
    return counts | {"memsets": 0.0, "waits": 0.0, "kernel_us": 1.0, "kernel_names": {}}


gpu_trace.profiled = profiled

from bench import gpu_arithmetic, gpu_first_step, gpu_host, gpu_launches, gpu_speed, gpu_tail, gpu_tiles  # noqa: E402
from bench.gpu_stage import Stage  # noqa: E402

MIXES = list(gpu_arithmetic.mixes())
gpu_arithmetic.mixes = lambda: MIXES[6::9]
gpu_arithmetic.DTYPES = (torch.float32, torch.bfloat16)
gpu_arithmetic.SIZES = (1, 300)
gpu_tiles.FEW_ELEMENTS, gpu_tiles.CHECKED, gpu_tiles.ROUNDS = 2_500, 4_500, 1
gpu_tiles.PAIRS = [(4096, 2), (8192, 4)]


def main(folder: Path) -> None:
    stages = {}
    for module in (gpu_arithmetic, gpu_launches, gpu_speed, gpu_tail, gpu_host, gpu_tiles):
        name = module.__name__.rpartition("gpu_")[2]
        stage = Stage(folder / name, quick=True, given={})
        module.run(stage)
        stages[name] = {"status": "passed", "seconds": 0.0, "failures": stage.failures, "data": stage.data}
    gpu_first_step.CASE = CASE
    rows = [
        {"implementation": name, "cache": "built before"} | gpu_first_step.first_steps(backend)
        for name, backend in gpu_cases.OWN.items()
    ]
    stages["first-step"] = {"status": "passed", "seconds": 0.0, "failures": [], "data": {"rows": rows}}
    print(json.dumps(stages))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
