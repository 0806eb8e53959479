"""Schedules of weight decay: the values that the groups get, the bits of the steps, what comes back from a checkpoint,
and what is refused before anything is written. Run by pytest; in a CUDA graph: tests/gpu/.
"""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from strategies import assert_same_bits
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR

from wd_fused import FusedSGD, WeightDecayScheduler

SEED = 31
EPOCHS = 6


def halved(epoch):
    return 0.5**epoch


def late(epoch):
    return 0.0 if epoch < 3 else 0.9


def phases(optimizer):
    return lr_scheduler.SequentialLR(optimizer, [ConstantLR(optimizer, 0.1, 2), CosineAnnealingLR(optimizer, 4)], [2])


def chained(optimizer):
    return lr_scheduler.ChainedScheduler([ConstantLR(optimizer, 0.1, 4), ExponentialLR(optimizer, 0.9)], optimizer)


SCHEDULES: dict[str, Any] = {
    "lambda": functools.partial(LambdaLR, lr_lambda=halved),
    "none at first": functools.partial(LambdaLR, lr_lambda=late),
    "constant": functools.partial(ConstantLR, factor=0.25, total_iters=3),
    "linear": functools.partial(LinearLR, start_factor=0.5, total_iters=4),
    "cosine": functools.partial(CosineAnnealingLR, T_max=5, eta_min=1e-4),
    "warm restarts": functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2, T_mult=2),
    "exponential": functools.partial(ExponentialLR, gamma=0.7),
    "multiplicative": functools.partial(lr_scheduler.MultiplicativeLR, lr_lambda=halved),
    "step": functools.partial(lr_scheduler.StepLR, step_size=2),
    "multistep": functools.partial(lr_scheduler.MultiStepLR, milestones=[1, 3, 3]),
    "polynomial": functools.partial(lr_scheduler.PolynomialLR, total_iters=5, power=0.9),
    "cyclic": functools.partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2, mode="exp_range"),
    "one cycle": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20),
    "phases": phases,
    "chained": chained,
}
ALL = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
SOME = pytest.mark.parametrize("make", [SCHEDULES[name] for name in ("lambda", "cosine", "phases")])


def parameters(count=3):
    source = torch.Generator().manual_seed(SEED)
    return [nn.Parameter(torch.randn(5, 7, generator=source)) for _ in range(count)]


def made(cls=FusedSGD, **options):
    params = parameters()
    groups = [{"params": param} for param in params]
    groups[0]["weight_decay"], groups[2]["weight_decay"] = 0.3, 0.0
    return params, cls(groups, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | options)


def decays(optimizer):
    return [float(group["weight_decay"]) for group in optimizer.param_groups]


def give_gradients(params, epoch):
    for i, param in enumerate(params):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * epoch + i))


# Values


def of_a_learning_rate(make, values):
    """What torch's scheduler makes of learning rates."""
    optimizer = torch.optim.SGD([{"params": param, "lr": lr} for param, lr in zip(parameters(), values, strict=False)])
    scheduler = make(optimizer)
    optimizer.step()
    return optimizer, scheduler


@ALL
@pytest.mark.filterwarnings("error")
def test_the_values_are_those_that_torchs_scheduler_gives_a_learning_rate(make):
    _, optimizer = made()
    other, expected = of_a_learning_rate(make, decays(optimizer))
    scheduler = WeightDecayScheduler(optimizer, make)
    seen = []
    for _ in range(EPOCHS + 1):
        seen.append(decays(optimizer))
        assert seen[-1] == scheduler.get_last_weight_decay() == [*(group["lr"] for group in other.param_groups[:2]), 0]
        scheduler.step()
        expected.step()
    assert len(set(map(tuple, seen))) > 1


def test_a_metric_is_passed_on():
    _, optimizer = made()
    plateau = functools.partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0)
    scheduler = WeightDecayScheduler(optimizer, plateau)
    for loss, factor in ((3.0, 1), (2.0, 1), (2.5, 0.5), (torch.tensor(1.0), 0.5), (1.5, 0.25)):
        scheduler.step(loss)
        assert decays(optimizer) == [0.3 * factor, 0.01 * factor, 0]


def test_a_line_ends_at_0_where_torchs_misses_it():
    missed = 0
    for start in (1.0, 0.9, 0.3, 0.01):
        for epochs in (7, 12, 30, 90):
            make = functools.partial(LinearLR, start_factor=start, end_factor=0.0, total_iters=epochs)
            _, optimizer = made()
            other, expected = of_a_learning_rate(make, decays(optimizer))
            scheduler = WeightDecayScheduler(optimizer, make)
            for _ in range(epochs + 2):
                scheduler.step()
                expected.step()
            rates = [group["lr"] for group in other.param_groups]
            assert decays(optimizer) == [max(0.0, rate) for rate in rates]
            missed += min(rates) < 0
    assert missed


