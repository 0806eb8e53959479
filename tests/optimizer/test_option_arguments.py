"""FusedSGD's options as a user meets them: what is refused, what is kept in state_dict, pickle and copy, the
average and the master weights, and what happens without a fused backend. Run by pytest.
"""

import copy
import io
import math
import pickle
import threading
import warnings
import weakref
from fractions import Fraction

import numpy
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from wd_fused import FusedSGD, reference
from wd_fused.options import spec

pytestmark = pytest.mark.filterwarnings("ignore:FusedSGD. plain torch operations step")

BF16, F16 = torch.bfloat16, torch.float16


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(*shape).to(dtype))


def with_gradients(*parameters):
    for p in parameters:
        p.grad = torch.randn_like(p)
    return list(parameters)


def stepped(params, steps=3, **options):
    torch.manual_seed(1)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, **options)
    for _ in range(steps):
        with_gradients(*params)
        optimizer.step()
    return optimizer


EVERY_OPTION = {
    "clip": (torch.float32, {"max_grad_norm": 0.5}),
    "L1 and decoupled decay": (torch.float64, {"l1_penalty": 0.1, "decoupled_weight_decay": 0.1, "decouple_lr": True}),
    "average": (torch.float32, {"ema_decay": 0.9, "ema_warmup": True}),
    "average in bfloat16": (BF16, {"ema_decay": 0.9, "ema_dtype": BF16}),
    "full": (F16, {"master_weights": "full", "ema_decay": 0.9}),
    "split": (BF16, {"master_weights": "split", "ema_decay": 0.9}),
    "split24": (BF16, {"master_weights": "split24"}),
    "kahan": (BF16, {"rounding": "kahan"}),
    "stochastic": (BF16, {"rounding": "stochastic", "rounding_seed": 7}),
    "int8 momentum": (torch.float32, {"momentum_dtype": torch.int8}),
    "bfloat16 momentum": (torch.float32, {"momentum_dtype": BF16}),
    "zeros": (torch.float32, {"zero_grads": True}),
}
every_option = pytest.mark.parametrize(("dtype", "options"), EVERY_OPTION.values(), ids=EVERY_OPTION)


# What is refused


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float32, {"max_grad_norm": -1.0}, r"max_grad_norm=-1\.0: use a number >= 0"),
        (torch.float32, {"max_grad_norm": math.nan}, "max_grad_norm=nan"),
        (torch.float32, {"max_grad_norm": "1"}, "max_grad_norm='1'"),
        (torch.float32, {"max_grad_norm": False}, "max_grad_norm=False: use a number, or None for none"),
        (torch.float32, {"l1_penalty": True}, "l1_penalty=True"),
        (torch.float32, {"ema_decay": False}, "ema_decay=False: use a number"),
        (
            torch.float32,
            {"decoupled_weight_decay": numpy.True_},
            "decoupled_weight_decay=.*True.*: use a Python",
        ),
        (torch.float32, {"error_if_nonfinite": True}, "error_if_nonfinite=True is for a norm: give max_grad_norm"),
        (torch.float32, {"norm_per_group": True}, "norm_per_group=True is for a norm: give max_grad_norm"),
        (torch.float32, {"ema_buffers": 5, "ema_decay": 0.9}, "a module or a list of tensors, not 5"),
        (torch.float32, {"ema_buffers": torch.ones(2), "ema_decay": 0.9}, "a module or a list of tensors, not tensor"),
        (torch.float32, {"l1_penalty": -0.1}, r"l1_penalty=-0\.1"),
        (torch.float32, {"l1_penalty": math.nan}, "l1_penalty=nan"),
        (torch.float32, {"l1_penalty": None}, "l1_penalty=None"),
        (torch.float32, {"decoupled_weight_decay": -0.1}, r"decoupled_weight_decay=-0\.1: use True"),
        (torch.float32, {"decouple_lr": True}, "give decoupled_weight_decay=True as well"),
        (torch.float32, {"decouple_lr": 1, "decoupled_weight_decay": True}, "decouple_lr=1: use True or False"),
        (torch.float32, {"ema_decay": 1.0}, r"ema_decay=1\.0: use a number in \[0, 1\)"),
        (torch.float32, {"ema_decay": -0.1}, r"ema_decay=-0\.1"),
        (torch.float32, {"ema_decay": math.nan}, "ema_decay=nan"),
        (torch.float32, {"ema_warmup": True}, "give ema_decay as well"),
        (BF16, {"ema_dtype": BF16}, "ema_dtype='bfloat16' is for an average: give ema_decay as well"),
        (BF16, {"ema_dtype": "half", "ema_decay": 0.9}, "ema_dtype='half': choose one of None, 'float32'"),
        (torch.float64, {"ema_dtype": torch.float64, "ema_decay": 0.9}, "ema_dtype='float64': choose one of"),
        (F16, {"ema_dtype": BF16, "ema_decay": 0.9}, "ema_dtype='bfloat16' is for parameters of that dtype, not f"),
        (torch.float32, {"ema_buffers": nn.BatchNorm1d(2)}, "ema_buffers are averaged with ema_decay"),
        (torch.float32, {"ema_buffers": [3], "ema_decay": 0.9}, "element 0 is 3"),
        (torch.float32, {"master_weights": "half"}, "master_weights='half': choose one of None, 'full', 'split'"),
        (torch.float32, {"master_weights": "full"}, "float16 and bfloat16 parameters, not for float32; parameter 0"),
        (torch.float64, {"master_weights": "full"}, "not for float64"),
        (F16, {"master_weights": "split"}, r"'split' is for bfloat16 parameters \(master_weights=\"full\""),
        (torch.float32, {"momentum_dtype": torch.float16}, "momentum_dtype='float16': choose one of"),
        (torch.float64, {"momentum_dtype": torch.float32}, "momentum_dtype='float32' is for.*not for float64"),
        (torch.float32, {"rounding": "up"}, "rounding='up': choose one of 'nearest'"),
        (
            torch.float32,
            {"rounding": "stochastic"},
            "rounding='stochastic' is for bfloat16 parameters, not for float32",
        ),
        (F16, {"rounding": "stochastic"}, "not for float16"),
        (torch.float32, {"rounding": "kahan"}, "rounding='kahan' is for float16 and bfloat16"),
        (BF16, {"rounding": "kahan", "master_weights": "full"}, "rounding='kahan' cannot be used with master_weights"),
        (BF16, {"rounding": "stochastic", "master_weights": "split"}, "rounding='stochastic' cannot be used with"),
        (torch.float32, {"rounding_seed": 1.5}, r"rounding_seed=1\.5: use a whole number"),
        (torch.float32, {"norm_per_group": 1}, "norm_per_group=1"),
        (torch.float32, {"error_if_nonfinite": "yes"}, "error_if_nonfinite='yes'"),
        (
            torch.float32,
            {"max_grad_norm": 1.0, "process_group": "all"},
            "process_group='all': call .*init_process_group",
        ),
        (torch.float32, {"zero_grads": 1}, "zero_grads=1"),
        (torch.float32, {"zero_grads": True, "differentiable": True}, "differentiable=True cannot be used with"),
        (torch.complex64, {"l1_penalty": 0.1}, r"l1_penalty=0\.1 needs the sign.*complex64"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_a_value_error_that_names_it(dtype, options, message):
    p = parameter(3, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        FusedSGD([p], lr=0.1, **options)
    own = {name: value for name, value in options.items() if name in spec.NAMES}
    if own == options:
        optimizer = FusedSGD([parameter(3)], lr=0.1)
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [p], **own})
        assert len(optimizer.param_groups) == 1


