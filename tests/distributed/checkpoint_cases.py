"""Checkpoints of sharded models: saved on 2 ranks, loaded on 1, 2 and 4, by either class; and checkpoints that are bad.

Gradients are made from seeds, so that a run on whole tensors, never interrupted, says what must come out.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from worlds import World, assert_same_bits, bits, case, whole

from wd_fused import FusedSGD

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_fsdp2.py"
ARGUMENTS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
OTHERS = {"lr": 9.0, "momentum": 0.1}  # of optimizers that load: what is saved takes their place
OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "average": (torch.float32, {"ema_decay": 0.9, "decoupled_weight_decay": 0.1, "momentum_dtype": torch.bfloat16}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "rounding_seed": 5}),
    "masters": (torch.bfloat16, {"master_weights": "split", "max_grad_norm": 1e6}),
}
PLAIN: tuple[torch.dtype, dict[str, Any]] = (torch.float32, {})
CLASSES: dict[str, type[torch.optim.SGD]] = {"FusedSGD": FusedSGD, "SGD": torch.optim.SGD}
BEFORE, AFTER = 3, 3  # steps until a checkpoint is saved, and after it is loaded


def network(seed: int, hidden: int = 16, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """With dimensions of 3 and 1, which some ranks have no part of."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, hidden), nn.Linear(hidden, 3), nn.Linear(3, 1)).to(dtype)


def sharded(world: World, seed: int, **options: Any) -> nn.Sequential:
    model = network(seed, **options)
    mesh = init_device_mesh("cpu", (world.size,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for i, p in enumerate(model.parameters()):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 + 100 * number + i)).to(p.dtype)
        p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
    optimizer.step()
    optimizer.zero_grad()


def uninterrupted(
    make: Callable[..., torch.optim.SGD], steps: int = BEFORE + AFTER, **options: Any
) -> tuple[nn.Module, torch.optim.SGD]:
    model = network(seed=1, **options)
    optimizer = make(model.parameters())
    for number in range(steps):
        step(model, optimizer, number)
    return model, optimizer


def trained(world: World, make: Callable[..., torch.optim.SGD], **options: Any) -> tuple[nn.Module, torch.optim.SGD]:
    model = sharded(world, seed=1, **options)
    optimizer = make(model.parameters())
    for number in range(BEFORE):
        step(model, optimizer, number)
    return model, optimizer


def goes_on_as(model: nn.Module, optimizer: torch.optim.SGD, expected: nn.Module, reference: torch.optim.SGD) -> None:
    """The steps that are missing give the bits of a run that was never interrupted, in parameters and state."""
    for number in range(BEFORE, BEFORE + AFTER):
        step(model, optimizer, number)
    ours = list(model.parameters())
    assert_same_bits([whole(p) for p in ours], expected.parameters())
    for p, q in zip(ours, expected.parameters(), strict=True):
        entries = reference.state[q]
        assert optimizer.state[p].keys() == entries.keys()
        for name, entry in entries.items():
            assert isinstance(optimizer.state[p][name], DTensor) == isinstance(p, DTensor)
            assert_same_bits([whole(optimizer.state[p][name])], [entry], name)


def by(class_name: str, **options: Any) -> Callable[..., torch.optim.SGD]:
    return lambda params: CLASSES[class_name](params, **{**ARGUMENTS, **options})


# ---- torch.distributed.checkpoint


@case(2)
def checkpoints_are_saved_on_two_ranks(world: World) -> None:
    """For the cases below, in this world and the later ones."""
    for name, (dtype, options) in {"FusedSGD": PLAIN, "SGD": PLAIN, **OPTIONS}.items():
        model, optimizer = trained(world, by("SGD" if name == "SGD" else "FusedSGD", **options), dtype=dtype)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=world.folder / name)
        if name == "FusedSGD":
            full = StateDictOptions(full_state_dict=True, cpu_offload=True)
            collected = get_optimizer_state_dict(model, optimizer, options=full)
            weights, _ = get_state_dict(model, [], options=full)
            if world.rank == 0:
                torch.save({"model": weights, "optimizer": collected}, world.folder / "collected")


def loaded(
    world: World, name: str, make: Callable[..., torch.optim.SGD], **options: Any
) -> tuple[nn.Module, torch.optim.SGD]:
    return loaded_into(sharded(world, seed=2, **options), world, name, make)


def loaded_into(
    model: nn.Module, world: World, name: str, make: Callable[..., torch.optim.SGD]
) -> tuple[nn.Module, torch.optim.SGD]:
    optimizer = make(model.parameters())
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state}
    dcp.load(content, checkpoint_id=world.folder / name)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    return model, optimizer


