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
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import lr_scheduler

from wd_fused import ConstantWeightDecay, CosineWeightDecay, FusedSGD, LambdaWeightDecay, LinearWeightDecay

SEED = 31
EPOCHS = 6


def halved(epoch):
    return 0.5**epoch


# Each with what torch has for the learning rate; its cosine comes back after its end, which is not compared.
SCHEDULES: dict[str, tuple[Any, Any]] = {
    "lambda": (lambda o, **e: LambdaWeightDecay(o, halved, **e), lambda o: lr_scheduler.LambdaLR(o, halved)),
    "constant": (lambda o, **e: ConstantWeightDecay(o, 0.25, 3, **e), lambda o: lr_scheduler.ConstantLR(o, 0.25, 3)),
    "linear": (lambda o, **e: LinearWeightDecay(o, 0.5, 1.0, 4, **e), lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 4)),
    "cosine": (lambda o, **e: CosineWeightDecay(o, 1.0, 0.0, 6, **e), lambda o: lr_scheduler.CosineAnnealingLR(o, 6)),
}
EACH = pytest.mark.parametrize("make", [ours for ours, _ in SCHEDULES.values()], ids=SCHEDULES)


def parameters(count=3):
    source = torch.Generator().manual_seed(SEED)
    return [nn.Parameter(torch.randn(5, 7, generator=source)) for _ in range(count)]


def groups(params):
    return [{"params": params[:1], "weight_decay": 0.3}, {"params": params[1:2]}, {"params": params[2:]}]


def made(cls=FusedSGD, **options):
    params = parameters()
    made_groups = groups(params)
    made_groups[2]["weight_decay"] = 0.0
    return params, cls(made_groups, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | options)


def decays(optimizer):
    return [float(group["weight_decay"]) for group in optimizer.param_groups]


def give_gradients(params, epoch):
    for i, param in enumerate(params):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * epoch + i))


# Values


@pytest.mark.parametrize(("ours", "theirs"), SCHEDULES.values(), ids=SCHEDULES)
def test_the_values_are_those_that_torchs_scheduler_gives_a_learning_rate(ours, theirs):
    _, optimizer = made()
    other = torch.optim.SGD([{"params": group["params"]} for group in optimizer.param_groups])
    for group, own in zip(other.param_groups, optimizer.param_groups, strict=True):
        group["lr"] = own["weight_decay"]
    scheduler, expected = ours(optimizer), theirs(other)
    for _ in range(EPOCHS + 1):
        assert decays(optimizer) == pytest.approx([group["lr"] for group in other.param_groups], rel=1e-12)
        assert scheduler.get_last_weight_decay() == decays(optimizer)
        assert decays(optimizer)[2] == 0
        other.step()
        scheduler.step()
        expected.step()
    assert [group["initial_weight_decay"] for group in optimizer.param_groups] == [0.3, 0.01, 0.0]


def test_a_ramp_begins_and_ends_with_its_factors_and_stays_there():
    for cls in (LinearWeightDecay, CosineWeightDecay):
        _, optimizer = made()
        scheduler = cls(optimizer, start_factor=1.0, end_factor=0.1, total_iters=3)
        factors = []
        for _ in range(6):
            factors.append(decays(optimizer)[0] / 0.3)
            scheduler.step()
        assert factors[0] == 1.0 and factors == sorted(factors, reverse=True)
        assert factors[3:] == pytest.approx([0.1] * 3, rel=1e-15)
        assert factors[2] > 0.15


def test_each_group_may_have_a_function_of_its_own():
    _, optimizer = made()
    scheduler = LambdaWeightDecay(optimizer, [lambda epoch: 1 + epoch, lambda epoch: 1, lambda epoch: 5])
    scheduler.step()
    assert decays(optimizer) == [0.6, 0.01, 0.0]


def test_a_group_that_is_added_later_follows():
    _, optimizer = made()
    scheduler = LambdaWeightDecay(optimizer, halved)
    scheduler.step()
    optimizer.add_param_group({"params": parameters(1), "weight_decay": 0.8})
    assert decays(optimizer)[3] == 0.8
    scheduler.step()
    assert decays(optimizer) == [0.3 / 4, 0.01 / 4, 0.0, 0.2]
    one_a_group = LambdaWeightDecay(made()[1], [halved] * 3)
    one_a_group.optimizer.add_param_group({"params": parameters(1)})
    with pytest.raises(ValueError, match="3 functions for 4 parameter groups"):
        one_a_group.step()