def test_an_initial_learning_rate_of_zero_cannot_be_divided_by():
    with pytest.raises(ValueError, match="initial learning rate, which is 0"):
        FusedSGD([parameter(3)], lr=0.0, weight_decay=0.1, decoupled_weight_decay=True, decouple_lr=True)


def test_an_option_edited_to_nonsense_is_refused_before_anything_is_written():
    p = with_gradients(parameter(3))[0]
    optimizer = FusedSGD([p], lr=0.1, max_grad_norm=1.0)
    before = p.detach().clone()
    optimizer.param_groups[0]["max_grad_norm"] = -1.0
    with pytest.raises(ValueError, match=r"max_grad_norm=-1\.0"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a fused one"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.filterwarnings("ignore:FusedSGD")
def test_what_a_parameter_has_become_is_checked_against_the_options(backend, beside):
    p, other = with_gradients(parameter(4, dtype=BF16), parameter(3))
    groups = [{"params": [p], "master_weights": "split"}, {"params": [other]}]
    optimizer = FusedSGD(groups[: 1 + beside], lr=0.1, momentum=0.9, backend=backend)
    optimizer.step()
    p.grad = None
    p.data = torch.full((4,), 1 / 3)
    p.grad_dtype = torch.float32
    p.grad = torch.zeros(4)
    with pytest.raises(
        ValueError, match=r"group 0: master_weights='split' is for bfloat16 parameters, not for float32"
    ):
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((4,), 1 / 3))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_norm_and_average_follow_a_parameter_that_was_cast(backend):
    p = with_gradients(parameter(4))[0]
    optimizer = stepped([p], max_grad_norm=1.0, ema_decay=0.5, backend=backend)
    assert optimizer.grad_norm.dtype == torch.float32
    p.grad = None
    p.data = p.data.double()
    p.grad_dtype = torch.float64
    p.grad = torch.full((4,), 0.5, dtype=torch.float64)
    optimizer.step()
    assert optimizer.grad_norm.dtype == torch.float64 and optimizer.grad_norm == 1
    assert optimizer.state[p]["ema"].dtype == torch.float64


def test_an_option_that_comes_as_another_key_goes_is_read():
    p = with_gradients(parameter(3))[0]
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9)
    group = optimizer.param_groups[0]
    group["initial_lr"] = 0.1
    optimizer.step()
    del group["initial_lr"]
    group["max_grad_norm"] = 0.0
    optimizer.state[p]["momentum_buffer"].zero_()
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before) and optimizer.grad_norm > 0


def test_decay_without_the_learning_rate_takes_note_of_the_first_one_it_sees():
    p = parameter(3)
    p.grad = torch.zeros(3)
    optimizer = FusedSGD([p], lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)
    group = optimizer.param_groups[0]
    group["decouple_lr"] = True
    optimizer.step()
    assert group["initial_lr"] == 0.1
    group["lr"] = 0.01
    optimizer.backends()  # reads the groups anew
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), before * 0.99)


def test_decay_that_would_turn_weights_round_is_refused_before_anything_is_written():
    p = with_gradients(parameter(3))[0]
    optimizer = FusedSGD([p], lr=0.1, weight_decay=0.05, decoupled_weight_decay=True, decouple_lr=True)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 2.5  # as of a schedule that has begun at a 25th of its highest
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"group 0: decouple_lr=True with lr=2\.5, initial_lr=0\.1 and a weight"):
        optimizer.step()
    assert torch.equal(p, before)
    optimizer.param_groups[0]["initial_lr"] = 2.5
    optimizer.step()


