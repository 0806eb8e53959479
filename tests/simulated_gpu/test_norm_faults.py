"""The norm's kernel of csrc without one of its fences or barriers, cut out of its PTX: found, whatever the sum was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulated_gpu import control, kernel_support

pytestmark = pytest.mark.skipif(control.LIBRARY not in os.environ, reason="runs on the simulated GPU alone")

CLIPPED_STEP = """
import torch
from wd_fused import FusedSGD
params = [torch.nn.Parameter(torch.ones(3_000, device="cuda")) for _ in range(3)]
for param in params:
    param.grad = torch.ones_like(param)
FusedSGD(params, lr=0.1, max_grad_norm=1.0).step()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    ("missing", "which", "found"),
    [
        (r"membar\.gl;", 0, "of global memory"),  # before blocks are counted
        (r"membar\.gl;", 1, "of global memory"),  # before the last reads what all have written
        (r"bar\.sync\s+0;", 0, "of shared memory"),  # in the sum of a block
        (r"bar\.sync\s+0;", 2, "of shared memory"),  # before all know whether they are the last
        (None, 0, None),
    ],
)
def test_a_fence_or_a_barrier_of_the_norm_is_missing(tmp_path, missing, which, found):
    text = Path(os.environ["SIMULATED_GPU_PTX"]).read_text()
    begin = text.index(".entry _ZN8wd_fused11norm_kernelENS_")
    end = text.index("\n}\n", begin)
    kernel = text[begin:end]
    if missing is not None:
        cut = list(re.finditer(missing, kernel))[which]
        kernel = kernel[: cut.start()] + kernel[cut.end() :]
    (tmp_path / "sgd_cuda.ptx").write_text(text[:begin] + kernel + text[end:])
    (tmp_path / "step.py").write_text(CLIPPED_STEP)
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulated_gpu.inside", str(tmp_path / "step.py")],
        cwd=kernel_support.ROOT,
        env=os.environ | {"SIMULATED_GPU_PTX": str(tmp_path / "sgd_cuda.ptx"), "PYTHONPATH": str(kernel_support.ROOT)},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    if found is None:
        assert done.returncode == 0, said
    else:
        assert done.returncode != 0 and "race: " in said and "norm_kernel" in said and found in said, said
