"""Trains on handwritten digits with DistributedDataParallel and FusedSGD, each process on its own images.

    torchrun --nproc_per_node=2 examples/train_ddp.py

The optimizer is the only line that differs from a program with torch.optim.SGD. To show that nothing else does, the
same training runs a second time with torch.optim.SGD, and every bit of the parameters is compared, on all ranks.
"""

from __future__ import annotations

import argparse
import sys

import needs

with needs.extra("demo", __file__):
    import torch
    import torch.distributed as dist
    from sklearn.datasets import load_digits
    from torch import Tensor, nn
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, TensorDataset
    from torch.utils.data.distributed import DistributedSampler

    from wd_fused import FusedSGD, weight_decay_param_groups

BATCH_SIZE = 32  # of one process
VALIDATION = 400  # images


def load_data() -> tuple[TensorDataset, Tensor, Tensor]:
    """Images [N, 64] between 0 and 1 with their labels, for training; and both for validation."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).flatten(1)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, validation = order[VALIDATION:], order[:VALIDATION]
    return TensorDataset(images[train], labels[train]), images[validation], labels[validation]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))


def train(optimizer_class: type[torch.optim.SGD], data: TensorDataset, epochs: int) -> nn.Module:
    model = DistributedDataParallel(make_model())
    groups = weight_decay_param_groups(model, 5e-4)
    optimizer = optimizer_class(groups, lr=0.1, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        scheduler.step()
    return model


def same_on_all_ranks(model: nn.Module) -> bool:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, flat)
    return all(torch.equal(flat, other) for other in gathered)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train on handwritten digits with DDP and FusedSGD.")
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    needs.torchrun(__file__)
    dist.init_process_group("gloo")
    data, images, labels = load_data()

    model = train(FusedSGD, data, epochs)
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    theirs = train(torch.optim.SGD, data, epochs)
    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), theirs.parameters(), strict=True))
    same = same_on_all_ranks(model) and same
    if dist.get_rank() == 0:
        said = "the same bits" if same else "NOT the same bits"
        print(f"validation accuracy {accuracy:.1%} after {epochs} epochs")
        print(f"parameters: {said} on {dist.get_world_size()} ranks and as torch.optim.SGD")
    dist.barrier()  # nobody leaves while others still read
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
