"""Averages of parameters and buffers where something comes in between: an interrupt in swap_ema(), at every line and
instruction; torch.distributed.checkpoint, which keeps state and groups only and has the state made by a step of zeros.
Run by pytest.
"""

import contextlib
import copy
import sys

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from wd_fused import FusedSGD
from wd_fused.options import averages
from wd_fused.step import of_options

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

BF16 = torch.bfloat16
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FORMS = pytest.mark.parametrize("form", [None, FLAT, StateDictOptions(full_state_dict=True)], ids=["", "flat", "full"])


# Interrupts


class Exchanged:
    """An optimizer with averages of its parameters' dtypes and of another, and of a buffer, and what they all hold."""

    def __init__(self):
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4).to(BF16)), nn.Parameter(torch.ones(2))]
        self.buffer = torch.randn(5)
        self.optimizer = FusedSGD(self.params, lr=0.1, ema_decay=0.9, ema_buffers=[self.buffer])
        for _ in range(2):
            for param in self.params:
                param.grad = torch.randn_like(param)
            self.buffer.add_(1)
            self.optimizer.step()
        self.before = [tensor.detach().clone() for tensor in self.tensors()]
        self.shown = [entry.clone() for entry in self.averages()]

    def averages(self):
        entries = self.optimizer.state
        return [*(entries[param]["ema"] for param in self.params), entries[self.params[0]]["ema_buffers.0"]]

    def tensors(self):
        return [*self.params, self.buffer, *self.averages()]

    def is_as_before(self):
        return all(torch.equal(now, was) for now, was in zip(self.tensors(), self.before, strict=True))

    def evaluate(self, error=None):
        with self.optimizer.swap_ema():
            shown = zip([*self.params, self.buffer], self.shown, strict=True)
            assert all(torch.equal(tensor, average.to(tensor.dtype)) for tensor, average in shown)
            if error is not None:
                raise error


OWN_FILES = {averages.__file__, contextlib.__file__}
OWN_FUNCTIONS = {"swap_ema", "_swap_back", "_refuse_while_swapped"}


def traced(call, kind, at_event):
    """Calls it; at_event: called before every line, or instruction, of the exchange."""

    def trace(frame, event, _):
        code = frame.f_code
        if code.co_filename not in OWN_FILES and not (
            code.co_filename == of_options.__file__ and code.co_name in OWN_FUNCTIONS
        ):
            return None
        frame.f_trace_opcodes = kind == "opcode"
        if event == kind:
            at_event()
        return trace

    before = sys.gettrace()
    # Python 3.12 watches instructions from the next settrace() on, not from the frame that asks for them.
    sys._getframe().f_trace_opcodes = kind == "opcode"
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("kind", "error", "inside"),
    [
        ("line", KeyboardInterrupt, None),
        ("line", RuntimeError, None),
        ("opcode", KeyboardInterrupt, None),
        ("opcode", RuntimeError, None),
        ("opcode", KeyboardInterrupt, ZeroDivisionError),
    ],
)
def test_an_interrupt_anywhere_in_an_exchange_loses_no_number(kind, error, inside):
    case, at, done = Exchanged(), 0, False
    while not done:
        at, seen = at + 1, 0

        def interrupt():
            nonlocal seen
            seen += 1
            if seen == at:  # noqa: B023
                raise error("an interrupt")

        try:
            traced(lambda: case.evaluate(inside), kind, interrupt)
        except (error, ZeroDivisionError) as caught:
            caught.__traceback__ = None  # which would keep the generator of a with that was never entered
        done = seen < at
        assert case.is_as_before() and torch.is_grad_enabled(), f"{kind} {at}"
        case.optimizer.state_dict()
    assert at > (50 if kind == "line" else 500)


def test_what_is_saved_anywhere_in_an_exchange_is_no_mixture():
    case, saved, refused = Exchanged(), 0, 0

    def save():
        nonlocal saved, refused
        try:
            case.optimizer.state_dict()
        except RuntimeError:
            refused += 1
        else:
            saved += 1
            assert case.is_as_before()

    traced(case.evaluate, "opcode", save)
    assert saved > 50 and refused > 500


# torch.distributed.checkpoint


class Network(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.to(dtype)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def train(model, optimizer, steps, seed):
    source = torch.Generator().manual_seed(seed)
    dtype = model.last.weight.dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=source).to(dtype)).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()


