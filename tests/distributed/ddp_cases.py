"""FusedSGD under DistributedDataParallel and ZeroRedundancyOptimizer, beside torch.optim.SGD on the same batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from worlds import World, assert_same_bits, assert_same_on_all_ranks, case, momentum_buffers

from wd_fused import FusedSGD

ARGUMENTS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
OPTIONS: list[dict[str, Any]] = [
    ARGUMENTS,
    ARGUMENTS | {"nesterov": True},
    {"lr": 0.05, "momentum": 0.8, "dampening": 0.1, "maximize": True},
    {"lr": 0.05},
]


class Branches(nn.Module):
    """A trunk and two branches, of which a step may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 17)
        self.first = nn.Linear(17, 3)
        self.second = nn.Linear(17, 3)

    def forward(self, x: Tensor, branches: Iterable[str] = ("first", "second")) -> Tensor:
        hidden = self.trunk(x).tanh()
        return torch.stack([getattr(self, name)(hidden) for name in branches]).sum(0)


def models(count: int, seed: int = 5) -> list[nn.Module]:
    torch.manual_seed(seed)
    model = Branches()
    return [model, *(copy.deepcopy(model) for _ in range(count - 1))]


def batch(world: World, step: int, size: int = 5) -> Tensor:
    """Another one on each rank."""
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(100 * step + world.rank))


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def wrapped(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, bucket_cap_mb=0.0005, **options)  # several buckets


def pair(options: dict[str, Any], **ddp_options: Any) -> list[tuple[nn.Module, torch.optim.SGD]]:
    """A model with our optimizer, and one with torch's."""
    ours, theirs = (wrapped(model, **ddp_options) for model in models(2))
    return [
        (ours, FusedSGD(ours.parameters(), **options)),
        (theirs, torch.optim.SGD(theirs.parameters(), **options, foreach=False)),
    ]


def assert_alike(runs: list[tuple[nn.Module, torch.optim.SGD]], world: World) -> None:
    (ours, optimizer), (theirs, reference) = runs
    assert_same_bits(ours.parameters(), theirs.parameters())
    assert_same_bits(momentum_buffers(optimizer), momentum_buffers(reference), "momentum buffer")
    assert_same_on_all_ranks(ours.parameters(), world)


def assert_fused(optimizer: FusedSGD) -> None:
    assert {entry.backend for entry in optimizer.backends()} == {"cpu"}


@case(2, 4)
def ddp_has_the_bits_of_torch_on_all_ranks(world: World) -> None:
    for options in OPTIONS:
        runs = pair(options)
        start = [p.detach().clone() for p in runs[0][0].parameters()]
        for step in range(4):
            for model, optimizer in runs:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                loss_of(model(batch(world, step))).backward()
                optimizer.step()
            assert_alike(runs, world)
        assert_fused(runs[0][1])
        assert not any(torch.equal(p, q) for p, q in zip(runs[0][0].parameters(), start, strict=True))


@case(2, 4)
def ddp_with_gradients_in_its_buckets(world: World) -> None:
    """Gradients are views of the buckets; zero_grads leaves zeros there, and the optimizer need not be asked."""
    for ours_zeroes in (False, True):
        runs = pair(ARGUMENTS, gradient_as_bucket_view=True, static_graph=ours_zeroes)
        if ours_zeroes:
            runs[0] = (runs[0][0], FusedSGD(runs[0][0].parameters(), **ARGUMENTS, zero_grads=True))
        for step in range(4):
            for model, optimizer in runs:
                loss_of(model(batch(world, step))).backward()
                optimizer.step()
                if not (ours_zeroes and isinstance(optimizer, FusedSGD)):
                    optimizer.zero_grad(set_to_none=not ours_zeroes)
            assert_alike(runs, world)
        assert_fused(runs[0][1])
        if ours_zeroes:
            assert all(p.grad is not None and not p.grad.any() for p in runs[0][0].parameters())


@case(2, 4)
def ddp_accumulates_without_synchronizing(world: World) -> None:
    runs = pair(ARGUMENTS)
    for step in range(3):
        for model, optimizer in runs:
            optimizer.zero_grad()
            with model.no_sync():
                for micro in (1, 2):
                    loss_of(model(batch(world, 10 * step + micro))).backward()
            loss_of(model(batch(world, 10 * step))).backward()
            optimizer.step()
        assert_alike(runs, world)
    assert_fused(runs[0][1])


@case(2, 4)
def ddp_with_a_branch_that_some_steps_leave_out(world: World) -> None:
    """Left out on all ranks its gradients stay None or zero; left out on one they come from the others."""
    for set_to_none in (True, False):
        runs = pair(ARGUMENTS, find_unused_parameters=True)
        for step in range(6):
            branches = ["first"] if step in (0, 3) else ["first", "second"]
            if step == 4 and world.rank == 0:
                branches = ["second"]
            for model, optimizer in runs:
                optimizer.zero_grad(set_to_none)
                loss_of(model(batch(world, step), branches)).backward()
                if step == 0:
                    assert model.module.second.weight.grad is None
                optimizer.step()
            assert_alike(runs, world)
        assert_fused(runs[0][1])