def test_options_that_are_off_leave_no_trace():
    model = nn.Linear(3, 2)
    off = {"max_grad_norm": None, "l1_penalty": 0.0, "ema_decay": None, "zero_grads": False, "rounding": "nearest"}
    ours, theirs = FusedSGD([{"params": model.parameters(), **off}], **off), torch.optim.SGD(model.parameters())
    assert ours.defaults == theirs.defaults and ours.state_dict() == theirs.state_dict()
    assert repr(ours) == repr(theirs).replace("SGD", "FusedSGD")


def test_groups_have_options_of_their_own_and_the_constructors_where_they_name_none():
    a, b, c = parameter(3), parameter(3), parameter(3)
    groups = [{"params": [a]}, {"params": [b], "ema_decay": None, "l1_penalty": 0.5}]
    optimizer = FusedSGD(groups, lr=0.1, ema_decay=0.9)
    optimizer.add_param_group({"params": [c], "zero_grads": True})
    keys = [{k: v for k, v in group.items() if k in spec.NAMES} for group in optimizer.param_groups]
    assert keys == [{"ema_decay": 0.9}, {"l1_penalty": 0.5}, {"ema_decay": 0.9, "zero_grads": True}]


def test_a_sparse_gradient_is_an_error_where_options_are_on():
    embedding = nn.Embedding(7, 3, sparse=True)
    embedding(torch.tensor([1, 4])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 0: .*sparse.*ema_decay=0\.9.*group without them"):
        FusedSGD(embedding.parameters(), lr=0.1, ema_decay=0.9).step()
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("word", [torch.ones(1, dtype=torch.float64), torch.ones(2), 1.0], ids=str)
def test_a_scale_of_another_type_is_named_before_anything_is_written(backend, name, word):
    params = with_gradients(parameter(3), parameter(3, dtype=torch.complex64))
    groups = [{"params": [p], "ema_decay": 0.9} for p in params]
    optimizer = FusedSGD(groups, lr=0.1, backend=backend)
    before = [p.detach().clone() for p in params]
    setattr(optimizer, name, word)
    with pytest.raises(TypeError, match=f"{name} must be a .*Tensor"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_default_device_changes_nothing(backend):
    params = with_gradients(parameter(3), parameter(3, dtype=torch.complex64))
    groups = [{"params": [p]} for p in params]
    optimizer = FusedSGD(
        groups, lr=0.1, momentum=0.9, max_grad_norm=1.0, norm_per_group=True, ema_decay=0.9, backend=backend
    )
    with torch.device("meta"):
        for _ in range(3):
            optimizer.step()
    assert optimizer.grad_norm.device.type == "cpu" and optimizer.grad_norm.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("options", [{"error_if_nonfinite": True}, {}], ids=["raises", "skipped"])
def test_gradients_are_as_they_were_after_a_step_that_is_not_done(backend, options):
    a, b = with_gradients(parameter(3), parameter(3))
    b.grad[0] = math.inf
    groups = [{"params": [a]}, {"params": [b], "max_grad_norm": 1.0}]
    optimizer = FusedSGD(groups, lr=0.1, backend=backend, **options)
    optimizer.grad_scale = torch.tensor(4.0)
    if options:
        optimizer.found_inf = torch.tensor(0.0)
    before = [t.detach().clone() for t in (a, b, a.grad, b.grad)]
    if options:
        with pytest.raises(RuntimeError, match="non-finite"):
            optimizer.step()
    else:
        optimizer.step()
    assert all(torch.equal(t, old) for t, old in zip((a, b, a.grad, b.grad), before, strict=True))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", ["parameter", "ema", "momentum_buffer"])
def test_what_shares_memory_within_itself_is_an_error_before_anything_is_written(backend, name):
    first, second = parameter(3), parameter(3)
    if name == "parameter":
        second = nn.Parameter(torch.zeros(1).expand(3))
    with_gradients(first, second)
    optimizer = FusedSGD([first, second], lr=0.1, momentum=0.9, ema_decay=0.9, backend=backend)
    if name != "parameter":
        optimizer.step()
        optimizer.state[second][name] = torch.zeros(1).expand(3)
    before = first.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 1: .*(share memory|expanded|not a dense)"):
        optimizer.step()
    assert torch.equal(first, before)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("other", ["the parameter", 'its "momentum_buffer"'])
def test_an_average_that_shares_memory_with_another_tensor_is_an_error(backend, other):
    p = parameter(3)
    optimizer = stepped([p], ema_decay=0.9, backend=backend)
    optimizer.state[p]["ema"] = p.detach() if other == "the parameter" else optimizer.state[p]["momentum_buffer"]
    with pytest.raises(RuntimeError, match=f'"ema" shares memory with {other}; del'):
        optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@every_option
def test_a_step_in_inference_mode_keeps_what_later_steps_can_write(backend, dtype, options):
    params = [parameter(300, dtype=dtype)]
    with torch.inference_mode():
        optimizer = stepped(params, steps=2, backend=backend, **options)
    with_gradients(*params)
    optimizer.step()
    if "ema_decay" in options:
        with torch.inference_mode():
            other = FusedSGD(params, lr=0.1, backend=backend, **options)
            with other.swap_ema():  # an evaluation before the first step
                pass
        other.step()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_group_that_clips_without_gradients_has_the_norm_zero(backend):
    a, b = with_gradients(parameter(3))[0], parameter(3)
    groups = [{"params": [a]}, {"params": [b]}, {"params": []}, {"params": [parameter(1)], "max_grad_norm": None}]
    optimizer = FusedSGD(groups, lr=0.1, max_grad_norm=1.0, norm_per_group=True, backend=backend)
    for _ in range(3):
        optimizer.step()
        norm = optimizer.grad_norm
        assert norm[0] > 0 and norm[1] == 0 and norm[2:].isnan().all()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("skips", ["found_inf", "its norm"])
def test_gradients_of_a_skipped_step_are_zeroed_as_well(backend, skips):
    p = with_gradients(parameter(3))[0]
    optimizer = FusedSGD([p], lr=0.1, max_grad_norm=1.0, zero_grads=True, backend=backend)
    optimizer.step()
    for _ in range(2):
        p.grad[1] = math.inf
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), None
        if skips == "found_inf":
            optimizer.found_inf = torch.tensor(1.0)
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(p, before) and not p.grad.any()


def test_the_last_norm_keeps_no_plan_alive():
    p = parameter(300)
    optimizer = stepped([p], max_grad_norm=1.0, ema_decay=0.9)
    norm, average = optimizer.grad_norm, weakref.ref(optimizer.state[p]["ema"])
    optimizer.param_groups[0].update(max_grad_norm=None, ema_decay=None)
    optimizer.step()
    assert average() is None and torch.equal(optimizer.grad_norm, norm)


# Options that are edited on the way


@pytest.mark.parametrize("off", ["popped", "set to the value that is off"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@every_option
def test_options_that_are_turned_off_leave_a_plain_step(backend, off, dtype, options):
    options = {name: value for name, value in options.items() if name in spec.NAMES}
    params = [parameter(300, dtype=dtype)]
    optimizer = stepped(params, backend=backend, **options)
    group = optimizer.param_groups[0]
    for name in options:
        if off == "popped":
            del group[name]
        else:
            group[name] = getattr(spec.Options(), name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with_gradients(*params)
            optimizer.step()
    state = optimizer.state[params[0]]
    assert state.keys() == {"momentum_buffer"} and state["momentum_buffer"].dtype == dtype
    assert "ema_updates" not in group


KINDS = {
    "full": {"master_weights": "full"},
    "split": {"master_weights": "split"},
    "split24": {"master_weights": "split24"},
    "kahan": {"rounding": "kahan"},
}


@pytest.mark.parametrize("how", ["edited", "loaded"])
@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_weights_are_converted_to_another_form_as_exactly_as_it_can(old, new, how):
    p = nn.Parameter(torch.linspace(1, 2, 65).repeat(5).to(BF16))
    optimizer = FusedSGD([p], lr=2**-10, **KINDS[old])
    p.grad = torch.linspace(0, 8, 9).to(BF16).repeat(37)[:325]  # to ties, among others
    optimizer.step()
    exact = optimizer.master_parameters()[0]
    if how == "loaded":
        saved = optimizer.state_dict()
        optimizer = FusedSGD([p], lr=0.0, **KINDS[new])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.load_state_dict(saved)
    else:
        optimizer.param_groups[0].update({"master_weights": None, "rounding": "nearest"} | KINDS[new])
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    precision = 2**-15 if new in ("split24", "kahan") else 2**-23
    torch.testing.assert_close(optimizer.master_parameters()[0], exact, rtol=precision, atol=0)
    assert len(optimizer.state[p]) == 1


def test_exact_weights_are_loaded_into_the_form_that_a_group_has_now():
    p = parameter(300, dtype=BF16)
    optimizer = stepped([p], master_weights="split24")
    weights = torch.randn(300)
    optimizer.param_groups[0]["master_weights"] = "split"
    optimizer.load_master_parameters([weights])
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.master_parameters()[0], weights)


def test_complex_parameters_are_clipped_and_averaged():
    p = parameter(5, dtype=torch.complex64)
    optimizer = stepped([p], max_grad_norm=0.5, ema_decay=0.5, decoupled_weight_decay=0.1)
    (average,) = optimizer.ema_parameters()
    assert average.dtype == torch.complex64 and not torch.equal(average, p) and optimizer.grad_norm > 0


def test_a_compiler_runs_a_step_with_options_as_it_is():
    ours, expected = [parameter(5)], None
    expected = [nn.Parameter(ours[0].detach().clone())]
    runs = [(p, FusedSGD(p, lr=0.1, momentum=0.9, max_grad_norm=0.1, ema_decay=0.9)) for p in (ours, expected)]
    compiled = torch.compile(runs[0][1].step, backend="eager")
    for _ in range(2):
        for params, _ in runs:
            params[0].grad = torch.ones(5)
        compiled()
        runs[1][1].step()
    assert torch.equal(ours[0], expected[0]) and runs[0][1].param_groups[0]["ema_updates"] == 2


# state_dict, pickle, copies


def states(optimizer, params):
    return [dict(optimizer.state[p]) for p in params]


def assert_same_states(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, entry in mine.items():
            assert entry.dtype == other[name].dtype and torch.equal(entry, other[name]), name


@every_option
def test_a_state_dict_keeps_every_bit_and_the_training_goes_on(dtype, options, tmp_path):
    params = [parameter(300, dtype=dtype), parameter(4, 5, dtype=dtype)]
    first = stepped(params, weight_decay=0.01, **options)
    torch.save(first.state_dict(), tmp_path / "state")
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    second = FusedSGD(copies, lr=7.0, weight_decay=0.5, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert_same_states(states(first, params), states(second, copies))
    for optimizer, own in ((first, params), (second, copies)):
        torch.manual_seed(3)
        for _ in range(2):
            with_gradients(*own)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    assert_same_states(states(first, params), states(second, copies))
    assert first.state_dict()["param_groups"] == second.state_dict()["param_groups"]


@every_option
def test_pickle_and_deepcopy_go_on_with_the_same_bits(dtype, options):
    params = [parameter(300, dtype=dtype)]
    optimizer = stepped(params, **options)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for each in (optimizer, *copies):
        (p,) = each.param_groups[0]["params"]
        torch.manual_seed(3)
        with_gradients(p)
        each.step()
        assert torch.equal(p, params[0])
        assert_same_states(states(optimizer, params), states(each, [p]))
        assert each.defaults == optimizer.defaults
        each.add_param_group({"params": [parameter(2, dtype=dtype)]})
        assert {k: each.param_groups[1].get(k) for k in spec.NAMES} == {
            k: optimizer.param_groups[0].get(k) for k in spec.NAMES
        }


# What stands in defaults and groups


@every_option
def test_what_stands_in_the_groups_is_plain(dtype, options):
    """So that torch.load(weights_only=True) and every function of torch.distributed.checkpoint take it."""
    model = nn.Linear(3, 2).to(dtype)
    params = list(model.parameters())
    optimizer = stepped(params, **options)
    for group in (optimizer.defaults, *optimizer.param_groups, *optimizer.state_dict()["param_groups"]):
        kinds = {name: type(value) for name, value in group.items() if name != "params"}
        assert set(kinds.values()) <= {bool, int, float, str, type(None)}, kinds
    for flat in (False, True):
        choice = StateDictOptions(cpu_offload=True, flatten_optimizer_state_dict=flat)
        saved = get_optimizer_state_dict(model, optimizer, options=choice)
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        fresh = FusedSGD(params, lr=0.1, momentum=0.9, **options)
        set_optimizer_state_dict(model, fresh, torch.load(file, weights_only=True), options=choice)
        assert fresh.param_groups == optimizer.param_groups


@pytest.mark.parametrize("give", [torch.int8, "int8"], ids=str)
@pytest.mark.parametrize("edit", [False, True])
def test_a_momentum_dtype_is_a_dtype_or_its_name(give, edit):
    p = parameter(300)
    optimizer = stepped([p], **({} if edit else {"momentum_dtype": give}))
    optimizer.param_groups[0]["momentum_dtype"] = give
    with_gradients(p)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.int8
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["momentum_dtype"] == "int8"
    saved["param_groups"][0]["momentum_dtype"] = torch.int8  # as earlier versions saved it
    other = FusedSGD([p], lr=0.1, momentum=0.9, momentum_dtype=give)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved)
    assert other.param_groups[0]["momentum_dtype"] == "int8"
    assert torch.equal(other.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])


@pytest.mark.parametrize("number", [numpy.float32, numpy.float64, numpy.float16, Fraction, numpy.array])
def test_numbers_of_other_libraries_become_pythons(number):
    options = {"max_grad_norm": 0.5, "l1_penalty": 0.25, "decoupled_weight_decay": 0.125, "ema_decay": 0.75}
    optimizer = FusedSGD([parameter(3)], lr=0.1, **{name: number(value) for name, value in options.items()})
    for group in (optimizer.defaults, optimizer.param_groups[0], optimizer.state_dict()["param_groups"][0]):
        assert {name: group[name] for name in options} == options
        assert {type(group[name]) for name in options} == {float}


WHOLE = {
    "backend": "torch",
    "numerics": "opmath",
    "norm_per_group": True,
    "error_if_nonfinite": True,
    "rounding_seed": 7,
    "report_numerics": 5,
}


def settings_of(optimizer):
    every = optimizer._settings.get("report_numerics", False)
    return (optimizer._backend, optimizer._numerics, every, *optimizer._reader_settings)


REMADE = {
    "defaults": lambda optimizer, params: type(optimizer)(params, **optimizer.defaults),
    "groups": lambda optimizer, params: type(optimizer)(optimizer.param_groups),
    "copied groups": lambda optimizer, params: type(optimizer)([{**group} for group in optimizer.param_groups]),
    "an iterator of groups": lambda optimizer, params: type(optimizer)(iter(optimizer.param_groups)),
    "both": lambda optimizer, params: type(optimizer)(optimizer.param_groups, **optimizer.defaults),
    "pickle": lambda optimizer, params: pickle.loads(pickle.dumps(optimizer)),
    "the copy of a copy": lambda optimizer, params: FusedSGD(copy.deepcopy(optimizer).param_groups),
}


@pytest.mark.parametrize("make", REMADE.values(), ids=REMADE)
@pytest.mark.parametrize("name", WHOLE)
def test_an_optimizer_made_anew_has_what_holds_for_the_whole_one(name, make):
    a, b = parameter(3), parameter(4)
    optimizer = FusedSGD([{"params": [a]}, {"params": [b], "lr": 1.0}], max_grad_norm=1.0, **{name: WHOLE[name]})
    assert settings_of(optimizer) != settings_of(FusedSGD([parameter(3)], max_grad_norm=1.0))
    assert optimizer.defaults[name] == WHOLE[name]
    optimizer.add_param_group({"params": [parameter(5)]})
    again = make(optimizer, [parameter(3)])
    assert settings_of(again) == settings_of(optimizer)
    assert settings_of(make(again, [parameter(3)])) == settings_of(optimizer)


def test_what_holds_for_the_whole_optimizer_leaves_no_trace_where_it_is_the_default():
    optimizer = FusedSGD([parameter(3)], backend="auto", numerics="torch", norm_per_group=False, rounding_seed=0)
    theirs = torch.optim.SGD([parameter(3)])
    assert optimizer.defaults.keys() == theirs.defaults.keys()
    assert optimizer.param_groups[0].keys() == theirs.param_groups[0].keys()


def test_groups_that_do_not_agree_about_the_whole_optimizer_are_refused_and_an_argument_goes_first():
    groups = [{"params": [parameter(3)], "numerics": "opmath"}, {"params": [parameter(3)]}]
    with pytest.raises(ValueError, match=r"numerics='opmath' in group 0 and 'torch' in group 1.*whole optimizer"):
        FusedSGD(groups, lr=0.1)
    optimizer = FusedSGD(groups, lr=0.1, numerics="opmath")
    assert [group["numerics"] for group in optimizer.param_groups] == ["opmath"] * 2
    for value in ("torch", "none"):
        with pytest.raises(ValueError, match=f"numerics='{value}' in a parameter group.*which has 'opmath'"):
            optimizer.add_param_group({"params": [parameter(3)], "numerics": value})
    assert len(optimizer.param_groups) == 2
    seeded = FusedSGD([{"params": [parameter(3)], "rounding_seed": 7}], rounding_seed=8)
    assert (settings_of(seeded)[-1], seeded.param_groups[0]["rounding_seed"]) == (8, 8)


def test_loading_leaves_what_holds_for_the_whole_optimizer():
    p = parameter(3)
    saved = stepped([p], rounding_seed=7).state_dict()
    for other in (FusedSGD([p], lr=0.1), FusedSGD([p], lr=0.1, rounding_seed=8)):
        seeds = [group.get("rounding_seed") for group in other.param_groups]
        other.load_state_dict(copy.deepcopy(saved))
        assert [group.get("rounding_seed") for group in other.param_groups] == seeds
        assert settings_of(other)[-1] == (seeds[0] or 0)


@every_option
def test_a_state_dict_with_options_loads_without_them_and_into_torchs_sgd(dtype, options):
    params = [parameter(300, dtype=dtype)]
    saved = stepped(params, **options).state_dict()
    plain = FusedSGD(params, lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning) as caught:
        plain.load_state_dict(copy.deepcopy(saved))
    messages = [str(w.message) for w in caught]
    named = [name for name in options if name != "rounding_seed"]
    assert len(messages) == 1 and all(f"{name}=" in messages[0] for name in named), messages
    assert caught[0].filename == __file__
    assert spec.NAMES.isdisjoint(plain.param_groups[0]) and "ema_updates" not in plain.param_groups[0]
    assert plain.state[params[0]].keys() == {"momentum_buffer"}
    assert plain.state[params[0]]["momentum_buffer"].dtype == dtype
    theirs = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    theirs.load_state_dict(copy.deepcopy(saved))
    for optimizer in (plain, theirs):
        with_gradients(*params)
        optimizer.step()


@every_option
def test_a_state_dict_without_options_loads_and_they_start_afresh(dtype, options):
    params = [parameter(300, dtype=dtype)]
    plain = torch.optim.SGD(params, lr=0.3, momentum=0.9)
    with_gradients(*params)
    plain.step()
    optimizer = stepped(params, **options)
    before = {k: v for k, v in optimizer.param_groups[0].items() if k in spec.NAMES}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert len(caught) == bool({"ema_decay", "master_weights", "momentum_dtype", "rounding"} & set(options)) - (
        options.get("rounding") == "stochastic"
    )
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.3 and {k: v for k, v in group.items() if k in spec.NAMES} == before
    assert group.get("ema_updates", 0) == 0 and "ema" not in optimizer.state[params[0]]
    with_gradients(*params)
    optimizer.step()
    assert all(p.isfinite().all() for p in params)


def test_the_warning_names_what_was_dropped_converted_and_started_afresh():
    params = [parameter(300, dtype=BF16)]
    saved = stepped(params, master_weights="full", max_grad_norm=1.0).state_dict()
    other = FusedSGD(params, lr=0.1, momentum=0.9, ema_decay=0.9, momentum_dtype=torch.int8)
    expected = (
        r"dropped: max_grad_norm=1\.0, master_weights='full'; started afresh: the average of ema_decay=0\.9; "
        "converted: momentum from float32 to int8"
    )
    with pytest.warns(UserWarning, match=expected):
        other.load_state_dict(saved)


def test_numbers_of_the_saved_optimizer_win_and_kinds_of_this_one():
    params = [parameter(300, dtype=BF16)]
    first = stepped(params, max_grad_norm=0.5, ema_decay=0.9, master_weights="full")
    exact = first.master_parameters()[0]
    second = FusedSGD(params, lr=0.1, momentum=0.9, max_grad_norm=1.0, ema_decay=0.99, master_weights="split")
    with pytest.warns(UserWarning, match="converted: \"master\" to .*'split'"):
        second.load_state_dict(first.state_dict())
    group = second.param_groups[0]
    assert (group["max_grad_norm"], group["ema_decay"], group["master_weights"]) == (0.5, 0.9, "split")
    # A float32 half-way between two bfloat16 may be one unit off: the parameter has been rounded to even.
    torch.testing.assert_close(second.master_parameters()[0], exact, rtol=2e-7, atol=0)


def test_momentum_in_int8_follows_a_parameter_that_is_laid_out_anew():
    p = nn.Parameter(torch.randn(40, 50))
    optimizer = stepped([p], momentum_dtype=torch.int8)
    scales = optimizer.state[p]["momentum_scale"].repeat_interleave(128)[:2000].view(40, 50)
    q = optimizer.state[p]["momentum_buffer"].float()
    p.data = p.data.t().contiguous().t()
    p.grad = torch.zeros(40, 50)
    before = p.detach().clone()
    optimizer.step()
    moved = (before - p.detach()) / (0.1 * 0.9)
    torch.testing.assert_close(moved, scales * q * q.abs(), atol=0.05, rtol=0.02)


def test_a_saved_rounding_that_is_another_one_is_named_as_dropped():
    p = parameter(300, dtype=BF16)
    saved = stepped([p], rounding="kahan").state_dict()
    other = FusedSGD([p], lr=0.1, momentum=0.9, rounding="stochastic")
    with pytest.warns(UserWarning, match="dropped: rounding='kahan'"):
        other.load_state_dict(saved)


def test_a_state_dict_that_cannot_be_loaded_leaves_the_optimizer_as_it_was():
    p = parameter(300)
    optimizer = stepped([p], ema_decay=0.9, momentum_dtype=torch.int8)
    before = copy.deepcopy(optimizer.state_dict())
    bad, short = copy.deepcopy(before), copy.deepcopy(before)
    bad["param_groups"][0]["ema_decay"] = 1.5
    short["state"][0]["ema"] = torch.ones(7)
    for saved, message in ((bad, r"ema_decay=1\.5"), (short, r'saved "ema" has shape \[7\], and \[300\] is needed')):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
        assert_same_states(states(optimizer, [p]), [before["state"][0]])
    optimizer.step()


def test_int8_momentum_that_lies_in_another_order_is_laid_out_as_the_parameter_is():
    p = nn.Parameter(torch.randn(8, 16, 5, 5))
    optimizer = stepped([p], momentum_dtype=torch.int8)
    saved = optimizer.state_dict()
    momentum = reference.dequantized(
        saved["state"][0]["momentum_buffer"].reshape(-1), saved["state"][0]["momentum_scale"]
    ).view(p.shape)
    q = nn.Parameter(p.detach().clone(memory_format=torch.channels_last))
    other = FusedSGD([q], lr=0.1, momentum=0.9, momentum_dtype=torch.int8)
    other.load_state_dict(saved)
    q.grad = torch.zeros_like(q)
    before = q.detach().clone()
    other.step()
    assert other.state[q]["momentum_buffer"].stride() == q.stride()
    torch.testing.assert_close((before - q.detach()) / 0.09, momentum, atol=0.05, rtol=0.02)


# Averages


def test_averages_are_exchanged_with_the_parameters_and_back_also_after_an_error():
    params = [parameter(30), parameter(4, 5)]
    optimizer = stepped(params, ema_decay=0.9)
    before = [p.detach().clone() for p in params]
    averages = [a.clone() for a in optimizer.ema_parameters()]
    addresses = [p.data_ptr() for p in params]
    with pytest.raises(ZeroDivisionError), optimizer.swap_ema():
        assert all(torch.equal(p, a) for p, a in zip(params, averages, strict=True))
        assert [p.data_ptr() for p in params] == addresses
        raise ZeroDivisionError
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.ema_parameters(), averages, strict=True))
    plans = optimizer._plans
    with_gradients(*params)
    optimizer.step()
    assert optimizer._plans is plans


def test_an_average_that_begins_later_goes_on_as_one_from_the_beginning():
    p = parameter(30)
    optimizer = stepped([p])
    optimizer.param_groups[0]["ema_decay"] = 0.5
    average = None
    for _ in range(4):
        with_gradients(p)
        optimizer.step()
        x = p.detach().clone()
        average = x if average is None else average.lerp(x, 0.5)
        torch.testing.assert_close(next(optimizer.ema_parameters()), average)


def test_what_would_mix_parameters_and_averages_is_refused_inside_the_exchange():
    params = with_gradients(parameter(3))
    optimizer = stepped(params, ema_decay=0.9)
    refused = (
        optimizer.step,
        optimizer.state_dict,
        optimizer.ema_parameters,
        optimizer.master_parameters,
        lambda: optimizer.swap_ema().__enter__(),
        lambda: optimizer.load_state_dict({}),
        lambda: optimizer.load_master_parameters([]),
        lambda: copy.deepcopy(optimizer),
    )
    with optimizer.swap_ema():
        for call in refused:
            with pytest.raises(RuntimeError, match=r"inside swap_ema\(\)"):
                call()
    optimizer.step()


@pytest.mark.parametrize("master_weights", ["full", "split", "split24"])
def test_an_average_in_float32_is_shown_rounded_and_no_weight_is_lost(master_weights):
    p = parameter(300, dtype=BF16)
    optimizer = stepped([p], master_weights=master_weights, ema_decay=0.9)
    (average,) = optimizer.ema_parameters()
    kept, exact = average.clone(), optimizer.master_parameters()
    assert average.dtype == torch.float32
    with optimizer.swap_ema():
        assert torch.equal(p, kept.to(BF16))
    assert torch.equal(next(optimizer.ema_parameters()), kept)
    assert torch.equal(optimizer.master_parameters()[0], exact[0])


def test_a_frozen_group_has_no_average_and_without_any_that_is_an_error():
    a, b = parameter(3), parameter(3)
    optimizer = FusedSGD([{"params": [a], "ema_decay": 0.5}, {"params": [b]}], lr=0.1)
    first, second = optimizer.ema_parameters()
    assert torch.equal(first, a) and second.data_ptr() == b.data_ptr()
    with optimizer.swap_ema():
        pass
    with pytest.raises(RuntimeError, match="no parameter group has ema_decay"):
        FusedSGD([b], lr=0.1).ema_parameters()


def buffer_averages(optimizer):
    """As a checkpoint has them."""
    found = {}
    for entries in optimizer.state_dict()["state"].values():
        found |= {name: entry.clone() for name, entry in entries.items() if name.startswith("ema_buffers.")}
    return [found[f"ema_buffers.{i}"] for i in range(len(found))]


def test_buffers_are_averaged_exchanged_saved_and_copied():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = FusedSGD(model.parameters(), lr=0.1, ema_decay=0.9, ema_buffers=model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).pow(2).sum().backward()
        optimizer.step()
    mean = model[1].running_mean.clone()
    averages = buffer_averages(optimizer)
    with optimizer.swap_ema():
        assert torch.equal(model[1].running_mean, averages[0]) and not torch.equal(averages[0], mean)
        assert model[1].num_batches_tracked == 3
    assert torch.equal(model[1].running_mean, mean)
    fresh = FusedSGD(model.parameters(), lr=0.1, ema_decay=0.9, ema_buffers=model.buffers())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(buffer_averages(fresh)[0], averages[0])
    both = copy.deepcopy((model, optimizer))
    with both[1].swap_ema():
        assert torch.equal(both[0][1].running_mean, averages[0])
    with pytest.warns(UserWarning, match="ema_buffers"):
        FusedSGD(model.parameters(), lr=0.1, ema_decay=0.9).load_state_dict(optimizer.state_dict())


def batch_norm():
    model = nn.BatchNorm1d(4)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, ema_decay=0.9, ema_buffers=model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).pow(2).sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("change", ["deleted", "None", "of another shape"])
