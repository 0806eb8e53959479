"""What stands around an optimizer in a training program: schedulers, averages, scalers, hooks, groups edited by hand,
parametrizations, casts, threads, forked workers, copies. Run by pytest.

A script is a function of an optimizer class that trains and returns what came of it. It is run with FusedSGD and with
torch.optim.SGD, and every bit of the two results must be equal. A step of FusedSGD that leaves anything to torch's code
warns, which is an error here but in the few scripts that expect it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from strategies import assert_same_bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from wd_fused import FusedSGD
from wd_fused.step import step as steps

pytestmark = [
    pytest.mark.filterwarnings("error:FusedSGD"),
    pytest.mark.filterwarnings("error:Detected call of"),  # a scheduler that does not see the optimizer's steps
    pytest.mark.filterwarnings("error:Seems like"),
]

OptimizerClass = type[torch.optim.SGD]
ARGUMENTS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "foreach": False}
SEED = 20


@pytest.fixture(autouse=True)
def one_thread(threads: int) -> None:
    """Models this small gain nothing from more, and beside other processes they would wait for each other."""
    torch.set_num_threads(1)


def both(script: Callable[[OptimizerClass], Any]) -> Any:
    """Runs the script with each class, compares, and returns what came of it."""
    results = []
    for optimizer_class in (FusedSGD, torch.optim.SGD):
        torch.manual_seed(SEED)
        results.append(script(optimizer_class))
    assert_same(*results, "result")
    return results[0]


def assert_same(ours: Any, theirs: Any, what: str) -> None:
    if isinstance(theirs, Tensor):
        assert_same_bits(ours, theirs, f"{what}, seed {SEED}") if theirs.is_floating_point() else None
        assert theirs.is_floating_point() or torch.equal(ours, theirs), what
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), what
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{what}[{key!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), what
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, other, f"{what}[{i}]")
    elif not callable(theirs):
        assert ours == theirs, what


def assert_fused(optimizer: torch.optim.Optimizer) -> None:
    """Of FusedSGD: the CPU backend takes every parameter."""
    if isinstance(optimizer, FusedSGD):
        assert {(b.backend, b.reason) for b in optimizer.backends() if b.backend != "cpu"} == set()


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    )


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(9, 17), nn.Tanh(), nn.Linear(17, 17), nn.Tanh(), nn.Linear(17, 5))


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 8, 8), torch.randint(5, (count,))


def vectors(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 9), torch.randint(5, (count,))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 3,
    batch: Callable[[], tuple[Tensor, Tensor]] = vectors,
    set_to_none: bool = True,
) -> Tensor:
    """Steps on random batches, converted to the model's dtype; returns the last loss."""
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        data, target = batch()
        loss = cross_entropy(model(data.to(next(model.parameters()).dtype)).float(), target)
        loss.backward()
        optimizer.step()
    return loss.detach()


