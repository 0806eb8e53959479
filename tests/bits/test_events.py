"""Random scripts of what users and libraries do between steps, run on FusedSGD and on torch.optim.SGD in lockstep:
after each event and step the same bits, the same state and rising version counters. Run by pytest.

An event is a function of one world and a number; both worlds get the same. A failure prints the script and the seed.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import os
import pickle
import random
import secrets
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAYOUTS, assert_same_bits, laid_out, memory, numbers
from torch import Tensor, nn

from wd_fused import FusedSGD

pytestmark = [
    pytest.mark.usefixtures("fused_backend"),
    pytest.mark.filterwarnings("ignore:FusedSGD. torch's own code steps", "ignore:Detected call of"),
]

SHAPES = ((), (3,), (17,), (4, 5), (2, 3, 4, 5), (0,), (1, 7), (300,))
GRADIENT_LAYOUTS = ("contiguous", "reversed", "column gaps", "odd offset", "channels_last")


class World:
    """Parameters, an optimizer and a source of random numbers; two worlds of one seed draw the same ones."""

    def __init__(self, optimizer_class: type[torch.optim.SGD], seed: int) -> None:
        """torch.optim.SGD's is on the CPU; FusedSGD's on strategies.DEVICE, or on both GPUs."""
        self.optimizer_class = optimizer_class
        self.device = strategies.DEVICE if optimizer_class is FusedSGD else torch.device("cpu")
        self.on_gpu = self.device.type == "cuda"
        self.gpus = min(1 + seed % 2, torch.cuda.device_count())
        devices = [self.device] * len(SHAPES)
        if self.on_gpu and self.gpus == 2:
            devices = [torch.device("cuda", i % 3 // 2) for i in range(len(SHAPES))]
        self.generator = torch.Generator().manual_seed(seed)
        self.model = nn.ParameterList(
            nn.Parameter(numbers(shape, (torch.float32, torch.float64)[i % 2], self.generator, device=device))
            for i, (shape, device) in enumerate(zip(SHAPES, devices, strict=True))
        )
        params = list(self.model)
        groups = [
            {"params": params[:3], "weight_decay": 0.01, "momentum": 0.9},
            {"params": params[3:6], "lr": 0.3, "momentum": 0.9, "nesterov": True},
            {"params": params[6:], "maximize": True},
        ]
        self.optimizer = self.made(groups)
        self.next_gradient: dict[int, Callable[[Tensor], Tensor | None]] = {}
        self.kept: list[tuple[Tensor, Tensor]] = []  # (tensor that nobody may write, what it holds)
        self.closure = False
        self.shares_memory = False
        self.was_pickled = False  # the CPU cannot resize a storage that was, a GPU can
        self.around_step = GpuStep()

    def made(self, groups: Any) -> torch.optim.SGD:
        # On a GPU torch's own code in FusedSGD would be foreach, which rounds otherwise where dtypes are mixed.
        options = {"foreach": False} if torch.cuda.is_available() or self.optimizer_class is torch.optim.SGD else {}
        return self.optimizer_class(groups, lr=0.1, **options)

    def share_memory(self) -> None:
        """From now on the order counts, which only the loop keeps among torch's implementations."""
        self.shares_memory = True
        for group in self.groups():
            group["foreach"] = False

    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def param(self, k: int) -> Tensor:
        params = [param for group in self.groups() for param in group["params"]]
        return params[k % len(params)]

    def buffer_state(self, k: int) -> dict[str, Any] | None:
        """The state of some parameter that has a momentum buffer."""
        held = [
            self.optimizer.state[p] for p in self.all_params() if "momentum_buffer" in self.optimizer.state.get(p, {})
        ]
        held = [state for state in held if state["momentum_buffer"] is not None]
        return held[k % len(held)] if held else None

    def all_params(self) -> list[Tensor]:
        return [param for group in self.groups() for param in group["params"]]

    def numbers_like(self, tensor: Tensor) -> Tensor:
        return numbers(tuple(tensor.shape), tensor.dtype, self.generator, device=tensor.device)

    def step(self) -> None:
        for i, param in enumerate(self.all_params()):
            values = self.numbers_like(param)
            make = self.next_gradient.pop(i, None)
            param.grad = values if make is None else make(values)
        if self.closure:
            self.closure = False
            calls = []
            assert self.optimizer.step(lambda: calls.append(torch.is_grad_enabled()) or 3.5) == 3.5
            assert calls == [True]
        else:
            self.around_step.step(self)
            self.around_step = GpuStep()