@case(2, 4, 1)
def a_checkpoint_of_two_ranks_goes_on_with_the_same_bits(world: World) -> None:
    model, optimizer = loaded(world, "FusedSGD", lambda params: FusedSGD(params, **OTHERS))
    assert optimizer.param_groups[0]["lr"] == ARGUMENTS["lr"] and optimizer.param_groups[0]["nesterov"]
    goes_on_as(model, optimizer, *uninterrupted(by("SGD", foreach=False)))


@case(2, 4, 1)
def a_sharded_checkpoint_goes_from_torch_and_to_torch(world: World) -> None:
    for saved, loader in (("SGD", "FusedSGD"), ("FusedSGD", "SGD")):
        model, optimizer = loaded(world, saved, lambda params, name=loader: CLASSES[name](params, **OTHERS))
        goes_on_as(model, optimizer, *uninterrupted(by("SGD", foreach=False)))


@case(2, 4, 1)
def a_sharded_checkpoint_keeps_what_options_keep(world: World) -> None:
    for name, (dtype, options) in OPTIONS.items():
        model, optimizer = loaded(
            world, name, lambda params, options=options: FusedSGD(params, **OTHERS, **options), dtype=dtype
        )
        goes_on_as(model, optimizer, *uninterrupted(by("FusedSGD", **options), dtype=dtype))
        if name == "average":
            assert optimizer.param_groups[0]["ema_updates"] == BEFORE + AFTER
            buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
            assert all(buffer.dtype == torch.bfloat16 for buffer in buffers)


@case(2, 4, 1)
def random_numbers_go_on_between_shards_and_plain_tensors(world: World) -> None:
    dtype, options = OPTIONS["stochastic"]

    def make(params: Any) -> torch.optim.SGD:
        return FusedSGD(params, **OTHERS, **options)

    model, optimizer = uninterrupted(by("FusedSGD", **options), steps=BEFORE, dtype=dtype)
    name = f"plain, {world.size}"
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=world.folder / name)
    expected = uninterrupted(by("FusedSGD", **options), dtype=dtype)
    goes_on_as(*loaded(world, name, make, dtype=dtype), *expected)
    expected = uninterrupted(by("FusedSGD", **options), dtype=dtype)
    goes_on_as(*loaded_into(network(seed=2, dtype=dtype), world, "stochastic", make), *expected)


