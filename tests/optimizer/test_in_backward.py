"""Gradient release: step_in_backward() beside backward() and step(), bit by bit, with what people do in between."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from wd_fused import FusedSGD, step_in_backward, weight_decay_param_groups

SGD_ARGUMENTS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}


@pytest.fixture(autouse=True)
def one_thread(threads: int) -> None:
    torch.set_num_threads(1)


def small_model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 7), nn.GELU(), nn.Linear(7, 5)).to(
        dtype
    )


def batch(seed, dtype=torch.float32):
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def deep_chain(layers=12, width=32):
    torch.manual_seed(2)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def backward(model, seed, **arguments):
    dtype = next(model.parameters()).dtype
    model(batch(seed, dtype)).square().mean().backward(**arguments)


def plain_step(model, optimizer, seed):
    optimizer.zero_grad()
    backward(model, seed)
    optimizer.step()


def released_step(model, optimizer, seed):
    backward(model, seed)
    assert all(param.grad is None for param in model.parameters() if param.requires_grad)
    optimizer.step()


def same(one, other):
    """Nested dicts and lists, as of state_dict(), with the same bits."""
    if isinstance(one, torch.Tensor):
        if one.is_sparse:
            one, other = one.to_dense(), other.to_dense()
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def by_parameter(state_dict):
    """backward() meets the last layer first: state has another order, and the same entries."""
    return state_dict | {"state": dict(sorted(state_dict["state"].items()))}


def assert_same_runs(ours, theirs):
    """Two pairs of model and optimizer."""
    assert same(ours[0].state_dict(), theirs[0].state_dict())
    assert same(by_parameter(ours[1].state_dict()), by_parameter(theirs[1].state_dict()))


def twins(make=small_model, dtype=torch.float32, optimizer=FusedSGD, **arguments):
    """(model, FusedSGD), (the same model, an optimizer with the same arguments)."""
    models = [make(dtype) if make is small_model else make() for _ in range(2)]
    arguments = SGD_ARGUMENTS | arguments
    return (models[0], FusedSGD(models[0].parameters(), **arguments)), (
        models[1],
        optimizer(models[1].parameters(), **arguments),
    )


BFLOAT16 = {"dtype": torch.bfloat16}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"momentum": 0.0},
        {"nesterov": True, "maximize": True},
        {"dampening": 0.3, "dtype": torch.float64},
        {"lr": torch.tensor(0.05), "weight_decay": torch.tensor(0.01)},
        {"fused": True},
        {"backend": "torch"},
        {"l1_penalty": 1e-3, "zero_grads": True},
        {"decoupled_weight_decay": True, "decouple_lr": True},
        {"momentum_dtype": torch.int8},
        {"momentum_dtype": torch.float32, **BFLOAT16},
        {"numerics": "opmath", **BFLOAT16},
        {"master_weights": "full", **BFLOAT16},
        {"master_weights": "split", "l1_penalty": 1e-3, **BFLOAT16},
        {"rounding": "kahan", "decoupled_weight_decay": 0.1, **BFLOAT16},
    ],
    ids=str,
)
def test_parameters_and_state_have_the_bits_of_plain_steps_at_every_learning_rate(arguments):
    ours, theirs = twins(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    schedulers = [torch.optim.lr_scheduler.StepLR(run[1], 2, 0.5) for run in (ours, theirs)]
    start = copy.deepcopy(ours[0].state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as a scheduler's, that step() was not called before it
        step_in_backward(ours[0], ours[1])
        for seed in range(5):
            released_step(*ours, seed)
            plain_step(*theirs, seed)
            for scheduler in schedulers:
                scheduler.step()
    assert_same_runs(ours, theirs)
    assert not any(map(torch.equal, start.values(), ours[0].state_dict().values()))


def test_the_bits_are_those_of_torch_optim_sgd_with_groups():
    models = [small_model(), small_model()]
    optimizers = [
        cls(weight_decay_param_groups(model, 0.1), lr=0.1, momentum=0.9, nesterov=True)
        for cls, model in zip((FusedSGD, torch.optim.SGD), models, strict=True)
    ]
    with step_in_backward(models[0].parameters(), optimizers[0]):
        for seed in range(4):
            released_step(models[0], optimizers[0], seed)
            plain_step(models[1], optimizers[1], seed)
    assert_same_runs((models[0], optimizers[0]), (models[1], optimizers[1]))


def test_step_is_not_needed():
    ours, theirs = twins()
    step_in_backward(*ours)
    for seed in range(3):
        backward(ours[0], seed)
        plain_step(*theirs, seed)
    assert_same_runs(ours, theirs)


# Memory


def gradients_alive(model):
    """During backward(): how many gradients, and how many bytes of them, are alive when a new one has come."""
    gradients, counts = [], []

    def count(param):
        gradients.append(weakref.ref(param.grad))
        alive = [grad for reference in gradients if (grad := reference()) is not None]
        counts.append((len(alive), sum(grad.nbytes for grad in alive)))

    handles = [param.register_post_accumulate_grad_hook(count) for param in model.parameters()]
    return counts, handles


def test_one_gradient_is_alive_at_a_time_instead_of_all():
    model, x = deep_chain(layers=12, width=32), torch.randn(3, 32)
    optimizer = FusedSGD(model.parameters(), **SGD_ARGUMENTS)
    counts, handles = gradients_alive(model)
    model(x).square().mean().backward()
    assert counts[-1] == (24, 12 * 4 * (32 * 32 + 32))
    optimizer.step()
    optimizer.zero_grad()
    counts.clear()
    with step_in_backward(model, optimizer):  # its hooks come after those that count
        for _ in range(2):
            model(x).square().mean().backward()
    assert len(counts) == 48 and max(counts) == (1, 4 * 32 * 32)
    for handle in handles:
        handle.remove()


def peak_of_backward(model, x):
    """Bytes that torch's CPU allocator held more at most during backward() than at its beginning."""
    loss = model(x).square().mean()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss.backward()
    now = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_backward_takes_a_fraction_of_the_models_memory():
    model, x = deep_chain(layers=24, width=64), torch.randn(2, 64)
    optimizer = FusedSGD(model.parameters(), **SGD_ARGUMENTS)
    weights = sum(param.nbytes for param in model.parameters())
    model(x).square().mean().backward()
    optimizer.step()  # the momentum buffers are there
    optimizer.zero_grad()
    plain = peak_of_backward(model, x)
    optimizer.zero_grad()
    with step_in_backward(model, optimizer):
        model(x).square().mean().backward()  # the plans are made
        released = peak_of_backward(model, x)
    assert plain >= weights and released < weights / 6


