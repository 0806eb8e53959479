"""A plugin of pytest that runs bench's suites on a GPU that the CPU stands for (on_cpu.py), so that their GPU's side
runs somewhere before it does on one:

    TRITON_INTERPRET=1 PYTHONPATH=tests/gpu:tests:. python -m pytest -p suites_on_cpu bench/test_step.py --smoke -k cuda

Run by tests/test_gpu_check.py. The times are of nothing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from stages_on_cpu import CASE

from bench import calls, cases, gpu_stage, gpu_trace, limit, training
from bench.implementations import Absent

gpu_stage.why_no_gpu = lambda: None
calls.profiled = gpu_trace.profiled
cases.SMOKE_STEP = cases.SMOKE_HOST = cases.SMOKE_GROWTH = cases.SMOKE_ELEMENTS = cases.SMOKE_MEMORY = (CASE,)
training.BATCH = 4
cuda: Any = torch.cuda
properties = {"name": "a GPU of nothing", "major": 9, "minor": 0, "total_memory": 1 << 30, "L2_cache_size": 1 << 16}
cuda.get_device_properties = lambda index: SimpleNamespace(**properties)
cuda.reset_peak_memory_stats = lambda: None
cuda.memory_allocated = cuda.max_memory_allocated = lambda: 0


def no_kernels(device: str) -> limit.Kernels:
    raise Absent("the CPU stands for the GPU")


limit.kernels = no_kernels
