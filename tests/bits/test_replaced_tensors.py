"""Parameters and state tensors that are replaced between steps: the same plan, pointed to them, wherever they lie and
whatever they overlap; with torch's bits and errors."""

import random

import pytest
import torch

from wd_fused import FusedSGD

pytestmark = [pytest.mark.usefixtures("fused_backend"), pytest.mark.some_backends("cpu")]

ARGUMENTS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
OPTIONS = {
    "full masters": {"master_weights": "full"},
    "split masters, int8 momentum": {"master_weights": "split", "momentum_dtype": "int8"},
    "kahan, an average": {"rounding": "kahan", "ema_decay": 0.9},
    "clipped": {"max_grad_norm": 0.5},
}


class Pair:
    """The same parameters under FusedSGD and under torch's loop; what is done to one set is done to the other."""

    def __init__(self, *sizes, dtype=torch.float32, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.params = [[], []]
        for size in sizes:
            values = torch.randn(size, generator=self.random).to(dtype)
            for params in self.params:
                params.append(values.clone().requires_grad_())
        self.optimizers = [
            FusedSGD(self.params[0], **ARGUMENTS),
            torch.optim.SGD(self.params[1], **ARGUMENTS, foreach=False),
        ]

    @property
    def plans(self):
        return self.optimizers[0]._plans

    def buffer(self, who, i):
        return self.optimizers[who].state[self.params[who][i]]["momentum_buffer"]

    def set_buffer(self, who, i, tensor):
        self.optimizers[who].state[self.params[who][i]]["momentum_buffer"] = tensor

    def step(self, *, gradients=True):
        if gradients:
            for ours, theirs in zip(*self.params, strict=True):
                values = torch.randn(ours.shape, generator=self.random).to(ours.dtype)
                ours.grad, theirs.grad = values.clone(), values.clone()
        for optimizer in self.optimizers:
            optimizer.step()
        for i, (ours, theirs) in enumerate(zip(*self.params, strict=True)):
            assert torch.equal(ours.detach(), theirs.detach()), f"parameter {i}"
            assert torch.equal(self.buffer(0, i), self.buffer(1, i)), f"momentum buffer {i}"


def replaced_parameters(pair):
    for params in pair.params:
        for param in params:
            param.data = param.data.clone()


def parameters_that_trade_places(pair):
    for first, *_, last in pair.params:
        first.data, last.data = last.data, first.data


def replaced_momentum(pair):
    for who in (0, 1):
        for i in range(len(pair.params[who])):
            pair.set_buffer(who, i, pair.buffer(who, i) * 0.5)


def moved_momentum(pair):
    for who in (0, 1):
        for i in range(len(pair.params[who])):
            pair.buffer(who, i).data = pair.buffer(who, i).clone()


def slices_of_a_flat_buffer(pair):
    for params in pair.params:
        flat = torch.cat([param.detach().flatten() for param in params])
        begin = 0
        for param in params:
            param.data = flat[begin : begin + param.numel()].view(param.shape)
            begin += param.numel()


def another_state(pair):
    for optimizer in pair.optimizers:
        entries = reversed([(param, dict(own)) for param, own in optimizer.state.items()])
        optimizer.state.clear()
        optimizer.state.update(entries)


SAME_KIND = [
    replaced_parameters,
    parameters_that_trade_places,
    replaced_momentum,
    moved_momentum,
    slices_of_a_flat_buffer,
    another_state,
]


@pytest.mark.parametrize("edit", SAME_KIND, ids=lambda edit: edit.__name__)
def test_tensors_of_the_same_kind_are_stepped_by_the_same_plan(edit):
    pair = Pair(7, 300, 7)
    pair.step()
    plans = pair.plans
    for _ in range(3):
        edit(pair)
        pair.step()
        assert pair.plans is plans


# What comes to overlap: a new plan, or torch's code, decides as at a first step


def a_parameter_over_another(pair):
    for params in pair.params:
        params[0].data = params[1].data[3:10]


def a_parameter_over_anothers_momentum(pair):
    for who in (0, 1):
        pair.params[who][0].data = pair.buffer(who, 1)[3:10]


def a_parameter_over_its_momentum(pair):
    for who in (0, 1):
        pair.params[who][0].data = pair.buffer(who, 0)


def momentum_over_anothers(pair):
    for who in (0, 1):
        pair.set_buffer(who, 0, pair.buffer(who, 1)[5:12])


OVERLAPS = [
    a_parameter_over_another,
    a_parameter_over_anothers_momentum,
    a_parameter_over_its_momentum,
    momentum_over_anothers,
]


@pytest.mark.filterwarnings("ignore:FusedSGD")
@pytest.mark.parametrize("edit", OVERLAPS, ids=lambda edit: edit.__name__)
def test_tensors_that_come_to_overlap_are_stepped_in_torchs_order_and_return(edit):
    pair = Pair(7, 300, 7)
    pair.step()
    plans = pair.plans
    edit(pair)
    pair.step()
    assert pair.plans is not plans
    pair.step()
    replaced_parameters(pair)
    replaced_momentum(pair)
    pair.step()
    plans = pair.plans
    replaced_parameters(pair)
    pair.step()
    assert pair.plans is plans
    assert [each.backend for each in pair.optimizers[0].backends()] == ["cpu"] * 3


def test_momentum_over_a_part_of_its_parameter_is_torchs_error():
    pair = Pair(7)
    pair.step()
    for who in (0, 1):
        memory = torch.cat([pair.params[who][0].detach(), torch.ones(2)])
        pair.params[who][0].data = memory[:7]
        pair.set_buffer(who, 0, memory[2:])
    with pytest.warns(UserWarning, match="its momentum buffer shares memory with it"):
        for optimizer in pair.optimizers:
            with pytest.raises(RuntimeError, match="refer to a single memory location"):
                optimizer.step()


@pytest.mark.filterwarnings("ignore:FusedSGD")
@pytest.mark.parametrize("which", [0, 1], ids=["its own", "another's"])
def test_a_parameter_may_come_to_lie_over_a_gradient(which):
    pair = Pair(7, 300, 7)
    pair.step()
    plans = pair.plans
    for params in pair.params:
        memory = torch.arange(300.0)
        params[which].grad = memory[: params[which].numel()]
        params[0].data = memory[2:9]
    pair.step(gradients=False)
    pair.step()
    assert pair.plans is plans


def test_a_parameter_may_come_to_lie_where_torch_steps_another():
    memory = [torch.ones(20, dtype=torch.complex64) for _ in range(2)]
    pair = Pair(7, 300)
    for who in (0, 1):
        param = memory[who][:10].requires_grad_()
        pair.params[who].append(param)
        pair.optimizers[who].param_groups[0]["params"].append(param)
    with pytest.warns(UserWarning, match="complex64"):
        pair.step()
    for who in (0, 1):
        pair.params[who][0].data = torch.view_as_real(memory[who]).view(-1)[9:16]
    with pytest.warns(UserWarning, match="share memory"):
        pair.step()


def test_another_kind_of_tensor_makes_a_new_plan():
    for other in (
        lambda tensor: torch.randn(20, 2)[:, 1].copy_(tensor),  # strides
        lambda tensor: tensor.double(),
        lambda tensor: tensor[:10].clone(),
    ):
        pair = Pair(20)
        pair.step()
        plans = pair.plans
        for who in (0, 1):
            pair.params[who][0].data = other(pair.params[who][0].data)
            pair.params[who][0].grad = None
            pair.set_buffer(who, 0, other(pair.buffer(who, 0)))
        pair.step()
        assert pair.plans is not plans


def test_a_parameter_whose_storage_is_resized_is_an_error_before_anything_is_written():
    pair = Pair(7, 300)
    pair.step()
    pair.params[0][1].data = pair.params[0][1].data.clone()
    pair.params[0][1].untyped_storage().resize_(40)
    before = pair.params[0][0].detach().clone()
    with pytest.raises(RuntimeError, match="has a storage of 40 bytes, and its shape and strides need 1200"):
        pair.optimizers[0].step()
    assert torch.equal(pair.params[0][0].detach(), before)


def test_a_gradient_that_cannot_be_used_is_an_error_where_parameters_have_moved():
    pair = Pair(7, 300)
    pair.step()
    replaced_parameters(pair)
    ours = pair.params[0]
    before = [param.detach().clone() for param in ours]
    with torch.no_grad():
        keep, ours[1].data = ours[1].data, ours[1].data[:5]
        ours[1].grad = torch.ones(5)
        ours[1].data = keep
    with pytest.raises(RuntimeError, match=r"group 0, parameter 1: its gradient has shape \[5\]"):
        pair.optimizers[0].step()
    assert all(torch.equal(param.detach(), own) for param, own in zip(ours, before, strict=True))
    pair.step()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_options_keep_may_be_replaced(options):
    dtype = torch.float32 if "max_grad_norm" in options else torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(size, generator=generator).to(dtype) for size in (130, 7)]
    some, others = ([value.clone().requires_grad_() for value in values] for _ in range(2))
    stays, moves = (FusedSGD(params, **ARGUMENTS, **options) for params in (some, others))
    plans = None
    for step in range(4):
        for one, other in zip(some, others, strict=True):
            one.grad = torch.randn(one.shape, generator=generator).to(dtype)
            other.grad = one.grad.clone()
        stays.step()
        moves.step()
        assert step < 2 or moves._plans is plans
        plans = moves._plans
        for one, other in zip(some, others, strict=True):
            assert torch.equal(one.detach(), other.detach())
            assert stays.state[one].keys() == moves.state[other].keys()
            for name, entry in stays.state[one].items():
                assert torch.equal(entry, moves.state[other][name]), name
        for param in others:
            param.data = param.data.clone()
            for name, entry in moves.state[param].items():
                moves.state[param][name] = entry.clone()


def test_what_an_option_keeps_may_not_come_to_overlap():
    param = torch.ones(8, dtype=torch.bfloat16).requires_grad_()
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9, master_weights="full")
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["momentum_buffer"] = optimizer.state[param]["master"]
    with pytest.raises(RuntimeError, match='"master" shares memory with its "momentum_buffer"'):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:FusedSGD")
def test_random_replacements_agree_with_torch():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    choice = random.Random(seed)
    pair = Pair(5, 33, 5, 1, 0, 70, 5, seed=seed)
    pair.step()
    for _ in range(40):
        for edit in choice.sample([*SAME_KIND[:5], lambda pair: None], k=2):
            edit(pair)
        if choice.random() < 0.3:
            for who in (0, 1):
                pair.params[who][2].data = pair.params[who][1].data[4:9]
        pair.step(gradients=choice.random() < 0.8)