def test_the_example_shows_both(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    sys.modules.pop("step_in_backward", None)
    import step_in_backward as example

    monkeypatch.setattr(example, "LAYERS", 8)
    monkeypatch.setattr(example, "STEPS", 3)
    assert example.main()
    shown = capsys.readouterr().out
    assert "the same bits" in shown and "      64 KiB\n" in shown, shown  # a weight of 128 by 128


def test_each_parameter_keeps_its_plan():
    model = deep_chain(layers=3)
    optimizer = FusedSGD(model.parameters(), **SGD_ARGUMENTS)
    handle = step_in_backward(model, optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    plans = []
    for _ in range(4):
        model(torch.randn(2, 32)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        plans.append([stepper._own._plans for stepper in handle._steppers.values()])
    assert len(plans[0]) == 6 and None not in plans[0]
    assert all(a is b for a, b in zip(plans[0], plans[3], strict=True))


# Several backward()s to a step


class Routed(nn.Module):
    """Uses one of its branches, as a mixture of experts does, and its trunk twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.trunk, self.branches = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, x, branch):
        return self.branches[branch](self.trunk(self.trunk(x).tanh()))


def routed_backward(model, i):
    """Of the i-th micro-batch."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(i))
    (model(x, (0, 0, 1, 2, 0, 1, 1, 2)[i % 8]).square().mean() / 3).backward()


@pytest.mark.parametrize("calls_step", [True, False])
def test_every_nth_backward_steps_with_the_bits_of_torch_optim_sgd_over_n(calls_step):
    ours, theirs = twins(optimizer=torch.optim.SGD)
    step_in_backward(*ours, gradient_accumulation_steps=3)
    for i in range(12):
        before = copy.deepcopy(ours[0].state_dict())
        for model, _ in (ours, theirs):
            backward(model, i)
        if i % 3 < 2:
            assert same(ours[0].state_dict(), before)
            assert all(map(torch.equal, *([p.grad for p in run[0].parameters()] for run in (ours, theirs))))
            continue
        assert all(param.grad is None for param in ours[0].parameters())
        if calls_step:
            ours[1].step()
        theirs[1].step()
        theirs[1].zero_grad()
        assert_same_runs(ours, theirs)


def test_parameters_that_the_nth_backward_does_not_reach_are_stepped_by_step():
    ours, theirs = twins(Routed, optimizer=torch.optim.SGD)
    step_in_backward(*ours, gradient_accumulation_steps=3)
    left = []
    for i in range(24):
        for model, optimizer in (ours, theirs):
            routed_backward(model, i)
            if i % 3 == 2:
                left += [model is ours[0] and param.grad is not None for param in model.parameters()]
                optimizer.step()
                optimizer.zero_grad()
        if i % 3 == 2:
            assert_same_runs(ours, theirs)
    assert any(left)


@pytest.mark.parametrize("first", range(1, 4))
def test_step_ends_a_round_early_and_the_next_backward_begins_another(first):
    ours, theirs = twins(optimizer=torch.optim.SGD)
    step_in_backward(*ours, gradient_accumulation_steps=3)
    seed = 0
    for micro_batches in (first, 3, 3):
        for _ in range(micro_batches):
            for model, _ in (ours, theirs):
                backward(model, seed)
            seed += 1
        assert all((param.grad is None) == (micro_batches == 3) for param in ours[0].parameters())
        for _, optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert_same_runs(ours, theirs)


def test_the_number_may_be_changed_between_rounds_and_within_one():
    (model, optimizer), _ = twins()
    handle = step_in_backward(model, optimizer)
    stepped = []
    for i, steps in enumerate((1, 2, 2, 4, 4, 4, 2, 3, 3, 3, 3, 1, 2, 2)):
        handle.gradient_accumulation_steps = steps
        assert handle.gradient_accumulation_steps == steps
        backward(model, i)
        stepped.append(model[0].weight.grad is None)
    assert [i for i, one in enumerate(stepped) if one] == [0, 2, 6, 9, 11, 13]


def test_a_backward_that_reaches_none_of_the_parameters_is_not_counted():
    (model, optimizer), _ = twins()
    step_in_backward(model, optimizer, gradient_accumulation_steps=2)
    for i in range(4):
        nn.Linear(2, 1)(torch.ones(1, 2)).sum().backward()
        backward(model, i)
        assert (model[0].weight.grad is None) == (i % 2 == 1)


def test_a_backward_inside_another_is_an_error_when_they_are_counted():
    model = deep_chain(layers=4)
    optimizer, x = FusedSGD(model.parameters(), **SGD_ARGUMENTS), torch.randn(3, 32)
    step_in_backward(model, optimizer, gradient_accumulation_steps=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"cannot be counted.*use_reentrant=False"):
        model[3](checkpoint(model[1:3], model[0](x), use_reentrant=True)).square().mean().backward()
    assert same(model.state_dict(), before)
    optimizer.zero_grad()
    optimizer.step()
    for i in range(4):
        model[3](checkpoint(model[1:3], model[0](x), use_reentrant=False)).square().mean().backward()
        assert (model[0].weight.grad is None) == (i == 3)


@pytest.mark.parametrize("steps", [0, -1, True, 2.0, "4", None])
def test_numbers_of_backwards_that_are_none(steps):
    (model, optimizer), _ = twins()
    with pytest.raises(ValueError, match=r"Invalid gradient_accumulation_steps=.*whole number >= 1"):
        step_in_backward(model, optimizer, gradient_accumulation_steps=steps)
    handle = step_in_backward(model, optimizer, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="Invalid gradient_accumulation_steps"):
        handle.gradient_accumulation_steps = steps
    assert handle.gradient_accumulation_steps == 2


# Clipping each gradient by its own norm


def clipped_one_by_one(model, limit):
    for param in model.parameters():
        if param.grad is not None:
            nn.utils.clip_grad_norm_([param], limit)


def test_clipping_has_torchs_bits_where_its_norm_is_correctly_rounded():
    """Gradients of 3² + 4² = 5² and the like, some above the limit and some below."""
    runs = [[nn.Parameter(torch.linspace(1, 2, 50)) for _ in range(3)] for _ in range(2)]
    ours, theirs = FusedSGD(runs[0], **SGD_ARGUMENTS), torch.optim.SGD(runs[1], **SGD_ARGUMENTS)
    step_in_backward(runs[0], ours, max_param_grad_norm=7.0)
    for step in range(4):
        for params in runs:
            values = torch.zeros(3, 50)
            values[:, step], values[:, step + 20] = torch.tensor([3.0, 5, 8]), torch.tensor([4.0, 12, 15])
            sum((param * own).sum() for param, own in zip(params, values, strict=True)).backward()
        norms = [float(nn.utils.clip_grad_norm_([param], 7.0)) for param in runs[1]]
        assert norms == [5, 13, 17]
        theirs.step()
        theirs.zero_grad()
        assert all(param.grad is None for param in runs[0]) and all(map(torch.equal, *runs))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"l1_penalty": 1e-3, "nesterov": True},
        {"backend": "torch"},
        {"momentum_dtype": torch.int8},
        {"rounding": "kahan", **BFLOAT16},
        {"master_weights": "split", **BFLOAT16},
    ],
    ids=str,
)
def test_clipping_has_the_bits_of_a_group_for_each_parameter(arguments, steps):
    """With norm_per_group: of accumulated gradients, and of those that step() finds."""
    arguments = SGD_ARGUMENTS | arguments
    dtype = arguments.pop("dtype", torch.float32)
    models = [Routed().to(dtype) for _ in range(2)]
    ours = FusedSGD(models[0].parameters(), **arguments)
    groups = [{"params": [param]} for param in models[1].parameters()]
    theirs = FusedSGD(groups, max_grad_norm=0.05, norm_per_group=True, **arguments)
    step_in_backward(models[0], ours, gradient_accumulation_steps=steps, max_param_grad_norm=0.05)
    clipped = set()
    for i in range(14):  # the last round is incomplete
        for model in models:
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(i)).to(dtype)
            model(x, (0, 0, 1, 2, 0, 1, 1, 2)[i % 8]).square().mean().backward()
        if i % steps == steps - 1 or i == 13:
            ours.step()
            theirs.step()
            clipped |= {bool(norm > 0.05) for norm in theirs.grad_norm}
            assert all(param.grad is None for param in models[0].parameters())
            theirs.zero_grad()
            assert same(models[0].state_dict(), models[1].state_dict()), i
            states = [
                [optimizer.state.get(p, {}) for p in model.parameters()]
                for model, optimizer in zip(models, (ours, theirs), strict=True)
            ]
            assert same(*states), i
    assert clipped == {True, False}
    assert "max_grad_norm" not in ours.param_groups[0]


