"""Transformers: a small GPT-2 with random weights learns to count with FusedSGD, by the Trainer, in both of its ways.

Run as `python examples/transformers_trainer.py`; needs the extra "integrations". Imported by its test.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import needs

with needs.extra("integrations", __file__):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from wd_fused import FusedSGD, weight_decay_param_groups

OPTIONS = {"lr": 0.1, "momentum": 0.9, "nesterov": True}


def build_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def build_dataset(rows: int = 256) -> list[dict[str, torch.Tensor]]:
    """Sequences that count up from a random number."""
    starts = torch.randint(32, (rows, 1), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in (starts + torch.arange(16)) % 32]


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    """The Trainer clips by its max_grad_norm, 1.0 where nothing is said."""
    common = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "use_cpu": True, "report_to": "none"}
    common |= {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "weight_decay": 0.01}
    return TrainingArguments(str(folder), **(common | options))


def with_optimizers(folder: Path | str, optimizer_class: Any = FusedSGD, **options: Any) -> Trainer:
    model = build_model()
    optimizer = optimizer_class(weight_decay_param_groups(model, 0.01), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 32)
    return Trainer(
        model, arguments(folder, **options), train_dataset=build_dataset(), optimizers=(optimizer, scheduler)
    )


def with_optimizer_class(folder: Path | str, optimizer_class: Any = FusedSGD, **options: Any) -> Trainer:
    """The Trainer makes the groups, with its weight_decay, and the scheduler."""
    return Trainer(
        build_model(),
        arguments(folder, **options),
        train_dataset=build_dataset(),
        optimizer_cls_and_kwargs=(optimizer_class, OPTIONS),
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for make in (with_optimizers, with_optimizer_class):
            trainer = make(folder)
            result = trainer.train()
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # Accelerate wraps it
            stepped_by = sorted({choice.backend for choice in optimizer.backends()})
            print(f"{make.__name__}: mean loss {result.training_loss:.3f}, stepped by {stepped_by}")