@dataclass
class GpuStep:
    """How the next step is made on a GPU. torch.optim.SGD, on the CPU, makes a plain one of the same gradients."""

    on_side_streams: bool = False
    scale: float | None = None  # of the gradients, for GradScaler
    overflows: bool = False
    replays: int = 0  # of a graph that has captured it, in its place

    def step(self, world: World) -> None:
        if world.optimizer_class is not FusedSGD:
            for _ in range(0 if self.overflows else max(1, self.replays)):
                assert world.optimizer.step() is None
            return
        devices = {param.device for param in world.all_params() if param.is_cuda} if self.on_side_streams else ()
        with strategies.side_streams(devices), contextlib.ExitStack() as stack:
            if self.scale is not None:
                self._give_words(world, stack)
            if self.replays:
                strategies.replayed(world.optimizer.step, self.replays)
            else:
                assert world.optimizer.step() is None

    def factor(self, world: World) -> float:
        """Of the gradients that the world's optimizer is given."""
        return self.scale if self.scale is not None and world.optimizer_class is FusedSGD else 1.0

    def _give_words(self, world: World, stack: contextlib.ExitStack) -> None:
        for param in set(world.all_params()):
            if param.grad is not None:
                param.grad = param.grad * self.scale
        world.optimizer.grad_scale = torch.tensor(self.scale, device=world.device)
        world.optimizer.found_inf = torch.tensor(float(self.overflows), device=world.device)
        stack.callback(delattr, world.optimizer, "grad_scale")
        stack.callback(delattr, world.optimizer, "found_inf")


# --- events ------------------------------------------------------------------------------------------------------

EVENTS: dict[str, Callable[[World, int], None]] = {}


def an_event(function: Callable[[World, int], None]) -> Callable[[World, int], None]:
    EVENTS[function.__name__] = function
    return function


def an_event_of_gpus(function: Callable[[World, int], None]) -> Callable[[World, int], None]:
    return an_event(function) if torch.cuda.is_available() else function


def an_event_of_cpus(function: Callable[[World, int], None]) -> Callable[[World, int], None]:
    return function if torch.cuda.is_available() else an_event(function)


def group_of(world: World, k: int) -> dict[str, Any]:
    return world.groups()[k % len(world.groups())]


@an_event
def nothing(world: World, k: int) -> None:
    pass


@an_event
def another_lr(world: World, k: int) -> None:
    group_of(world, k)["lr"] = (0.0, 0.05, torch.tensor(0.07), torch.tensor([0.2], dtype=torch.float64), 1)[k % 5]


@an_event
def lr_tensor_written_in_place(world: World, k: int) -> None:
    group = group_of(world, k)
    if isinstance(group["lr"], Tensor):
        group["lr"].mul_(0.5)
    else:
        group["lr"] = torch.tensor(float(group["lr"]))


@an_event
def a_scheduler_steps(world: World, k: int) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(world.optimizer, 0.9)
    scheduler.step()


@an_event
def momentum_on_or_off(world: World, k: int) -> None:
    group = group_of(world, k)
    group["momentum"] = 0 if group["momentum"] else 0.8


@an_event
def weight_decay_on_or_off(world: World, k: int) -> None:
    group = group_of(world, k)
    group["weight_decay"] = 0 if group["weight_decay"] else (0.02, torch.tensor(0.02))[k % 2]


@an_event
def other_options(world: World, k: int) -> None:
    group = group_of(world, k)
    if k % 3 == 0:
        group["maximize"] = not group["maximize"]
    elif k % 3 == 1:
        group["nesterov"] = not group["nesterov"]
        group["dampening"] = 0
    elif not group["nesterov"]:
        group["dampening"] = 0.3


@an_event
def foreach_flag(world: World, k: int) -> None:
    if not world.shares_memory and not torch.cuda.is_available():
        group_of(world, k)["foreach"] = (True, False, None)[k % 3]