def learned(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """What training has changed: a copy."""
    return copy.deepcopy([list(model.state_dict().values()), optimizer.state_dict()])


def test_the_comparison_can_fail() -> None:
    def script(optimizer_class: OptimizerClass) -> Any:
        model = perceptron()
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        train(model, optimizer)
        optimizer.param_groups[0]["lr"] *= 1 + 1e-6 * (optimizer_class is FusedSGD)
        train(model, optimizer)
        return list(model.parameters())

    with pytest.raises(AssertionError, match="elements differ"):
        both(script)


# Schedulers. One entry for each class of torch.optim.lr_scheduler.


def chained(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.3, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(optimizer, 5)]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda n: 0.95**n, lambda n: 1 / (1 + n)]),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda n: 0.9 + 0.01 * n),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.3),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 3, 7], 0.3),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.2, 4),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.2, 0.9, 7),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.8),
    "ChainedScheduler": chained,
    "SequentialLR": sequential,
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 8, 2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4, 0.01),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, 2),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.2, 3, 2),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [0.3, 0.2], 12, three_phase=True),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    classes = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} == set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore:The epoch parameter in", "ignore:Please also save or load the state of the opt")
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "Tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_torchs_and_continue_from_their_state(name: str, tensor_lr: bool) -> None:
    """Learning rate, momentum and parameters after each step; halfway both are saved, made anew and loaded."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model = perceptron()
        params = list(model.parameters())

        def made() -> tuple[torch.optim.SGD, lr_scheduler.LRScheduler]:
            groups = [
                {"params": params[:2], "lr": torch.tensor(0.05) if tensor_lr else 0.05},
                {"params": params[2:], "lr": torch.tensor(0.1) if tensor_lr else 0.1},
            ]
            optimizer = optimizer_class(groups, **ARGUMENTS)
            return optimizer, SCHEDULERS[name](optimizer)

        optimizer, scheduler = made()
        seen: list[Any] = []
        for step in range(11):
            if step == 6:
                saved = copy.deepcopy([optimizer.state_dict(), scheduler.state_dict()])
                optimizer, scheduler = made()
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            loss = train(model, optimizer, 1)
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss.item())
            else:
                scheduler.step()
            groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
            seen.append(copy.deepcopy([groups, scheduler.get_last_lr(), params]))
        assert_fused(optimizer)
        return seen, scheduler.state_dict()

    seen, _ = both(script)
    assert len({float(groups[0]["lr"]) for groups, *_ in seen}) > 1, "the scheduler does nothing here"
    if name in ("CyclicLR", "OneCycleLR"):
        assert len({groups[0]["momentum"] for groups, *_ in seen}) > 1, "nor does it cycle the momentum"


def test_a_scheduler_warns_of_a_step_that_was_forgotten() -> None:
    optimizer = FusedSGD(perceptron().parameters(), **ARGUMENTS)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="Detected call of"):
        scheduler.step()


# Averages


@pytest.mark.parametrize("average", ["equal", "exponential"])
@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_swa_utils_average_anneal_and_update_the_norm_layers(average: str, strategy: Any) -> None:
    def script(optimizer_class: OptimizerClass) -> Any:
        model = convolutional()
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS, nesterov=True)
        function = swa_utils.get_ema_multi_avg_fn(0.9) if average == "exponential" else swa_utils.get_swa_multi_avg_fn()
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=function)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 4)
        annealing = swa_utils.SWALR(optimizer, swa_lr=0.03, anneal_epochs=3, anneal_strategy=strategy)
        seen = []
        for epoch in range(8):
            train(model, optimizer, 2, images)
            if epoch < 4:
                scheduler.step()
            else:
                averaged.update_parameters(model)
                annealing.step()
            seen.append(optimizer.param_groups[0]["lr"])
        swa_utils.update_bn([images() for _ in range(3)], averaged)
        assert_fused(optimizer)
        return seen, learned(averaged, optimizer), annealing.state_dict()

    seen, *_ = both(script)
    assert seen[-1] == 0.03


# GradScaler


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_with_accumulation_and_clipping_and_an_overflow_in_one_of_two_optimizers(
    fused: bool | None,
) -> None:
    def script(optimizer_class: OptimizerClass) -> Any:
        models = [perceptron(), perceptron()]
        options = ARGUMENTS | ({"fused": fused} if optimizer_class is FusedSGD else {})
        optimizers = [optimizer_class(model.parameters(), **options) for model in models]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        seen = []
        for step in range(8):
            for _ in range(2):  # micro-batches
                data, target = vectors()
                for i, model in enumerate(models):
                    bad = float("inf") if step == 4 and i == 1 else 1.0
                    scaler.scale(cross_entropy(model(data), target) * bad / 2).backward()
            for model, optimizer in zip(models, optimizers, strict=True):
                if step % 2:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            seen.append(scaler.get_scale())
            if step == 5:
                state = scaler.state_dict()
                scaler = torch.amp.GradScaler("cpu")
                scaler.load_state_dict(state)
        for optimizer in optimizers:
            assert_fused(optimizer)
        buffers = [[state["momentum_buffer"] for state in optimizer.state.values()] for optimizer in optimizers]
        return seen, scaler.state_dict(), [list(model.parameters()) for model in models], buffers

    seen, *_ = both(script)
    assert seen[4] == seen[3] / 2 and seen[-1] > seen[4]


# Hooks


@pytest.fixture
def no_hooks_are_left() -> Iterator[list[Any]]:
    """Handles of global hooks, which are removed after the test."""
    handles: list[Any] = []
    yield handles
    for handle in handles:
        handle.remove()


def test_hooks_that_change_gradients_parameters_and_arguments(no_hooks_are_left: list[Any]) -> None:
    def script(optimizer_class: OptimizerClass) -> Any:
        model, calls = perceptron(), []
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        train(model, optimizer)

        def centralize(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            for group in opt.param_groups:
                for param in group["params"]:
                    param.grad = param.grad - param.grad.mean()

        def normalize(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                model[0].weight.div_(model[0].weight.norm())

        def with_closure(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
            return (args[0], lambda: calls.append("closure")), kwargs

        def decay_more(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            opt.param_groups[0]["weight_decay"] *= 2
            once.remove()

        for make, register in (
            (centralize, optimizer.register_step_pre_hook),
            (normalize, optimizer.register_step_post_hook),
            (with_closure, optimizer.register_step_pre_hook),
        ):
            register(make)
            train(model, optimizer, 2)
        once = optimizer.register_step_post_hook(decay_more)
        train(model, optimizer)
        everywhere = [
            register_optimizer_step_pre_hook(lambda opt, args, kwargs: calls.append("before")),
            register_optimizer_step_post_hook(normalize),
        ]
        no_hooks_are_left.extend(everywhere)
        train(model, optimizer)
        for handle in everywhere:
            handle.remove()
        train(model, optimizer)
        assert_fused(optimizer)
        return calls, learned(model, optimizer)

    calls, (_, state) = both(script)
    assert calls.count("before") == 3 and calls.count("closure") == 2 + 9
    assert state["param_groups"][0]["weight_decay"] == 0.02


def test_hooks_of_state_dict_and_load_state_dict_change_what_is_saved_and_loaded() -> None:
    def script(optimizer_class: OptimizerClass) -> Any:
        model = perceptron()
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        train(model, optimizer)

        def saved(opt: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            groups = [group | {"lr": 0.5} for group in state["param_groups"]]
            return {"state": {k: {n: b.double() for n, b in v.items()} for k, v in state["state"].items()}} | {
                "param_groups": groups
            }

        def loaded(opt: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            return {"state": {k: {n: b / 2 for n, b in v.items()} for k, v in state["state"].items()}} | {
                "param_groups": state["param_groups"]
            }

        def afterwards(opt: torch.optim.Optimizer) -> None:
            opt.param_groups[0]["momentum"] = 0.7

        optimizer.register_state_dict_post_hook(saved)
        optimizer.register_load_state_dict_pre_hook(loaded)
        optimizer.register_load_state_dict_post_hook(afterwards)
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer)
        assert_fused(optimizer)
        return learned(model, optimizer)

    _, state = both(script)
    assert (state["param_groups"][0]["lr"], state["param_groups"][0]["momentum"]) == (0.5, 0.7)


# Parameter groups edited by hand


def test_groups_edited_by_hand_between_steps() -> None:
    def script(optimizer_class: OptimizerClass) -> Any:
        model = perceptron()
        params = list(model.parameters())
        optimizer = optimizer_class([{"params": params[:3]}, {"params": params[3:], "momentum": 0}], **ARGUMENTS)
        groups, seen = optimizer.param_groups, []

        def go_on() -> None:
            train(model, optimizer, 2)
            seen.append(copy.deepcopy([params, optimizer.state_dict()]))

        go_on()
        groups[0]["lr"], groups[1]["weight_decay"] = 0.03, 0.0
        go_on()
        groups[0]["nesterov"], groups[1]["momentum"] = True, 0.5
        go_on()
        groups[1]["params"].append(groups[0]["params"].pop(1))  # with its momentum
        go_on()
        optimizer.add_param_group({"params": [groups[0]["params"].pop()], "maximize": True, "lr": 0.01})
        go_on()
        del groups[1]  # its parameters stay as they are, and their state stays behind
        before = params[4].detach().clone()
        train(model, optimizer, 2)
        assert torch.equal(params[4], before)
        groups.insert(0, {**groups[0], "params": params[4:], "dampening": 0.1, "nesterov": False})
        train(model, optimizer, 2)
        groups.reverse()
        train(model, optimizer, 2)
        groups[:] = [{**groups[0], "params": params}]
        go_on()
        assert_fused(optimizer)
        return seen

    both(script)


# Parametrizations


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


@pytest.mark.parametrize("when", ["before the optimizer", "between two steps"])
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal", "symmetric", "prune"])
def test_a_layer_is_parametrized_trained_and_made_plain_again(name: str, when: str) -> None:
    """A layer that is parametrized later leaves its old weight with the optimizer, and gives it the new parameters."""

    def parametrized(layer: nn.Linear) -> None:
        if name == "symmetric":
            parametrize.register_parametrization(layer, "weight", Symmetric())
        elif name == "prune":
            prune.l1_unstructured(layer, "weight", 0.3)
        else:
            getattr(parametrizations, name)(layer)

    def script(optimizer_class: OptimizerClass) -> Any:
        model = perceptron()
        layer = model[2]
        if when == "before the optimizer":
            parametrized(layer)
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        train(model, optimizer)
        if when == "between two steps":
            parametrized(layer)
            held = {id(param) for group in optimizer.param_groups for param in group["params"]}
            added = [param for param in model.parameters() if id(param) not in held]
            if added:
                optimizer.add_param_group({"params": added})
            train(model, optimizer, set_to_none=False)
            train(model, optimizer)
        seen = learned(model, optimizer)
        if name == "prune":
            prune.remove(layer, "weight")
        else:
            parametrize.remove_parametrizations(layer, "weight")
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        added = [param for param in model.parameters() if id(param) not in held]
        if added:
            optimizer.add_param_group({"params": added})
        train(model, optimizer)
        assert_fused(optimizer)
        return seen, learned(model, optimizer)

    both(script)


# Tied and frozen weights


class Tagger(nn.Module):
    """Looks up vectors and scores against them again: one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.scores = nn.Embedding(5, 9), nn.Linear(9, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.inner(x) + self.embedding(x.argmax(1) % 5))
        return scores


