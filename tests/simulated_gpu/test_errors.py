"""What FusedSGD makes of a GPU that its build does not cover, and of launches that fail; and the end of a tensor of
more than 2³¹ elements. Run on the simulated GPU, which is told to, by `make simulated-gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.simulated_gpu import control
from wd_fused import FusedSGD, reference
from wd_fused.build import extension

pytestmark = pytest.mark.skipif(control.LIBRARY not in os.environ, reason="runs on the simulated GPU alone")

INVALID_CONFIGURATION = 9  # cudaErrorInvalidConfiguration
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

NOT_COVERED = """
import warnings
import torch
from tests.simulated_gpu import control
from wd_fused import FusedSGD, backends

backends.PREFERENCE["cuda"] = ("cuda",)

def step(**arguments):
    control.fail_kernel(209, times=1_000)  # cudaErrorNoKernelImageForDevice
    FusedSGD([param], lr=1.0, **arguments).step()

param = torch.ones(3, device="cuda", requires_grad=True)
param.grad = torch.ones_like(param)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    step()
assert param.tolist() == [0, 0, 0]
assert ["TORCH_CUDA_ARCH_LIST=9.0" in str(warning.message) for warning in caught] == [True], caught
try:
    step(backend="cuda")
except RuntimeError as error:
    assert "not for compute capability 9.0 of cuda:0" in str(error), error
else:
    raise AssertionError("no error")
"""


def test_a_device_that_the_build_does_not_cover_is_a_reason_with_a_remedy(tmp_path):
    """In a process of its own: the answer is kept."""
    script = tmp_path / "program.py"
    script.write_text(NOT_COVERED)
    command = [sys.executable, "-m", "tests.simulated_gpu.inside", str(script)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_launch_that_fails_names_the_kernel_and_leaves_the_optimizer_as_it_was(steps_before):
    params = [torch.randn(size, device="cuda", requires_grad=True) for size in (4, 3_000)]
    twins = [param.detach().clone().requires_grad_() for param in params]
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad = torch.randn_like(param)
    optimizer, expected = FusedSGD(params, **OPTIONS, backend="cuda"), torch.optim.SGD(twins, **OPTIONS, foreach=False)
    for _ in range(steps_before):
        optimizer.step()
        expected.step()
    before = [param.detach().clone() for param in params]
    assert extension.load().why_not_cuda(0) is None  # or the step would ask
    control.fail_kernel(INVALID_CONFIGURATION, after=0 if steps_before else 1)  # a first step loads the kernel
    with pytest.raises(RuntimeError, match=r"in the launch of sgd_kernel<float32, torch, 4096>"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert len(optimizer.state) == (2 if steps_before else 0)
    optimizer.step()
    expected.step()
    assert all(torch.equal(param, twin) for param, twin in zip(params, twins, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_end_of_a_tensor_of_more_than_2_to_the_31_elements(dtype):
    """Of all blocks only the last ones run; memory that nobody touches takes no room."""
    count, end = 2**31 + 2**14, 100  # whole tiles: smaller ones come first in a launch
    param, gradient = (torch.empty(count, dtype=dtype, device="cuda") for _ in range(2))
    optimizer = FusedSGD([param], **OPTIONS, backend="cuda")
    param.grad = gradient
    with control.only_blocks_from(2**40):
        optimizer.step()
        (launch,) = optimizer._plans.parts[0].plan.launches()
    state = optimizer.state[param]["momentum_buffer"]
    ends = [tensor.detach()[-end:] for tensor in (param, gradient, state)]
    for i, part in enumerate(ends):
        part.copy_(torch.randn(end, generator=torch.Generator().manual_seed(i)))
    expected, buffer = ends[0].clone(), [ends[2].clone()]
    with control.only_blocks_from(launch["blocks"] - 2):
        optimizer.step()
    reference.sgd([expected], [ends[1].clone()], buffer, **OPTIONS)
    assert torch.equal(ends[0], expected) and torch.equal(ends[2], buffer[0])