def of_whole_blocks(seed: int) -> nn.Sequential:
    """Of which 4 ranks have whole blocks of 128 elements each."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 16, bias=False), nn.Linear(64, 8, bias=False))


def with_int8(params: Any) -> torch.optim.SGD:
    return FusedSGD(params, **ARGUMENTS, momentum_dtype="int8")


def after_steps(model: nn.Module, numbers: range) -> tuple[nn.Module, torch.optim.SGD]:
    optimizer = with_int8(model.parameters())
    for number in numbers:
        step(model, optimizer, number)
    return model, optimizer


@case(2)
def int8_momentum_is_saved_on_two_ranks(world: World) -> None:
    model, optimizer = after_steps(fully_shard(of_whole_blocks(1), mesh=init_device_mesh("cpu", (2,))), range(BEFORE))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=world.folder / "int8")


@case(2, 4, 1)
def int8_momentum_goes_on_in_other_shards_and_in_plain_tensors(world: World) -> None:
    for model in (fully_shard(of_whole_blocks(2), mesh=init_device_mesh("cpu", (world.size,))), of_whole_blocks(2)):
        goes_on_as(
            *loaded_into(model, world, "int8", with_int8), *after_steps(of_whole_blocks(1), range(BEFORE + AFTER))
        )


@case(2, 4, 1)
def a_collected_state_dict_is_read_by_all(world: World) -> None:
    """Of whole tensors, from a file that holds nothing but tensors and numbers; sharded anew as it is loaded."""
    saved = torch.load(world.folder / "collected", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    for class_name in CLASSES:
        model = sharded(world, seed=2)
        optimizer = CLASSES[class_name](model.parameters(), **OTHERS)
        content = copy.deepcopy(saved)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
            options=options,
        )
        goes_on_as(model, optimizer, *uninterrupted(by("SGD", foreach=False)))


@case(2)
def a_flat_state_dict_goes_on_with_the_same_bits(world: World) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = trained(world, by("FusedSGD"))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    assert "state.0.weight.momentum_buffer" in saved
    other = FusedSGD(model.parameters(), **OTHERS)
    set_optimizer_state_dict(model, other, saved, options=options)
    goes_on_as(model, other, *uninterrupted(by("SGD", foreach=False)))


@case(2)
def averages_of_buffers_are_kept_in_a_checkpoint(world: World) -> None:
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        both = []
        for seed in (1, 2):
            model = sharded(world, seed=seed)
            model[0].register_buffer("seen", torch.zeros(3))
            both.append((model, FusedSGD(model.parameters(), **ARGUMENTS, ema_decay=0.9, ema_buffers=model)))
        (model, optimizer), (other, others) = both
        for number in range(BEFORE):
            model[0].seen.add_(number + 1)
            step(model, optimizer, number)
        folder = world.folder / f"averages of buffers, {flat}"
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=folder)
        content = {"optimizer": get_optimizer_state_dict(other, others, options=options)}
        dcp.load(content, checkpoint_id=folder)
        set_optimizer_state_dict(other, others, content["optimizer"], options=options)
        with optimizer.swap_ema(), others.swap_ema():
            assert model[0].seen.any() and torch.equal(other[0].seen, model[0].seen)


@case(2)
def saving_before_the_first_step_changes_nothing(world: World) -> None:
    for dtype, options in OPTIONS.values():
        model = sharded(world, seed=1, dtype=dtype)
        optimizer = FusedSGD(model.parameters(), **ARGUMENTS, **options)
        get_optimizer_state_dict(model, optimizer)
        for number in range(BEFORE):
            step(model, optimizer, number)
        goes_on_as(model, optimizer, *uninterrupted(by("FusedSGD", **options), dtype=dtype))


@case(2)
def a_first_step_with_lr_0_is_one_on_all_ranks(world: World) -> None:
    """Of whose parameter one rank has nothing, so that all its gradients are zeros."""
    model = fully_shard(nn.Linear(1, 1, bias=False), mesh=init_device_mesh("cpu", (world.size,)))
    optimizer = FusedSGD(model.parameters(), lr=0.0, ema_decay=0.9, max_grad_norm=1.0)
    step(model, optimizer, 0)
    assert optimizer.param_groups[0]["ema_updates"] == 1 and optimizer.grad_norm > 0


@case(*((2,) if find_spec("sklearn") else ()))  # of the extra "demo"
def the_fsdp2_example_trains_and_goes_on_from_its_checkpoint(world: World) -> None:
    """As torchrun runs it, but for the process group, which is there."""
    sys.path.insert(0, str(EXAMPLE.parent))  # as a program's own folder is
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert runpy.run_path(str(EXAMPLE))["run"](3, str(world.folder / "example"))
    if world.rank == 0:
        found = re.search(r"validation accuracy (\d+\.\d)%.*stepped by: cpu\n", printed.getvalue())
        assert found is not None and float(found.group(1)) > 80, printed.getvalue()
        assert "the same bits after loading" in printed.getvalue()


# ---- bad checkpoints


def picture(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a failed load may not change, copied."""
    states = [optimizer.state[p] for p in model.parameters()]
    return [
        [bits(p).clone() for p in model.parameters()],
        [{name: bits(entry).clone() for name, entry in state.items()} for state in states],
        [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups],
    ]