def test_weights_tied_before_and_between_steps_and_untied_again() -> None:
    def script(optimizer_class: OptimizerClass) -> Any:
        model, seen = Tagger(), []
        model.scores.weight = model.embedding.weight
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        for tied in (True, False, True):
            if tied:
                model.scores.weight = model.embedding.weight
            else:
                model.scores.weight = nn.Parameter(model.embedding.weight.detach().clone())
                optimizer.add_param_group({"params": [model.scores.weight], "lr": 0.02})
            train(model, optimizer)
            assert_fused(optimizer)
            seen.append(learned(model, optimizer))
        return seen

    both(script)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("given", ["all parameters", "trainable ones"])
def test_layers_frozen_and_thawed_again(given: str, set_to_none: bool) -> None:
    """Without a gradient a layer stays as it is; with one that is left as zeros it decays and coasts."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model, seen = perceptron(), []
        layers = [model[0], model[2], model[4]]
        model.requires_grad_(False)
        layers[2].requires_grad_(True)
        params = [param for param in model.parameters() if given == "all parameters" or param.requires_grad]
        optimizer = optimizer_class(params, **ARGUMENTS)
        for thawed in (layers[1], layers[0], None, layers[2]):
            train(model, optimizer, set_to_none=set_to_none)
            seen.append(learned(model, optimizer))
            assert_fused(optimizer)
            if thawed is None:
                layers[2].requires_grad_(False)
                layers[2].bias.grad = None
            else:
                thawed.requires_grad_(True)
                held = {id(param) for group in optimizer.param_groups for param in group["params"]}
                if id(thawed.weight) not in held:
                    optimizer.add_param_group({"params": list(thawed.parameters()), "lr": 0.05})
        train(model, optimizer, set_to_none=set_to_none)
        return seen, learned(model, optimizer)

    both(script)


# Models moved and cast


def replaced_data(model: nn.Module) -> None:
    for param in model.parameters():
        param.data = param.data.clone().mul_(0.9)


def flattened(model: nn.Module) -> None:
    """All parameters become views of one buffer, as libraries that communicate them do."""
    params = list(model.parameters())
    flat = torch.cat([param.data.flatten() for param in params])
    for param, part in zip(params, flat.split([param.numel() for param in params]), strict=True):
        param.data = part.view_as(param)


def halved_by_load_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def assigned_by_load_state_dict(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "double()": nn.Module.double,
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "contiguous again": lambda model: model.to(memory_format=torch.contiguous_format),
    "share_memory()": nn.Module.share_memory,
    "load_state_dict()": halved_by_load_state_dict,
    "assign=True": assigned_by_load_state_dict,
    "p.data = …": replaced_data,
    "one flat buffer": flattened,
}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("move", MOVES)
def test_a_model_is_moved_or_cast_after_its_optimizer_was_made(move: str, steps_before: int) -> None:
    """assign=True puts other parameters into the model than those that the optimizer holds: then nothing is trained."""
    is_cast = move == "double()" and steps_before > 0  # the momentum buffers stay in float32

    def script(optimizer_class: OptimizerClass) -> Any:
        model = convolutional()
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        train(model, optimizer, steps_before, images) if steps_before else None
        if move == "contiguous again":
            model.to(memory_format=torch.channels_last)
            train(model, optimizer, 2, images)
        optimizer.zero_grad()
        MOVES[move](model)
        train(model, optimizer, 3, images)
        if not is_cast:
            assert_fused(optimizer)
        seen = learned(model, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())  # brings the momentum buffers to the parameters' dtype
        train(model, optimizer, 2, images)
        assert_fused(optimizer)
        return seen, learned(model, optimizer), [param.stride() for param in model.parameters()]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both(script)
    ours = [str(warning.message) for warning in caught if "FusedSGD" in str(warning.message)]
    assert bool(ours) == is_cast and all("its momentum buffer is float32" in message for message in ours), ours


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_cast_to_half_precision_and_back(dtype: torch.dtype) -> None:
    """In half precision torch's own implementations differ from each other; to be near them is all that is asked."""
    results = []
    for optimizer_class in (FusedSGD, torch.optim.SGD):
        torch.manual_seed(SEED)
        model, seen = perceptron(), []
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        train(model, optimizer)
        for cast_to in (dtype, torch.float32):
            optimizer.zero_grad()
            model.to(cast_to)
            optimizer.load_state_dict(optimizer.state_dict())
            train(model, optimizer)
            assert_fused(optimizer)
            assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {cast_to}
            seen += [param.detach().float().clone() for param in model.parameters()]
        results.append(seen)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("default:FusedSGD. torch's own code steps")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_cast_to_half_precision_whose_momentum_stays_float32(dtype: torch.dtype) -> None:
    """No fused backend takes that without `momentum_dtype`: torch's code does, with a warning and its own bits."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model = perceptron()
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        train(model, optimizer)
        optimizer.zero_grad()
        model.to(dtype)
        train(model, optimizer)
        return learned(model, optimizer)

    with pytest.warns(UserWarning, match="FusedSGD: torch's own code steps .* momentum buffer is float32"):
        both(script)


# Several optimizers


def test_optimizers_of_the_parts_of_a_model_take_turns() -> None:
    def script(optimizer_class: OptimizerClass) -> Any:
        generator, critic = perceptron(), nn.Linear(5, 1)
        optimizers = [optimizer_class(part.parameters(), **ARGUMENTS) for part in (generator, critic)]
        for step in range(6):
            score = critic(generator(vectors()[0])).tanh().mean()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            (score if step % 3 else -score).backward()
            optimizers[step % 2].step()
        for optimizer in optimizers:
            assert_fused(optimizer)
        return [learned(part, optimizer) for part, optimizer in zip((generator, critic), optimizers, strict=True)]

    both(script)


def test_optimizers_that_share_parameters_take_turns() -> None:
    """Each with a momentum of its own; one of them is thrown away in between, and made anew with the other's state."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model = perceptron()
        params = list(model.parameters())
        first = optimizer_class(params[:4], **ARGUMENTS)
        second = optimizer_class(params[2:], **(ARGUMENTS | {"lr": 0.02, "nesterov": True}))
        for _ in range(3):
            train(model, first, 1)
            second.step()
        third = optimizer_class(params[:4], **ARGUMENTS)
        third.load_state_dict(first.state_dict())
        del first
        for _ in range(3):
            train(model, third, 1)
            second.step()
        assert_fused(second)
        assert_fused(third)
        return params, third.state_dict(), second.state_dict()

    both(script)