def made(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    model = Network(dtype)
    groups = [{"params": list(model.first.parameters())}, {"params": [*model.norm.parameters()]}, {"params": []}]
    model.last.bias.requires_grad_(False)
    groups[2]["params"] += [model.last.bias, model.last.weight]
    return model, FusedSGD(groups, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | options)


def everything(model, optimizer):
    """All that training goes on from, but for the learning rates."""
    entries = {
        (n, name): entry
        for n, param in enumerate(model.parameters())
        for name, entry in optimizer.state.get(param, {}).items()
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [*model.parameters(), *model.buffers()], entries, groups


def assert_same(ours, theirs):
    tensors, entries, groups = everything(*ours)
    others, expected, other_groups = everything(*theirs)
    assert groups == other_groups and entries.keys() == expected.keys()
    pairs = [*zip(tensors, others, strict=True), *((entries[name], expected[name]) for name in entries)]
    assert all(torch.equal(a, b) for a, b in pairs)


@FORMS
@pytest.mark.parametrize("first", [[], ["ema_parameters"], ["backends"]], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_averages_of_buffers_come_back_from_a_distributed_checkpoint(form, first, frozen, tmp_path):
    options = {"ema_decay": 0.9, "ema_buffers": None}
    both = []
    for seed in range(2):
        model, optimizer = made(seed=seed, **options)
        if frozen:
            model.first.weight.requires_grad_(False)
        optimizer = FusedSGD(optimizer.param_groups, lr=0.1, **options | {"ema_buffers": model})
        both.append((model, optimizer))
    ours, other = both
    train(*ours, 4, seed=1)
    weights, state = get_state_dict(*ours, options=form)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    for name in first:
        getattr(other[1], name)()
    weights, state = get_state_dict(*other, options=form)
    content = {"model": weights, "optimizer": state}
    checkpoint.load(content, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(*other, model_state_dict=content["model"], optim_state_dict=content["optimizer"], options=form)
    other[0].load_state_dict(ours[0].state_dict())  # of frozen parameters torch keeps no state
    names = {name for _, name in everything(*other)[1]}
    assert {"ema", "momentum_buffer", "ema_buffers.0", "ema_buffers.1", "ema_buffers.2"} == names
    for each in (ours, other):
        train(*each, 3, seed=2)
    assert_same(other, ours)


def test_averages_of_buffers_are_read_from_an_older_checkpoint():
    model, optimizer = made(ema_decay=0.9)
    optimizer = FusedSGD(optimizer.param_groups, lr=0.1, ema_buffers=model)
    train(model, optimizer, 3, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    entries = saved["state"][0]
    saved["ema_buffers"] = [entries.pop(f"ema_buffers.{i}") for i in range(3)]
    expected = [average.clone() for average in saved["ema_buffers"]]
    optimizer.load_state_dict(saved)
    names = {name for entries in optimizer.state_dict()["state"].values() for name in entries}
    assert "ema_buffers.2" in names
    older = copy.deepcopy((model, optimizer))  # as a pickle has it
    older[1]._averaged_buffers.averages = [
        older[1].state[older[0].first.weight].pop(f"ema_buffers.{i}") for i in range(3)
    ]
    older[1]._averaged_buffers._home = None
    for own, of_own in ((model, optimizer), older):
        with of_own.swap_ema():
            assert all(torch.equal(buffer, average) for buffer, average in zip(own.buffers(), expected, strict=True))
    before = copy.deepcopy(everything(model, optimizer)[1])
    for wrong, message in (
        (5, "is a int, not a list of Tensors"),
        ([3, *expected[1:]], "average 0 .* is a int, not a"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(copy.deepcopy(saved) | {"ema_buffers": wrong})
        after = everything(model, optimizer)[1]
        assert all(torch.equal(after[name], before[name]) for name in before | after)


def test_a_flat_checkpoint_without_averages_of_buffers_has_them_begin_anew():
    model, optimizer = made(ema_decay=0.9)
    optimizer = FusedSGD(optimizer.param_groups, lr=0.1, ema_buffers=model)
    train(model, optimizer, 2, seed=1)
    saved = get_optimizer_state_dict(model, optimizer, options=FLAT)
    older = {name: value for name, value in saved.items() if "ema_buffers" not in name}
    model.norm.running_mean.fill_(7.0)
    with pytest.warns(UserWarning, match="started afresh: the averages of ema_buffers"):
        set_optimizer_state_dict(model, optimizer, older, options=FLAT)
    optimizer.step()
    with optimizer.swap_ema():
        assert torch.equal(model.norm.running_mean, torch.full((4,), 7.0))


def test_averages_of_buffers_stay_with_a_parameter_that_is_trained():
    model, optimizer = made(ema_decay=0.9)
    optimizer = FusedSGD(optimizer.param_groups, lr=0.1, ema_buffers=model)
    train(model, optimizer, 2, seed=1)
    model.first.requires_grad_(False)
    train(model, optimizer, 1, seed=2)
    state = optimizer.state
    assert "ema_buffers.0" not in state[model.first.weight] and "ema_buffers.0" in state[model.norm.weight]
    for group in optimizer.param_groups:
        del group["ema_decay"]
    train(model, optimizer, 1, seed=3)
    assert "ema_buffers.0" not in {name for entries in state.values() for name in entries}


# What a step of zeros before the first one leaves


FIRST_STEPS = {
    "average": (torch.float32, {"ema_decay": 0.9, "ema_warmup": True}),
    "average without momentum": (torch.float32, {"ema_decay": 0.9, "momentum": 0.0}),
    "dampening": (torch.float32, {"max_grad_norm": 1.0, "dampening": 0.3}),
    "L1": (torch.float32, {"l1_penalty": 0.1}),
    "decoupled decay": (torch.float32, {"decoupled_weight_decay": True, "decouple_lr": True}),
    "stochastic": (BF16, {"rounding": "stochastic"}),
    "stochastic without state": (BF16, {"rounding": "stochastic", "momentum": 0.0}),
    "kahan": (BF16, {"rounding": "kahan", "ema_decay": 0.5}),
    "split": (BF16, {"master_weights": "split", "dampening": 0.3, "ema_decay": 0.5}),
    "full": (BF16, {"master_weights": "full"}),
    "int8 momentum": (torch.float32, {"momentum_dtype": torch.int8, "dampening": 0.3}),
    "zeros": (torch.float32, {"zero_grads": True}),
    "lr in a tensor": (torch.float32, {"lr": torch.tensor(0.1), "l1_penalty": 0.1}),
}


@pytest.mark.parametrize(("dtype", "options"), FIRST_STEPS.values(), ids=FIRST_STEPS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.filterwarnings("ignore:FusedSGD. plain torch operations step")
def test_training_goes_on_as_if_nothing_had_been_saved_before_its_first_step(dtype, options, backend):
    ours, theirs = (made(dtype, backend=backend, **copy.deepcopy(options)) for _ in range(2))
    for step in range(3):
        norm = ours[1].grad_norm
        get_optimizer_state_dict(*ours)
        assert ours[1].grad_norm is None if norm is None else torch.equal(norm, ours[1].grad_norm)
        for each in (ours, theirs):
            train(*each, 1, seed=step)
        assert_same(ours, theirs)


def test_an_option_that_is_switched_on_before_the_first_step_finds_its_learning_rate():
    ours, theirs = made(), made()
    for _, optimizer in (ours, theirs):
        for group in optimizer.param_groups:
            group |= {"decoupled_weight_decay": True, "decouple_lr": True}
    get_optimizer_state_dict(*ours)
    for each in (ours, theirs):
        train(*each, 2, seed=1)
    assert_same(ours, theirs)
    assert ours[1].param_groups[0]["initial_lr"] == 0.1


def test_without_options_the_step_of_zeros_is_torchs():
    model, optimizer = made(dampening=0.3)
    other = copy.deepcopy(model)
    names = {id(param): name for name, param in model.named_parameters()}
    groups = [
        {"params": [other.get_parameter(names[id(param)]) for param in group["params"]]}
        for group in optimizer.param_groups
    ]
    theirs = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.3)
    for each in ((model, optimizer), (other, theirs)):
        get_optimizer_state_dict(*each)
        train(*each, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_first_step_of_zeros_with_a_learning_rate_and_one_of_numbers_without_are_steps():
    for lr, gradient in ((0.1, 0.0), (0.0, 1.0)):
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.full((3,), gradient)
        optimizer = FusedSGD([param], lr=lr, momentum=0.9, l1_penalty=0.1, ema_decay=0.9)
        optimizer.step()
        assert optimizer.param_groups[0]["ema_updates"] == 1 and optimizer.state[param]["momentum_buffer"].any()


@FORMS
def test_a_checkpoint_of_before_the_first_step_and_one_read_in_place_are_loaded(form):
    options = {"ema_decay": 0.9}
    saved, ours, theirs = made(seed=0, **options), made(seed=1, **options), made(seed=0, **options)
    set_optimizer_state_dict(*ours, get_optimizer_state_dict(*saved, options=form), options=form)
    ours[0].load_state_dict(theirs[0].state_dict())
    for each in (ours, theirs):
        train(*each, 3, seed=1)
    assert_same(ours, theirs)
    if form is None:  # as checkpoint.load() does: into the tensors that it is given
        fresh = made(seed=0, **options)
        given = get_optimizer_state_dict(*fresh)["state"]
        for name, entries in get_optimizer_state_dict(*ours)["state"].items():
            for entry in entries:
                given[name][entry].copy_(entries[entry])
        fresh[0].load_state_dict(ours[0].state_dict())
        for group in fresh[1].param_groups:
            group["ema_updates"] = 3
        for each in (ours, fresh):
            train(*each, 2, seed=2)
        assert_same(fresh, ours)
