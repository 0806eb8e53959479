"""Input that no step can use: an error that names parameter or group and the value, before anything is written. Run by
pytest.
"""

import math

import pytest
import strategies
import torch
from torch import nn

from wd_fused import FusedSGD, functional

pytestmark = pytest.mark.filterwarnings("ignore:FusedSGD. plain torch operations step", "ignore:FusedSGD. torch's own")
BF16 = torch.bfloat16


def parameter(*shape, dtype=torch.float32):
    p = nn.Parameter(torch.randn(*shape).to(strategies.DEVICE, dtype))
    p.grad = torch.randn_like(p)
    return p


def refused(optimizer, params, message, error=RuntimeError):
    """step() raises, and has written nothing."""
    before = [p.detach().clone() for p in params]
    gradients = [None if p.grad is None else p.grad.detach().clone() for p in params]
    with pytest.raises(error, match=message):
        optimizer.step()
    for p, old, gradient in zip(params, before, gradients, strict=True):
        assert p.is_meta or torch.equal(p, old)
        assert gradient is None or p.grad.is_meta or torch.equal(p.grad, gradient)


# Storages that are shorter than what lies in them


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("what", ["parameter", "gradient", "momentum buffer"])
def test_a_tensor_beyond_the_end_of_its_storage_is_an_error(what, size, steps, fused_backend):
    first, second = params = [parameter(300), parameter(300)]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=fused_backend)
    for _ in range(steps):
        optimizer.step()
    if what == "momentum buffer" and steps == 0:
        optimizer.state[second]["momentum_buffer"] = torch.randn_like(second)
    tensors = {"parameter": second, "gradient": second.grad}
    tensor = tensors[what] if what in tensors else optimizer.state[second]["momentum_buffer"]
    whole = tensor.detach().clone()
    tensor.untyped_storage().resize_(size)
    before = first.detach().clone()
    with pytest.raises(RuntimeError, match=f"group 0, parameter 1.*storage of {size} bytes, .*need 1200"):
        optimizer.step()
    assert torch.equal(first, before)
    tensor.untyped_storage().resize_(1200)
    tensor.detach().copy_(whole)
    optimizer.step()
    assert not torch.equal(first, before)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("dtype", "options", "name"),
    [
        (torch.float32, {}, "momentum_buffer"),
        (torch.float32, {"ema_decay": 0.9}, "ema"),
        (torch.float32, {"momentum_dtype": torch.int8}, "momentum_scale"),
        (BF16, {"master_weights": "full"}, "master"),
        (BF16, {"master_weights": "split"}, "remainder"),
        (BF16, {"rounding": "kahan"}, "compensation"),
    ],
)
def test_an_entry_beyond_the_end_of_its_storage_is_an_error(dtype, options, name, backend):
    params = [parameter(300, dtype=dtype), parameter(300, dtype=dtype)]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=backend, **options)
    optimizer.step()
    optimizer.state[params[1]][name].untyped_storage().resize_(1)
    refused(optimizer, params, "group 0, parameter 1.*storage of 1 bytes")


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}])
@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_torchs_code_and_the_reference_read_no_further_than_the_storage(what, options):
    params = [parameter(300), parameter(300)]
    optimizer = FusedSGD(params, lr=0.1, backend="torch", **options)
    optimizer.step()
    tensor = params[1] if what == "parameter" else params[1].grad
    tensor.untyped_storage().resize_(4)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"group 0, parameter 1.*storage of 4 bytes"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_functional_step_reads_no_further_than_the_storage(backend):
    p, grad = torch.ones(300), torch.ones(300)
    grad.untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match=r"parameter 0.*storage of 4 bytes|tensor 0.*storage of 4 bytes"):
        functional.sgd([p], [grad], [None], lr=0.1, backend=backend)
    assert torch.equal(p, torch.ones(300))


# A group's numbers


