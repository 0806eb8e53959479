"""torch.ops.wd_fused.sgd_ keeps the plans of its last calls: what that must not change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from wd_fused import reference
from wd_fused.build import extension

OPTIONS = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "nesterov": False, "maximize": False}


@pytest.fixture(autouse=True)
def _operator() -> None:
    extension.load()


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_steps(params: Sequence[Tensor], buffers: Sequence[Tensor], first: bool = False) -> None:
    grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) for p in params]
    expected = [p.clone() for p in params]
    expected_buffers = [None if first else b.clone() for b in buffers]
    torch.ops.wd_fused.sgd_(params, grads, buffers, [first] * len(params), **OPTIONS)
    reference.sgd(expected, grads, expected_buffers, **OPTIONS, numerics="torch")
    for ours, theirs in zip([*params, *buffers], [*expected, *expected_buffers], strict=True):
        assert theirs is not None and torch.equal(ours, theirs)


def test_a_plan_keeps_no_tensor_alive() -> None:
    params, buffers = [numbers(5), numbers(3, 4)], [numbers(5), numbers(3, 4)]
    for _ in range(3):
        assert_steps(params, buffers)
    seen = [weakref.ref(tensor) for tensor in (*params, *buffers)]
    del params, buffers
    gc.collect()
    assert [tensor() for tensor in seen] == [None] * 4


def replaced(params: list[Tensor], buffers: list[Tensor]) -> None:
    params[1].data = params[1].clone()
    buffers[0] = buffers[0].clone()


def another_shape(params: list[Tensor], buffers: list[Tensor]) -> None:
    params[1], buffers[1] = numbers(2, 9), numbers(2, 9)


def strided(params: list[Tensor], buffers: list[Tensor]) -> None:
    params[1], buffers[1] = numbers(4, 3).t(), numbers(8, 3)[::2].t()


def empty(params: list[Tensor], buffers: list[Tensor]) -> None:
    params[1], buffers[1] = numbers(0), numbers(0)


def sharing(params: list[Tensor], buffers: list[Tensor]) -> None:
    """The first one is where it was; the second one now overlaps its momentum buffer's neighbour."""
    memory = numbers(24)
    params[1], buffers[1] = memory[:12].view(3, 4), memory[12:].view(3, 4)


@pytest.mark.parametrize("change", [replaced, another_shape, strided, empty, sharing])
def test_what_changed_between_calls_is_seen(change: Callable[[list[Tensor], list[Tensor]], None]) -> None:
    params, buffers = [numbers(5), numbers(3, 4)], [numbers(5), numbers(3, 4)]
    for first in (True, False, False):
        assert_steps(params, buffers, first)
    change(params, buffers)
    for first in (False, True, False):
        assert_steps(params, buffers, first)


def test_a_parameter_over_another_ones_memory_since_the_last_call() -> None:
    memory = numbers(8)
    params, buffers = [memory[:4], numbers(4)], [numbers(4), numbers(4)]
    assert_steps(params, buffers)
    params[1] = memory[2:6]  # in order, one after the other
    grads = [numbers(4), numbers(4)]
    expected = [memory.clone(), *(b.clone() for b in buffers)]
    torch.ops.wd_fused.sgd_(params, grads, buffers, [False] * 2, **OPTIONS)
    reference.sgd([expected[0][:4], expected[0][2:6]], grads, [*expected[1:]], **OPTIONS, numerics="torch")
    assert torch.equal(memory, expected[0])


def test_a_call_that_fails_writes_nothing_and_leaves_the_next_one_right() -> None:
    params, buffers = [numbers(5), numbers(3, 4)], [numbers(5), numbers(3, 4)]
    assert_steps(params, buffers)
    before = [tensor.clone() for tensor in (*params, *buffers)]
    with pytest.raises(RuntimeError, match="tensor 1 cannot be stepped"):
        torch.ops.wd_fused.sgd_(params, [numbers(5), numbers(3, 4).half()], buffers, [False] * 2, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip((*params, *buffers), before, strict=True))
    assert_steps(params, buffers)


def test_more_models_than_plans_are_kept() -> None:
    models = [([numbers(n + 1), numbers(3)], [numbers(n + 1), numbers(3)]) for n in range(20)]
    for _ in range(2):
        for params, buffers in models:
            assert_steps(params, buffers)
