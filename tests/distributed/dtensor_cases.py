"""FusedSGD on DTensors: FSDP2, tensor parallelism, both at once, gradients placed by hand; beside torch.optim.SGD."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import World, assert_same_bits, case, momentum_buffers, whole

from wd_fused import FusedSGD

ARGUMENTS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
OPTIONS: list[dict[str, Any]] = [
    ARGUMENTS,
    ARGUMENTS | {"nesterov": True},
    {"lr": 0.05, "momentum": 0.8, "dampening": 0.1, "maximize": True},
    {"lr": 0.05, "weight_decay": 0.1},
]
Run = tuple[nn.Module, torch.optim.SGD]


def assert_fused(optimizer: FusedSGD) -> None:
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
        plain = [nn.Parameter(full(shape, i, dtype)) for i, (shape, _) in enumerate(SHAPES)]
        plain += [nn.Parameter(full((4, 3), 50, dtype))]
        optimizer = FusedSGD(ours, **ARGUMENTS)
        reference = torch.optim.SGD(plain, **ARGUMENTS, foreach=False)
        for step in range(4):
            for i, (p, q) in enumerate(zip(ours, plain, strict=True)):
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
            assert_same_bits([whole(p) for p in ours], plain)
        for p in ours:
            assert isinstance(optimizer.state[p]["momentum_buffer"], DTensor) == isinstance(p, DTensor)
        assert_fused(optimizer)


@case(2, 4)
def a_gradient_placed_otherwise_than_its_parameter(world: World) -> None:
    """Replicated where the parameter is sharded, along another dimension, and from one step to the next.

    What torch refuses, as it does for some shapes, may be refused here, too, or stepped rightly. The local parts may
    have the same shape and mean something else: parts of a sum, or transposed blocks.
    """
    line = init_device_mesh("cpu", (world.size,))
    changes: list[tuple[DeviceMesh, tuple[int, ...], list[Placement], list[Placement]]] = [
        (line, (3, 5), [Shard(0)], [Replicate()]),
        (line, (3, 5), [Shard(0)], [Shard(1)]),
        (line, (3, 5), [Replicate()], [Shard(0)]),
        (line, (4, 4), [Replicate()], [Partial()]),
        (line, (4, 4), [Shard(0)], [Partial()]),
    ]
    if world.size == 4:
        square = init_device_mesh("cpu", (2, 2))
        changes += [(square, (4, 4), [Shard(0), Shard(1)], [Shard(1), Shard(0)])]
    for options in ARGUMENTS, {"lr": 0.05}, {"lr": 0.05, "momentum": 0.9}:
        for mesh, shape, placements, others in changes:
            ours, theirs = (nn.Parameter(distribute_tensor(full(shape, 1), mesh, placements)) for _ in range(2))
            plain = nn.Parameter(full(shape, 1))
            optimizer = FusedSGD([ours], **options)
            torchs, reference = (torch.optim.SGD([p], **options, foreach=False) for p in (theirs, plain))
            refused = None
            for step in range(4):
                plain.grad = full(shape, 100 + step)
                for p in (ours, theirs):
                    p.grad = spread_out(plain.grad, mesh, others if step != 1 else placements)
                refused = refused or message_of(torchs.step)
                message = message_of(optimizer.step)
                if message is not None:
                    assert refused is not None, message
                    break
                reference.step()
                assert ours.placements == tuple(placements)
                assert_same_bits([whole(ours)], [plain], f"{shape}, {placements}, {others}, step {step}")


def spread_out(tensor: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    """As distribute_tensor(), which knows no parts of a sum: here the first rank has all of it."""
    if placements != [Partial()]:
        return distribute_tensor(tensor.clone(), mesh, placements)
    part = tensor.clone() if mesh.get_local_rank() == 0 else torch.zeros_like(tensor)
    return DTensor.from_local(part, mesh, placements)


@case(2, 4)
def what_is_changed_between_steps_is_noticed(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    shapes: list[tuple[tuple[int, ...], Placement]] = [((6, 5), Shard(0)), ((3, 5), Shard(1)), ((4,), Replicate())]
    ours = [placed(mesh, shape, placement, i) for i, (shape, placement) in enumerate(shapes)]
    plain = [nn.Parameter(full(shape, i)) for i, (shape, _) in enumerate(shapes)]
    runs = [(ours, FusedSGD(ours, **ARGUMENTS)), (plain, torch.optim.SGD(plain, **ARGUMENTS, foreach=False))]

    def like(p: Tensor, values: Tensor) -> Tensor:
        return distribute_tensor(values, mesh, p.placements) if isinstance(p, DTensor) else values

    def another_local_tensor(params: list[nn.Parameter], _: Any) -> None:
        if isinstance(params[0], DTensor):
            params[0]._local_tensor = params[0]._local_tensor.clone()

    def written_data(params: list[nn.Parameter], _: Any) -> None:
        with torch.no_grad():
            params[0].copy_(like(params[0], full((6, 5), 41)))

    def another_buffer(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        optimizer.state[params[0]]["momentum_buffer"] = like(params[0], full((6, 5), 42))

    def another_group(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        params.append(nn.Parameter(like(params[0], full((7, 2), 43))))
        optimizer.add_param_group({"params": params[-1:], "lr": 0.2})

    events: list[Callable[[list[nn.Parameter], Any], Any]] = [
        lambda params, optimizer: None,
        another_local_tensor,
        written_data,
        another_buffer,
        lambda params, optimizer: optimizer.state.pop(params[1]),
        lambda params, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        another_group,
        lambda params, optimizer: optimizer.param_groups[0]["params"].reverse(),
        lambda params, optimizer: optimizer.state.clear(),
    ]
    for number, event in enumerate(events):
        for params, optimizer in runs:
            event(params, optimizer)
            for step in (2 * number, 2 * number + 1):
                for i, p in enumerate(params):
                    p.grad = like(p, full(tuple(p.shape), 1000 + 100 * step + i))
                optimizer.step()
        assert_same_bits([whole(p) for p in ours], plain, f"after event {number}: parameter")
        assert_fused(runs[0][1])


@case(2)
def local_tensors_of_any_layout_are_stepped(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda t: t.t().contiguous().t(),
        "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
        "in a larger tensor": lambda t: torch.cat([torch.zeros(3), t.flatten()])[3:].view(t.shape),
    }
    for of_param in layouts.values():
        for of_grad in layouts.values():
            values = full((3, 4), world.rank)
            ours = nn.Parameter(DTensor.from_local(of_param(values), mesh, [Shard(0)]))
            plain = nn.Parameter(values.clone())
            optimizer = FusedSGD([ours], **ARGUMENTS)
            reference = torch.optim.SGD([plain], **ARGUMENTS, foreach=False)
            for step in range(3):
                plain.grad = full((3, 4), 10 * step + world.rank)
                ours.grad = DTensor.from_local(of_grad(plain.grad), mesh, [Shard(0)])
                optimizer.step()
                reference.step()
            assert_same_bits([ours.to_local()], [plain])
            assert optimizer.state[ours]["momentum_buffer"].shape == ours.shape
            assert_fused(optimizer)


@case(2)
def fsdp2_in_mixed_precision_and_under_a_scaler(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for fused in (None, True):
        runs = optimizers(*(fully_shard(model, mesh=mesh, mp_policy=policy) for model in twins(Small)), **ARGUMENTS)
        runs[0] = (runs[0][0], FusedSGD(runs[0][0].parameters(), **ARGUMENTS, fused=fused))
        scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in runs]
        for step in range(4):
            for (model, optimizer), scaler in zip(runs, scalers, strict=True):
                optimizer.zero_grad()
                loss = model(batch(world, step)).float().square().mean()
                scaler.scale(loss * (math.inf if step == 2 else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
            assert_alike(runs)
        assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**10
        assert_fused(runs[0][1])


def message_of(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


# ---- options


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
            torch.testing.assert_close(whole(measured), norm)
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(local(p), local(q))


@case(2, 4)
def clipping_of_plain_and_sharded_parameters_together(world: World) -> None:
    """A plain one is on every rank, and counts once."""
    mesh = init_device_mesh("cpu", (world.size,))
    shapes = [((3, 5), Shard(0)), ((4, 6), Replicate()), ((1,), Shard(0))]
    ours = [placed(mesh, shape, placement, i) for i, (shape, placement) in enumerate(shapes)]
    ours += [nn.Parameter(full((5,), 9))]
    plain = [nn.Parameter(full(shape, i)) for i, (shape, _) in enumerate(shapes)] + [nn.Parameter(full((5,), 9))]
    optimizer = FusedSGD(ours, **ARGUMENTS, max_grad_norm=0.5)
    reference = torch.optim.SGD(plain, **ARGUMENTS, foreach=False)
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, plain, strict=True)):
            q.grad = full(tuple(q.shape), 100 * step + i)
            gradient = q.grad.clone()  # distribute_tensor() may keep the memory that it is given
            p.grad = distribute_tensor(gradient, mesh, p.placements) if isinstance(p, DTensor) else gradient
        norm = nn.utils.clip_grad_norm_(plain, 0.5)
        optimizer.step()
        reference.step()
        measured = optimizer.grad_norm
        assert measured is not None
        torch.testing.assert_close(whole(measured), norm)
        for p, q in zip(ours, plain, strict=True):
            torch.testing.assert_close(whole(p), q)


@case(4)
def clipping_of_parameters_on_two_meshes(world: World) -> None:
    """Sharded along two dimensions, along one of a part of the mesh, and replicated along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    kinds: list[tuple[DeviceMesh, tuple[int, ...], list[Placement]]] = [
        (mesh, (6, 5), [Shard(0), Shard(1)]),
        (mesh, (3, 3), [Shard(0), Replicate()]),
        (mesh["data"], (3, 4), [Shard(0)]),
        (mesh["tensor"], (5,), [Shard(0)]),
    ]
    ours = [nn.Parameter(distribute_tensor(full(shape, i), on, placed)) for i, (on, shape, placed) in enumerate(kinds)]
    plain = [nn.Parameter(full(shape, i)) for i, (_, shape, _) in enumerate(kinds)]
    for per_group in (False, True):
        groups, expected = ([{"params": params[:2]}, {"params": params[2:]}] for params in (ours, plain))
        optimizer = FusedSGD(groups, **ARGUMENTS, max_grad_norm=0.5, norm_per_group=per_group)
        reference = FusedSGD(expected, **ARGUMENTS, max_grad_norm=0.5, norm_per_group=per_group)
        for step in range(3):
            for i, (p, q) in enumerate(zip(ours, plain, strict=True)):
                q.grad = full(tuple(q.shape), 100 * step + i)
                p.grad = distribute_tensor(q.grad.clone(), p.device_mesh, p.placements)
            optimizer.step()
            reference.step()
            assert optimizer.grad_norm is not None
            torch.testing.assert_close(whole(optimizer.grad_norm), reference.grad_norm)
            torch.testing.assert_close([whole(p) for p in ours], [q.data for q in plain])