def assert_unchanged(before: list[Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters, states, groups = picture(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before[0], strict=True))
    for state, was in zip(states, before[1], strict=True):
        assert state.keys() == was.keys() and all(torch.equal(state[name], was[name]) for name in was)
    assert groups == before[2]


def error_of(call: Callable[[], Any]) -> str:
    """The message, and what lies behind it."""
    try:
        call()
    except (Exception, CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def copies(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What dcp.load() may write before it fails: it reads into the tensors that it is given."""
    weights, state = get_state_dict(model, optimizer)
    return copy.deepcopy({"model": weights, "optimizer": state})


@case(2)
def a_checkpoint_without_the_optimizer_names_what_is_missing(world: World) -> None:
    model, optimizer = trained(world, by("FusedSGD"))
    dcp.save({"model": copies(model, optimizer)["model"]}, checkpoint_id=world.folder / "weights only")
    before = picture(model, optimizer)
    message = error_of(lambda: dcp.load(copies(model, optimizer), checkpoint_id=world.folder / "weights only"))
    assert "Missing key in checkpoint state_dict: optimizer." in message, message
    assert_unchanged(before, model, optimizer)


@case(2)
def a_state_that_is_missing_is_named(world: World) -> None:
    model, optimizer = trained(world, by("FusedSGD"))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    del saved["state"]["1.bias"]
    before = picture(model, optimizer)
    message = error_of(lambda: set_optimizer_state_dict(model, optimizer, saved))
    assert "1.bias" in message, message
    assert_unchanged(before, model, optimizer)


@case(2)
def a_checkpoint_of_another_model_is_refused(world: World) -> None:
    model, optimizer = trained(world, by("FusedSGD"))
    other = sharded(world, seed=1, hidden=12)
    others = FusedSGD(other.parameters(), **ARGUMENTS)
    step(other, others, 0)
    dcp.save(copies(other, others), checkpoint_id=world.folder / "another model")
    before = picture(model, optimizer)
    message = error_of(lambda: dcp.load(copies(model, optimizer), checkpoint_id=world.folder / "another model"))
    assert "Size mismatch" in message and "0.weight" in message, message
    assert_unchanged(before, model, optimizer)


@case(2)
def a_state_dict_of_another_model_is_refused(world: World) -> None:
    model, optimizer = trained(world, by("FusedSGD"))
    other = sharded(world, seed=1, hidden=12)
    others = FusedSGD(other.parameters(), **ARGUMENTS)
    step(other, others, 0)
    before = picture(model, optimizer)
    saved = copy.deepcopy(others.state_dict())
    message = error_of(lambda: optimizer.load_state_dict(saved))
    assert "momentum_buffer" in message and "[12, 6]" in message and "[16, 6]" in message, message
    assert_unchanged(before, model, optimizer)


@case(2)
def a_rank_whose_shapes_differ_is_refused_there(world: World) -> None:
    """Only there: to load a state dict is no collective operation. The others can be told by those who load."""
    model, optimizer = trained(world, by("FusedSGD"))
    saved = copy.deepcopy(optimizer.state_dict())
    before = picture(model, optimizer)
    if world.rank == 1:
        entry = saved["state"][2]
        mesh, placements = entry["momentum_buffer"].device_mesh, entry["momentum_buffer"].placements
        entry["momentum_buffer"] = distribute_tensor(torch.zeros(3, 17), mesh, placements, src_data_rank=None)
        message = error_of(lambda: optimizer.load_state_dict(saved))
        assert "momentum_buffer" in message and "[3, 17]" in message and "[3, 16]" in message, message
    assert_unchanged(before, model, optimizer)


@case(2)
def a_momentum_buffer_placed_otherwise_is_not_misread(world: World) -> None:
    """Replicated, of a sharded parameter: the same numbers in other places. Refused, or the right bits."""
    model, optimizer = trained(world, by("FusedSGD"))
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        buffer = entry["momentum_buffer"]
        entry["momentum_buffer"] = distribute_tensor(buffer.full_tensor(), buffer.device_mesh)
    optimizer.load_state_dict(saved)
    expected, _ = uninterrupted(by("SGD", foreach=False), BEFORE + 1)
    step(model, optimizer, BEFORE)
    assert_same_bits([whole(p) for p in model.parameters()], expected.parameters())


@case(2)
def whole_tensors_for_shards_are_refused_or_placed(world: World) -> None:
    """A state dict of plain tensors: an error that says so, before anything is written; or the right bits."""
    model, optimizer = trained(world, by("FusedSGD"))
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].full_tensor()
    before = picture(model, optimizer)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        assert "momentum_buffer" in str(error)
        assert_unchanged(before, model, optimizer)
        return
    expected, _ = uninterrupted(by("SGD", foreach=False), BEFORE + 1)
    step(model, optimizer, BEFORE)
    assert_same_bits([whole(p) for p in model.parameters()], expected.parameters())


def truncated(world: World, name: str, path: str) -> Path:
    """A copy of the checkpoint of which one file has lost its second half."""
    folder = world.folder / f"truncated {path}"
    if world.rank == 0:
        folder.mkdir()
        for file in (world.folder / name).iterdir():
            content = file.read_bytes()
            (folder / file.name).write_bytes(content[: len(content) // 2] if file.name == path else content)
    torch.distributed.barrier()
    return folder


@case(2)
def a_file_cut_off_in_the_middle_is_an_error(world: World) -> None:
    model, optimizer = trained(world, by("FusedSGD"))
    before = picture(model, optimizer)
    for path in (".metadata", "__0_0.distcp"):
        folder = truncated(world, "FusedSGD", path)
        message = error_of(lambda folder=folder: dcp.load(copies(model, optimizer), checkpoint_id=folder))
        assert "CheckpointException" in message, message
        assert_unchanged(before, model, optimizer)
    goes_on_as(model, optimizer, *uninterrupted(by("SGD", foreach=False)))