NUMBERS = {
    "none": ("lr", None, TypeError, "lr=None"),
    "text": ("lr", "x", TypeError, "lr='x'"),
    "text that is a number": ("lr", "0.1", TypeError, "lr='0.1'"),
    "complex": ("weight_decay", 0.1j, TypeError, "weight_decay=0.1j"),
    "several": ("lr", torch.ones(2), (TypeError, RuntimeError), r"lr=tensor\(\[1., 1.\]\)"),
    "no momentum": ("momentum", None, TypeError, "momentum=None"),
    "a list": ("dampening", [0.0], TypeError, r"dampening=\[0.0\]"),
    "beyond a float": ("momentum", 10**400, RuntimeError, "momentum=a number of"),
    "beyond float32": ("momentum", 1e300, RuntimeError, r"momentum=1e\+300"),
    "dampening beyond float32": ("dampening", -1e300, RuntimeError, "dampening"),
}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}])
@pytest.mark.parametrize(("name", "value", "error", "message"), NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("code", ["fused", "torch's"])
def test_what_is_no_number_of_a_group_is_named(code, name, value, error, message, options, fused_backend):
    backend = fused_backend if code == "fused" else "torch"
    params = [parameter(3), parameter(3)]
    optimizer = FusedSGD([{"params": [p]} for p in params], lr=0.1, momentum=0.9, backend=backend, **options)
    optimizer.step()
    optimizer.param_groups[1][name] = value
    refused(optimizer, params, f"group 1: .*{message}", error)


def test_a_functional_step_names_what_is_no_number():
    p = torch.ones(3)
    with pytest.raises(TypeError, match="lr=None"):
        functional.sgd([p], [torch.ones(3)], [None], lr=None)
    with pytest.raises(RuntimeError, match=r"momentum=1e\+300"):
        functional.sgd([p], [torch.ones(3)], [None], lr=0.1, momentum=1e300, backend="torch")
    assert torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("options", "edit", "message"),
    [
        ({"l1_penalty": 1e300}, {}, r"l1_penalty=1e\+300"),
        ({"decoupled_weight_decay": 1e30}, {"lr": 1e10}, "1 - lr"),
        ({"decoupled_weight_decay": True}, {"weight_decay": None}, "weight_decay=None"),
        ({"decoupled_weight_decay": True, "decouple_lr": True}, {"initial_lr": None}, "initial_lr=None"),
        ({"decoupled_weight_decay": True, "decouple_lr": True}, {"lr": None}, "lr=None"),
        ({"ema_decay": 0.9}, {"ema_updates": None}, "ema_updates=None: use a whole number"),
        ({"ema_decay": 0.9, "ema_warmup": True}, {"ema_updates": 1.5}, "ema_updates=1.5"),
        ({"max_grad_norm": 1.0}, {"max_grad_norm": 10**400}, "max_grad_norm=a number of 1329 bits"),
        ({"l1_penalty": 1.0}, {"l1_penalty": 10**400}, "l1_penalty=a number of 1329 bits"),
        ({"max_grad_norm": 1.0}, {"max_grad_norm": "1"}, "max_grad_norm='1'"),
    ],
)
def test_a_number_of_an_option_that_cannot_be_used_is_named_with_its_group(options, edit, message, backend):
    params = [parameter(3), parameter(3)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], **options}]
    optimizer = FusedSGD(groups, lr=0.1, weight_decay=0.1, backend=backend)
    if edit:
        optimizer.step()
    optimizer.param_groups[1].update(edit)
    refused(optimizer, params, f"group 1: .*{message}", (TypeError, ValueError, RuntimeError))


def test_a_count_of_roundings_that_is_no_number_is_named_and_can_be_mended():
    (p,), (q,) = params = [parameter(30, dtype=BF16)], [nn.Parameter(torch.zeros(30).to(BF16))]
    q.data.copy_(p)
    q.grad = p.grad.clone()
    ours, theirs = (FusedSGD(each, lr=0.1, rounding="stochastic") for each in params)
    ours.step()
    theirs.step()
    ours.param_groups[0]["rounding_steps"] = None
    refused(ours, [p], "group 0: rounding_steps=None", ValueError)
    ours.param_groups[0]["rounding_steps"] = 1
    ours.step()
    theirs.step()
    assert torch.equal(p, q)


def test_a_number_beyond_a_float_is_refused_at_construction():
    with pytest.raises(ValueError, match="max_grad_norm=a number of 1329 bits: use a Python number"):
        FusedSGD([parameter(3)], lr=0.1, max_grad_norm=10**400)


# Tensors that cannot be written, or have no numbers


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"ema_decay": 0.9}])
@pytest.mark.parametrize("what", ["parameter", "momentum buffer"])
def test_what_was_made_in_inference_mode_is_named(what, options):
    params = [parameter(3), parameter(3)]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend="torch", **options)
    with torch.inference_mode():
        made = nn.Parameter(torch.ones(3)) if what == "parameter" else torch.ones(3)
    if what == "parameter":
        made.grad = torch.ones(3)
        params[1] = optimizer.param_groups[0]["params"][1] = made
    else:
        optimizer.state[params[1]]["momentum_buffer"] = made
    if what == "parameter" or not options:  # else the step takes a copy
        refused(
            optimizer, params, "group 0, parameter 1.*it was made in inference mode|1: its momentum buffer was made"
        )
    else:
        optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_zeros_are_written_into_a_gradient_of_inference_mode(backend):
    params = [parameter(3), parameter(3)]
    with torch.inference_mode():
        params[0].grad = torch.ones(3)
    before = params[0].detach().clone()
    optimizer = FusedSGD(params, lr=0.1, zero_grads=True, backend=backend)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), before - 0.1)
    assert all(torch.equal(p.grad, torch.zeros(3)) for p in params)