def test_clipping_is_near_torchs_clip_grad_norm_of_each_parameter():
    ours, theirs = twins(optimizer=torch.optim.SGD)
    step_in_backward(*ours, max_param_grad_norm=0.02)
    for seed in range(5):
        released_step(*ours, seed)
        backward(theirs[0], seed)
        clipped_one_by_one(theirs[0], 0.02)
        theirs[1].step()
        theirs[1].zero_grad()
        torch.testing.assert_close(ours[0].state_dict(), theirs[0].state_dict(), rtol=1e-6, atol=1e-7)
    unclipped = twins()[0]
    for seed in range(5):
        plain_step(*unclipped, seed)
    assert not torch.allclose(unclipped[0][0].weight, ours[0][0].weight, rtol=1e-3)


def test_both_norms_are_refused_and_norms_that_are_none():
    model, optimizer = twins(max_grad_norm=2.0)[0]
    with pytest.raises(ValueError, match=r"max_grad_norm=2\.0.*leave it out.*max_param_grad_norm"):
        step_in_backward(model, optimizer, max_param_grad_norm=1.0)
    model, optimizer = twins()[0]
    for norm in (-1.0, float("nan"), True, "1", torch.tensor(1.0)):
        with pytest.raises(ValueError, match="Invalid max_param_grad_norm="):
            step_in_backward(model, optimizer, max_param_grad_norm=norm)
    assert not any(vars(param) for param in model.parameters()) and not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("rule", ["max_param_grad_norm", "max_lagged_grad_norm"])
