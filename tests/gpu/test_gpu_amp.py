"""Under torch.amp.GradScaler: the bits of torch.optim.SGD under a scaler of its own, and no waiting for the GPU.

With fused=True: the scaler then leaves unscaling and skipping to the step.
Gradients are made by hand, already scaled, so that the two see the same ones.
"""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    SGD_ARGUMENTS,
    Reference,
    assert_same_bits,
    buffers_of,
    fused,
    launches,
    no_waiting,
    numbers,
    parameters,
    source,
    twin,
)

pytestmark = pytest.mark.gpu_backend("cuda", "triton")

SIZES = (3, 1_000, 5_000, 20_001)


class Run:
    """An optimizer under a scaler, stepped with gradients of one's own."""

    def __init__(self, optimizer, params, **scaler):
        self.optimizer = optimizer
        self.params = params
        self.scaler = torch.amp.GradScaler(DEVICE.type, **scaler)
        self.scaler.scale(torch.zeros((), device=DEVICE))  # makes its scale

    def give(self, seed, overflow=False):
        generator = source(seed)
        for param in self.params:
            gradient = numbers(param.shape, param.dtype, generator)
            param.grad = (gradient * self.scaler.get_scale()).to(param.dtype)
        if overflow:
            self.params[-1].grad[7] = float("inf")

    def step(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()


def pair(dtype=torch.float32, arguments=None, **scaler):
    params = parameters(dtype, sizes=SIZES)
    twins = twin(params)
    arguments = SGD_ARGUMENTS | (arguments or {})
    ours = Run(fused(params, **arguments, fused=True), params, **scaler)
    theirs = Run(torch.optim.SGD(twins, **arguments, foreach=False), twins, **scaler)
    return ours, theirs


def assert_equal_runs(ours, theirs, what=""):
    assert_same_bits(ours.params, theirs.params, f"{what} parameters")
    assert_same_bits(buffers_of(ours.optimizer), buffers_of(theirs.optimizer), f"{what} momentum buffers")
    assert ours.scaler.get_scale() == theirs.scaler.get_scale(), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [2.0**12, 1_000.0, 3.0], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"nesterov": True}, {"momentum": 0.0}], ids=str)
def test_bits_and_scale_are_torchs(dtype, scale, arguments):
    ours, theirs = pair(dtype, arguments, init_scale=scale)
    for step in range(4):
        for run in (ours, theirs):
            run.give(seed=step)
            run.step()
        assert_equal_runs(ours, theirs, f"step {step}:")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [2.0**6, 100.0], ids=str)
def test_half_precision_bits_are_the_references_of_gradients_unscaled_before(dtype, scale):
    params = parameters(dtype, sizes=SIZES)
    ours = Run(fused(params, fused=True), params, init_scale=scale)
    expected = Reference(ours.optimizer)
    for step in range(4):
        ours.give(seed=step)
        scaled = [param.grad for param in params]
        inverse = torch.tensor(scale, dtype=torch.float64).reciprocal().float().item()
        for param, gradient in zip(params, scaled, strict=True):
            param.grad = gradient.float().mul(inverse).to(dtype)
        expected.step()
        for param, gradient in zip(params, scaled, strict=True):
            param.grad = gradient
        ours.step()
        expected.assert_agrees(f"step {step}:")


@pytest.mark.parametrize("numerics", ["torch", "opmath"])
@pytest.mark.parametrize("scale", [1.7e38, 1.0, 1e-3, 2.0**-140], ids=str)
def test_extreme_scales_of_every_dtype(scale, numerics):
    """Their reciprocals, formed in float32, may be subnormal or infinite."""
    params = [param for dtype in DTYPES for param in parameters(dtype, sizes=(1, 9, 130, 2_000))]
    optimizer = fused(params, numerics=numerics)
    expected = Reference(optimizer, numerics)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()  # the first one, which makes the buffers, unscales in place
    expected.step()
    optimizer.grad_scale = torch.tensor(scale, device=DEVICE)
    inverse = 1 / optimizer.grad_scale
    for seed in range(2):
        generator = source(seed)
        unscaled = []
        for param in params:
            opmath = torch.float64 if param.dtype == torch.float64 else torch.float32
            param.grad = numbers(param.shape, param.dtype, generator) * max(scale, 1)
            gradient = param.grad.to(opmath) * inverse.to(opmath)
            unscaled.append(gradient.to(param.dtype) if numerics == "torch" else gradient)
        optimizer.step()
        expected.step(unscaled)
        expected.assert_agrees(f"step {seed}")


