"""step_in_backward() on a GPU: the parameters are stepped from backward()'s own thread, without waiting."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    assert_same_bits,
    buffers_of,
    fused,
    no_waiting,
    numbers,
    parameters,
    source,
    twin,
)

from wd_fused import step_in_backward

pytestmark = pytest.mark.gpu_backend("cuda", "triton")


def backward(tensors, seed):
    """Of a loss whose gradients are computed element by element, with the same bits every time."""
    generator = source(seed)
    values = [numbers(tensor.shape, tensor.dtype, generator) / 8 for tensor in tensors]
    loss = sum((tensor * value * tensor).float().sum() for tensor, value in zip(tensors, values, strict=True))
    with no_waiting():
        loss.backward()


@pytest.mark.parametrize("arguments", [{}, {"nesterov": True, "l1_penalty": 1e-3}], ids=str)
def test_bits_are_those_of_a_step_after_backward(arguments):
    params = [p for dtype in DTYPES for p in parameters(dtype, sizes=(5, 1_000, 2_501))]
    twins = twin(params)
    ours, theirs = fused(params, **arguments), fused(twins, **arguments)
    step_in_backward(params, ours)
    before = [param.detach().clone() for param in params]
    for seed in range(4):
        if seed == 0:  # the first step of each parameter makes its plan, and its momentum buffer
            sum((tensor * tensor).float().sum() for tensor in params).backward()
            sum((tensor * tensor).float().sum() for tensor in twins).backward()
        else:
            backward(params, seed)
            backward(twins, seed)
        assert all(param.grad is None for param in params)
        ours.step()
        theirs.step()
        theirs.zero_grad()
        assert_same_bits(params, twins, f"step {seed}")
        assert_same_bits(buffers_of(ours), buffers_of(theirs), f"step {seed}, momentum buffers")
    assert all(bool((param != old).any()) for param, old in zip(params, before, strict=True))
    assert {param.device.type for param in params} == {DEVICE.type}


def test_a_stream_of_its_own():
    """backward() runs a hook on the stream of its forward()."""
    params = parameters(torch.float32, sizes=(5, 1_000, 2_501))
    twins = twin(params)
    ours, theirs = fused(params), fused(twins)
    step_in_backward(params, ours)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        with torch.cuda.stream(stream):
            sum((tensor * tensor).sum() for tensor in params).backward()
        torch.cuda.current_stream().wait_stream(stream)
        sum((tensor * tensor).sum() for tensor in twins).backward()
        theirs.step()
        theirs.zero_grad()
        stream.wait_stream(torch.cuda.current_stream())
    assert_same_bits(params, twins)


def test_accumulated_and_clipped_by_each_parameters_norm_without_waiting():
    params = [p for dtype in DTYPES for p in parameters(dtype, sizes=(5, 1_000, 2_501))]
    twins = twin(params)
    ours, theirs = fused(params), [fused([param], max_grad_norm=1.0) for param in twins]
    step_in_backward(params, ours, gradient_accumulation_steps=2, max_param_grad_norm=1.0)
    clipped = set()
    for seed in range(8):
        own = [slice(None), slice(0, 4)][seed % 4 == 3]  # what the second backward() does not reach is left to step()
        if seed < 4:  # the first steps make plans and momentum buffers
            for tensors in (params, twins):
                sum((tensor * tensor).float().sum() for tensor in tensors[own]).backward()
        else:
            backward(params[own], seed)
            backward(twins[own], seed)
        assert [param.grad is None for param in params[own]] == [seed % 2 == 1] * len(params[own])
        if seed % 2 == 1:
            ours.step()
            for optimizer in theirs:
                optimizer.step()
                optimizer.zero_grad()
                clipped.add(bool(optimizer.grad_norm > 1))
            assert all(param.grad is None for param in params)
            assert_same_bits(params, twins, f"backward {seed}")
            buffers = [buffer for optimizer in theirs for buffer in buffers_of(optimizer)]
            assert_same_bits(buffers_of(ours), buffers, f"backward {seed}, momentum buffers")
    assert True in clipped


def test_clipped_by_the_norm_of_the_step_before_without_waiting():
    params = parameters(torch.float32, sizes=(5, 1_000, 2_501))
    twins = twin(params)
    ours, theirs = fused(params), fused(twins)
    handle = step_in_backward(params, ours, max_lagged_grad_norm=1.0)
    coefficients = []
    for seed in range(5):
        if seed < 2:  # plans and momentum buffers are made
            for tensors in (params, twins):
                sum((tensor * tensor).sum() for tensor in tensors).backward()
        else:
            backward(params, seed)
            backward(twins, seed)
        norm = torch.nn.utils.get_total_norm([param.grad.double() for param in twins])
        coefficients.append(1.0 if seed == 0 else min(1.0, 1 / (float(handle.grad_norm) + 1e-6)))
        for param in twins:
            param.grad.mul_(coefficients[-1])
            torch.nn.utils.clip_grad_norm_([param], 1.0)
        with no_waiting():
            ours.step()
            theirs.step()
        theirs.zero_grad()
        torch.testing.assert_close(handle.grad_norm, norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-6)
    assert min(coefficients) < 0.5