@case(2, 4)
def ddp_clips_alike_on_all_ranks(world: World) -> None:
    ours, theirs = (wrapped(model) for model in models(2))
    optimizer = FusedSGD(ours.parameters(), **ARGUMENTS, max_grad_norm=0.05)
    reference = torch.optim.SGD(theirs.parameters(), **ARGUMENTS, foreach=False)
    for step in range(3):
        for model, each in ((ours, optimizer), (theirs, reference)):
            each.zero_grad()
            loss_of(model(batch(world, step))).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        assert norm > 0.05
        optimizer.step()
        reference.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q)
        assert_same_on_all_ranks([*ours.parameters(), optimizer.grad_norm], world)


@case(2, 4)
def zero_redundancy_has_the_bits_of_torch(world: World) -> None:
    for in_buckets in (False, True):
        ours, theirs = (wrapped(model) for model in models(2))
        optimizer = ZeroRedundancyOptimizer(
            ours.parameters(), optimizer_class=FusedSGD, parameters_as_bucket_view=in_buckets, **ARGUMENTS
        )
        reference = torch.optim.SGD(theirs.parameters(), **ARGUMENTS, foreach=False)
        for step in range(3):
            for model, each in ((ours, optimizer), (theirs, reference)):
                each.zero_grad()
                loss_of(model(batch(world, step))).backward()
                each.step()
            assert_same_bits(ours.parameters(), theirs.parameters())
            assert_same_on_all_ranks(ours.parameters(), world)
        own = optimizer.optim
        assert isinstance(own, FusedSGD)
        assert_fused(own)
        assert 0 < len(momentum_buffers(own)) < len(momentum_buffers(reference))  # each rank keeps its own only


@case(2)
def a_norm_of_a_ranks_share_is_refused_with_the_remedy(world: World) -> None:
    model, twin = models(2)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=FusedSGD, max_grad_norm=1.0, **ARGUMENTS)
    loss_of(model(batch(world, 0))).backward()
    with pytest.raises(
        RuntimeError, match=r"ZeroRedundancyOptimizer.*process_group=group.*clip_grad_norm_\(model\.parameters\(\)"
    ):
        optimizer.step()
    assert_same_bits(model.parameters(), twin.parameters())
    optimizer.param_groups[0]["max_grad_norm"] = None
    optimizer.step()
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer"):
        optimizer.step()
    flat = nn.Parameter(torch.ones(3))
    flat._fsdp_flattened = True  # as FullyShardedDataParallel marks what it shards
    flat.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"FullyShardedDataParallel.*process_group.*model\.clip_grad_norm_"):
        FusedSGD([flat], lr=0.1, max_grad_norm=1.0).step()


@case(2, 4)
def zero_redundancy_states_are_collected_and_loaded(world: World) -> None:
    """Of all ranks, into plain optimizers of both classes and into a sharded one: each goes on with the same bits."""
    sharded, plain = models(2)
    optimizer = ZeroRedundancyOptimizer(sharded.parameters(), optimizer_class=FusedSGD, **ARGUMENTS)
    reference = torch.optim.SGD(plain.parameters(), **ARGUMENTS, foreach=False)

    def train(model: nn.Module, each: torch.optim.Optimizer, steps: Iterable[int]) -> None:
        for step in steps:
            each.zero_grad()
            loss_of(model(batch(world, step))).backward()
            for p in model.parameters():  # one by one: a fresh DDP adds in another order than one that has run
                torch.distributed.all_reduce(p.grad)
            each.step()

    train(sharded, optimizer, range(3))
    train(plain, reference, range(3))
    optimizer.consolidate_state_dict(to=0)
    collected = [optimizer.state_dict() if world.rank == 0 else None]
    torch.distributed.broadcast_object_list(collected, src=0)
    saved = collected[0]
    assert saved is not None
    expected = reference.state_dict()
    assert saved["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert torch.equal(saved["state"][key]["momentum_buffer"], entry["momentum_buffer"]), key

    weights = copy.deepcopy(sharded.state_dict())
    makes: list[Callable[[nn.Module], torch.optim.Optimizer]] = [
        lambda model: FusedSGD(model.parameters(), lr=9.0),
        lambda model: torch.optim.SGD(model.parameters(), lr=9.0, foreach=False),
        lambda model: ZeroRedundancyOptimizer(model.parameters(), optimizer_class=FusedSGD, lr=9.0),
    ]
    train(plain, reference, range(3, 6))
    for make in makes:
        fresh = models(1, seed=77)[0]
        fresh.load_state_dict(weights)
        continued = make(fresh)
        continued.load_state_dict(copy.deepcopy(saved))
        train(fresh, continued, range(3, 6))
        assert_same_bits(fresh.parameters(), plain.parameters())