def test_a_sparse_gradient_is_not_clipped_and_says_what_to_do(rule):
    model = nn.Embedding(4, 2, sparse=True)
    step_in_backward(model, FusedSGD(model.parameters(), lr=0.1), **{rule: 1.0})
    with pytest.raises(RuntimeError, match="sparse_coo gradient of group 0, parameter 0: give it the other parameters"):
        model(torch.arange(2)).sum().backward()


# Clipping by the norm of the step before


def lagged(norms, limit):
    """What torch's gradients are multiplied with, of the exact norms so far."""
    return min(1.0, limit / (norms[-1] + 1e-6))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("calls_step", [True, False])
def test_lagged_clipping_is_torchs_with_the_norm_of_the_round_before(steps, calls_step):
    limit = 0.02
    ours, theirs = twins(optimizer=torch.optim.SGD)
    handle = step_in_backward(*ours, max_lagged_grad_norm=limit, gradient_accumulation_steps=steps)
    norms, coefficients = [], set()
    for i in range(6):
        for seed in range(steps * i, steps * (i + 1)):
            for model, _ in (ours, theirs):
                backward(model, seed)
            if norms:  # known since the round's first backward()
                torch.testing.assert_close(handle.grad_norm.item(), norms[-1], rtol=1e-5, atol=0)
        if calls_step:
            ours[1].step()
        params = list(theirs[0].parameters())
        norm = nn.utils.get_total_norm([param.grad.double() for param in params]).item()
        if norms:
            coefficients.add(lagged(norms, limit))
            for param in params:
                param.grad.mul_(lagged(norms, limit))
        clipped_one_by_one(theirs[0], limit)
        theirs[1].step()
        theirs[1].zero_grad()
        norms.append(norm)
        torch.testing.assert_close(ours[0].state_dict(), theirs[0].state_dict(), rtol=1e-6, atol=1e-7)
        if calls_step:
            torch.testing.assert_close(handle.grad_norm.item(), norm, rtol=1e-5, atol=0)
    assert len(coefficients) > 1 and min(coefficients) < 1