@SOME
def test_it_goes_on_from_what_others_have_set(make):
    _, optimizer = made()
    optimizer.param_groups[1]["weight_decay"] = tensor = torch.tensor(0.5, dtype=torch.float64)
    other, expected = of_a_learning_rate(make, decays(optimizer))
    scheduler = WeightDecayScheduler(optimizer, make)
    for epoch in range(EPOCHS):
        if epoch == 1:
            optimizer.param_groups[0]["weight_decay"] = other.param_groups[0]["lr"] = 0.7
        if epoch == 2:
            other.param_groups[1]["lr"] = tensor.fill_(0.7).item()
        if epoch == 3:
            optimizer.param_groups[1]["weight_decay"] = tensor = torch.tensor(0.1, dtype=torch.float64)
            other.param_groups[1]["lr"] = tensor.item()
        if epoch == 4:
            other.param_groups[1]["lr"] = tensor.data.fill_(0.3).item()  # the version stays what it was
        scheduler.step()
        expected.step()
        assert decays(optimizer)[:2] == [group["lr"] for group in other.param_groups[:2]]
    assert optimizer.param_groups[1]["weight_decay"] is tensor


def test_a_group_without_weight_decay_is_left_alone():
    params, tensor = parameters(), torch.tensor(0.0)
    optimizer = FusedSGD([{"params": params[:1]}, {"params": params[1:], "weight_decay": tensor}], lr=0.1)
    scheduler = WeightDecayScheduler(optimizer, functools.partial(CosineAnnealingLR, T_max=4, eta_min=0.1))
    scheduler.step()
    assert decays(optimizer) == scheduler.get_last_weight_decay() == [0, 0]
    assert optimizer.param_groups[1]["weight_decay"] is tensor and tensor._version == 0
    optimizer.param_groups[0]["weight_decay"] = 0.5
    scheduler.step()
    assert decays(optimizer) == [0.5, 0]


def test_it_is_for_any_optimizer_that_has_weight_decay():
    optimizer = torch.optim.AdamW(parameters(), weight_decay=0.5)
    keys = optimizer.param_groups[0].keys()
    scheduler = WeightDecayScheduler(optimizer, functools.partial(LinearLR, start_factor=1.0, end_factor=0.0))
    scheduler.step()
    assert decays(optimizer) == [0.4] and optimizer.param_groups[0].keys() == keys


# Steps


def compare(params, optimizer, expected, other, schedulers, before_step=lambda: None):
    for epoch in range(EPOCHS):
        give_gradients(params, epoch)
        give_gradients(expected, epoch)
        before_step()
        for each in (optimizer, other, *schedulers):
            each.step()
        for i, (ours, theirs) in enumerate(zip(params, expected, strict=True)):
            assert_same_bits(ours, theirs, f"epoch {epoch}, parameter {i}, seed {SEED}")


TORCHS: list[dict[str, Any]] = [{}, {"nesterov": True}, {"momentum": 0.0}, {"maximize": True}]
OPTIONS: list[dict[str, Any]] = [
    {"decoupled_weight_decay": True},
    {"decoupled_weight_decay": True, "decouple_lr": True, "ema_decay": 0.9},
    {"decoupled_weight_decay": 0.02, "l1_penalty": 0.01},
    {"max_grad_norm": 0.5, "momentum_dtype": "int8", "ema_decay": 0.9},
]


@SOME
@pytest.mark.parametrize("options", [*TORCHS, *OPTIONS], ids=str)
def test_steps_have_the_bits_of_torch_and_of_the_reference_with_weight_decay_set_by_hand(make, options):
    params, optimizer = made(**options)
    if options in OPTIONS:
        expected, other = made(backend="torch", **options)
    else:
        expected, other = made(torch.optim.SGD, foreach=False, **options)
    scheduler = WeightDecayScheduler(optimizer, make)

    def by_hand():
        for group, value in zip(other.param_groups, scheduler.get_last_weight_decay(), strict=True):
            group["weight_decay"] = value

    rates = [LinearLR(each, 0.5, 1.0, 3) for each in (optimizer, other)]
    compare(params, optimizer, expected, other, [*rates, scheduler], by_hand)


@pytest.mark.parametrize("options", [{}, {"decoupled_weight_decay": True}], ids=str)
def test_a_tensor_is_filled_in_place_and_steps_see_it(options):
    tensor = torch.tensor(0.5)
    params, optimizer = made(weight_decay=tensor, **options)
    expected, with_numbers = made(weight_decay=0.5, **options)
    schedulers = [WeightDecayScheduler(each, SCHEDULES["lambda"]) for each in (optimizer, with_numbers)]
    compare(params, optimizer, expected, with_numbers, schedulers)
    assert optimizer.param_groups[1]["weight_decay"] is tensor and tensor == 0.5 ** (EPOCHS + 1)