@case(2, 4)
def a_gradient_that_is_no_number_on_one_rank_stops_all(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    ours = placed(mesh, (5, 3), Shard(0), 1)
    optimizer = FusedSGD([ours], **ARGUMENTS, max_grad_norm=1.0, error_if_nonfinite=True)
    for step in range(3):
        gradient = full((5, 3), step)
        gradient[0, 0] = math.nan if step == 1 else 1.0  # on the first rank
        ours.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        before = local(ours), copy.deepcopy(optimizer.state_dict())
        message = message_of(optimizer.step)
        assert (message is not None) == (step == 1)
        if message is not None:
            assert "non-finite" in message or "nonfinite" in message, message
            assert_same_bits([local(ours)], [before[0]])
            buffers = (state["state"][0]["momentum_buffer"] for state in (optimizer.state_dict(), before[1]))
            assert torch.equal(*(buffer.to_local() for buffer in buffers))


@case(2)
def an_average_takes_the_place_of_sharded_parameters(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    ours, _ = twins(Small)
    other = copy.deepcopy(ours)
    sharded(ours, mesh)
    ours.set_reshard_after_forward(True)  # or the root keeps what it has gathered: the averages, after the exchange
    optimizer = FusedSGD(ours.parameters(), **ARGUMENTS, ema_decay=0.5, zero_grads=True)
    for step in range(3):
        ours(batch(world, step)).square().mean().backward()
        optimizer.step()
        assert not any(p.grad.full_tensor().any() for p in ours.parameters() if p.grad is not None)
    before = [local(p) for p in ours.parameters()]
    averages = [whole(average) for average in optimizer.ema_parameters()]
    with torch.no_grad():
        for p, average in zip(other.parameters(), averages, strict=True):
            p.copy_(average)
        with optimizer.swap_ema():
            assert torch.equal(ours(batch(world, 9)), other(batch(world, 9)))
        assert not torch.equal(ours(batch(world, 9)), other(batch(world, 9)))
    assert_same_bits([local(p) for p in ours.parameters()], before)
    exact = optimizer.master_parameters()
    optimizer.load_master_parameters([2 * weight for weight in exact])
    assert_same_bits([local(p) for p in ours.parameters()], [2 * p for p in before])


ELEMENTWISE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "average": (torch.float32, {"ema_decay": 0.9, "ema_warmup": True}),
    "decays": (torch.float32, {"decoupled_weight_decay": 0.1, "l1_penalty": 0.01}),
    "bfloat16_momentum": (torch.float32, {"momentum_dtype": torch.bfloat16}),
    "full_masters": (torch.bfloat16, {"master_weights": "full", "ema_decay": 0.9}),
    "split_masters": (torch.bfloat16, {"master_weights": "split"}),
    "kahan_summation": (torch.bfloat16, {"rounding": "kahan"}),
    "stochastic_rounding": (torch.bfloat16, {"rounding": "stochastic", "rounding_seed": 3}),
}


def options_in_shards(world: World, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Options that look at one element: against FusedSGD on whole tensors, parameters and all that the state has."""
    mesh = init_device_mesh("cpu", (world.size,))
    ours = [placed(mesh, shape, placement, i, dtype=dtype) for i, (shape, placement) in enumerate(SHAPES)]
    plain = [nn.Parameter(full(shape, i, dtype)) for i, (shape, _) in enumerate(SHAPES)]
    optimizer, reference = (FusedSGD(params, **ARGUMENTS, **options) for params in (ours, plain))
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, plain, strict=True)):
            q.grad = full(tuple(q.shape), 1000 + 100 * step + i, dtype)
            p.grad = distribute_tensor(q.grad.clone(), mesh, p.placements)
        optimizer.step()
        reference.step()
    assert_same_bits([whole(p) for p in ours], plain)
    for p, q in zip(ours, plain, strict=True):
        assert optimizer.state[p].keys() == reference.state[q].keys()
        for key, entry in reference.state[q].items():
            assert_same_bits([whole(optimizer.state[p][key])], [entry], key)
    assert_fused(optimizer)
    exact = optimizer.master_parameters()
    assert_same_bits([whole(weights) for weights in exact], reference.master_parameters(), "exact weights")


@case(2, 4)
def numerics_of_the_ranks_add_up_to_those_of_the_whole(world: World) -> None:
    """On four ranks one has a single row, and counts its own part alone. The gradient may be placed otherwise."""
    mesh = init_device_mesh("cpu", (world.size,))
    shape, options = (10, 30), {"lr": 1e-3, "master_weights": "split24", "report_numerics": True}
    for momentum in (0.0, 0.9):
        found = []
        for place in (Replicate(), Shard(0), Shard(1)):
            param = placed(mesh, shape, place, 0, dtype=torch.bfloat16)
            param.grad = distribute_tensor(full(shape, 1, torch.bfloat16), mesh, [Shard(0)])
            optimizer = FusedSGD([param], momentum=momentum, **options)
            optimizer.step()
            counts = torch.stack(optimizer.last_step.numerics[:3])
            if place != Replicate():
                torch.distributed.all_reduce(counts)
            found.append(counts.flatten().tolist())
        assert found[0] == found[1] == found[2] and 0 < found[0][1] < found[0][0], found


@case(2, 4)
def exact_weights_are_loaded_into_shards(world: World) -> None:
    """DTensors of the parameters' placements; whole tensors are refused, and change nothing."""
    mesh = init_device_mesh("cpu", (world.size,))
    for name in ("average", "full_masters", "split_masters", "kahan_summation"):
        dtype, options = ELEMENTWISE[name]
        ours = [placed(mesh, shape, placement, i, dtype=dtype) for i, (shape, placement) in enumerate(SHAPES)]
        plain = [nn.Parameter(full(shape, i, dtype)) for i, (shape, _) in enumerate(SHAPES)]
        optimizer, reference = (FusedSGD(params, **ARGUMENTS, **options) for params in (ours, plain))
        weights = [full(shape, 70 + i) for i, (shape, _) in enumerate(SHAPES)]
        reference.load_master_parameters(weights)
        optimizer.load_master_parameters(
            [distribute_tensor(w, mesh, p.placements) for p, w in zip(ours, weights, strict=True)]
        )
        with pytest.raises(ValueError, match="weight 0 is not placed as its parameter"):
            optimizer.load_master_parameters([w + 1 for w in weights])
        assert_same_bits([whole(w) for w in optimizer.master_parameters()], reference.master_parameters(), name)
        assert_same_bits([whole(p) for p in ours], plain, name)


STOCHASTIC: dict[str, Any] = {**ARGUMENTS, "rounding": "stochastic", "rounding_seed": 7}


class Wide(nn.Module):
    """Dimensions that 4 ranks share evenly, and parameters of several chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(40, 64)
        self.down = nn.Linear(64, 40)
        self.norm = nn.LayerNorm(40)


def assert_rounded_as_whole(model: nn.Module, plain: nn.Module, optimizer_class: Any = FusedSGD) -> None:
    """Steps a model that is sharded and one that is not; gradients are of one number, so that all agree on them."""
    optimizer, reference = (optimizer_class(each.parameters(), **STOCHASTIC) for each in (model, plain))
    for step in range(3):
        for each in (model, plain):
            for i, p in enumerate(each.parameters()):
                p.grad = torch.full_like(p, 0.01 * (i + step + 1))
        optimizer.step()
        reference.step()
    assert_same_bits([whole(p) for p in model.parameters()], plain.parameters())
    buffers = ([whole(buffer) for buffer in momentum_buffers(each)] for each in (optimizer, reference))
    assert_same_bits(*buffers, "momentum buffer")


@case(1, 2, 4)
def stochastic_rounding_is_that_of_whole_parameters(world: World) -> None:
    """Sharded by FSDP2, evenly and unevenly, along any dimension; by tensor parallelism; by both; replicated."""

    def by_columns(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))

    def twice(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        return fully_shard(parallelize_module(model, mesh["tensor"], plan), mesh=mesh["data"])

    line = init_device_mesh("cpu", (world.size,))
    cases: list[tuple[Callable[[], nn.Module], Callable[..., nn.Module], DeviceMesh]] = [
        (Small, sharded, line),
        (Wide, fully_shard, line),
        (Wide, by_columns, line),
        (Mlp, parallelized, line),
    ]
    if world.size == 4:
        cases += [
            (Small, sharded, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))),
            (Wide, twice, init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))),
        ]
    for make, wrap, mesh in cases:
        model, plain = (each.bfloat16() for each in twins(make))
        model = wrap(model, mesh=mesh)
        assert_rounded_as_whole(model, plain)
        assert_rounded_as_whole(model, plain, partial(FusedSGD, backend="torch"))


@case(2)
def stochastic_rounding_follows_the_order_of_the_whole_in_memory(world: World) -> None:
    """Whatever the order of the local tensor is."""
    mesh = init_device_mesh("cpu", (world.size,))
    values = full((6, 10, 4, 4), 1, torch.bfloat16)
    wholes = [values, values.to(memory_format=torch.channels_last), values.permute(3, 1, 0, 2)]
    for given, dim in itertools.product(wholes, range(4)):
        ours = nn.Parameter(distribute_tensor(given, mesh, [Shard(dim)]))
        of_local = [None, *itertools.permutations(range(4))][3 * dim :: 11]
        for order in of_local:
            if order is not None:
                own = ours._local_tensor
                ours._local_tensor = torch.empty_permuted(own.shape, order, dtype=own.dtype).copy_(own)
            plain = nn.Parameter(torch.empty_strided(given.shape, ours.stride(), dtype=given.dtype).copy_(whole(ours)))
            optimizer, reference = (FusedSGD([p], **STOCHASTIC) for p in (ours, plain))
            for step in range(2):
                plain.grad = full(tuple(given.shape), 10 + step, given.dtype)
                ours.grad = distribute_tensor(plain.grad, mesh, ours.placements)
                optimizer.step()
                reference.step()
            assert_same_bits([whole(ours)], [plain], f"{given.stride()}, dimension {dim}, local order {order}")
            assert_fused(optimizer)


@case(4)
def a_shard_whose_place_cannot_be_told_is_not_rounded_at_random(world: World) -> None:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(nn.Linear(6, 10).bfloat16(), square["tensor"], ColwiseParallel())
    own = full(((1, 2, 2, 5)[world.rank], 3), world.rank, torch.bfloat16)  # torch.chunk() makes 3, 3, 3, 1
    refused = [
        fully_shard(model, mesh=square["data"]).weight,  # 10 rows by 2, then by 2
        nn.Parameter(DTensor.from_local(own, line, [Partial()])),
        nn.Parameter(DTensor.from_local(own, line, [Shard(0)], shape=torch.Size((10, 3)), stride=(3, 1))),
    ]
    for p, backend in itertools.product(refused, ("auto", "torch")):
        before = local(p)
        p.grad = DTensor.from_local(before.clone(), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        message = message_of(FusedSGD([p], **STOCHASTIC, backend=backend).step)
        assert message is not None and "cannot tell where its local tensor" in message, (p.placements, message)
        assert_same_bits([local(p)], [before])


@case(1, 2, 4)
def int8_momentum_is_that_of_whole_parameters(world: World) -> None:
    """Where each rank has whole blocks: along the first dimension, on several dimensions of a mesh, replicated."""
    line = init_device_mesh("cpu", (world.size,))
    placed_on: list[tuple[DeviceMesh, tuple[int, ...], list[Placement]]] = [
        (line, (8, 64), [Shard(0)]),
        (line, (1024,), [Shard(0)]),
        (line, (4, 3, 128), [Shard(0)]),
        (line, (5, 70), [Replicate()]),
    ]
    if world.size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        placed_on += [(square, (4, 128), [Replicate(), Shard(0)]), (square, (8, 128), [Shard(0), Shard(0)])]
    for backend, options in itertools.product(("cpu", "torch"), ({}, {"max_grad_norm": 1.0})):
        wholes = [full(shape, i) for i, (_, shape, _) in enumerate(placed_on)]
        ours = [
            nn.Parameter(distribute_tensor(w, mesh, to)) for w, (mesh, _, to) in zip(wholes, placed_on, strict=True)
        ]
        plain = [nn.Parameter(w.clone()) for w in wholes]
        common = {**ARGUMENTS, "momentum_dtype": "int8", "backend": backend, **options}
        optimizer, reference = (FusedSGD(params, **common) for params in (ours, plain))
        for step in range(3):
            for i, (p, q) in enumerate(zip(ours, plain, strict=True)):
                q.grad = full(tuple(q.shape), 1000 + 100 * step + i).mul(16).round().div(16)  # squares add up exactly
                p.grad = distribute_tensor(q.grad.clone(), p.device_mesh, p.placements)
            optimizer.step()
            reference.step()
        assert_same_bits([whole(p) for p in ours], plain)
        for p, q in zip(ours, plain, strict=True):
            for name in ("momentum_buffer", "momentum_scale"):
                assert_same_bits([whole(optimizer.state[p][name])], [reference.state[q][name]], name)
        if backend == "cpu":
            assert_fused(optimizer)
            for params in (ours, plain):  # to another dtype and back: in the same blocks
                for name in ("bfloat16", "int8"):
                    each = optimizer if params is ours else reference
                    each.param_groups[0]["momentum_dtype"] = name
                    each.step()
            scales = (
                [whole(each.state[p]["momentum_scale"]) for p in params]
                for each, params in ((optimizer, ours), (reference, plain))
            )
            assert_same_bits(*scales, "converted scale")


@case(2, 4)
def shards_that_would_cut_blocks_of_int8_are_refused(world: World) -> None:
    line = init_device_mesh("cpu", (world.size,))
    for shape, place in (((1000,), Shard(0)), ((10, 128), Shard(0)), ((128, 8), Shard(1))):
        p = placed(line, shape, place, 0)
        if shape == (10, 128) and world.size == 2:
            continue  # 5 rows each, of a block each
        p.grad = distribute_tensor(full(shape, 1), line, [place])
        before = local(p)
        for backend in ("auto", "cpu", "torch"):
            message = message_of(FusedSGD([p], **ARGUMENTS, momentum_dtype="int8", backend=backend).step)
            assert message is not None and "whose shards would cut the blocks of momentum_dtype='int8'" in message
            assert message.endswith("that make whole blocks"), message
            assert_same_bits([local(p)], [before])


for name, (dtype, options) in ELEMENTWISE.items():
    case(2, 4)(partial(options_in_shards, dtype=dtype, options=options), f"options_in_shards_{name}")