@an_event
def state_dict_through_torch_and_back(world: World, k: int) -> None:
    if len(set(world.all_params())) < len(world.all_params()):
        return  # torch makes no optimizer of a parameter in two groups
    for left_over in set(world.optimizer.state) - set(world.all_params()):  # torch's state_dict() raises KeyError
        del world.optimizer.state[left_over]
    shape = [{"params": list(group["params"])} for group in world.groups()]
    other = torch.optim.SGD(shape, lr=1.0)
    other.load_state_dict(world.optimizer.state_dict())
    if k % 2:
        for param in world.all_params():
            param.grad = world.numbers_like(param)
        other.step()
    state_dict = other.state_dict()
    if k % 3 == 1:
        file = io.BytesIO()
        torch.save(state_dict, file)
        file.seek(0)
        state_dict = torch.load(file, weights_only=True)
    if k % 3 == 2:  # into the optimizer that has a plan
        world.optimizer.load_state_dict(state_dict)
    else:
        world.optimizer = world.made(shape)
        world.optimizer.load_state_dict(state_dict)


@an_event
def pickled_or_copied(world: World, k: int) -> None:
    both = (world.model, world.optimizer)
    world.was_pickled |= k % 2 == 1
    world.model, world.optimizer = pickle.loads(pickle.dumps(both)) if k % 2 else copy.deepcopy(both)


@an_event
def state_cleared(world: World, k: int) -> None:
    if k % 2:
        world.optimizer.state.clear()
    else:
        world.optimizer.state = defaultdict(dict)


@an_event
def state_entry_gone(world: World, k: int) -> None:
    world.optimizer.state.pop(world.param(k), None)


@an_event
def state_entry_replaced(world: World, k: int) -> None:
    param = world.param(k)
    entry = world.optimizer.state.get(param)
    if entry is not None:
        world.optimizer.state[param] = dict(entry)


@an_event
def state_in_another_order(world: World, k: int) -> None:
    entries = list(world.optimizer.state.items())
    world.optimizer.state.clear()
    world.optimizer.state.update(entries[::-1])


@an_event
def more_in_the_state(world: World, k: int) -> None:
    if (state := world.buffer_state(k)) is None:
        return
    buffer = state.pop("momentum_buffer")
    state["of the user"] = k
    state["momentum_buffer"] = buffer


@an_event
def another_buffer(world: World, k: int) -> None:
    if (state := world.buffer_state(k)) is None:
        return
    buffer = state["momentum_buffer"]
    if k % 3 == 0:
        state["momentum_buffer"] = None
    elif k % 3 == 1:
        state["momentum_buffer"] = world.numbers_like(buffer)
    else:
        del state["momentum_buffer"]


@an_event
def buffer_edited(world: World, k: int) -> None:
    if (state := world.buffer_state(k)) is None:
        return
    buffer = state["momentum_buffer"]
    kind = k % 5
    if kind == 0:
        buffer.mul_(0.5)
    elif kind == 1:
        buffer.data = world.numbers_like(buffer)
    elif kind == 2:
        buffer.data = laid_out(world.numbers_like(buffer), LAYOUTS[k % len(LAYOUTS)])
    elif kind == 3:
        old = buffer.clone()
        if not buffer.untyped_storage().resizable():  # on the CPU, what torch.load() has made
            buffer.set_(old.clone())
        buffer.resize_(1000).resize_(old.shape).copy_(old)
    else:
        buffer.set_(world.numbers_like(buffer))


@an_event
def new_group(world: World, k: int) -> None:
    param = nn.Parameter(numbers((5 + k % 7,), torch.float32, world.generator, device=world.device))
    world.model.append(param)
    world.optimizer.add_param_group({"params": [param], "lr": 0.2, "momentum": (0, 0.9)[k % 2]})


@an_event
def parameters_moved(world: World, k: int) -> None:
    group = group_of(world, k)
    kind = k % 4
    if kind == 0:
        group["params"].reverse()
    elif kind == 1:
        group["params"] = group["params"][1:] + group["params"][:1]
    elif kind == 2 and len(group["params"]) > 1:
        group["params"].pop()
    elif group["params"]:
        moved = group["params"].pop(0)
        group_of(world, k + 1)["params"].append(moved)


@an_event
def parameter_replaced_in_its_group(world: World, k: int) -> None:
    group = group_of(world, k)
    if group["params"]:
        old = group["params"][0]
        group["params"][0] = nn.Parameter(world.numbers_like(old))
        del old


@an_event
def parameter_twice(world: World, k: int) -> None:
    group = group_of(world, k)
    if group["params"] and k % 2:
        group["params"].append(group["params"][0])
        world.share_memory()


@an_event
def cast_by_data(world: World, k: int) -> None:
    param = world.param(k)
    param.grad = None
    param.data = param.data.to(torch.float32 if param.dtype == torch.float64 else torch.float64)


