"""A schedule of weight decay in a Tensor: steps captured in a CUDA graph follow it, and nothing waits for the GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_support import (
    DEVICE,
    assert_same_bits,
    copy_gradients,
    fused,
    give_gradients,
    no_waiting,
    parameters,
    twin,
)
from torch.optim.lr_scheduler import LinearLR

from wd_fused import WeightDecayScheduler

pytestmark = pytest.mark.gpu_backend("cuda", "triton")


def test_a_decoupled_tensor_is_read_by_the_host_and_cannot_be_captured():
    params = parameters(torch.float32)
    give_gradients(params, seed=0)
    optimizer = fused(params, weight_decay=torch.tensor(0.25, device=DEVICE), decoupled_weight_decay=True)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    with (
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(RuntimeError, match=r"weight_decay is a Tensor on cuda"),
    ):
        optimizer.step()
    assert_same_bits(params, before)
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.25)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    expected = twin(params)
    copy_gradients(params, expected)
    by_hand = fused(expected, weight_decay=0.25, decoupled_weight_decay=True)
    by_hand.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    graph.replay()
    by_hand.step()
    assert_same_bits(params, expected)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "ema_decay": 0.9}], ids=str)
def test_replays_follow_the_schedule(options):
    params = parameters(torch.float32)
    give_gradients(params, seed=0)
    expected = twin(params)
    copy_gradients(params, expected)
    weight_decay = torch.tensor(0.25, device=DEVICE)
    optimizer = fused(params, weight_decay=weight_decay, **options)
    by_hand = fused(expected, weight_decay=0.25, **options)
    scheduler = WeightDecayScheduler(optimizer, lambda o: LinearLR(o, 1.0, end_factor=0.0, total_iters=4))
    graph = torch.cuda.CUDAGraph()
    optimizer.step()
    by_hand.step()
    with torch.cuda.graph(graph):
        optimizer.step()
    for epoch in range(1, 6):
        with no_waiting():
            scheduler.step()
        by_hand.param_groups[0]["weight_decay"] = scheduler.get_last_weight_decay()[0]
        graph.replay()
        by_hand.step()
        assert_same_bits(params, expected, f"epoch {epoch}")
    assert optimizer.param_groups[0]["weight_decay"] is weight_decay and weight_decay == 0
