"""FusedSGD on DTensors: FSDP2, tensor parallelism, both at once, gradients placed by hand; beside torch.optim.SGD."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import World, assert_same_bits, case, momentum_buffers

from wd_fused import FusedSGD

EXPECTS_FUSED = True  # DTensors without options of the tail are stepped by a fused backend, not by torch

ARGUMENTS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
OPTIONS: list[dict[str, Any]] = [
    ARGUMENTS,
    ARGUMENTS | {"nesterov": True},
    {"lr": 0.05, "momentum": 0.8, "dampening": 0.1, "maximize": True},
    {"lr": 0.05, "weight_decay": 0.1},
]
Run = tuple[nn.Module, torch.optim.SGD]

warnings.filterwarnings("ignore", "FusedSGD: (torch's own code|plain torch operations)")


def assert_fused(optimizer: FusedSGD) -> None:
    if EXPECTS_FUSED:
        left = [entry for entry in optimizer.backends() if entry.backend == "torch"]
        assert not left, left


class Small(nn.Module):
    """Dimensions of 1 and 3: on 2 and on 4 ranks shards are uneven, and some ranks have none."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 16)
        self.narrow = nn.Linear(16, 3)
        self.one = nn.Linear(3, 1)
        self.unused = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.narrow(self.enter(x).tanh()).tanh()
        return self.one(hidden) * self.scale


def twins(make: Callable[[], nn.Module], seed: int = 5) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    model = make()
    return model, copy.deepcopy(model)


def optimizers(ours: nn.Module, theirs: nn.Module, **options: Any) -> list[Run]:
    return [
        (ours, FusedSGD(ours.parameters(), **options)),
        (theirs, torch.optim.SGD(theirs.parameters(), **options, foreach=False)),
    ]


def batch(world: World, step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + world.rank))


def assert_alike(runs: list[Run]) -> None:
    """Parameters, momentum buffers, and what kind of tensors these are: the parameter's, as in torch's."""
    (ours, optimizer), (theirs, reference) = runs
    assert_same_bits(ours.parameters(), theirs.parameters())
    assert_same_bits(momentum_buffers(optimizer), momentum_buffers(reference), "momentum buffer")
    for p in ours.parameters():
        buffer = optimizer.state.get(p, {}).get("momentum_buffer")
        if buffer is not None and isinstance(p, DTensor):
            assert isinstance(buffer, DTensor)
            assert (buffer.placements, buffer.device_mesh) == (p.placements, p.device_mesh)
            assert buffer.to_local().shape == p.to_local().shape


def train(runs: list[Run], world: World, steps: int = 4, start: int = 0) -> None:
    for step in range(start, start + steps):
        for model, optimizer in runs:
            optimizer.zero_grad(set_to_none=step % 3 != 2)
            model(batch(world, step)).square().mean().backward()
            optimizer.step()
        assert_alike(runs)


def moved(model: nn.Module, before: list[Tensor]) -> int:
    """How many parameters have changed on this rank."""
    return sum(not torch.equal(local(p), q) for p, q in zip(model.parameters(), before, strict=True))


def local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()