def test_of_a_tensor_the_schedule_keeps_what_was_rounded():
    _, optimizer = made(weight_decay=torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True))
    scheduler = WeightDecayScheduler(optimizer, SCHEDULES["exponential"])
    value = 0.5
    for _ in range(EPOCHS):
        scheduler.step()
        value *= 0.7
        assert scheduler.get_last_weight_decay()[1] == value
        assert optimizer.param_groups[1]["weight_decay"] == torch.tensor(value, dtype=torch.bfloat16)


def test_groups_that_share_a_tensor_share_its_schedule_or_are_refused():
    tensor = torch.tensor(0.5)
    optimizer = FusedSGD([{"params": parameters(1)}, {"params": parameters(1)}], lr=0.1, weight_decay=tensor)
    scheduler = WeightDecayScheduler(optimizer, lambda o: LambdaLR(o, [halved, lambda epoch: 1.0]))
    with pytest.raises(ValueError, match=r"group 1: .* be 0\.5: a group with the same Tensor needs 0\.25: give each"):
        scheduler.step()
    assert tensor == 0.5 and scheduler.get_last_weight_decay() == [0.5, 0.5]
    WeightDecayScheduler(optimizer, SCHEDULES["lambda"]).step()
    assert tensor == 0.25


# Checkpoints


def advanced(make, steps=2, **options):
    params, optimizer = made(**options)
    scheduler = WeightDecayScheduler(optimizer, make)
    for epoch in range(steps):
        give_gradients(params, epoch)
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


def schedule_of(scheduler):
    values = []
    for _ in range(EPOCHS):
        values.append((decays(scheduler.optimizer), scheduler.get_last_weight_decay()))
        scheduler.step()
    return values


@ALL
@pytest.mark.parametrize("order", ["optimizer first", "scheduler first", "scheduler made last"])
def test_a_schedule_goes_on_after_loading(make, order, tmp_path):
    optimizer, scheduler = advanced(make, weight_decay=torch.tensor(0.01))
    torch.save((optimizer.state_dict(), scheduler.state_dict()), tmp_path / "saved")
    of_optimizer, of_scheduler = torch.load(tmp_path / "saved", weights_only=True)
    before = copy.deepcopy(of_scheduler)
    _, fresh = made(weight_decay=torch.tensor(0.01))
    if order == "scheduler made last":
        fresh.load_state_dict(of_optimizer)
    loaded = WeightDecayScheduler(fresh, make)
    both = [(fresh, of_optimizer), (loaded, of_scheduler)]
    for each, state in reversed(both) if order == "scheduler first" else both:
        each.load_state_dict(state)
    assert of_scheduler == before
    assert schedule_of(loaded) == schedule_of(scheduler)


@ALL
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_of_optimizer_and_schedule_goes_on_by_itself(make, steps, copied):
    optimizer, scheduler = copied(both := advanced(make, steps, weight_decay=torch.tensor(0.01)))
    assert scheduler.optimizer is optimizer is not both[0]
    before = decays(both[0])
    values = schedule_of(scheduler)
    assert decays(both[0]) == before and values == schedule_of(both[1])


def test_a_distributed_checkpoint_keeps_the_schedule(tmp_path):
    def content(optimizer, scheduler):
        return {"optimizer": get_optimizer_state_dict(model, optimizer), "scheduler": scheduler.state_dict()}

    model = nn.ParameterList(parameters())
    both = [FusedSGD(model.parameters(), lr=0.1, weight_decay=0.5) for _ in range(2)]
    ours, other = [(optimizer, WeightDecayScheduler(optimizer, phases)) for optimizer in both]
    for _ in range(3):
        ours[1].step()
    checkpoint.save(content(*ours), checkpoint_id=tmp_path, no_dist=True)
    loaded = content(*other)
    checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(model, other[0], loaded["optimizer"])
    other[1].load_state_dict(loaded["scheduler"])
    assert schedule_of(other[1]) == schedule_of(ours[1])


# What is refused


def lambdas(*functions):
    return functools.partial(LambdaLR, lr_lambda=list(functions))