# Threads


def test_training_in_several_threads_each_with_its_own_model() -> None:
    """Backward passes, schedulers and steps beside each other; the batches are made beforehand."""

    def script(optimizer_class: OptimizerClass) -> Any:
        runs = []
        for _ in range(4):
            model = convolutional()
            optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
            runs.append((model, optimizer, lr_scheduler.ExponentialLR(optimizer, 0.9), [images() for _ in range(6)]))
        failures: list[BaseException] = []

        def run(
            model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler, batches: list[Any]
        ) -> None:
            try:
                for batch in batches:
                    train(model, optimizer, 1, lambda batch=batch: batch)
                    scheduler.step()
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=run, args=arguments) for arguments in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not failures and not any(thread.is_alive() for thread in threads), failures
        for _, optimizer, *_ in runs:
            assert_fused(optimizer)
        return [learned(model, optimizer) for model, optimizer, *_ in runs]

    both(script)


def test_one_optimizer_is_refused_to_a_second_thread_as_long_as_the_first_is_in_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = perceptron()
    optimizer = FusedSGD(model.parameters(), **ARGUMENTS)
    model(vectors()[0]).sum().backward()
    entered, leave = threading.Event(), threading.Event()
    step_together = steps._step_together

    def slowly(*args: Any) -> None:
        entered.set()
        assert leave.wait(timeout=60)
        step_together(*args)

    monkeypatch.setattr(steps, "_step_together", slowly)
    first = threading.Thread(target=optimizer.step)
    before = [param.detach().clone() for param in model.parameters()]
    first.start()
    try:
        assert entered.wait(timeout=60)
        with pytest.raises(RuntimeError, match="already running"):
            optimizer.step()
        assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    finally:
        leave.set()
        first.join(timeout=60)
    assert not torch.equal(model[0].weight, before[0])
    monkeypatch.undo()
    optimizer.step()  # it is free again


