"""Hugging Face Accelerate: FusedSGD through prepare(), accumulate() and clip_grad_norm_(), saved and loaded.

Run as `python examples/accelerate_digits.py`; needs the extra "integrations". Imported by its test.
"""

from __future__ import annotations

import tempfile
from typing import Any

import needs

with needs.extra("integrations", __file__):
    import torch
    from accelerate import Accelerator
    from digits_training import build_model, load_split
    from torch import nn
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader, TensorDataset

    from wd_fused import FusedSGD, weight_decay_param_groups


def prepared(accelerator: Accelerator, optimizer_class: Any = FusedSGD, **options: Any) -> list[Any]:
    """Model, optimizer, batches and scheduler, as prepare() returns them."""
    digits, model = load_split(), build_model(seed=0)
    optimizer = optimizer_class(weight_decay_param_groups(model, 5e-4), lr=0.1, momentum=0.9, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    batches = DataLoader(TensorDataset(digits.train_images, digits.train_labels), batch_size=32)
    return list(accelerator.prepare(model, optimizer, batches, scheduler))


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, batches: Any, scheduler: Any) -> float:
    """One epoch; returns the last batch's loss."""
    for images, labels in batches:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(images), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return loss.item()


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    parts = prepared(accelerator)
    train(accelerator, *parts)
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        first = train(accelerator, *parts)
        accelerator.load_state(folder)
    again = train(accelerator, *parts)
    print(f"stepped by: {sorted({choice.backend for choice in parts[1].optimizer.backends()})}")
    print(f"loss of the second epoch: {first:.6f}; after load_state(): {again:.6f}; the same: {first == again}")
