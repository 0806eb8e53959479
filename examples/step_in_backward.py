"""Gradient release: a deep network trained with its gradients in memory one at a time.

Trains the same network twice, by step() after backward() and by wd_fused.step_in_backward(); compares every bit and the
most bytes of gradients that were there at once. Run as `python examples/step_in_backward.py`; needs torch only.
"""

from __future__ import annotations

import needs

with needs.extra("", __file__):
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import cross_entropy

    from wd_fused import FusedSGD, step_in_backward

LAYERS, WIDTH, STEPS = 32, 128, 20


def build_model() -> nn.Module:
    torch.manual_seed(0)
    hidden = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def count_gradients(model: nn.Module) -> list[int]:
    """A list that backward() extends: the bytes of gradients that are there, whenever one has come."""
    counts: list[int] = []
    params = list(model.parameters())

    def count(_: Tensor) -> None:
        counts.append(sum(param.grad.nbytes for param in params if param.grad is not None))

    for param in params:
        param.register_post_accumulate_grad_hook(count)
    return counts


def train(in_backward: bool) -> tuple[nn.Module, FusedSGD, int]:
    """The trained model, its optimizer, and the most bytes of gradients at once."""
    model = build_model()
    optimizer = FusedSGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    counts = count_gradients(model)  # before step_in_backward(): its hooks come after these
    if in_backward:
        step_in_backward(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images, labels = torch.randn(16, WIDTH, generator=generator), torch.randint(10, (16,), generator=generator)
        cross_entropy(model(images), labels).backward()
        optimizer.step()  # does nothing more where the parameters have been stepped; the loop stays as it is
        optimizer.zero_grad()
        scheduler.step()
    return model, optimizer, max(counts)


def main() -> bool:
    """Whether both runs have the same bits."""
    (plain, plain_optimizer, plain_bytes), (released, optimizer, released_bytes) = train(False), train(True)
    same = all(map(torch.equal, plain.parameters(), released.parameters()))
    for ours, theirs in zip(released.parameters(), plain.parameters(), strict=True):
        buffers = optimizer.state[ours]["momentum_buffer"], plain_optimizer.state[theirs]["momentum_buffer"]
        same = same and torch.equal(*buffers)
    print(f"step() after backward(): {plain_bytes / 2**10:8,.0f} KiB of gradients at once")
    print(f"step_in_backward():      {released_bytes / 2**10:8,.0f} KiB")
    print(f"parameters and momentum buffers: {'the same bits' if same else 'DIFFERENT'}")
    return same


if __name__ == "__main__":
    raise SystemExit(not main())