@an_event
def model_cast(world: World, k: int) -> None:
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(k % 2 == 1)
    try:
        for param in world.model:
            param.grad = None
        world.model.to((torch.float32, torch.float64)[k // 2 % 2])
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)


@an_event
def other_data(world: World, k: int) -> None:
    param = world.param(k)
    param.data = laid_out(world.numbers_like(param), LAYOUTS[k % len(LAYOUTS)])


@an_event
def data_in_the_memory_of_another(world: World, k: int) -> None:
    param, other = world.param(k), world.param(k + 1)
    if param is not other and param.dtype == other.dtype and param.numel() < other.numel() and other.is_contiguous():
        if world.gpus == 2:  # where the two may be on different ones
            return
        world.share_memory()
        param.data = other.data.view(-1)[other.numel() - param.numel() :].view(param.shape)


@an_event
def written_in_place(world: World, k: int) -> None:
    with torch.no_grad():
        world.param(k).mul_(0.5)


@an_event
def requires_grad_flipped(world: World, k: int) -> None:
    param = world.param(k)
    param.requires_grad_(not param.requires_grad)


@an_event
def gradient_laid_out_otherwise(world: World, k: int) -> None:
    layout = GRADIENT_LAYOUTS[k % len(GRADIENT_LAYOUTS)]
    world.next_gradient[k % len(world.all_params())] = lambda values: laid_out(values, layout)


@an_event
def no_gradient(world: World, k: int) -> None:
    world.next_gradient[k % len(world.all_params())] = lambda values: None


@an_event
def no_gradients_at_all(world: World, k: int) -> None:
    world.next_gradient = {i: lambda values: None for i in range(len(world.all_params()))}


@an_event
def gradients_of_zeros(world: World, k: int) -> None:
    world.optimizer.zero_grad(set_to_none=False)
    for i, param in enumerate(world.all_params()):
        if param.grad is not None:
            grad = param.grad
            world.next_gradient[i] = lambda values, grad=grad: grad if grad.dtype == values.dtype else None


@an_event
def lazily_copied_gradient(world: World, k: int) -> None:
    def make(values: Tensor) -> Tensor:
        world.kept.append((values, values.clone()))
        return torch._lazy_clone(values)

    world.next_gradient[k % len(world.all_params())] = make


@an_event
def lazily_copied_parameter(world: World, k: int) -> None:
    param = world.param(k)
    if len({p.untyped_storage().data_ptr() for p in world.all_params()}) == len(world.all_params()):
        source = param.data.clone()
        world.kept.append((source, source.clone()))
        param.data = torch._lazy_clone(source)


@an_event
def negated_gradient(world: World, k: int) -> None:
    world.next_gradient[k % len(world.all_params())] = torch._neg_view


@an_event_of_cpus  # torch's own code for sparse gradients is no operator that the simulated GPU has
def sparse_gradient(world: World, k: int) -> None:
    for group in world.groups():
        for param in group["params"]:
            if param.dim() == 1 and param.numel() and group["momentum"] == 0 and not group["weight_decay"]:
                index = next(i for i, p in enumerate(world.all_params()) if p is param)
                world.next_gradient[index] = lambda values: values.mul(values > 0).to_sparse()
                return


@an_event
def gradient_of_another_dtype(world: World, k: int) -> None:
    param = world.param(k)
    if not hasattr(param, "grad_dtype") or not param.requires_grad:
        return
    param.grad = None
    param.grad_dtype = None
    index = next(i for i, p in enumerate(world.all_params()) if p is param)
    world.next_gradient[index] = lambda values: values.to(torch.float32)


@an_event
def memory_freed_and_back(world: World, k: int) -> None:
    """As FSDP does it: no memory during a step, and other memory afterwards."""
    param = world.param(k)
    storage = param.untyped_storage()
    if (
        not param.numel()
        or not storage.resizable()
        or world.was_pickled
        or sum(p.untyped_storage().data_ptr() == storage.data_ptr() for p in world.all_params()) > 1
    ):
        return
    values, size = memory(param).clone(), storage.nbytes()
    storage.resize_(0)
    world.next_gradient[next(i for i, p in enumerate(world.all_params()) if p is param)] = lambda values: None
    world.step()
    storage.resize_(size)
    memory(param).copy_(values)


@an_event
def a_closure(world: World, k: int) -> None:
    world.closure = True


@an_event
def a_step_that_fails(world: World, k: int) -> None:
    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        world.optimizer.step(closure)


@an_event
def a_hook_for_one_step(world: World, k: int) -> None:
    param = world.param(k)
    replacement = world.numbers_like(param)

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if param.grad is not None and param.grad.dtype == replacement.dtype:
            param.grad = replacement * world.around_step.factor(world)
        handle.remove()

    handle = world.optimizer.register_step_pre_hook(hook)


@an_event
def other_threads(world: World, k: int) -> None:
    torch.set_num_threads(1 + k % 3)


def can_be_captured(world: World) -> bool:
    """Momentum buffers and gradients are there, all on one GPU, and nothing has to wait."""
    for group in world.groups():
        for param in group["params"] if group["momentum"] else ():
            buffer = world.optimizer.state.get(param, {}).get("momentum_buffer")
            if buffer is None:
                return False
            if buffer.dtype != param.dtype and isinstance(group["lr"], Tensor):
                return False  # stepped by torch's code, which waits for the value of lr
    return not world.next_gradient and world.gpus == 1


@an_event_of_gpus
def side_streams(world: World, k: int) -> None:
    world.around_step.on_side_streams = True


@an_event_of_gpus
def a_busy_gpu(world: World, k: int) -> None:
    if world.on_gpu:
        torch.cuda._sleep(1000)


@an_event_of_gpus
def words_of_a_grad_scaler(world: World, k: int) -> None:
    world.around_step.scale = (1.0, 8.0, 0.5)[k % 3]
    world.around_step.overflows = k % 4 == 3


@an_event_of_gpus
def lr_on_the_gpu(world: World, k: int) -> None:
    group_of(world, k)["lr"] = torch.tensor(
        0.03 * (k % 5), dtype=(torch.float32, torch.float64)[k % 2], device=world.device
    )


@an_event_of_gpus
def a_captured_step(world: World, k: int) -> None:
    if can_be_captured(world):
        world.around_step.replays = 1 + k % 3


# --- the scripts -------------------------------------------------------------------------------------------------


def assert_same_worlds(ours: World, theirs: World, what: str) -> None:
    our_params, their_params = ours.all_params(), theirs.all_params()
    assert len(our_params) == len(their_params)
    our_state, their_state = ours.optimizer.state, theirs.optimizer.state
    assert len(our_state) == len(their_state), f"{what}: {len(our_state)} entries in the state, not {len(their_state)}"
    for i, (mine, other) in enumerate(zip(our_params, their_params, strict=True)):
        assert_same_bits(mine, other, f"{what}: parameter {i}")
        assert_same_bits(memory(mine), memory(other), f"{what}: memory of parameter {i}")
        assert (mine in our_state) == (other in their_state), f"{what}: state of parameter {i}"
        my_entry, other_entry = our_state.get(mine, {}), their_state.get(other, {})
        assert list(my_entry) == list(other_entry), f"{what}: state of parameter {i}"
        for key, value in other_entry.items():
            if isinstance(value, Tensor):
                assert_same_bits(my_entry[key], value, f"{what}: {key} of parameter {i}")
            else:
                assert my_entry[key] == value, f"{what}: {key} of parameter {i}"
    for world in (ours, theirs):
        for kept, holds in world.kept:
            assert_same_bits(kept, holds, f"{what}: the source of a lazy copy, {world.optimizer_class.__name__}")


def run_script(script: list[tuple[str, int]], seed: int) -> None:
    threads = torch.get_num_threads()
    try:
        _run_script(script, seed)
    finally:
        torch.set_num_threads(threads)


def _run_script(script: list[tuple[str, int]], seed: int) -> None:
    ours, theirs = World(FusedSGD, seed), World(torch.optim.SGD, seed)
    for position, (name, k) in enumerate([("nothing", 0), *script]):
        what = f"seed {seed}, event {position}: {name}({k})"
        for world in (ours, theirs):
            EVENTS[name](world, k)
        versions = [param._version for param in ours.all_params()]
        is_skipped = ours.around_step.overflows and not ours.closure
        outcomes = []
        for world in (ours, theirs):
            try:
                world.step()
                outcomes.append(None)
            except RuntimeError as error:
                outcomes.append(error)
        assert outcomes[0] is None or outcomes[1] is not None, f"{what}: {outcomes[0]!r}, but torch steps"
        if outcomes[1] is not None:
            return  # torch has stepped some parameters; FusedSGD none, or all, since it takes more
        for i, param in enumerate(ours.all_params()):
            assert is_skipped or param.grad is None or param._version > versions[i], f"{what}: version of parameter {i}"
        assert_same_worlds(ours, theirs, what)


scripts = st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.integers(0, 59)), min_size=1, max_size=12)