@contextlib.contextmanager
def held_in_step(optimizer: FusedSGD, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another thread is within step(), and stays there."""
    entered, leave = threading.Event(), threading.Event()

    def held(*args: Any) -> None:
        entered.set()
        assert leave.wait(timeout=60)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_step_together", held)
        patch.setattr(steps, "_step_alone", lambda *args: False)
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        assert entered.wait(timeout=60)
    try:
        yield
    finally:
        leave.set()
        thread.join(timeout=60)


def test_averages_are_not_swapped_while_another_thread_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perceptron()
    optimizer = FusedSGD(model.parameters(), ema_decay=0.5, **ARGUMENTS)
    train(model, optimizer, 1)
    with (
        held_in_step(optimizer, monkeypatch),
        pytest.raises(RuntimeError, match="another thread"),
        optimizer.swap_ema(),
    ):
        pass
    with optimizer.swap_ema():
        pass
    optimizer.step()


def in_a_thread(call: Callable[[], None]) -> None:
    """Raises what it raised there."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


class Interrupted(BaseException):
    pass


def interrupt(call: Callable[[], None], code: CodeType, event: str, at: int) -> BaseException | None:
    """Raises when ``code`` comes to its line or opcode number ``at``; None if it has fewer."""
    left = at

    def trace(frame: FrameType, kind: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        if kind == event:
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted as interruption:
        return interruption
    finally:
        sys.settrace(before)
    return None


@pytest.mark.parametrize("event", ["line", "opcode"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "options"])
def test_a_step_that_is_interrupted_anywhere_locks_no_thread_out(options: dict[str, Any], event: str) -> None:
    model = perceptron()
    optimizer = FusedSGD(model.parameters(), **options, **ARGUMENTS)
    train(model, optimizer, 2)
    kept, left_over = [], 0  # a traceback keeps the frame, with all its variables
    while (interruption := interrupt(optimizer.step, steps.run.__code__, event, len(kept))) is not None:
        kept.append(interruption)
        left_over += len(optimizer._claims)
        in_a_thread(optimizer.step)
        assert not optimizer._claims, f"{event} {len(kept) - 1}"
        optimizer.step()
    assert len(kept) > 5
    assert left_over > 0, "no place was found where a claim stays behind: this test shows nothing"


def test_a_step_within_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = FusedSGD(perceptron().parameters(), **ARGUMENTS)
    monkeypatch.setattr(steps, "_step_together", lambda *args: optimizer.step())
    with pytest.raises(RuntimeError, match="already running"):
        optimizer.step()


# Forked workers


def in_forked_processes(count: int, work: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
    """What work(rank) returns in each of several forks of this process."""
    context = multiprocessing.get_context("fork")

    def child(rank: int, connection: Any) -> None:
        torch.set_num_threads(1)  # the threads of the parent are not there
        try:
            result: Any = [tensor.detach().clone().numpy() for tensor in work(rank)]
        except BaseException as failure:
            result = repr(failure)
        connection.send(result)

    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    children = [context.Process(target=child, args=(rank, pipe[1]), daemon=True) for rank, pipe in enumerate(pipes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of a fork beside threads
        for process in children:
            process.start()
    try:
        results = []
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(60), f"child {rank} does not answer"
            results.append(receiver.recv())
    finally:
        for process in children:
            process.join(timeout=5)
            process.kill()
    for rank, result in enumerate(results):
        assert not isinstance(result, str), f"child {rank}: {result}"
    return [[torch.from_numpy(array) for array in result] for result in results]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def in_a_process_of_its_own(test: Callable[[], None]) -> Callable[[], None]:
    """Other tests may have made autograd start threads, after which torch refuses backward() in forked children."""

    @functools.wraps(test)
    def run() -> None:
        if os.environ.get(_ALONE) == test.__name__:
            return test()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{test.__name__}"]
        done = subprocess.run(
            command, env=environment | {_ALONE: test.__name__}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]

    return run


_ALONE = "WD_FUSED_TEST_ALONE"


@in_a_process_of_its_own
def test_forked_children_go_on_with_their_copies_of_model_and_optimizer() -> None:
    """The parent has stepped before and goes on afterwards; a tensor is large enough to be split among threads."""
    torch.set_num_threads(2)

    def script(optimizer_class: OptimizerClass) -> Any:
        model = nn.Sequential(nn.Linear(9, 9000), nn.Tanh(), nn.Linear(9000, 5))
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        train(model, optimizer, 2)

        def work(rank: int) -> list[Tensor]:
            torch.manual_seed(rank)
            optimizer.param_groups[0]["lr"] /= 1 + rank
            train(model, optimizer, 2)
            assert_fused(optimizer)
            return [*model.parameters(), *(state["momentum_buffer"] for state in optimizer.state.values())]

        results = in_forked_processes(2, work)
        train(model, optimizer, 2)
        assert_fused(optimizer)
        return results, learned(model, optimizer)

    results, _ = both(script)
    assert not torch.equal(results[0][0], results[1][0])


@in_a_process_of_its_own
def test_forked_children_step_though_a_thread_of_the_parent_was_in_its_step() -> None:
    """Of a tensor so large that a step leaves Python to others meanwhile."""
    torch.set_num_threads(1)
    param = nn.Parameter(torch.randn(1 << 21))
    param.grad = torch.randn(1 << 21)
    optimizer = FusedSGD([param], **ARGUMENTS)
    optimizer.step()
    stop = threading.Event()

    def steps() -> None:
        while not stop.is_set():
            optimizer.step()

    def work(rank: int) -> list[Tensor]:
        assert_fused(optimizer)
        before = param.detach()[:9].clone()
        optimizer.step()
        in_a_thread(optimizer.step)
        assert not torch.equal(param.detach()[:9], before)
        return []

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        in_forked_processes(6, work)
    finally:
        stop.set()
        thread.join(timeout=60)


@in_a_process_of_its_own
def test_forked_children_average_their_gradients_as_data_parallel_training_does() -> None:
    """Over pipes: each child sends its gradients, gets the mean, and steps; all end with the same bits."""
    context = multiprocessing.get_context("fork")

    def script(optimizer_class: OptimizerClass) -> Any:
        model = perceptron()
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        train(model, optimizer, 1)
        ends = context.Pipe()

        def work(rank: int) -> list[Tensor]:
            for step in range(3):
                torch.manual_seed(10 * step + rank)
                optimizer.zero_grad()
                data, target = vectors()
                cross_entropy(model(data), target).backward()
                ends[rank].send([param.grad.numpy() for param in model.parameters()])
                assert ends[rank].poll(60)
                for param, other in zip(model.parameters(), ends[rank].recv(), strict=True):
                    param.grad = (param.grad + torch.from_numpy(other)) / 2
                optimizer.step()
            assert_fused(optimizer)
            return list(model.parameters())

        return in_forked_processes(2, work)

    results = both(script)
    assert_same(results[0], results[1], "the two ranks")


def test_data_loader_workers_beside_the_training() -> None:
    def script(optimizer_class: OptimizerClass) -> Any:
        model = perceptron()
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        train(model, optimizer, 1)
        dataset = torch.utils.data.TensorDataset(*vectors(48))
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=8, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        for batch in loader:
            train(model, optimizer, 1, lambda batch=batch: batch)
        assert_fused(optimizer)
        return learned(model, optimizer)

    both(script)


# Copies


def by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def by_torch_save(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_of_model_optimizer_and_scheduler_go_on_beside_the_originals(copied: Callable[[Any], Any]) -> None:
    def script(optimizer_class: OptimizerClass) -> Any:
        model = convolutional()
        optimizer = optimizer_class(model.parameters(), **ARGUMENTS)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.3, 20)
        originals = (model, optimizer, scheduler)

        def go_on(model: nn.Module, optimizer: torch.optim.SGD, scheduler: lr_scheduler.LRScheduler) -> list[Any]:
            for _ in range(3):
                train(model, optimizer, 1, images)
                scheduler.step()
            assert_fused(optimizer)
            return learned(model, optimizer)

        go_on(*originals)
        copies = copied(originals)
        assert copies[1].param_groups[0]["params"][0] is copies[0][0].weight
        assert type(copies[1]) is optimizer_class and copies[2].optimizer is copies[1]
        return go_on(*originals), go_on(*copies), go_on(*originals), go_on(*copied(copies))

    both(script)