def test_buffers_that_change_or_go_spoil_no_step(change):
    model, optimizer = batch_norm()
    if change == "deleted":
        del model.running_mean
    else:
        model.running_mean = None if change == "None" else torch.ones(7)
    for step in range(2):
        optimizer.step()
        assert optimizer.param_groups[0]["ema_updates"] == 3 + step
    with optimizer.swap_ema():
        pass
    if change == "of another shape":
        assert torch.equal(buffer_averages(optimizer)[0], torch.ones(7))


def test_buffers_that_are_replaced_inside_the_exchange_hold_their_own_values_afterwards():
    model, optimizer = batch_norm()
    mean = model.running_mean.clone()
    with optimizer.swap_ema():
        model.double()
        assert not torch.equal(model.running_mean.float(), mean)
    assert model.running_mean.dtype == torch.float64 and torch.equal(model.running_mean.float(), mean)


def test_an_exchange_that_cannot_be_undone_for_one_is_undone_for_the_others():
    params = [parameter(3), parameter(4), parameter(5)]
    optimizer = stepped(params, ema_decay=0.9)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError), optimizer.swap_ema():
        params[1].data = torch.ones(2)
    assert torch.equal(params[0], before[0]) and torch.equal(params[2], before[2])


def test_an_exchange_and_a_step_of_another_thread_refuse_each_other():
    params = with_gradients(parameter(3))
    optimizer = stepped(params, ema_decay=0.9)
    errors = []

    class Watched(torch.Tensor):  # steps while it is exchanged
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), keywords=None):
            if function is torch.Tensor.copy_:
                thread = threading.Thread(target=step)
                thread.start()
                thread.join()
            return super().__torch_function__(function, types, arguments, keywords or {})

    def step():
        try:
            optimizer.step()
        except RuntimeError as error:
            errors.append(str(error))

    optimizer.state[params[0]]["ema"] = optimizer.state[params[0]]["ema"].as_subclass(Watched)
    with optimizer.swap_ema():
        pass
    assert errors and all("inside swap_ema()" in error for error in errors)