# ---- FSDP2


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in ("enter", "narrow"):
        fully_shard(getattr(model, layer), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@case(1, 2, 4)
def fsdp2_has_the_bits_of_torch(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    for options in OPTIONS if world.size < 4 else OPTIONS[1:3]:
        ours, theirs = (sharded(model, mesh) for model in twins(Small))
        assert all(isinstance(p, DTensor) for p in ours.parameters())
        shapes = [tuple(local(p).shape) for p in ours.parameters()]
        assert ((0, 3) in shapes) == (world.rank > 0)  # of the weight of one row
        before = [local(p) for p in ours.parameters()]
        runs = optimizers(ours, theirs, **options)
        train(runs, world)
        assert moved(ours, before) >= (5 if world.rank == 0 else 1)
        assert_fused(runs[0][1])


@case(2, 4)
def fsdp2_accumulates_and_steps_what_has_a_gradient(world: World) -> None:
    """Without a reduction in between, with a layer frozen, then thawed; its state comes when it has a gradient."""
    mesh = init_device_mesh("cpu", (world.size,))
    ours, theirs = (sharded(model, mesh) for model in twins(Small))
    runs = optimizers(ours, theirs, **ARGUMENTS)
    for model, _ in runs:
        model.one.requires_grad_(False)
    for step in range(4):
        for model, optimizer in runs:
            if step == 2:
                model.one.requires_grad_(True)
            optimizer.zero_grad()
            for micro, is_last in ((0, False), (1, True)):
                model.set_requires_gradient_sync(is_last)
                model(batch(world, 10 * step + micro)).square().mean().backward()
            optimizer.step()
        assert_alike(runs)
        assert ("momentum_buffer" in runs[0][1].state.get(ours.one.weight, {})) == (step >= 2)
        assert ours.unused.weight not in runs[0][1].state
    assert_fused(runs[0][1])


@case(4)
def hybrid_sharding_has_the_bits_of_torch(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    runs = optimizers(*(sharded(model, mesh) for model in twins(Small)), **ARGUMENTS)
    train(runs, world)
    assert_fused(runs[0][1])


# ---- tensor parallelism


class Mlp(nn.Module):
    """The norm is not parallelized: its parameters are plain tensors beside DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)  # 10 columns over 4 ranks: 3, 3, 3, 1
        self.down = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(self.norm(x)).tanh()
        return self.down(hidden)


def parallelized(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()})


@case(2, 4)
def tensor_parallel_has_the_bits_of_torch(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    for options in OPTIONS if world.size < 4 else OPTIONS[1:3]:
        ours, theirs = (parallelized(model, mesh) for model in twins(Mlp))
        kinds = {name: isinstance(p, DTensor) for name, p in ours.named_parameters()}
        assert not kinds["norm.weight"] and kinds["up.weight"] and kinds["down.bias"]
        before = [local(p) for p in ours.parameters()]
        runs = optimizers(ours, theirs, **options)
        train(runs, World(0, world.size, world.folder))  # the same batch on all ranks
        assert moved(ours, before) == 6
        assert_fused(runs[0][1])


@case(4)
def tensor_parallel_inside_fsdp2_has_the_bits_of_torch(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def wrapped(model: nn.Module) -> nn.Module:
        parallelized(model, mesh["tensor"])
        return fully_shard(model, mesh=mesh["data"])

    ours, theirs = (wrapped(model) for model in twins(Mlp))
    assert len(ours.up.weight.placements) == 2 and len(ours.norm.weight.placements) == 1  # two meshes in one group
    runs = optimizers(ours, theirs, **ARGUMENTS)
    train(runs, World(world.rank // 2, world.size, world.folder))
    assert_fused(runs[0][1])


# ---- parameters and gradients placed by hand


def full(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def placed(mesh: DeviceMesh, shape: tuple[int, ...], placement: Placement, seed: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(full(shape, seed, **options), mesh, [placement]))


SHAPES: list[tuple[tuple[int, ...], Placement]] = [
    ((3, 5), Shard(0)),
    ((3, 5), Shard(1)),
    ((1,), Shard(0)),
    ((7,), Shard(0)),
    ((4, 6), Replicate()),
    ((2, 3, 9), Shard(2)),
    ((0, 4), Shard(0)),
    ((), Replicate()),
]


@case(1, 2, 4)
def each_placement_and_plain_tensors_in_one_group(world: World) -> None:
    """Against torch on whole tensors: what is sharded is stepped as if it were not."""
    mesh = init_device_mesh("cpu", (world.size,))
    for dtype in (torch.float32, torch.float64):
        ours = [placed(mesh, shape, placement, i, dtype=dtype) for i, (shape, placement) in enumerate(SHAPES)]
        ours += [nn.Parameter(full((4, 3), 50, dtype))]
        whole = [nn.Parameter(full(shape, i, dtype)) for i, (shape, _) in enumerate(SHAPES)]
        whole += [nn.Parameter(full((4, 3), 50, dtype))]
        optimizer = FusedSGD(ours, **ARGUMENTS)
        reference = torch.optim.SGD(whole, **ARGUMENTS, foreach=False)
        for step in range(4):
            for i, (p, q) in enumerate(zip(ours, whole, strict=True)):
                gradient = full(tuple(q.shape), 1000 + 100 * step + i, dtype)
                q.grad = None if (i + step) % 5 == 0 else gradient
                if q.grad is None:
                    p.grad = None
                elif isinstance(p, DTensor):
                    p.grad = distribute_tensor(gradient, mesh, p.placements)
                else:
                    p.grad = gradient.clone()
            optimizer.step()
            reference.step()
            assert_same_bits([p.full_tensor() if isinstance(p, DTensor) else p for p in ours], whole)
        for p in ours:
            assert isinstance(optimizer.state[p]["momentum_buffer"], DTensor) == isinstance(p, DTensor)
        assert_fused(optimizer)


@case(2, 4)
def a_gradient_placed_otherwise_than_its_parameter(world: World) -> None:
    """Replicated where the parameter is sharded, along another dimension, and from one step to the next.

    What torch refuses, as it does for some shapes, may be refused here, too, or stepped rightly.
    """
    mesh = init_device_mesh("cpu", (world.size,))
    changes = [(Shard(0), Replicate()), (Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Shard(1))]
    for options in ARGUMENTS, {"lr": 0.05}, {"lr": 0.05, "momentum": 0.9}:
        for placement, other in changes:
            ours, theirs = (placed(mesh, (3, 5), placement, 1) for _ in range(2))
            whole = nn.Parameter(full((3, 5), 1))
            optimizer = FusedSGD([ours], **options)
            torchs, reference = (torch.optim.SGD([p], **options, foreach=False) for p in (theirs, whole))
            refused = None
            for step in range(4):
                whole.grad = full((3, 5), 100 + step)
                for p in (ours, theirs):
                    p.grad = distribute_tensor(whole.grad.clone(), mesh, [other if step != 1 else placement])
                refused = refused or message_of(torchs.step)
                message = message_of(optimizer.step)
                if message is not None:
                    assert refused is not None, message
                    break
                reference.step()
                assert ours.placements == (placement,)
                assert_same_bits([ours.full_tensor()], [whole])


def message_of(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


# ---- options of the tail


@case(1, 2, 4)
def clipping_by_the_norm_of_all_ranks(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    for limit in (0.05, math.inf):
        ours, theirs = (sharded(model, mesh) for model in twins(Small))
        optimizer = FusedSGD(ours.parameters(), **ARGUMENTS, max_grad_norm=limit)
        reference = torch.optim.SGD(theirs.parameters(), **ARGUMENTS, foreach=False)
        for step in range(3):
            for model, each in ((ours, optimizer), (theirs, reference)):
                each.zero_grad()
                model(batch(world, step)).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), limit).full_tensor()
            assert norm > 0.05
            optimizer.step()
            reference.step()
            assert optimizer.grad_norm is not None
            measured = optimizer.grad_norm
            torch.testing.assert_close(measured.full_tensor() if isinstance(measured, DTensor) else measured, norm)
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(local(p), local(q))


@case(2, 4)
def clipping_of_plain_and_sharded_parameters_together(world: World) -> None:
    """A plain one is on every rank, and counts once."""
    mesh = init_device_mesh("cpu", (world.size,))
    shapes = [((3, 5), Shard(0)), ((4, 6), Replicate()), ((1,), Shard(0))]
    ours = [placed(mesh, shape, placement, i) for i, (shape, placement) in enumerate(shapes)]
    ours += [nn.Parameter(full((5,), 9))]
    whole = [nn.Parameter(full(shape, i)) for i, (shape, _) in enumerate(shapes)] + [nn.Parameter(full((5,), 9))]
    optimizer = FusedSGD(ours, **ARGUMENTS, max_grad_norm=0.5)
    reference = torch.optim.SGD(whole, **ARGUMENTS, foreach=False)
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, whole, strict=True)):
            q.grad = full(tuple(q.shape), 100 * step + i)
            gradient = q.grad.clone()  # distribute_tensor() may keep the memory that it is given
            p.grad = distribute_tensor(gradient, mesh, p.placements) if isinstance(p, DTensor) else gradient
        norm = nn.utils.clip_grad_norm_(whole, 0.5)
        optimizer.step()
        reference.step()
        measured = optimizer.grad_norm
        assert measured is not None
        torch.testing.assert_close(measured.full_tensor() if isinstance(measured, DTensor) else measured, norm)
        for p, q in zip(ours, whole, strict=True):
            torch.testing.assert_close(p.full_tensor() if isinstance(p, DTensor) else p, q)


ELEMENTWISE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "average": (torch.float32, {"ema_decay": 0.9, "ema_warmup": True}),
    "decays": (torch.float32, {"decoupled_weight_decay": 0.1, "l1_penalty": 0.01}),
    "bfloat16_momentum": (torch.float32, {"momentum_dtype": torch.bfloat16}),
    "full_masters": (torch.bfloat16, {"master_weights": "full", "ema_decay": 0.9}),
    "split_masters": (torch.bfloat16, {"master_weights": "split"}),
    "kahan_summation": (torch.bfloat16, {"rounding": "kahan"}),
}


def options_in_shards(world: World, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Options that look at one element: against FusedSGD on whole tensors, parameters and all that the state has."""
    mesh = init_device_mesh("cpu", (world.size,))
    ours = [placed(mesh, shape, placement, i, dtype=dtype) for i, (shape, placement) in enumerate(SHAPES)]
    whole = [nn.Parameter(full(shape, i, dtype)) for i, (shape, _) in enumerate(SHAPES)]
    optimizer, reference = (FusedSGD(params, **ARGUMENTS, **options) for params in (ours, whole))
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, whole, strict=True)):
            q.grad = full(tuple(q.shape), 1000 + 100 * step + i, dtype)
            p.grad = distribute_tensor(q.grad.clone(), mesh, p.placements)
        optimizer.step()
        reference.step()
    assert_same_bits([p.full_tensor() for p in ours], whole)
    for p, q in zip(ours, whole, strict=True):
        assert optimizer.state[p].keys() == reference.state[q].keys()
        for key, entry in reference.state[q].items():
            assert_same_bits([optimizer.state[p][key].full_tensor()], [entry], key)


for name, (dtype, options) in ELEMENTWISE.items():
    case(2, 4)(partial(options_in_shards, dtype=dtype, options=options), f"options_in_shards_{name}")