def test_a_gradient_of_inference_mode_is_unscaled():
    params = [parameter(3), parameter(3)]
    with torch.inference_mode():
        params[1].grad = torch.full((3,), 8.0)
    before = params[1].detach().clone()
    optimizer = FusedSGD(params, lr=1.0, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(params[1].detach(), before - 1)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_gradient_without_numbers_cannot_be_clipped(backend):
    p, on_meta = parameter(3), nn.Parameter(torch.ones(3, device="meta"))
    on_meta.grad = torch.ones(3, device="meta")
    optimizer = FusedSGD([p, on_meta], lr=0.1, max_grad_norm=1.0, backend=backend)
    refused(optimizer, [p, on_meta], r"group 0, parameter 1.*gradient is on meta.*max_grad_norm=1\.0")


# State


@pytest.mark.parametrize(
    ("dtype", "options", "name", "value", "message"),
    [
        (torch.float32, {}, "momentum_buffer", "x", "momentum buffer is a str|momentum_buffer.* is a str"),
        (torch.float32, {"max_grad_norm": 1.0}, "momentum_buffer", "x", "is a str, not a Tensor"),
        (torch.float32, {"ema_decay": 0.9}, "ema", torch.ones(300).long(), '"ema" is torch.int64'),
        (torch.float32, {"ema_decay": 0.9}, "ema", torch.ones(300).to_sparse(), '"ema" is torch.sparse_coo'),
        (torch.float32, {"ema_decay": 0.9}, "ema", torch.ones(1).expand(300), '"ema" is expanded'),
        (torch.float32, {"momentum_dtype": torch.int8}, "momentum_scale", torch.ones(3).long(), "scale.*torch.int64"),
        (BF16, {"master_weights": "full"}, "master", torch.ones(300).double(), '"master" is torch.float64'),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_state_that_no_step_can_use_is_named(backend, dtype, options, name, value, message):
    params = [parameter(300, dtype=dtype), parameter(300, dtype=dtype)]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=backend, **options)
    optimizer.step()
    optimizer.state[params[1]][name] = value
    refused(optimizer, params, f"group 0, parameter 1: .*({message})")


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("options", [{"master_weights": "full"}, {"rounding": "kahan"}, {"momentum_dtype": torch.int8}])
def test_entries_of_none_are_made_anew(options, backend):
    p = parameter(300, dtype=BF16)
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9, ema_decay=0.9, backend=backend, **options)
    optimizer.step()
    state = optimizer.state[p]
    before = set(state)
    state.update(dict.fromkeys(state))
    optimizer.step()
    assert set(state) == before and all(isinstance(entry, torch.Tensor) for entry in state.values())


# The initial learning rate


@pytest.mark.parametrize("has_scheduler", [False, True])
def test_decouple_lr_that_comes_on_again_takes_note_of_the_rate_anew_unless_it_was_given(has_scheduler):
    p = parameter(3)
    p.grad.zero_()
    optimizer = FusedSGD([p], lr=1.0, weight_decay=0.1, decoupled_weight_decay=True)
    group = optimizer.param_groups[0]
    if has_scheduler:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for lr, expected in ((1.0, 0.9), (0.1, 0.99 if has_scheduler else 0.9)):
        group.update(lr=lr, decouple_lr=True)
        before = p.detach().clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), before * expected)
        group["decouple_lr"] = False
        optimizer.step()


def test_decouple_lr_of_the_constructor_comes_on_again_at_another_rate():
    p = parameter(3)
    p.grad.zero_()
    optimizer = FusedSGD([p], lr=1.0, weight_decay=0.1, decoupled_weight_decay=True, decouple_lr=True)
    group = optimizer.param_groups[0]
    group["lr"] = 0.5
    optimizer.step()
    assert group["initial_lr"] == 1.0
    group["decouple_lr"] = False
    optimizer.step()
    group.update(lr=0.25, decouple_lr=True)
    optimizer.step()
    assert group["initial_lr"] == 0.25 and math.isclose(optimizer._reader._step.groups[0].decoupled, 0.4)
