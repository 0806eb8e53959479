"""FusedSGD with timm's models, groups, schedulers, wrappers and registry, beside torch.optim.SGD. Run by pytest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import Lookahead, param_groups_weight_decay
from timm.optim.sgdw import SGDW
from timm.scheduler import CosineLRScheduler, create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from timm_digits import build_batches, build_model, by_hand, by_name, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from integrations.conftest import Evidence, fused, momentum_buffers, run_example
from wd_fused import FusedSGD, weight_decay_param_groups

FRAMEWORK = "timm"
ARGUMENTS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}


def changed(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """What training has changed."""
    return [tensor.clone() for tensor in [*model.state_dict().values(), *momentum_buffers(optimizer)]]


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_groups_and_scheduler(name: str, evidence: Evidence) -> None:
    """create_model, param_groups_weight_decay, create_scheduler_v2("cosine") with warm-up, step_update and step"""
    results = []
    for kind in (FusedSGD, torch.optim.SGD):
        model = build_model(name)
        optimizer = by_hand(model, kind)
        train(model, optimizer, build_batches(6))
        if kind is FusedSGD:
            fused(optimizer)
        results.append(changed(model, optimizer))
    evidence.same_bits(*results)


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}, {"filter_bias_and_bn": False}], ids=str)
def test_the_registry(options: dict[str, Any], evidence: Evidence) -> None:
    """create_optimizer_v2 by a registered name, against its "sgd"; also with layer_decay"""
    results = []
    for name in ("wdfusedsgd", "sgd"):
        model = build_model()
        optimizer = by_name(model, name, **options)
        train(model, optimizer, build_batches(4), epochs=2)
        if name == "wdfusedsgd":
            fused(optimizer)
        results.append(changed(model, optimizer))
    evidence.same_bits(*results)


def test_lookahead(evidence: Evidence) -> None:
    """The wrapper Lookahead, by create_optimizer_v2("lookahead_…")"""
    results = []
    for name in ("lookahead_wdfusedsgd", "lookahead_sgd"):
        model = build_model()
        optimizer = by_name(model, name, filter_bias_and_bn=False)
        assert isinstance(optimizer, Lookahead)
        train(model, optimizer, build_batches(8), epochs=2)
        if name == "lookahead_wdfusedsgd":
            assert {choice.backend for choice in optimizer._base_optimizer.backends()} == {"cpu"}
        results.append([tensor.clone() for tensor in model.state_dict().values()])
    evidence.same_bits(*results)


@pytest.mark.parametrize("name", ["cosine", "tanh", "step", "multistep", "plateau", "poly"])
def test_schedulers(name: str, evidence: Evidence) -> None:
    """create_scheduler_v2: cosine, tanh, step, multistep, plateau and poly, with noise on the learning rate"""
    results, rates = [], []
    for kind in (FusedSGD, torch.optim.SGD):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(20, 10)), nn.Parameter(torch.randn(10))]
        optimizer = kind([{"params": params[:1]}, {"params": params[1:], "lr_scale": 0.3}], **ARGUMENTS)
        scheduler, epochs = create_scheduler_v2(
            optimizer, name, num_epochs=8, decay_epochs=2, decay_milestones=(2, 5), patience_epochs=1, warmup_epochs=2,
            noise=[0.5, 0.9],
        )  # fmt: skip
        seen = []
        for epoch in range(epochs):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
            scheduler.step(epoch + 1, metric=1.0)
            seen.append([group["lr"] for group in optimizer.param_groups])
        rates.append(seen)
        results.append([*params, *momentum_buffers(optimizer)])
        if kind is FusedSGD:
            fused(optimizer)
    assert rates[0] == rates[1] and len({first for first, _ in rates[0]}) > 2
    evidence.same_bits(*results)


@pytest.mark.parametrize("clip_mode", ["norm", "value", "agc"])
def test_the_training_script_s_scaler(clip_mode: str, evidence: Evidence) -> None:
    """NativeScaler with clip_grad by norm, by value and adaptively (AGC); CosineLRScheduler by updates"""
    results = []
    for kind in (FusedSGD, torch.optim.SGD):
        model = build_model()
        optimizer, scaler = by_hand(model, kind), NativeScaler(device="cpu")
        scheduler = CosineLRScheduler(optimizer, t_initial=8, t_in_epochs=False)
        for i, (images, labels) in enumerate(build_batches(8)):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            scaler(loss, optimizer, 0.05, clip_mode, parameters=list(model.parameters()), need_update=True)
            scheduler.step_update(i + 1)
        if kind is FusedSGD:
            fused(optimizer)
        results.append(changed(model, optimizer))
    evidence.same_bits(*results)


def test_the_average(evidence: Evidence) -> None:
    """ModelEmaV3 beside FusedSGD, and ema_decay of FusedSGD instead of it, buffers included"""
    model = build_model()
    optimizer = FusedSGD(model.parameters(), **ARGUMENTS, ema_decay=0.9, ema_buffers=model)
    average = ModelEmaV3(model, decay=0.9)
    for step, (images, labels) in enumerate(build_batches(8)):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        if step == 0:
            average.set(model)  # torch's average starts from the first parameters that it sees
        else:
            average.update(model)
    theirs = [tensor for tensor in average.module.state_dict().values() if tensor.is_floating_point()]
    with optimizer.swap_ema():
        ours = [tensor.clone() for tensor in model.state_dict().values() if tensor.is_floating_point()]
    evidence.near(ours, theirs, 1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_decoupled_weight_decay(nesterov: bool, evidence: Evidence) -> None:
    """decoupled_weight_decay=True against timm.optim.SGDW"""
    results = []
    for kind, options in ((FusedSGD, {"decoupled_weight_decay": True}), (SGDW, {})):
        model = build_model()
        optimizer = kind(model.parameters(), **ARGUMENTS, nesterov=nesterov, **options)
        train(model, optimizer, build_batches(6), epochs=2)
        if kind is FusedSGD:
            fused(optimizer)
        results.append(changed(model, optimizer))
    evidence.same_bits(*results)


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_groups_are_timms(name: str) -> None:
    """weight_decay_param_groups sorts timm's test models as param_groups_weight_decay does, but for (C, 1, 1, 1)"""
    model = timm.create_model(name, pretrained=False)
    exempt = getattr(model, "no_weight_decay", set)()
    theirs = param_groups_weight_decay(model, 0.01, no_weight_decay_list=exempt)
    ours = weight_decay_param_groups(model, 0.01)
    names = {param: name for name, param in model.named_parameters()}
    disguised = {name for name in names.values() if name.endswith((".gain", ".latent"))}  # vectors that timm decays
    decayed = [
        sorted(names[param] for group in groups if group["weight_decay"] for param in group["params"])
        for groups in (ours, theirs)
    ]
    assert decayed[0] == [name for name in decayed[1] if name not in disguised] != []


def test_the_example(tmp_path: Path) -> None:
    """examples/timm_digits.py: trains with groups by name and by hand"""
    printed = run_example("timm_digits.py", tmp_path)
    assert printed.count("['cpu']") == 2