@pytest.mark.parametrize(
    ("make", "message"),
    {
        "a negative value": (lambdas(halved, lambda _: -1, halved), r"group 1: weight_decay would be -0\.01: it must"),
        "NaN": (lambdas(lambda _: float("nan"), halved, halved), "group 0: weight_decay would be nan: it must"),
        "infinite": (lambdas(halved, lambda _: float("inf"), halved), "group 1: weight_decay would be inf: it must"),
        "no number": (lambdas(halved, lambda _: 1j, halved), "group 1: .* a complex is not a number"),
        "too few functions": (lambdas(halved), "Expected 3 lr_lambdas, but got 1"),
        "of another optimizer": (lambda _: ConstantLR(made()[1]), "make must return a scheduler of the optimizer it"),
        "no scheduler": (lambda _: None, "make must return a scheduler of the optimizer it is given: lambda o: "),
    }.values(),
)
def test_what_is_wrong_is_named_and_nothing_is_written(make, message):
    _, optimizer = made()
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        WeightDecayScheduler(optimizer, make)
    assert [dict(group) for group in optimizer.param_groups] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_a_tensor_cannot_hold_is_refused(dtype):
    most = torch.finfo(dtype).max
    _, optimizer = made(weight_decay=torch.tensor(most, dtype=dtype))
    scheduler = WeightDecayScheduler(optimizer, functools.partial(ExponentialLR, gamma=2.0))
    with pytest.raises(ValueError, match=r"group 1: weight_decay would be .* at most (65504|3\.40282e\+38)"):
        scheduler.step()
    assert decays(optimizer) == [0.3, most, 0]


def test_after_a_step_that_fails_the_groups_are_as_they_were():
    _, optimizer = made()
    scheduler = WeightDecayScheduler(optimizer, lambdas(halved, lambda epoch: [1.0, -1.0, 0.5][epoch], halved))
    with pytest.raises(ValueError, match=r"group 1: weight_decay would be -0\.01"):
        scheduler.step()
    assert decays(optimizer) == scheduler.get_last_weight_decay() == [0.3, 0.01, 0.0]
    scheduler.step()
    assert decays(optimizer) == [0.075, 0.005, 0.0]


def test_a_group_that_is_added_needs_another_schedule():
    _, optimizer = made()
    scheduler = WeightDecayScheduler(optimizer, SCHEDULES["lambda"])
    optimizer.add_param_group({"params": parameters(1), "weight_decay": 0.8})
    with pytest.raises(ValueError, match=r"has 4 groups, its schedule 3: make a new WeightDecayScheduler after"):
        scheduler.step()
    assert decays(optimizer) == [0.3, 0.01, 0.0, 0.8]
    WeightDecayScheduler(optimizer, SCHEDULES["lambda"]).step()
    assert decays(optimizer) == [0.15, 0.005, 0.0, 0.4]


def test_what_has_no_weight_decay_is_refused():
    with pytest.raises(ValueError, match="group 0: weight_decay=None cannot be scheduled: a NoneType is not a number"):
        WeightDecayScheduler(torch.optim.LBFGS(parameters()), SCHEDULES["lambda"])
    with pytest.raises(TypeError, match="list is not an Optimizer"):
        WeightDecayScheduler(parameters(), SCHEDULES["lambda"])
    _, optimizer = made()
    scheduler = WeightDecayScheduler(optimizer, SCHEDULES["exponential"])
    with torch.inference_mode():
        inference = torch.tensor(0.5)
    for broken, message in (
        ("x", "group 1: weight_decay='x'"),
        (-0.5, "group 1: weight_decay would be -0"),
        (torch.ones(2), "group 1: .* is not one real number"),
        (torch.tensor(1), "group 1: .* use a floating-point Tensor"),
        (inference, "group 1: .* made outside of torch.inference_mode"),
    ):
        optimizer.param_groups[1]["weight_decay"] = broken
        for attempt in (lambda: WeightDecayScheduler(optimizer, SCHEDULES["exponential"]), scheduler.step):
            with pytest.raises(ValueError, match=message):
                attempt()
        assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_the_state_of_another_schedule_is_refused_and_nothing_has_changed():
    scheduler = WeightDecayScheduler(made()[1], phases)
    scheduler.step()
    before = copy.deepcopy(scheduler.state_dict())
    fewer = FusedSGD(parameters(), lr=0.1, weight_decay=0.3)
    others = {
        r"ChainedScheduler\(ConstantLR, ExponentialLR\) over 3": WeightDecayScheduler(made()[1], chained).state_dict(),
        r"SequentialLR\(ConstantLR, CosineAnnealingLR\) over 1": WeightDecayScheduler(fewer, phases).state_dict(),
        "None over 0": scheduler.scheduler.state_dict(),
    }
    for name, state in others.items():
        with pytest.raises(ValueError, match=rf"{name} groups, the schedule SequentialLR\(.*\) over 3"):
            scheduler.load_state_dict(state)
        assert scheduler.state_dict() == before