def test_lagged_clipping_goes_on_after_a_gradient_that_is_not_finite():
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=1.0)
    handle = step_in_backward(params, optimizer, max_lagged_grad_norm=1.0)
    for factor, stepped in ((2.0, True), (math.inf, False), (2.0, True)):
        before = [param.detach().clone() for param in params]
        (params[0].sum() + factor * params[1].sum()).backward()
        optimizer.step()
        assert not torch.equal(params[0], before[0])
        assert torch.equal(params[1], before[1]) is not stepped
    torch.testing.assert_close(before[1] - params[1].detach(), torch.full((4,), 2 / 20**0.5))
    assert handle.grad_norm.item() == pytest.approx(20**0.5)


def test_a_first_gradient_that_is_not_finite_is_not_stepped_and_the_next_is_clipped_by_the_others():
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=1.0, momentum=0.9)
    handle = step_in_backward(params, optimizer, max_lagged_grad_norm=1.0)
    (params[0].sum() + math.inf * params[1].sum()).backward()
    assert torch.equal(params[1], torch.ones(4)) and params[1] not in optimizer.state
    (params[0].sum() + 5 * params[1].sum()).backward()
    torch.testing.assert_close(params[1].detach(), torch.full((4,), 0.5))  # 10 / 2, the norm of four ones, and then 1
    optimizer.step()
    assert handle.grad_norm.item() == pytest.approx(104**0.5)


@pytest.mark.parametrize("limit", [0.0, 1e-40])
def test_a_lagged_norm_of_next_to_nothing_steps_nothing_and_is_measured(limit):
    param = nn.Parameter(torch.ones(4))
    optimizer = FusedSGD([param], lr=1.0)
    handle = step_in_backward([param], optimizer, max_lagged_grad_norm=limit)
    for _ in range(3):
        param.sum().backward()
        optimizer.step()
        assert handle.grad_norm.item() == pytest.approx(2) and torch.equal(param, torch.ones(4))


def test_a_backward_inside_another_has_no_norm_of_its_own():
    model = deep_chain(layers=4)
    step_in_backward(model, FusedSGD(model.parameters(), lr=0.1), max_lagged_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"max_lagged_grad_norm: they cannot be counted.*use_reentrant=False"):
        model[3](checkpoint(model[1:3], model[0](torch.ones(3, 32)), use_reentrant=True)).square().mean().backward()


def test_two_rules_of_clipping_are_refused():
    model, optimizer = twins()[0]
    with pytest.raises(ValueError, match="two rules of clipping: give one of them"):
        step_in_backward(model, optimizer, max_param_grad_norm=1.0, max_lagged_grad_norm=1.0)
    with pytest.raises(ValueError, match="Invalid max_lagged_grad_norm=-1"):
        step_in_backward(model, optimizer, max_lagged_grad_norm=-1.0)
    assert step_in_backward(model, optimizer).grad_norm is None


# Parameters that come, go and are shared


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.middle, self.head.weight = nn.Linear(8, 8), self.embedding.weight

    def forward(self, tokens):
        return self.head(self.middle(self.embedding(tokens)).tanh())


def test_a_tied_weight_is_stepped_once_after_all_its_uses():
    ours, theirs = twins(Tied)
    tokens = torch.arange(6)
    step_in_backward(*ours)
    for _ in range(4):
        for model, optimizer in (ours, theirs):
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
            optimizer.step()
    assert_same_runs(ours, theirs)


def test_a_layer_used_twice_and_recomputed_activations():
    ours, theirs = twins(lambda: deep_chain(layers=4))
    x = torch.randn(3, 32)
    step_in_backward(*ours)
    for _ in range(3):
        for model, optimizer in (ours, theirs):
            optimizer.zero_grad()
            half = checkpoint(nn.Sequential(model[0], nn.Tanh(), model[1]), x, use_reentrant=False)
            again = checkpoint(nn.Sequential(model[2], nn.Tanh(), model[1]), half, use_reentrant=False)
            model[3](again).square().mean().backward()
            optimizer.step()
    assert_same_runs(ours, theirs)


def test_frozen_and_thawed_layers():
    ours, theirs = twins()
    for model, _ in (ours, theirs):
        model[0].requires_grad_(False)
    step_in_backward(*ours)
    for seed in range(8):
        for model, optimizer in (ours, theirs):
            if seed in (2, 6):
                model[0].requires_grad_(True)
            if seed == 4:
                model[0].requires_grad_(False)
            optimizer.zero_grad()
            backward(model, seed)
            if model is ours[0]:
                left = [name for name, param in model.named_parameters() if param.grad is not None]
                assert left == (["0.weight", "0.bias"] if seed == 2 else []), seed  # step() has seen it afterwards
            optimizer.step()
    assert_same_runs(ours, theirs)


