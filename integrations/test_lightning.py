"""FusedSGD in Lightning's Trainer, beside torch.optim.SGD in the same Trainer. Run by pytest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import callbacks
from lightning_digits import DigitsModule, loaders, trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from integrations.conftest import Evidence, fused, momentum_buffers, run_example
from wd_fused import FusedSGD

FRAMEWORK = "lightning"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated", "ignore:Be aware that when using .ckpt_path"
)
SHORT: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": 8, "limit_val_batches": 1}


def made(optimizer_class: Any, module_class: type[DigitsModule] = DigitsModule) -> DigitsModule:
    torch.manual_seed(0)
    module = module_class()
    module.optimizer_class = optimizer_class
    return module


def fit(module: DigitsModule, folder: Path, checkpoint: Path | None = None, **options: Any) -> list[Tensor]:
    """Trains; returns what that has changed."""
    settings = SHORT | ({} if "callbacks" in options else {"enable_checkpointing": False}) | options
    run = trainer(folder, **settings)
    run.fit(module, *loaders(), ckpt_path=checkpoint)
    for optimizer in run.optimizers:
        if isinstance(optimizer, FusedSGD):
            fused(optimizer)
    buffers = [buffer for optimizer in run.optimizers for buffer in momentum_buffers(optimizer)]
    return [*module.state_dict().values(), *buffers]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_trainer(algorithm: str, evidence: Evidence, tmp_path: Path) -> None:
    """Trainer with gradient_clip_val (by norm and by value), accumulate_grad_batches=2, OneCycleLR"""
    options = {"accumulate_grad_batches": 2, "gradient_clip_algorithm": algorithm, "gradient_clip_val": 0.1}
    ours, theirs = (fit(made(kind), tmp_path, **options) for kind in (FusedSGD, torch.optim.SGD))
    evidence.same_bits(ours, theirs)
    assert not torch.equal(ours[0], DigitsModule().state_dict()["model.0.weight"])


@pytest.mark.parametrize("saved_by", [FusedSGD, torch.optim.SGD])
@pytest.mark.parametrize("resumed_by", [FusedSGD, torch.optim.SGD])
def test_a_checkpoint(saved_by: Any, resumed_by: Any, evidence: Evidence, tmp_path: Path) -> None:
    """ModelCheckpoint's file resumed by fit(ckpt_path=…), in either class, against an uninterrupted run"""
    each_epoch = callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = fit(made(saved_by), tmp_path, callbacks=[each_epoch])
    resumed = fit(made(resumed_by), tmp_path, tmp_path / "epoch=0.ckpt")
    evidence.same_bits(resumed, whole)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(precision: Any, evidence: Evidence, tmp_path: Path) -> None:
    """Trainer(precision="bf16-mixed") and "64-true\""""
    results = []
    for kind in (FusedSGD, torch.optim.SGD):
        module = made(kind)
        results.append(fit(module, tmp_path, precision=precision))
    assert results[0][0].dtype == (torch.float64 if precision == "64-true" else torch.float32)
    evidence.same_bits(*results)


class PerEpoch(DigitsModule):
    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_class(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)]


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averages(name: str, evidence: Evidence, tmp_path: Path) -> None:
    """The callbacks StochasticWeightAveraging and EMAWeightAveraging"""
    results = []
    for kind in (FusedSGD, torch.optim.SGD):
        if name == "EMAWeightAveraging":
            average: Any = callbacks.EMAWeightAveraging(decay=0.9, update_every_n_steps=2)
        else:
            average = callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)
        results.append(fit(made(kind, PerEpoch), tmp_path, callbacks=[average], enable_checkpointing=False))
    evidence.same_bits(*results)


class ByHand(DigitsModule):
    """Two optimizers for two halves of the model, stepped in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        chosen = self.optimizers()[index % 2]
        self.toggle_optimizer(chosen)
        loss = cross_entropy(self.model(images), labels)
        chosen.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(chosen, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        chosen.step()
        self.untoggle_optimizer(chosen)

    def configure_optimizers(self) -> Any:
        halves = [list(self.model[:6].parameters()), list(self.model[6:].parameters())]
        return [self.optimizer_class(half, lr=0.05, momentum=0.9, weight_decay=5e-4) for half in halves]


def test_manual_optimization(evidence: Evidence, tmp_path: Path) -> None:
    """Manual optimization: two optimizers by toggle_optimizer, clip_gradients and step"""
    results = [fit(made(kind, ByHand), tmp_path, gradient_clip_val=None) for kind in (FusedSGD, torch.optim.SGD)]
    evidence.same_bits(*results)


class WithOptions(DigitsModule):
    def configure_optimizers(self) -> Any:
        options = {"max_grad_norm": 0.1, "ema_decay": 0.9} if self.optimizer_class is FusedSGD else {}
        return self.optimizer_class(self.parameters(), lr=0.05, momentum=0.9, **options)


def test_options(evidence: Evidence, tmp_path: Path) -> None:
    """max_grad_norm and ema_decay of FusedSGD instead of gradient_clip_val, saved and resumed"""
    theirs = made(torch.optim.SGD, WithOptions)
    fit(theirs, tmp_path, gradient_clip_val=0.1)
    each_epoch = callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    ours, resumed = made(FusedSGD, WithOptions), made(FusedSGD, WithOptions)
    fit(ours, tmp_path, gradient_clip_val=None, callbacks=[each_epoch])
    fit(resumed, tmp_path, tmp_path / "epoch=1.ckpt", gradient_clip_val=None)
    evidence.near(ours.parameters(), theirs.parameters(), 1e-3)
    averages = [list(module.trainer.optimizers[0].ema_parameters()) for module in (ours, resumed)]
    evidence.same_bits([*ours.state_dict().values(), *averages[0]], [*resumed.state_dict().values(), *averages[1]])
    assert not torch.equal(averages[0][0], next(ours.parameters()))


def test_fabric(evidence: Evidence) -> None:
    """Fabric: setup, backward, clip_gradients, step"""
    results = []
    for kind in (FusedSGD, torch.optim.SGD):
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        module = made(kind)
        raw = kind(module.model.parameters(), lr=0.05, momentum=0.9)
        model, optimizer = fabric.setup(module.model, raw)
        for images, labels in list(fabric.setup_dataloaders(loaders()[0]))[:8]:
            optimizer.zero_grad()
            fabric.backward(cross_entropy(model(images), labels))
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
        if kind is FusedSGD:
            fused(optimizer)
        results.append([*module.model.state_dict().values(), *momentum_buffers(optimizer)])
    evidence.same_bits(*results)


def test_the_example(tmp_path: Path) -> None:
    """examples/lightning_digits.py: trains, saves, resumes"""
    assert "resumed with the same bits: True" in run_example("lightning_digits.py", tmp_path)