# Master weights


@pytest.mark.parametrize("options", [{"master_weights": "full"}, {"master_weights": "split"}], ids=str)
def test_exact_weights_come_out_as_they_went_in(options):
    p = parameter(2000, dtype=BF16)
    optimizer = FusedSGD([p], lr=0.1, **options)
    weights = torch.randn(2000)
    optimizer.load_master_parameters([weights])
    assert torch.equal(optimizer.master_parameters()[0], weights)
    assert (p.float() - weights).abs().max() <= weights.abs().max() / 256
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(optimizer.master_parameters()[0], weights)
    with pytest.raises(ValueError, match="2 weights for 1 parameters"):
        optimizer.load_master_parameters([weights, weights])
    bad = (
        (torch.ones(3), r"has shape \[3\]"),
        (weights.to("meta"), "meta"),
        (weights.to_sparse(), "sparse"),
        (weights.to(torch.complex64), "complex64"),
        (weights.int(), "int32"),
        (weights.tolist(), "is a list, not a Tensor"),
    )
    q = parameter(2)
    optimizer.add_param_group({"params": [q], "master_weights": None})
    optimizer.param_groups.reverse()
    before = q.detach().clone()
    for values, message in bad:
        with pytest.raises(ValueError, match=f"weight 1 .*{message}"):
            optimizer.load_master_parameters([torch.ones(2), values])
        assert torch.equal(q, before)


@pytest.mark.parametrize("options", [{"master_weights": "full"}, {"master_weights": "split"}, {"rounding": "kahan"}])
def test_a_parameter_that_somebody_writes_is_its_weight(options):
    p = parameter(300, dtype=BF16)
    optimizer = stepped([p], **options)
    optimizer.state[p]["momentum_buffer"].zero_()
    new = torch.randn(300).to(BF16)
    p.data.copy_(new)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), new, rtol=1 / 128, atol=0.02)


def test_an_entry_on_the_wrong_device_or_of_the_wrong_shape_is_an_error_with_the_remedy():
    p = parameter(300, dtype=BF16)
    optimizer = stepped([p], master_weights="full")
    optimizer.state[p]["master"] = torch.ones(3)
    with pytest.raises(
        RuntimeError, match=r'parameter 0: .*"master" has shape \[3\], and \[300\] is needed.*starts it afresh'
    ):
        optimizer.step()
