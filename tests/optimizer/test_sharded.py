"""DTensors in the plan: what is stepped of them, and when torch's code steps them instead. One process stands for every
rank here; several are in test_distributed.py. Run by pytest.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from strategies import assert_same_bits
from torch import Tensor, nn

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402

from wd_fused import FusedSGD  # noqa: E402

pytestmark = pytest.mark.usefixtures("fused_backend")

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
SHAPES = ((3, 4), (7,), (1, 5), (0, 3), (2, 3, 4))


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def parameters(mesh: DeviceMesh, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(distribute_tensor(torch.randn(shape, generator=generator), mesh, [Shard(0)])) for shape in shapes
    ]


def gradients(*lists: list[nn.Parameter], seed: int, placement: Any = None) -> None:
    """The same in each list."""
    for i, params in enumerate(zip(*lists, strict=True)):
        values = torch.randn(params[0].shape, generator=torch.Generator().manual_seed(100 * seed + i))
        for param in params:
            own: Any = param
            placements = [placement or Shard(0)]
            param.grad = distribute_tensor(values.to(param.dtype), own.device_mesh, placements)


def local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.detach().to_local()


def assert_same(ours: FusedSGD, theirs: torch.optim.SGD) -> None:
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(mine["params"], other["params"], strict=True)):
            assert_same_bits(local(p), local(q), f"parameter {i}")
            buffer, expected = (state[r].get("momentum_buffer") for state, r in ((ours.state, p), (theirs.state, q)))
            assert (buffer is None) == (expected is None), i
            if buffer is not None:
                assert (buffer.placements, buffer.shape) == (p.placements, p.shape) and not buffer.requires_grad
                assert_same_bits(local(buffer), local(expected), f"momentum buffer {i}")


def pair(
    mesh: DeviceMesh, shapes: Sequence[tuple[int, ...]] = SHAPES, **options: Any
) -> tuple[FusedSGD, torch.optim.SGD, list[Any], list[Any]]:
    ours, theirs = parameters(mesh, shapes), parameters(mesh, shapes)
    return (
        FusedSGD(ours, **OPTIONS | options),
        torch.optim.SGD(theirs, **OPTIONS | options, foreach=False),
        ours,
        theirs,
    )


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"nesterov": True, "maximize": True}], ids=str)
def test_steps_have_torchs_bits_and_state(mesh: DeviceMesh, options: dict[str, Any], fused_backend: str) -> None:
    optimizer, expected, ours, theirs = pair(mesh, **options)
    for step in range(4):
        gradients(ours, theirs, seed=step)
        optimizer.step()
        expected.step()
        assert_same(optimizer, expected)
    assert {parameter.backend for parameter in optimizer.backends()} == {fused_backend}


def test_a_plan_is_kept_and_gradients_may_lie_elsewhere_be_missing_or_new(mesh: DeviceMesh) -> None:
    optimizer, expected, ours, theirs = pair(mesh)
    plans = []
    for step in range(6):
        gradients(ours, theirs, seed=step)
        if step % 2:
            ours[1].grad = theirs[1].grad = None
        optimizer.step()
        expected.step()
        plans.append(optimizer._plans)
        assert_same(optimizer, expected)
    assert plans[2] is plans[-1]  # built anew once, over the momentum buffers of the first step


def test_a_gradient_or_momentum_buffer_of_another_placement_is_redistributed(
    mesh: DeviceMesh, fused_backend: str
) -> None:
    optimizer, expected, ours, theirs = pair(mesh)
    for step, placement in enumerate((Replicate(), None, Replicate(), Replicate(), None)):
        gradients(ours, seed=step, placement=placement)
        gradients(theirs, seed=step)
        if step == 3:
            for param in ours:
                state = optimizer.state[param]
                state["momentum_buffer"] = state["momentum_buffer"].redistribute(mesh, [Replicate()])
        optimizer.step()
        expected.step()
        assert_same(optimizer, expected)
    assert {parameter.backend for parameter in optimizer.backends()} == {fused_backend}


@pytest.mark.filterwarnings("ignore:FusedSGD. torch's own code steps")
def test_a_gradient_that_is_no_dtensor_is_torchs_error_and_nothing_is_written(mesh: DeviceMesh) -> None:
    optimizer, _, ours, _ = pair(mesh)
    gradients(ours, seed=0)
    optimizer.step()
    before = [local(param).clone() for param in ours]
    gradients(ours, seed=1)
    ours[1].grad = torch.ones(7)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):  # torch's own
        optimizer.step()
    for param, kept in zip(ours, before, strict=True):
        assert_same_bits(local(param), kept, "parameter")


def test_versions_rise_as_after_any_write_in_place(mesh: DeviceMesh) -> None:
    optimizer, _, ours, _ = pair(mesh)
    gradients(ours, seed=0)
    before = [(param._version, param._local_tensor._version) for param in ours]
    optimizer.step()
    after = [(param._version, param._local_tensor._version) for param in ours]
    assert all(new > old for olds, news in zip(before, after, strict=True) for old, new in zip(olds, news, strict=True))


def test_a_graph_that_kept_a_parameter_notices_the_step(mesh: DeviceMesh) -> None:
    optimizer, _, ours, _ = pair(mesh)
    loss = (ours[0] * ours[0]).sum()
    gradients(ours, seed=0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_that_is_replaced_or_edited_is_noticed(mesh: DeviceMesh) -> None:
    optimizer, expected, ours, theirs = pair(mesh)
    edits = {
        1: lambda state, param: state[param].update(momentum_buffer=state[param]["momentum_buffer"].clone()),
        2: lambda state, param: state.pop(param),
        3: lambda state, param: state[param]["momentum_buffer"].mul_(2),
    }
    for step in range(5):
        gradients(ours, theirs, seed=step)
        for own, params in ((optimizer, ours), (expected, theirs)):
            if step in edits:
                edits[step](own.state, params[0])
            own.step()
        assert_same(optimizer, expected)


def test_a_checkpoint_goes_both_ways_and_a_copy_goes_on(mesh: DeviceMesh) -> None:
    optimizer, expected, ours, theirs = pair(mesh)
    for step in range(5):
        gradients(ours, theirs, seed=step)
        optimizer.step()
        expected.step()
        if step == 1:
            mine, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(expected.state_dict())
            optimizer.load_state_dict(other)
            expected.load_state_dict(mine)
        assert_same(optimizer, expected)
    copied, (twins, twin) = optimizer, copy.deepcopy((ours, optimizer))
    gradients(ours, twins, seed=9)
    for own in (copied, twin):
        own.step()
    for p, q in zip(ours, twins, strict=True):
        assert_same_bits(local(p), local(q), "parameter of a copy")
    assert pickle.loads(pickle.dumps(optimizer.param_groups[0]["lr"])) == OPTIONS["lr"]


def test_a_state_is_loaded_by_name(mesh: DeviceMesh) -> None:
    ours, others = parameters(mesh), parameters(mesh)
    names = [f"weight{i}" for i in range(len(ours))]
    optimizer = FusedSGD(zip(names, ours, strict=True), **OPTIONS)
    other = FusedSGD([*zip(names, others, strict=True)][::-1], **OPTIONS)
    gradients(ours, seed=1)
    optimizer.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()), by_name=True)
    for p, q in zip(ours, others, strict=True):
        buffer = other.state[q]["momentum_buffer"]
        assert buffer.placements == q.placements
        assert_same_bits(local(buffer), local(optimizer.state[p]["momentum_buffer"]), "momentum buffer")


def test_plain_parameters_and_dtensors_mix(mesh: DeviceMesh, fused_backend: str) -> None:
    optimizer, expected, ours, theirs = pair(mesh)
    plain = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    for own, param in zip((optimizer, expected), plain, strict=True):
        own.add_param_group({"params": [param], "lr": 0.5})
    for step in range(3):
        gradients(ours, theirs, seed=step)
        for param in plain:
            param.grad = torch.full((5,), float(step))
        optimizer.step()
        expected.step()
        assert_same_bits(plain[0].detach(), plain[1].detach(), "plain parameter")
        for p, q in zip(ours, theirs, strict=True):
            assert_same_bits(local(p), local(q), "parameter")
    assert {parameter.backend for parameter in optimizer.backends()} == {fused_backend}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"max_grad_norm": 0.5, "ema_decay": 0.9, "l1_penalty": 1e-3}),
        (torch.float32, {"max_grad_norm": 0.5, "norm_per_group": True, "zero_grads": True}),
        (torch.float32, {"decoupled_weight_decay": True, "momentum_dtype": torch.bfloat16}),
        (torch.bfloat16, {"master_weights": "split", "ema_decay": 0.9, "max_grad_norm": 0.5}),
        (torch.bfloat16, {"master_weights": "split24"}),
        (torch.bfloat16, {"master_weights": "full"}),
        (torch.bfloat16, {"rounding": "kahan", "zero_grads": True}),
        (torch.bfloat16, {"rounding": "stochastic"}),
        (torch.bfloat16, {"master_weights": "split", "momentum_dtype": torch.int8}),
    ],
    ids=str,
)
def test_options(mesh: DeviceMesh, dtype: torch.dtype, options: dict[str, Any], fused_backend: str) -> None:
    ours = [nn.Parameter(param.detach().to(dtype)) for param in parameters(mesh)]
    theirs = [nn.Parameter(local(param).clone()) for param in ours]
    optimizer = FusedSGD(ours, **OPTIONS, **options)
    expected = FusedSGD(theirs, **OPTIONS, **options, backend="torch")
    for step in range(3):
        gradients(ours, seed=step)
        for param, own in zip(theirs, ours, strict=True):
            assert own.grad is not None
            own.grad = (own.grad * 16).round() / 16  # whose squares add up exactly in any order
            param.grad = local(own.grad).clone()
        optimizer.step()
        expected.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_same_bits(local(p), q.detach(), "parameter")
            state, other = optimizer.state[p], expected.state[q]
            assert set(state) == set(other)
            for name, entry in state.items():
                assert entry.placements == (Shard(0),)
                assert entry.is_floating_point() or torch.equal(local(entry), other[name]), name
                if entry.is_floating_point():
                    assert_same_bits(local(entry), other[name], name)
            if "zero_grads" in options:
                assert p.grad is not None and not local(p.grad).any()
    if "max_grad_norm" in options:
        assert optimizer.grad_norm is not None and expected.grad_norm is not None
        assert_same_bits(optimizer.grad_norm, expected.grad_norm, "norm")
    assert {parameter.backend for parameter in optimizer.backends()} == {fused_backend}


def test_what_no_plan_and_no_reference_can_step_is_refused_before_anything_is_written(mesh: DeviceMesh) -> None:
    ours = [nn.Parameter(DTensor.from_local(torch.ones(3, dtype=torch.bfloat16), mesh, [Partial()]))]
    optimizer = FusedSGD(ours, **OPTIONS, rounding="stochastic")
    ours[0].grad = DTensor.from_local(torch.ones(3, dtype=torch.bfloat16), mesh, [Partial()])
    with pytest.raises(RuntimeError, match=r"group 0, parameter 0: it is a DTensor.*Partial.*redistribute it by Shard"):
        optimizer.step()
    assert_same_bits(local(ours[0]), torch.ones(3, dtype=torch.bfloat16), "parameter")


@pytest.mark.filterwarnings("ignore:FusedSGD. plain torch operations step")
@pytest.mark.parametrize("options", [{}, {"master_weights": "split"}], ids=str)
def test_master_parameters_go_out_and_in(mesh: DeviceMesh, options: dict[str, Any]) -> None:
    ours = [nn.Parameter(param.detach().to(torch.bfloat16)) for param in parameters(mesh)]
    optimizer = FusedSGD(ours, **OPTIONS, **options)
    gradients(ours, seed=0)
    optimizer.step()
    weights = optimizer.master_parameters()
    wanted = [weight.detach() * 3 for weight in weights]
    with pytest.raises(ValueError, match=r"weight 1 is not placed as its parameter.*distribute_tensor"):
        optimizer.load_master_parameters([wanted[0], *map(local, wanted[1:])])
    for weight, kept in zip(optimizer.master_parameters(), weights, strict=True):
        assert_same_bits(local(weight), local(kept), "weight")
    optimizer.load_master_parameters(wanted)
    for weight, expected in zip(optimizer.master_parameters(), wanted, strict=True):
        rounded = expected if options else expected.to(torch.bfloat16).float()
        assert_same_bits(local(weight), local(rounded), "weight")
    gradients(ours, seed=1)
    optimizer.step()
    assert all(set(optimizer.state[param]) == {"momentum_buffer", *["remainder"] * bool(options)} for param in ours)


@pytest.mark.filterwarnings("ignore:FusedSGD. plain torch operations step")
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}], ids=str)
def test_plain_state_for_dtensors_is_refused_when_it_is_loaded(mesh: DeviceMesh, options: dict[str, Any]) -> None:
    ours = parameters(mesh)
    plain = [nn.Parameter(local(param).clone()) for param in ours]
    optimizers = [FusedSGD(params, **OPTIONS, **options) for params in (ours, plain)]
    gradients(ours, seed=0)
    for param, own in zip(plain, ours, strict=True):
        assert own.grad is not None
        param.grad = local(own.grad)
    for optimizer in optimizers:
        optimizer.step()
    for optimizer, other in (optimizers, optimizers[::-1]):
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=r'the saved "\w+" is a.*set_optimizer_state_dict'):
            optimizer.load_state_dict(other.state_dict())
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for i, entries in before["state"].items():
            for name, entry in entries.items():
                assert torch.equal(after["state"][i][name], entry)