def test_parameters_added_later_and_parameters_outside_the_model():
    ours, theirs = twins()
    scales = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    for (model, optimizer), scale in zip((ours, theirs), scales, strict=True):
        optimizer.add_param_group({"params": [scale], "lr": 0.5})
        if model is ours[0]:
            step_in_backward(model, optimizer)
        model.append(nn.Linear(5, 5))
        torch.manual_seed(4)
        nn.init.normal_(model[-1].weight)
        nn.init.zeros_(model[-1].bias)
        optimizer.add_param_group({"params": model[-1].parameters(), "weight_decay": 0.0})
        for seed in range(3):
            optimizer.zero_grad()
            (model(batch(seed)) * scale).square().mean().backward()
            if model is ours[0]:
                assert scale.grad is not None and (model[-1].weight.grad is None) == (seed > 0)
            optimizer.step()
    assert_same_runs(ours, theirs)
    assert torch.equal(*scales)


def test_a_parameter_that_the_optimizer_has_lost_keeps_its_gradient():
    (model, optimizer), _ = twins()
    step_in_backward(model, optimizer)
    backward(model, 0)
    lost = optimizer.param_groups[0]["params"].pop(0)
    before = lost.detach().clone()
    backward(model, 1)
    assert torch.equal(lost, before) and lost.grad is not None
    assert all(param.grad is None for param in optimizer.param_groups[0]["params"])


def test_sparse_gradients():
    weights = torch.randn(10, 3)
    ours, theirs = twins(
        lambda: nn.Embedding.from_pretrained(weights.clone(), freeze=False, sparse=True), weight_decay=0.0
    )
    step_in_backward(*ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch's code steps it
        for start in range(3):
            for model, optimizer in (ours, theirs):
                optimizer.zero_grad()
                model(torch.arange(start, start + 4)).square().mean().backward()
                optimizer.step()
    assert_same_runs(ours, theirs)


def test_a_model_cast_between_steps():
    ours, theirs = twins()
    step_in_backward(*ours)
    for seed in range(4):
        if seed == 2:
            for model, optimizer in (ours, theirs):
                model.double()
                optimizer.load_state_dict(optimizer.state_dict())  # casts the momentum buffers
        released_step(*ours, seed)
        plain_step(*theirs, seed)
    assert ours[0][0].weight.dtype == torch.float64
    assert_same_runs(ours, theirs)


def test_a_compiled_model():
    torch._dynamo.reset()
    ours, theirs = twins()
    compiled = [torch.compile(run[0], backend="aot_eager") for run in (ours, theirs)]
    step_in_backward(compiled[0], ours[1])
    for seed in range(3):
        for model, (_, optimizer) in zip(compiled, (ours, theirs), strict=True):
            plain_step(model, optimizer, seed)
    assert_same_runs(ours, theirs)
    assert all(param.grad is None for param in ours[0].parameters())


# Checkpoints, copies, the end


def test_a_checkpoint_goes_either_way_between_this_and_torch_optim_sgd():
    ours, theirs = twins(optimizer=torch.optim.SGD)
    handle = step_in_backward(*ours)
    for seed in range(2):
        released_step(*ours, seed)
        plain_step(*theirs, seed)
    assert_same_runs(ours, theirs)
    saved = io.BytesIO()
    torch.save([theirs[0].state_dict(), theirs[1].state_dict()], saved)
    for seed in range(2, 4):
        plain_step(*theirs, seed)
    for _ in range(2):  # the second time over states of its own
        saved.seek(0)
        model, state = torch.load(saved, weights_only=True)
        ours[0].load_state_dict(model)
        ours[1].load_state_dict(state)
        for seed in range(2, 4):
            released_step(*ours, seed)
        assert_same_runs(ours, theirs)
    handle.remove()
    theirs[1].load_state_dict(copy.deepcopy(ours[1].state_dict()))
    for run in (ours, theirs):
        plain_step(*run, 4)
    assert_same_runs(ours, theirs)


def test_state_and_groups_edited_by_hand():
    ours, theirs = twins()
    step_in_backward(*ours)
    for seed in range(6):
        for model, optimizer in (ours, theirs):
            if seed == 2:
                optimizer.state[model[3].weight]["momentum_buffer"].zero_()
            if seed == 3:
                del optimizer.state[model[3].weight]
            if seed == 4:
                optimizer.state.clear()
                optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["l1_penalty"] = 0.3, 0.1
            if seed == 5:
                del optimizer.param_groups[0]["l1_penalty"]
                optimizer.param_groups[0]["params"].reverse()
            plain_step(model, optimizer, seed)
    assert_same_runs(ours, theirs)


def test_remove_gives_back_plain_behaviour_and_it_can_be_begun_again():
    ours, theirs = twins()
    for seed in range(4):
        handle = step_in_backward(*ours)
        released_step(*ours, seed)
        plain_step(*theirs, seed)
        handle.remove()
        handle.remove()
        for run in (ours, theirs):
            run[1].zero_grad()
            for micro in range(2):  # accumulates
                backward(run[0], 10 * seed + micro)
            assert all(param.grad is not None for param in run[0].parameters())
            run[1].step(lambda: 1.0)
            run[1].zero_grad()
    assert_same_runs(ours, theirs)
    assert not ours[1]._optimizer_step_pre_hooks and not any(vars(param) for param in ours[0].parameters())


def test_it_lives_as_long_as_the_model_and_no_longer():
    model = small_model()
    step_in_backward(model, FusedSGD(model.parameters(), **SGD_ARGUMENTS))  # nobody keeps optimizer and handle
    gc.collect()
    before = model[0].weight.detach().clone()
    backward(model, 0)
    assert not torch.equal(model[0].weight, before)
    optimizer = weakref.ref(model[0].weight._wd_fused_step_in_backward.handle.optimizer)
    assert optimizer() is not None
    del model
    gc.collect()
    assert optimizer() is None


def test_copies_and_pickles_of_model_and_optimizer_are_plain():
    model, optimizer = twins()[0]
    step_in_backward(model, optimizer)
    released_step(model, optimizer, 0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = FusedSGD(copied.parameters(), **SGD_ARGUMENTS)
        backward(copied, 1)
        assert all(param.grad is not None for param in copied.parameters())
        with step_in_backward(copied, own):
            backward(copied, 1)
            assert all(param.grad is None for param in copied.parameters())
    assert not copy.deepcopy(optimizer)._optimizer_step_pre_hooks


def test_hooks_of_step_run_once_a_step():
    model, optimizer = twins()[0]
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("own"))
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("global"))
    try:
        with step_in_backward(model, optimizer):
            for seed in range(2):
                released_step(model, optimizer, seed)
    finally:
        handle.remove()
    assert calls == ["global", "own"] * 2