@given(script=scripts, seed=st.integers(0, 2**31))
def test_random_scripts_of_events(script: list[tuple[str, int]], seed: int) -> None:
    run_script(script, seed)


def test_scripts_of_a_fresh_seed(fused_backend: str) -> None:
    """WD_FUSED_SEED=N repeats them."""
    seed = int(os.environ.get("WD_FUSED_SEED", secrets.randbelow(2**31)))
    print(f"WD_FUSED_SEED={seed}")
    choose = random.Random(seed)
    for _ in range(200 if fused_backend == "cpu" else 15):
        script = [(choose.choice(sorted(EVENTS)), choose.randrange(60)) for _ in range(12)]
        run_script(script, choose.randrange(2**31))


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_each_event_between_two_steps(name: str, fused_backend: str) -> None:
    # A simulated step takes long: there an event is what it is for 0 to 3, each of them once.
    for k in (0, 2) if fused_backend != "cpu" else range(12):
        run_script([(name, k), ("nothing", 0), (name, k + 1), ("nothing", 0)], seed=k)


def test_a_missed_event_is_seen() -> None:
    """The scripts can fail: one world that misses an event differs."""
    ours, theirs = World(FusedSGD, 1), World(torch.optim.SGD, 1)
    for world in (ours, theirs):
        world.step()
    assert_same_worlds(ours, theirs, "before")
    group = ours.groups()[0]
    group["lr"] = math.nextafter(group["lr"], 1) if group["lr"] > 1e9 else group["lr"] * (1 + 2**-22)
    for world in (ours, theirs):
        world.step()
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_worlds(ours, theirs, "planted")


