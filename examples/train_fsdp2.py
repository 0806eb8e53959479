"""Trains on scikit-learn's handwritten digits with FSDP2 and FusedSGD, and goes on from a distributed checkpoint.

    torchrun --nproc_per_node=2 examples/train_fsdp2.py --checkpoint out/fsdp2

Parameters, gradients and momentum buffers are DTensors: each process holds, and steps, its part of them. Half-way the
training is saved with torch.distributed.checkpoint; at the end it is done again from there, in a new model, and every
bit compared. The checkpoint can be loaded by another number of processes, and by torch.optim.SGD.
"""

from __future__ import annotations

import argparse
import sys

import needs

with needs.extra("demo", __file__):
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from sklearn.datasets import load_digits
    from torch import Tensor, nn
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.functional import cross_entropy

    from wd_fused import FusedSGD, weight_decay_param_groups

BATCH_SIZE = 32  # of one process
VALIDATION = 400  # images


def load_data() -> tuple[Tensor, Tensor]:
    """Images [N, 64] between 0 and 1, and their labels; the first ones are for validation."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).flatten(1)
    return images[order], torch.tensor(digits.target)[order]


def make(seed: int) -> tuple[nn.Module, FusedSGD]:
    """A sharded model with its optimizer, which is made after sharding: it steps what the model has then."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, FusedSGD(weight_decay_param_groups(model, 5e-4), lr=0.1, momentum=0.9, nesterov=True)


def train(model: nn.Module, optimizer: FusedSGD, images: Tensor, labels: Tensor, epochs: range) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for epoch in epochs:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for rows in order[: len(order) // size * size].view(-1, size)[:, rank].split(BATCH_SIZE):
            optimizer.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()


def save(model: nn.Module, optimizer: FusedSGD, folder: str) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: FusedSGD, folder: str) -> None:
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state}
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])


def local_parts(model: nn.Module) -> list[Tensor]:
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


def run(epochs: int, folder: str) -> bool:
    """Trains, prints what came out, and tells whether the training from the checkpoint has the same bits."""
    images, labels = load_data()
    train_images, train_labels = images[VALIDATION:], labels[VALIDATION:]
    model, optimizer = make(seed=0)
    train(model, optimizer, train_images, train_labels, range(epochs // 2))
    save(model, optimizer, folder)
    train(model, optimizer, train_images, train_labels, range(epochs // 2, epochs))
    with torch.no_grad():
        accuracy = (model(images[:VALIDATION]).argmax(1) == labels[:VALIDATION]).float().mean().item()

    other, others = make(seed=1)
    load(other, others, folder)
    train(other, others, train_images, train_labels, range(epochs // 2, epochs))
    same = all(torch.equal(p, q) for p, q in zip(local_parts(model), local_parts(other), strict=True))
    if dist.get_rank() == 0:
        backends = ", ".join(sorted({entry.backend for entry in optimizer.backends()}))
        print(f"validation accuracy {accuracy:.1%} after {epochs} epochs; parameters stepped by: {backends}")
        print(f"parameters: {'the same bits' if same else 'NOT the same bits'} after loading {folder}")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description="Train on handwritten digits with FSDP2 and FusedSGD.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", default="out/fsdp2", help="folder of the checkpoint (default: out/fsdp2)")
    arguments = parser.parse_args()
    needs.torchrun(__file__)
    dist.init_process_group("gloo")
    same = run(arguments.epochs, arguments.checkpoint)
    dist.barrier()  # nobody leaves while others still read
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
