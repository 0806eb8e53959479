"""timm: a small model from create_model, FusedSGD in timm's registry of optimizers, timm's groups and scheduler.

Run as `python examples/timm_digits.py`; needs the extra "integrations". Imported by its test.
"""

from __future__ import annotations

from typing import Any

import needs

with needs.extra("integrations", __file__):
    import timm
    import torch
    from digits_training import load_split
    from timm.optim import OptimInfo, create_optimizer_v2, param_groups_weight_decay
    from timm.optim._optim_factory import default_registry
    from timm.scheduler import create_scheduler_v2
    from torch import Tensor, nn
    from torch.nn.functional import cross_entropy, interpolate

    from wd_fused import FusedSGD


def register() -> None:
    """timm takes what stands before a _ in a name for a wrapper's."""
    defaults = {"nesterov": True}
    default_registry.register(OptimInfo("wdfusedsgd", FusedSGD, has_eps=False, has_momentum=True, defaults=defaults))


def by_name(model: nn.Module, name: str = "wdfusedsgd", **options: Any) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, name, lr=0.05, momentum=0.9, weight_decay=5e-4, **options)


def by_hand(model: nn.Module, optimizer_class: Any = FusedSGD) -> torch.optim.Optimizer:
    return optimizer_class(param_groups_weight_decay(model, 5e-4), lr=0.05, momentum=0.9, nesterov=True)


register()


def build_model(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=10, in_chans=1)


def build_batches(count: int = 10) -> list[tuple[Tensor, Tensor]]:
    digits = load_split()
    images = interpolate(digits.train_images, scale_factor=4)
    return list(zip(images.split(32), digits.train_labels.split(32), strict=True))[:count]


def train(model: nn.Module, optimizer: Any, batches: list[tuple[Tensor, Tensor]], epochs: int = 3) -> float:
    """Returns the last batch's loss. The scheduler is called as timm's training script does."""
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=epochs, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=len(batches)
    )
    for epoch in range(epochs):
        for i, (images, labels) in enumerate(batches):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            scheduler.step_update(epoch * len(batches) + i + 1)
        scheduler.step(epoch + 1)
    return loss.item()


if __name__ == "__main__":
    batches = build_batches()
    for make in (by_name, by_hand):
        model = build_model()
        optimizer = make(model)
        loss = train(model, optimizer, batches)
        print(f"{make.__name__}: last loss {loss:.3f}, stepped by {sorted({b.backend for b in optimizer.backends()})}")