def test_it_is_for_any_optimizer_that_has_weight_decay():
    optimizer = torch.optim.AdamW(parameters(), weight_decay=0.5)
    scheduler = LinearWeightDecay(optimizer, 1.0, 0.0, total_iters=2)
    scheduler.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


# Steps


@EACH
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"momentum": 0.0}, {"maximize": True}], ids=str)
def test_steps_have_the_bits_of_torch_with_weight_decay_set_by_hand(make, options):
    params, optimizer = made(**options)
    expected, theirs = made(torch.optim.SGD, foreach=False, **options)
    scheduler = make(optimizer)
    for epoch in range(EPOCHS):
        give_gradients(params, epoch)
        give_gradients(expected, epoch)
        for group, value in zip(theirs.param_groups, scheduler.get_last_weight_decay(), strict=True):
            group["weight_decay"] = value
        optimizer.step()
        theirs.step()
        scheduler.step()
        for i, (ours, other) in enumerate(zip(params, expected, strict=True)):
            assert_same_bits(ours, other, f"epoch {epoch}, parameter {i}, seed {SEED}")


OPTIONS = [
    {"decoupled_weight_decay": True},
    {"decoupled_weight_decay": True, "decouple_lr": True, "ema_decay": 0.9},
    {"decoupled_weight_decay": 0.02, "l1_penalty": 0.01},
    {"max_grad_norm": 0.5, "momentum_dtype": "int8", "ema_decay": 0.9},
]


@EACH
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_with_options_have_the_references_bits(make, options):
    params, optimizer = made(**options)
    expected, by_reference = made(backend="torch", **options)
    scheduler = make(optimizer)
    lr_schedule = [lr_scheduler.LinearLR(each, 0.5, 1.0, 3) for each in (optimizer, by_reference)]
    for epoch in range(EPOCHS):
        give_gradients(params, epoch)
        give_gradients(expected, epoch)
        for group, value in zip(by_reference.param_groups, scheduler.get_last_weight_decay(), strict=True):
            group["weight_decay"] = value
        for each in (optimizer, by_reference, *lr_schedule, scheduler):
            each.step()
        for i, (ours, other) in enumerate(zip(params, expected, strict=True)):
            assert_same_bits(ours, other, f"epoch {epoch}, parameter {i}, seed {SEED}")
            assert optimizer.state[ours].keys() == by_reference.state[other].keys()


def test_beside_a_sequence_of_schedules_of_the_learning_rate_neither_disturbs_the_other():
    def trained(with_decay, with_lr):
        params, optimizer = made()
        decay = [LinearWeightDecay(optimizer, 1.0, 0.0, 4)] * with_decay
        rate = []
        if with_lr:
            phases = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 2), lr_scheduler.CosineAnnealingLR(optimizer, 4)]
            rate = [lr_scheduler.SequentialLR(optimizer, phases, [2])]
        found = []
        for epoch in range(EPOCHS):
            give_gradients(params, epoch)
            optimizer.step()
            found.append((decays(optimizer), [group["lr"] for group in optimizer.param_groups]))
            for each in (*decay, *rate):
                each.step()
        return [[entry[i] for entry in found] for i in range(2)]

    both = trained(True, True)
    assert both == [trained(True, False)[0], trained(False, True)[1]]
    assert both[0][0] != both[0][1] and both[1][0] != both[1][1]


@pytest.mark.parametrize("options", [{}, {"decoupled_weight_decay": True}], ids=str)
def test_a_tensor_is_filled_in_place_and_steps_see_it(options):
    tensor = torch.tensor(0.5)
    params, optimizer = made(weight_decay=tensor, **options)
    expected, with_numbers = made(weight_decay=0.5, **options)
    schedules = [LambdaWeightDecay(each, halved) for each in (optimizer, with_numbers)]
    for epoch in range(3):
        give_gradients(params, epoch)
        give_gradients(expected, epoch)
        for each in (optimizer, with_numbers, *schedules):
            each.step()
        for i, (ours, other) in enumerate(zip(params, expected, strict=True)):
            assert_same_bits(ours, other, f"epoch {epoch}, parameter {i}, seed {SEED}")
    assert optimizer.param_groups[1]["weight_decay"] is tensor and tensor == 0.0625
    assert optimizer.param_groups[1]["initial_weight_decay"] == 0.5


