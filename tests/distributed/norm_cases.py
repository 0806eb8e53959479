"""Clipping by the norm over the ranks of a process group, of gradients in plain tensors: beside torch.optim.SGD in one
process, which has them all and is clipped by torch.nn.utils.clip_grads_with_norm_.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_cases import ARGUMENTS, batch, loss_of, models, wrapped
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from worlds import World, assert_same_bits, assert_same_on_all_ranks, case

from wd_fused import FusedSGD

LIMIT = 0.05


def norm_of(params: Iterable[Tensor]) -> Tensor:
    squares = [param.grad.double().square().sum().item() for param in params if param.grad is not None]
    return torch.tensor(math.sqrt(math.fsum(squares)), dtype=torch.float64).float()


def clip(groups: list[dict[str, Any]], per_group: bool) -> Tensor:
    """In this process; returns what FusedSGD.grad_norm has to be."""
    params = [param for group in groups for param in group["params"]]
    norms = [norm_of(group["params"]) for group in groups] if per_group else [norm_of(params)] * len(groups)
    for group, norm in zip(groups, norms, strict=True):
        nn.utils.clip_grads_with_norm_(group["params"], LIMIT, norm)
    return torch.stack(norms) if per_group else norms[0]


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- who has a part


@case(2, 4)
def zero_redundancy_clips_by_the_norm_of_all_ranks(world: World) -> None:
    """On four ranks some have no parameter of a group."""
    for per_group, backend in ((False, "auto"), (True, "auto"), (True, "torch")):
        ours, theirs = (wrapped(model) for model in models(2))
        groups, expected = (
            [{"params": [*model.module.trunk.parameters()]}, {"params": [*model.module.first.parameters()]}]
            for model in (ours, theirs)
        )
        optimizer = ZeroRedundancyOptimizer(
            groups,
            optimizer_class=functools.partial(FusedSGD, process_group=dist.group.WORLD, backend=backend),
            **ARGUMENTS,
            max_grad_norm=LIMIT,
            norm_per_group=per_group,
        )
        reference = torch.optim.SGD(expected, **ARGUMENTS, foreach=False)
        for step in range(3):
            for model in (ours, theirs):
                model.zero_grad()
                loss_of(model(batch(world, step))).backward()
            norm = clip(reference.param_groups, per_group)
            assert bool((norm > LIMIT).all())
            optimizer.step()
            reference.step()
            assert isinstance(optimizer.optim, FusedSGD)
            assert_same_bits([optimizer.optim.grad_norm], [norm], "norm")
            assert_same_bits(ours.parameters(), theirs.parameters())


def stage_shapes(rank: int) -> list[tuple[int, ...]]:
    return [(5, 3), (7,), (2, 3, 4), (1,)][: rank + 1]


@case(1, 2, 4)
def stages_of_a_pipeline_clip_by_the_norm_of_the_whole_model(world: World) -> None:
    """A rank may have other groups than the others, no gradient in a step, and with lr=0 zeros, before it has a state.
    In a world of four, two pipelines of two stages."""
    size = min(world.size, 2)
    lines = [dist.new_group(range(first, first + size)) for first in range(0, world.size, size)]
    line, stage = divmod(world.rank, size)
    for backend in ("auto", "torch"):
        stages = [
            [nn.Parameter(drawn(shape, 10 * s + i)) for i, shape in enumerate(stage_shapes(s))] for s in range(size)
        ]
        ours = [nn.Parameter(param.detach().clone()) for param in stages[stage]]
        groups = [{"params": ours}] if stage == 0 else [{"params": [param]} for param in ours]
        optimizer = FusedSGD(groups, **ARGUMENTS, max_grad_norm=LIMIT, process_group=lines[line], backend=backend)
        reference = torch.optim.SGD([param for own in stages for param in own], **ARGUMENTS, foreach=False)
        for step in range(5):
            for each in (optimizer, reference):
                for group in each.param_groups:
                    group["lr"] = 0.05 * (step > 0)
            for s, own in enumerate(stages):
                for i, param in enumerate(own):
                    param.grad = drawn(param.shape, 1000 * line + 100 * step + 10 * s + i)
                    if step == 0 and s == 0:
                        param.grad = torch.zeros_like(param)
                    if step == 2 and s == size - 1:
                        param.grad = None
            for param, twin in zip(ours, stages[stage], strict=True):
                param.grad = None if twin.grad is None else twin.grad.clone()
            norm = clip(reference.param_groups, per_group=False)
            optimizer.step()
            reference.step()
            assert_same_bits([optimizer.grad_norm], [norm], "norm")
            assert_same_bits(ours, stages[stage])


def gathered(tensors: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """The whole tensors, flat, of which each rank has given its parts: in one tensor, or in one for each."""
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, [tensor.detach().flatten() for tensor in tensors])
    flat = torch.cat([piece for of_ranks in zip(*pieces, strict=True) for piece in of_ranks])
    return list(flat[: sum(sizes)].split(sizes))  # behind them FSDP1 pads


@case(2, 4)
def fully_sharded_data_parallel_clips_by_the_norm_of_all_ranks(world: World) -> None:
    for use_orig_params in (False, True):
        ours, theirs = models(2)
        flat = FullyShardedDataParallel(ours, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        optimizer = FusedSGD(flat.parameters(), **ARGUMENTS, max_grad_norm=LIMIT, process_group=dist.group.WORLD)
        reference = torch.optim.SGD(theirs.parameters(), **ARGUMENTS, foreach=False)
        own, whole = list(flat.parameters()), list(theirs.parameters())
        sizes = [param.numel() for param in whole]
        for step in range(3):
            optimizer.zero_grad()
            loss_of(flat(batch(world, step))).backward()
            parts = [torch.zeros_like(param) if param.grad is None else param.grad for param in own]
            for param, gradient in zip(whole, gathered(parts, sizes), strict=True):
                param.grad = gradient.view_as(param).clone()
            norm = clip(reference.param_groups, per_group=False)
            assert norm > LIMIT
            optimizer.step()
            reference.step()
            assert_same_bits([optimizer.grad_norm], [norm], "norm")
            assert_same_bits(gathered(own, sizes), [param.flatten() for param in whole])


@case(4)
def a_norm_of_dtensors_is_summed_over_a_group_across_their_meshes(world: World) -> None:
    """Two pipeline stages, each sharded over two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    whole = [nn.Parameter(drawn((5, 3), stage)) for stage in range(2)]
    stage = mesh.get_local_rank("stage")
    ours = nn.Parameter(distribute_tensor(whole[stage].detach().clone(), mesh["data"], [Shard(0)]))
    optimizer = FusedSGD([ours], **ARGUMENTS, max_grad_norm=LIMIT, process_group=mesh.get_group("stage"))
    reference = torch.optim.SGD(whole, **ARGUMENTS, foreach=False)
    for step in range(3):
        for i, param in enumerate(whole):
            param.grad = drawn((5, 3), 10 * step + i)
        ours.grad = distribute_tensor(whole[stage].grad.clone(), mesh["data"], [Shard(0)])
        norm = clip(reference.param_groups, per_group=False)
        optimizer.step()
        reference.step()
        assert_same_bits([optimizer.grad_norm], [norm], "norm")
        assert_same_bits([ours.detach().full_tensor()], [whole[stage]])


