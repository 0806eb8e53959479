"""FusedSGD in the Trainer of Transformers, beside torch.optim.SGD in the same Trainer. Run by pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer
from transformers_trainer import (
    OPTIONS,
    arguments,
    build_dataset,
    build_model,
    with_optimizer_class,
    with_optimizers,
)

from integrations.conftest import Evidence, fused, momentum_buffers, run_example
from wd_fused import FusedSGD

FRAMEWORK = "transformers"
WAYS = pytest.mark.parametrize("make", [with_optimizers, with_optimizer_class])


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate, by which the Trainer trains, keeps its settings for a process."""
    yield
    AcceleratorState._reset_state(True)


def trained(trainer: Trainer, **options: Any) -> list[Tensor]:
    """What training has changed."""
    trainer.train(**options)
    if trainer.optimizer.optimizer.__class__ is FusedSGD:
        fused(trainer.optimizer)
    assert trainer.state.global_step == trainer.state.max_steps > 10
    return [*trainer.model.state_dict().values(), *momentum_buffers(trainer.optimizer)]


@WAYS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "num_train_epochs": 3, "max_grad_norm": 0.1, "warmup_steps": 4},
        {"bf16": True, "lr_scheduler_type": "cosine"},
    ],
    ids=["defaults", "accumulation, clipping, warm-up", "bf16"],
)
def test_the_trainer(make: Callable[..., Trainer], options: dict[str, Any], evidence: Evidence, tmp_path: Path) -> None:
    """GPT-2, by optimizers= and by optimizer_cls_and_kwargs=; accumulation, max_grad_norm, warm-up, bf16=True"""
    results = [trained(make(tmp_path, kind, **options)) for kind in (FusedSGD, torch.optim.SGD)]
    evidence.same_bits(*results)


@WAYS
@pytest.mark.parametrize("saved_by", [FusedSGD, torch.optim.SGD])
@pytest.mark.parametrize("resumed_by", [FusedSGD, torch.optim.SGD])
def test_a_checkpoint(
    make: Callable[..., Trainer], saved_by: Any, resumed_by: Any, evidence: Evidence, tmp_path: Path
) -> None:
    """train(resume_from_checkpoint=…), in either class, against an uninterrupted run"""
    options = {"save_strategy": "steps", "save_steps": 20}
    whole = trained(make(tmp_path, saved_by, **options))
    resumed = trained(make(tmp_path, resumed_by, **options), resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    evidence.same_bits(resumed, whole)


def test_bert(evidence: Evidence, tmp_path: Path) -> None:
    """BERT with a classifier: the Trainer's own groups for weight decay"""
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 4} for row in build_dataset()]
    results = []
    for kind in (FusedSGD, torch.optim.SGD):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=4)
        config.intermediate_size = 64
        model = BertForSequenceClassification(config)
        cls_and_kwargs = (kind, OPTIONS)
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows, optimizer_cls_and_kwargs=cls_and_kwargs)
        results.append(trained(trainer))
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.01, 0.0]
    evidence.same_bits(*results)


def test_options(evidence: Evidence, tmp_path: Path) -> None:
    """max_grad_norm and ema_decay of FusedSGD instead of the Trainer's max_grad_norm, saved and resumed"""
    results, averages = [], []
    for kind, options, clipped, checkpoint in (
        (torch.optim.SGD, {}, 0.3, None),
        (FusedSGD, {"max_grad_norm": 0.3, "ema_decay": 0.9}, 0.0, None),
        (FusedSGD, {"max_grad_norm": 0.3, "ema_decay": 0.9}, 0.0, str(tmp_path / "checkpoint-20")),
    ):
        settings = arguments(tmp_path, max_grad_norm=clipped, save_strategy="steps", save_steps=20)
        trainer = Trainer(
            build_model(),
            settings,
            train_dataset=build_dataset(),
            optimizer_cls_and_kwargs=(kind, OPTIONS | options),
        )
        results.append(trained(trainer, resume_from_checkpoint=checkpoint))
        averages.append(list(fused(trainer.optimizer).ema_parameters()) if options else [])
    evidence.near(results[0], results[1], 1e-3)
    evidence.same_bits([*results[1], *averages[1]], [*results[2], *averages[2]])


def test_the_example(tmp_path: Path) -> None:
    """examples/transformers_trainer.py: trains in both ways"""
    printed = run_example("transformers_trainer.py", tmp_path)
    assert printed.count("['cpu']") == 2