def test_groups_that_share_a_tensor_share_its_schedule_or_are_refused():
    tensor = torch.tensor(0.5)
    optimizer = FusedSGD([{"params": parameters(1)}, {"params": parameters(1)}], lr=0.1, weight_decay=tensor)
    scheduler = LambdaWeightDecay(optimizer, [halved, lambda epoch: 1.0])
    with pytest.raises(ValueError, match=r"group 1 has its weight_decay in the same Tensor .* needs 0\.25 .* 0\.5"):
        scheduler.step()
    assert tensor == 0.5 and scheduler.last_epoch == 0
    LambdaWeightDecay(optimizer, halved).step()
    assert tensor == 0.25


# Checkpoints


class Power:
    def __init__(self, base):
        self.base = base

    def __call__(self, epoch):
        return self.base**epoch


def advanced(make, steps=2):
    params, optimizer = made()
    scheduler = make(optimizer)
    for epoch in range(steps):
        give_gradients(params, epoch)
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


def schedule_of(scheduler):
    values = []
    for _ in range(EPOCHS):
        values.append(decays(scheduler.optimizer))
        scheduler.step()
    return values


@EACH
def test_a_schedule_goes_on_after_loading(make, tmp_path):
    optimizer, scheduler = advanced(make)
    torch.save((optimizer.state_dict(), scheduler.state_dict()), tmp_path / "saved")
    _, fresh = made()
    loaded = make(fresh)
    of_optimizer, of_scheduler = torch.load(tmp_path / "saved", weights_only=True)
    fresh.load_state_dict(of_optimizer)
    loaded.load_state_dict(of_scheduler)
    assert (loaded.last_epoch, loaded.get_last_weight_decay()) == (2, decays(optimizer))
    assert schedule_of(loaded) == schedule_of(scheduler)


@EACH
def test_a_schedule_goes_on_with_last_epoch(make):
    optimizer, scheduler = advanced(make)
    _, fresh = made()
    fresh.load_state_dict(optimizer.state_dict())
    assert schedule_of(make(fresh, last_epoch=1)) == schedule_of(scheduler)


@EACH
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_optimizer_and_schedule_goes_on_by_itself(make, copied):
    both = advanced(make)
    optimizer, scheduler = copied(both)
    assert scheduler.optimizer is optimizer is not both[0]
    before = decays(both[0])
    values = schedule_of(scheduler)
    assert decays(both[0]) == before and values == schedule_of(both[1])


