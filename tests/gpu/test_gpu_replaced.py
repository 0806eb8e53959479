"""Parameters and momentum buffers that are replaced between steps: their addresses are brought to the GPU anew, and
nothing is taken from a kernel that is queued or from a graph."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    Reference,
    assert_same_bits,
    forget,
    fused,
    give_gradients,
    numbers,
    parameters,
    source,
    synchronize,
)

pytestmark = pytest.mark.gpu_backend("cuda", "triton")

SLEEP = 20_000_000  # cycles


def replace(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.clone()
        state = optimizer.state[param]
        state["momentum_buffer"] = state["momentum_buffer"].clone()


def warm(params):
    optimizer = fused(params)
    expected = Reference(optimizer)
    give_gradients(params, seed=0)
    optimizer.step()
    expected.step()
    return optimizer, expected, optimizer._plans


def test_replaced_tensors_are_stepped_by_the_same_plan():
    params = [p for dtype in (torch.float32, torch.bfloat16) for p in parameters(dtype)]
    optimizer, expected, plans = warm(params)
    for seed in range(1, 5):
        replace(optimizer)
        give_gradients(params, seed=seed)
        optimizer.step()
        expected.step()
    expected.assert_agrees()
    assert optimizer._plans is plans


def test_replaced_tensors_while_the_host_runs_ahead():
    """What earlier steps read, and have not read yet, is neither overwritten nor given away."""
    with torch.cuda.stream(torch.cuda.Stream()):
        params = parameters(torch.float32)
        optimizer, expected, plans = warm(params)
        gradients = [[numbers(p.shape, p.dtype, source(seed)) for p in params] for seed in range(4)]
        for own in gradients:
            torch.cuda._sleep(SLEEP)
            for param, gradient in zip(params, own, strict=True):
                param.grad = gradient
            replace(optimizer)
            optimizer.step()
            expected.step()
        expected.assert_agrees()
        synchronize()
    assert optimizer._plans is plans


def test_a_graph_keeps_the_tensors_that_it_has_captured():
    params = parameters(torch.float32)
    optimizer, expected, plans = warm(params)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    captured = [param.data for param in params]
    gradients = [param.grad for param in params]
    momentum = [optimizer.state[param]["momentum_buffer"] for param in params]
    of_the_graph = Reference(optimizer)
    of_the_graph.buffers = [[buffer.clone() for buffer in momentum]]

    for seed in (1, 2):
        replace(optimizer)
        give_gradients(params, seed=seed)
        optimizer.step()
        expected.step()
    assert optimizer._plans is plans
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
    forget()
    for _ in range(2):
        graph.replay()
        of_the_graph.step()
    expected.assert_agrees()
    assert_same_bits(captured, of_the_graph.params, "of the graph:")
    assert_same_bits(momentum, of_the_graph.buffers[0], "of the graph:")