# What is refused


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1\.0.*all gradients"),
        ({"ema_decay": 0.9}, r"ema_decay=0\.9.*AveragedModel"),
        ({"rounding": "stochastic", **BFLOAT16}, r"rounding='stochastic'.*'kahan'"),
        ({"differentiable": True}, "differentiable=True"),
    ],
    ids=str,
)
def test_options_of_whole_steps_are_refused_and_nothing_is_left_behind(arguments, named):
    model, optimizer = twins(**arguments)[0]
    with pytest.raises(ValueError, match=f"group 0 has {named}"):
        step_in_backward(model, optimizer)
    backward(model, 0)
    assert all(param.grad is not None for param in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks


def test_a_group_without_the_option_may_be_stepped_in_backward_while_another_is_clipped():
    runs = []
    for _ in range(2):
        model = small_model()
        groups = [{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "max_grad_norm": 1e-3}]
        runs.append((model, FusedSGD(groups, **SGD_ARGUMENTS)))
    ours, theirs = runs
    step_in_backward(ours[0][:4], ours[1])
    for seed in range(3):
        for run in runs:
            plain_step(*run, seed)
    assert_same_runs(ours, theirs)
    assert torch.equal(ours[1].grad_norm, theirs[1].grad_norm)


def test_an_option_turned_on_later_is_an_error_of_backward():
    model, optimizer = twins()[0]
    step_in_backward(model, optimizer)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="group 0 has max_grad_norm"):
        backward(model, 0)
    assert same(model.state_dict(), before)
    del optimizer.param_groups[0]["max_grad_norm"]
    optimizer.zero_grad()
    released_step(model, optimizer, 0)