# ---- what has to be the same on all ranks


@case(2, 4)
def what_is_not_finite_on_one_rank_is_an_error_or_a_skipped_step_on_all(world: World) -> None:
    for scaled in (False, True):
        ours = nn.Parameter(drawn((4,), world.rank))
        optimizer = FusedSGD(
            [ours],
            **ARGUMENTS,
            max_grad_norm=LIMIT,
            error_if_nonfinite=not scaled,
            fused=scaled,
            process_group=dist.group.WORLD,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for step in range(3):
            before = ours.detach().clone()
            spoils = step == 1 and world.rank == 1
            optimizer.zero_grad()
            scaler.scale(ours.sum() * (math.inf if spoils else 1.0)).backward()
            if step == 1 and not scaled:
                with pytest.raises(RuntimeError, match="non-finite"):
                    optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update(4.0) if scaled else None
                assert optimizer.last_step_skipped == (scaled and step == 1)
            assert torch.equal(before, ours.detach()) == (step == 1)
            assert math.isfinite(optimizer.grad_norm.item()) == (step != 1)


@case(2)
def copies_have_the_same_process_group_and_a_pickle_is_refused(world: World) -> None:
    first = FusedSGD(
        [nn.Parameter(drawn((4,), world.rank))], **ARGUMENTS, max_grad_norm=LIMIT, process_group=dist.group.WORLD
    )
    with pytest.raises(TypeError, match=r"process_group cannot be pickled.*state_dict\(\)"):
        pickle.dumps(first)
    assert "process_group" not in {*first.defaults, *first.param_groups[0], *first.state_dict()["param_groups"][0]}
    second = copy.deepcopy(first)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for optimizer in (first, second):
        optimizer.param_groups[0]["params"][0].grad = drawn((4,), 7 + world.rank)
        optimizer.step()
    assert_same_on_all_ranks([second.grad_norm], world)
    assert_same_bits(first.param_groups[0]["params"], second.param_groups[0]["params"])


@case(2)
def process_groups_that_cannot_be_summed_over_are_refused(world: World) -> None:
    def make(group: Any, param: Tensor | None = None, **options: Any) -> FusedSGD:
        return FusedSGD([nn.Parameter(torch.ones(4)) if param is None else param], process_group=group, **options)

    of_first = dist.new_group([0])
    if world.rank == 1:
        with pytest.raises(ValueError, match="process_group: rank 1 is not a member of it"):
            make(of_first, max_grad_norm=1.0)
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(TypeError, match=r"process_group=DeviceMesh.* is not a process group: give .*get_group\(\)"):
        make(mesh, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"process_group=<.* is for a norm: give max_grad_norm"):
        make(dist.group.WORLD)
    for placement in (Shard(0), Replicate()):
        param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [placement]))
        param.grad = distribute_tensor(torch.ones(4), mesh, [placement])
        with pytest.raises(RuntimeError, match="more than once: its parameters are DTensors on DeviceMesh"):
            make(dist.group.WORLD, param, max_grad_norm=1.0).step()
        assert bool((param.to_local() == 1).all())