# --- what is left behind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_backward", [False, True])
def test_nothing_is_kept_alive(in_backward: bool, fused_backend: str) -> None:
    """With in_backward, hooks of the parameters close over the optimizers, as steps during backward do."""
    alive = stepped_and_left(in_backward, fused_backend)
    gc.collect()
    assert [type(reference()) for reference in alive if reference() is not None] == []


def stepped_and_left(in_backward: bool, fused_backend: str) -> list[weakref.ref[Any]]:
    """Trains a model, and returns references to its parameters, optimizers and momentum buffers."""
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 2)).to(strategies.DEVICE)
    params = list(model.parameters())
    parts = [[param] for param in params] if in_backward else [params]
    optimizers = [FusedSGD(part, lr=0.1, momentum=0.9, backend=fused_backend) for part in parts]

    def step(stepped: Tensor) -> None:
        for optimizer in optimizers:
            if any(stepped is param for param in optimizer.param_groups[0]["params"]):
                optimizer.step()

    handles = [param.register_post_accumulate_grad_hook(step) for param in params] if in_backward else []
    for _ in range(3):
        model(torch.randn(5, 30).to(strategies.DEVICE)).sum().backward()
        if not in_backward:
            step(params[0])
    buffers = [entry["momentum_buffer"] for optimizer in optimizers for entry in optimizer.state.values()]
    assert len(buffers) == len(params) == 4
    for handle in handles:  # Python's garbage collector does not see through a hook, with torch.optim.SGD neither
        handle.remove()
    return [weakref.ref(left) for left in (*params, *optimizers, *buffers)]


def test_an_old_momentum_buffer_and_gradient_are_not_kept_alive_after_the_next_step(fused_backend: str) -> None:
    params = [nn.Parameter(torch.zeros(100_000, device=strategies.DEVICE)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=fused_backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    gradient = weakref.ref(params[0].grad)
    buffer = weakref.ref(optimizer.state[params[0]]["momentum_buffer"])
    params[0].grad = torch.ones_like(params[0])
    assert gradient() is None
    optimizer.state.clear()
    optimizer.step()
    assert buffer() is None


def test_autograd_catches_a_step_between_forward_and_backward(fused_backend: str) -> None:
    param = nn.Parameter(torch.ones(3, device=strategies.DEVICE))
    optimizer = FusedSGD([param], lr=0.1, backend=fused_backend)
    loss = (param * param).sum()
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