def test_a_closure_is_refused_before_anything():
    model, optimizer = twins()[0]
    step_in_backward(model, optimizer)
    for call in (lambda c: optimizer.step(c), lambda c: optimizer.step(closure=c)):
        with pytest.raises(RuntimeError, match="no closure"):
            call(lambda: pytest.fail("called"))
    optimizer.step(closure=None)
    optimizer.step(None)


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("scales", ["first", "after a step"])
def test_a_grad_scaler_is_refused_before_anything_is_stepped(fused, scales):
    model, optimizer = twins(fused=fused)[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    step_in_backward(model, optimizer)
    if scales == "after a step":
        backward(model, 0)
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"torch\.amp\.GradScaler cannot be used.*bfloat16.*beside_grad_scaler=True"):
        scaler.scale(model(batch(0)).square().mean()).backward()
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("released", ["all", "the last layer"])
def test_a_grad_scaler_that_comes_later_is_refused_by_its_first_step_which_names_what_was_stepped(fused, released):
    model, optimizer = twins(fused=fused)[0]
    handle = step_in_backward(model if released == "all" else model[-1], optimizer)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(batch(0)).square().mean()).backward()
    first = 0 if released == "all" else 4
    named = rf"{6 - first} parameters have been stepped with scaled gradients: group 0, parameter {first};"
    with pytest.raises(RuntimeError, match=rf"torch\.amp\.GradScaler cannot be used.*{named}"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    handle.remove()
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == bool(fused)


def test_words_of_a_grad_scaler_are_refused():
    model, optimizer = twins()[0]
    step_in_backward(model, optimizer)
    optimizer.grad_scale = torch.ones(())
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"torch\.amp\.GradScaler cannot be used.*bfloat16"):
            backward(model, 0)
        with pytest.raises(RuntimeError, match=r"torch\.amp\.GradScaler cannot be used"):
            optimizer.step()
    assert same(model.state_dict(), before)


def test_scalers_that_scale_nothing_here_are_no_hindrance():
    ours, theirs = twins()
    off = torch.amp.GradScaler("cpu", enabled=False)
    idle = torch.amp.GradScaler("cpu")
    gone = torch.amp.GradScaler("cpu")
    of_others = nn.Linear(2, 1)
    gone.scale(of_others(torch.ones(1, 2)).sum()).backward()
    del gone
    with step_in_backward(*ours):
        off.scale(ours[0](batch(0)).square().mean()).backward()
        off.step(ours[1])
    plain_step(*theirs, 0)
    assert_same_runs(ours, theirs)
    idle.scale(of_others(torch.ones(1, 2)).sum()).backward()
    with step_in_backward(*ours, beside_grad_scaler=True):
        released_step(*ours, 1)
    plain_step(*theirs, 1)
    assert_same_runs(ours, theirs)
    with step_in_backward(*ours), pytest.raises(RuntimeError, match="beside_grad_scaler"):
        backward(ours[0], 2)


def test_handles_on_parts_of_a_model_end_in_any_order():
    model, optimizer = twins()[0]
    handles = [step_in_backward(part, optimizer) for part in (model[0], model[-1])]
    assert not hasattr(copy.deepcopy(optimizer), "_step_supports_amp_scaling")
    handles[0].remove()
    assert optimizer._step_supports_amp_scaling
    handles[1].remove()
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_gradients_with_a_graph_are_refused():
    model, optimizer = twins()[0]
    step_in_backward(model, optimizer)
    with pytest.raises(RuntimeError, match="create_graph=True"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about a reference cycle
        backward(model, 0, create_graph=True)
    model.zero_grad()


def test_what_it_is_given_is_checked():
    model, optimizer = twins()[0]
    with pytest.raises(TypeError, match="needs a FusedSGD, not a SGD"):
        step_in_backward(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="none of these parameters"):
        step_in_backward(small_model(), optimizer)
    with pytest.raises(ValueError, match="1 of these parameters are not in the optimizer"):
        step_in_backward([model[0].weight, nn.Parameter(torch.ones(2))], optimizer)
    with step_in_backward(list(model[3].parameters()), optimizer):
        with pytest.raises(RuntimeError, match="group 0, parameter 2 is stepped in backward already"):
            step_in_backward(model, optimizer)
        backward(model, 0)
        assert [param.grad is None for param in model.parameters()] == [False, False, True, True, False, False]
    base = torch.randn(10)
    shared = [nn.Parameter(base[:6]), nn.Parameter(base[4:])]
    with pytest.raises(ValueError, match="two parameters share memory"):
        step_in_backward(shared, FusedSGD(shared, lr=0.1))


def test_a_model_in_ddp_is_refused():
    model, optimizer = twins()[0]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.Sequential(nn.parallel.DistributedDataParallel(model))
        with pytest.raises(ValueError, match="DistributedDataParallel averages gradients when"):
            step_in_backward(wrapped, optimizer)
    finally:
        torch.distributed.destroy_process_group()


def test_a_graph_that_is_walked_twice_is_an_error_of_autograd():
    model, optimizer = twins()[0]
    step_in_backward(model, optimizer)
    loss = model(batch(0)).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_error_of_a_step_names_group_and_parameter():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    optimizer = FusedSGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, backend="cpu")
    step_in_backward(params, optimizer)
    with pytest.raises(RuntimeError, match=r'^group 1, parameter 0: backend="cpu" does not take it'):
        params[1].abs().sum().backward()
    params[0].sum().backward()
    assert torch.equal(params[0], torch.full((3,), 0.9))