@pytest.mark.parametrize("found_inf", [1.0, 2.0, float("inf"), float("nan")])
def test_anything_but_0_is_an_overflow(found_inf):
    """torch adds up what was found."""
    params = [param for dtype in DTYPES for param in parameters(dtype, sizes=(9, 2_000))]
    optimizer = fused(params)
    for step in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        if step:
            optimizer.found_inf = torch.tensor(found_inf, device=DEVICE)
            before = [tensor.detach().clone() for tensor in (*params, *buffers_of(optimizer))]
        optimizer.step()
    assert_same_bits([*params, *buffers_of(optimizer)], before)


@pytest.mark.parametrize("overflows", [{0}, {2}, {0, 1, 4}], ids=["first step", "a later one", "several"])
def test_an_overflow_skips_the_whole_step_and_halves_the_scale(overflows):
    ours, theirs = pair(init_scale=2.0**10)
    for step in range(6):
        before = [param.detach().clone() for param in ours.params]
        for run in (ours, theirs):
            run.give(seed=step, overflow=step in overflows)
            run.step()
        if step in overflows:
            assert_same_bits(ours.params, before, f"step {step}")
        assert_equal_runs(ours, theirs, f"step {step}:")
    assert ours.scaler.get_scale() == 2.0 ** (10 - len(overflows))


def test_the_scale_grows_as_torchs_does():
    ours, theirs = pair(init_scale=64.0, growth_interval=2, growth_factor=1.5)
    for step in range(7):
        for run in (ours, theirs):
            run.give(seed=step)
            run.step()
        assert_equal_runs(ours, theirs, f"step {step}:")
    assert ours.scaler.get_scale() > 64.0


def test_gradients_keep_their_scale_and_gradients_that_were_unscaled_before_are_taken_as_they_are():
    ours, theirs = pair(init_scale=2.0**8)
    for step in range(4):
        for run in (ours, theirs):
            run.give(seed=step)
            if step == 3:
                run.scaler.unscale_(run.optimizer)  # as for clipping
                torch.nn.utils.clip_grad_norm_(run.params, 1.0)
        scaled = [param.grad.clone() for param in ours.params]
        for run in (ours, theirs):
            run.step()
        if step:  # the first step, which makes the buffers, unscales them in place
            assert_same_bits([param.grad for param in ours.params], scaled, f"step {step}, gradients")
    assert_equal_runs(ours, theirs)


def test_a_step_under_a_scaler_does_not_wait_once_it_is_under_way():
    ours, _ = pair(init_scale=2.0**10)
    for step in range(2):
        ours.give(seed=step)
        ours.step()
    for step, overflow in enumerate((False, True, False)):
        ours.give(seed=10 + step, overflow=overflow)
        with no_waiting():
            ours.scaler.step(ours.optimizer)
        ours.scaler.update()
        assert len(launches(ours.optimizer)) == 1


def test_scale_and_overflow_are_read_on_the_gpu_when_the_step_runs():
    """Set by hand, as GradScaler sets them, and changed after step() returned: what counts is the stream's order."""
    params = parameters(torch.float32, sizes=SIZES)
    optimizer = fused(params, momentum=0.0, weight_decay=0.0)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(1.0, device=DEVICE)
    optimizer.step()
    assert_same_bits(params, before, "skipped")
    optimizer.found_inf.zero_()
    optimizer.step()
    optimizer.found_inf.fill_(1.0)
    assert_same_bits(params, [value.add(torch.ones_like(value) / 4, alpha=-0.1) for value in before], "unscaled")