def test_a_distributed_checkpoint_keeps_the_initial_value(tmp_path):
    def trained(steps):
        torch.manual_seed(SEED)
        model = nn.Linear(3, 2)
        optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
        scheduler = LambdaWeightDecay(optimizer, halved)
        for _ in range(steps):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            scheduler.step()
        return model, optimizer, scheduler

    def content(model, optimizer, scheduler):
        weights, state = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": state, "scheduler": scheduler.state_dict()}

    ours, other = trained(3), trained(1)
    checkpoint.save(content(*ours), checkpoint_id=tmp_path, no_dist=True)
    loaded = content(*other)
    checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(*other[:2], model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    other[2].load_state_dict(loaded["scheduler"])
    assert other[1].param_groups[0]["initial_weight_decay"] == 0.5
    assert schedule_of(other[2]) == schedule_of(ours[2])


def test_of_functions_the_attributes_are_saved_as_lambdalr_saves_them():
    functions = [halved, Power(0.25), functools.partial(pow, 0.5)]
    state = LambdaWeightDecay(made()[1], functions).state_dict()
    other = lr_scheduler.LambdaLR(made()[1], functions).state_dict()
    assert state["weight_decay_lambdas"] == other["lr_lambdas"] == [None, {"base": 0.25}, {}]
    loaded = LambdaWeightDecay(made()[1], [halved, Power(1.0), functools.partial(pow, 0.5)])
    loaded.load_state_dict(state)
    loaded.step()
    assert decays(loaded.optimizer) == [0.15, 0.0025, 0.0]


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    {
        "a negative factor": (lambda o: LinearWeightDecay(o, -0.5, 1, 3), "Invalid start_factor=-0.5"),
        "a factor that is NaN": (lambda o: CosineWeightDecay(o, 1, float("nan"), 3), "Invalid end_factor=nan"),
        "an infinite factor": (lambda o: ConstantWeightDecay(o, float("inf"), 3), "Invalid factor=inf"),
        "a factor of text": (lambda o: ConstantWeightDecay(o, "1", 3), "Invalid factor='1'"),
        "no epochs": (lambda o: LinearWeightDecay(o, 1, 0, 0), "Invalid total_iters=0"),
        "half an epoch": (lambda o: CosineWeightDecay(o, 1, 0, 0.5), "Invalid total_iters=0.5"),
        "less than no epochs": (lambda o: ConstantWeightDecay(o, 1, -2), "Invalid total_iters=-2"),
        "too few functions": (lambda o: LambdaWeightDecay(o, [halved]), "1 functions for 3 parameter groups"),
        "a function that is negative": (
            lambda o: LambdaWeightDecay(o, lambda _: -1),
            "group 0: the factor -1 of epoch 0",
        ),
        "a function that is NaN": (
            lambda o: LambdaWeightDecay(o, [halved, lambda _: float("nan"), halved]),
            "group 1: the",
        ),
        "a function without a result": (lambda o: LambdaWeightDecay(o, lambda _: None), "a NoneType is not a number"),
        "an epoch before the first": (lambda o: LambdaWeightDecay(o, halved, last_epoch=-2), "Invalid last_epoch=-2"),
        "going on with nothing": (lambda o: LambdaWeightDecay(o, halved, last_epoch=3), "no initial_weight_decay"),
    }.values(),
)
def test_what_is_wrong_is_named_and_nothing_is_written(make, message):
    _, optimizer = made()
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        make(optimizer)
    assert [dict(group) for group in optimizer.param_groups] == before


def test_a_step_that_fails_can_be_repeated():
    _, optimizer = made()
    factors = [1.0, -1.0, 0.5]
    scheduler = LambdaWeightDecay(optimizer, lambda epoch: factors[epoch])
    with pytest.raises(ValueError, match=r"of epoch 1 makes no weight_decay of 0\.3"):
        scheduler.step()
    assert scheduler.last_epoch == 0 and decays(optimizer) == scheduler.get_last_weight_decay() == [0.3, 0.01, 0.0]
    factors[1] = 2.0
    scheduler.step()
    assert decays(optimizer) == [0.6, 0.02, 0.0]


def test_what_has_no_weight_decay_is_refused():
    with pytest.raises(ValueError, match="group 0 of the optimizer has no weight_decay"):
        LambdaWeightDecay(torch.optim.LBFGS(parameters()), halved)
    with pytest.raises(TypeError, match="list is not an Optimizer"):
        LambdaWeightDecay(parameters(), halved)
    _, optimizer = made()
    for broken, message in (
        ("x", "group 1: weight_decay='x'"),
        (-0.5, "group 1: the factor"),
        (torch.ones(2), "group 1"),
    ):
        optimizer.param_groups[1]["weight_decay"] = broken
        with pytest.raises(ValueError, match=message):
            LambdaWeightDecay(optimizer, halved)
        assert optimizer.param_groups[0] | {"weight_decay": 0.3} == optimizer.param_groups[0]


def test_the_state_of_another_schedule_is_refused_and_nothing_has_changed():
    scheduler = LambdaWeightDecay(made()[1], [halved, Power(0.25), halved])
    before = copy.deepcopy(scheduler.state_dict())
    for saved, message in (
        (LinearWeightDecay(made()[1], 1, 0, 2).state_dict(), "needs .*weight_decay_lambdas: was it saved by another"),
        (LambdaWeightDecay(made()[1], halved).state_dict(), "has 1 functions, this schedule 3"),
        (before | {"last_epoch": "x"}, "Invalid last_epoch='x'"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.load_state_dict(saved)
        assert scheduler.state_dict() == before
