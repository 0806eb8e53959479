"""FusedSGD as people who know torch.optim.SGD use it: what it accepts, refuses, warns of, and leaves to torch."""

import copy
import gc
import inspect
import math
import pickle
import re
import threading
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import strategies
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.optim import utils as distributed_optimizers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from wd_fused import FusedSGD, functional
from wd_fused import backends as registry

pytestmark = pytest.mark.usefixtures("fused_backend")

SGD_ARGUMENTS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def parameter(*shape, **options):
    return torch.randn(*shape, device=strategies.DEVICE, **options).requires_grad_()


def with_gradients(*parameters):
    for p in parameters:
        p.grad = torch.randn_like(p)
    return list(parameters)


def twin(parameters):
    """Copies with the same values and gradients."""
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    for copied, p in zip(copies, parameters, strict=True):
        copied.grad = None if p.grad is None else p.grad.clone()
    return copies


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def raised_by(call):
    with pytest.raises(Exception) as info:
        call()
    return type(info.value), str(info.value)


@pytest.mark.some_backends("cpu")
def test_the_example_in_the_readme_runs_and_is_fused():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1), names)
    assert {b.backend for b in names["optimizer"].backends()} == {"cpu"}


# What the constructor refuses


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -0.1},
        {"lr": torch.tensor([0.1, 0.2])},
        {"momentum": -0.5},
        {"weight_decay": -1e-4},
        {"weight_decay": torch.tensor(-1e-4)},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused_in_torchs_own_words(arguments):
    p = parameter(3)
    assert raised_by(lambda: FusedSGD([p], **arguments)) == raised_by(lambda: torch.optim.SGD([p], **arguments))


@pytest.mark.parametrize("params", [[], torch.ones(3), [{"params": {torch.ones(1)}}], [torch.ones(3), "x"]], ids=str)
def test_bad_parameters_are_refused_in_torchs_own_words(params):
    assert raised_by(lambda: FusedSGD(params)) == raised_by(lambda: torch.optim.SGD(params))


def test_unknown_backend_and_numerics_are_named_with_the_choices():
    with pytest.raises(ValueError, match=r"backend='gpu'.*\"auto\", \"cuda\", \"triton\", \"cpu\", \"torch\""):
        FusedSGD([parameter(3)], backend="gpu")
    with pytest.raises(ValueError, match=r"numerics='exact'.*\"torch\", \"opmath\""):
        FusedSGD([parameter(3)], numerics="exact")
    with pytest.raises(ValueError, match=r'numerics="opmath" needs a fused backend'):
        FusedSGD([parameter(3)], numerics="opmath", backend="torch")


def test_a_backend_that_is_missing_here_is_an_error_that_tells_what_there_is(monkeypatch, fused_backend):
    missing = next(name for name in registry.FUSED if name != fused_backend)
    monkeypatch.setattr(registry.FUSED[missing], "unavailable", lambda: "it was left at home; fetch it")
    usable = rf'Usable here: .*"{fused_backend}".*"torch"'
    with pytest.raises(RuntimeError, match=rf"backend='{missing}' cannot be used: it was left.*fetch it\. {usable}"):
        FusedSGD([parameter(3)], backend=missing)


def test_the_environment_variable_overrides_auto_and_only_auto(monkeypatch, fused_backend):
    monkeypatch.setenv("WD_FUSED_BACKEND", "torch")
    assert [b.backend for b in FusedSGD([parameter(3)]).backends()] == ["torch"]
    assert [b.backend for b in FusedSGD([parameter(3)], backend=fused_backend).backends()] == [fused_backend]
    monkeypatch.setenv("WD_FUSED_BACKEND", "fast")
    with pytest.raises(ValueError, match="WD_FUSED_BACKEND='fast'"):
        FusedSGD([parameter(3)])


# What works as in torch.optim.SGD


def test_it_is_a_torch_optim_sgd_with_its_state_dict():
    model = nn.Linear(4, 3)
    ours, theirs = FusedSGD(model.parameters(), **SGD_ARGUMENTS), torch.optim.SGD(model.parameters(), **SGD_ARGUMENTS)
    assert isinstance(ours, torch.optim.SGD)
    assert ours.state_dict() == theirs.state_dict()
    assert ours.defaults == theirs.defaults
    assert repr(ours) == repr(theirs).replace("SGD", "FusedSGD")


@pytest.mark.parametrize("fresh_class", [FusedSGD, torch.optim.SGD])
def test_a_checkpoint_continues_with_the_same_bits_in_either_class(fresh_class):
    ours = with_gradients(parameter(50), parameter(4, 5))
    theirs = twin(ours)
    first, reference = FusedSGD(ours, **SGD_ARGUMENTS), torch.optim.SGD(theirs, **SGD_ARGUMENTS)
    for _ in range(3):
        first.step()
        reference.step()
    second = fresh_class(ours, lr=7.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        second.step()
        reference.step()
    assert same_bits(ours, theirs)
    back = FusedSGD(ours, lr=7.0)
    back.load_state_dict(copy.deepcopy(reference.state_dict()))  # torch shares the loaded buffers
    back.step()
    reference.step()
    assert same_bits(ours, theirs)


def test_named_parameters_are_taken_and_kept_in_the_state_dict():
    model = nn.Linear(4, 3)
    optimizer = FusedSGD(model.named_parameters(), **SGD_ARGUMENTS)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_pickle_and_deepcopy_keep_options_and_continue_with_the_same_bits(fused_backend):
    params = with_gradients(parameter(30))
    optimizer = FusedSGD(params, **SGD_ARGUMENTS, backend=fused_backend, numerics="opmath")
    optimizer.step()
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = copied.param_groups[0]["params"]
        theirs[0].grad = params[0].grad.clone()
        expected = twin(params)
        reference = torch.optim.SGD(expected, **SGD_ARGUMENTS)
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        copied.step()
        reference.step()
        assert same_bits(theirs, expected)
        assert copied._numerics == "opmath" and [b.backend for b in copied.backends()] == [fused_backend]


def test_closure_is_called_once_with_gradients_enabled_and_its_loss_returned():
    p = parameter(5)
    optimizer = FusedSGD([p], lr=0.1)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1


def test_step_hooks_run_once_each_and_in_order():
    p = with_gradients(parameter(3))[0]
    optimizer = FusedSGD([p, with_gradients(parameter(2, dtype=torch.complex64))[0]], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", p.detach().clone())))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", p.detach().clone())))
    with pytest.warns(UserWarning, match="complex64"):
        optimizer.step()
    assert [when for when, _ in seen] == ["pre", "post"]
    assert not torch.equal(seen[0][1], seen[1][1])


def test_a_profiler_sees_the_step_under_its_usual_name():
    optimizer = FusedSGD(with_gradients(parameter(3)), lr=0.1)
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#FusedSGD.step" in {event.key for event in profile.key_averages()}


def test_hooks_for_all_optimizers_run_for_this_one_too():
    optimizer = FusedSGD(with_gradients(parameter(3)), lr=0.1)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt))),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt))),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == [("pre", optimizer), ("post", optimizer)]


def test_state_dict_hooks_run():
    optimizer = FusedSGD([parameter(3)], lr=0.1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "load"]


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.3),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 7),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.5, total_steps=10),  # moves momentum too
    ],
    ids=["StepLR", "CosineAnnealingLR", "OneCycleLR"],
)
def test_schedulers_drive_it_as_they_drive_torchs(make):
    ours = with_gradients(parameter(40), parameter(3, 3))
    theirs = twin(ours)
    pairs = [(opt, make(opt)) for opt in (FusedSGD(ours, **SGD_ARGUMENTS), torch.optim.SGD(theirs, **SGD_ARGUMENTS))]
    for _ in range(6):
        for optimizer, scheduler in pairs:
            optimizer.step()
            scheduler.step()
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_tensor_hyperparameters_are_read_at_every_step(name):
    ours = with_gradients(parameter(40))
    theirs = twin(ours)
    value = torch.tensor(0.1)
    arguments = SGD_ARGUMENTS | {name: value}
    ours_opt, theirs_opt = FusedSGD(ours, **arguments), torch.optim.SGD(theirs, **arguments)
    for _ in range(4):
        ours_opt.step()
        theirs_opt.step()
        value.mul_(0.7)
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_gives_the_bits_it_gives_torchs_and_skips_overflows(fused):
    torch.manual_seed(3)
    model = nn.Linear(6, 4)
    models = [model, copy.deepcopy(model)]
    runs = [
        (m, cls(m.parameters(), **SGD_ARGUMENTS, fused=f), torch.amp.GradScaler("cpu", init_scale=2.0**12))
        for m, cls, f in zip(models, (FusedSGD, torch.optim.SGD), (fused, None), strict=True)
    ]
    data = torch.randn(5, 6)
    for step in range(6):
        for m, optimizer, scaler in runs:
            optimizer.zero_grad()
            loss = m(data).pow(2).sum() * (float("inf") if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert runs[0][1].last_step_skipped is (step == 2 and fused is True)  # else the scaler leaves step() out
    assert same_bits(models[0].parameters(), models[1].parameters())
    assert runs[0][2].get_scale() == runs[1][2].get_scale() < 2.0**12


def test_autograd_catches_a_parameter_that_step_changed_before_backward():
    p, x = with_gradients(parameter(4, 4))[0], torch.randn(2, 4, requires_grad=True)
    optimizer = FusedSGD([p], lr=0.1)
    loss = (x @ p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_step_works_inside_torch_compile():
    torch.manual_seed(5)
    ours = with_gradients(parameter(30), parameter(5, 5))
    theirs = twin(ours)
    optimizer, reference = FusedSGD(ours, **SGD_ARGUMENTS), torch.optim.SGD(theirs, **SGD_ARGUMENTS)
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        compiled()
        optimizer.step()
        reference.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# What the plan does with what happens between steps


def test_one_plan_serves_moving_and_missing_gradients_and_changing_hyperparameters():
    params = with_gradients(parameter(10), parameter(20))
    optimizer = FusedSGD(params, **SGD_ARGUMENTS)
    optimizer.step()
    plans = optimizer._plans
    for step in range(20):
        with_gradients(*params)
        if step % 3 == 0:
            params[step % 2].grad = None
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
    assert optimizer._plans is plans


def test_each_edit_of_what_a_plan_was_built_on_makes_a_new_one():
    params = with_gradients(parameter(10), parameter(2, 6))
    optimizer = FusedSGD(params, **SGD_ARGUMENTS)

    def transpose_data():
        params[1].data = params[1].data.t().contiguous().t()

    edits = {
        "cleared state": optimizer.state.clear,
        "one entry deleted": lambda: optimizer.state.pop(params[0]),
        "another buffer": lambda: optimizer.state[params[1]].update(momentum_buffer=torch.zeros(6, 2).t()),
        "no buffer": lambda: optimizer.state[params[1]].update(momentum_buffer=None),
        "load_state_dict": lambda: optimizer.load_state_dict(optimizer.state_dict()),
        "new group": lambda: optimizer.add_param_group({"params": with_gradients(parameter(3))}),
        "p.data = another layout": transpose_data,
        "order of the parameters": optimizer.param_groups[0]["params"].reverse,
    }
    for what, edit in edits.items():
        optimizer.step()
        plans = optimizer._plans
        edit()
        optimizer.step()
        assert optimizer._plans is not plans, what


def test_a_parameter_returns_to_its_fused_backend_when_the_reason_is_gone(fused_backend):
    p = with_gradients(parameter(6))[0]
    optimizer = FusedSGD([p], lr=0.1)
    p.data, p.grad = p.data.to(torch.complex64), None
    p.grad = torch.ones(6, dtype=torch.complex64)
    with pytest.warns(UserWarning, match="complex64"):
        optimizer.step()
    assert optimizer.backends()[0].backend == "torch"
    p.grad = None
    p.data = p.data.real.clone()
    with_gradients(p)
    optimizer.step()
    assert optimizer.backends()[0].backend == fused_backend


# What no fused backend takes


class Opinionated(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def complex_parameter():
    return with_gradients(parameter(4, dtype=torch.complex64))


def sparse_gradient():
    embedding = nn.Embedding(7, 3, sparse=True)
    embedding(torch.tensor([1, 4])).sum().backward()
    return [embedding.weight]


def twice_in_a_group():
    p = with_gradients(parameter(4))[0]
    return [p, p]


def overriding_subclass():
    return with_gradients(Opinionated(torch.randn(5)))


UNUSUAL = {
    "complex": (complex_parameter, {}, "complex64"),
    "sparse gradient": (sparse_gradient, {"weight_decay": 0}, "layout"),
    "subclass": (overriding_subclass, {}, "__torch_function__"),
    "differentiable": (lambda: with_gradients(parameter(3)), {"differentiable": True}, "differentiable=True"),
}


@pytest.mark.parametrize(("make", "options", "reason"), UNUSUAL.values(), ids=UNUSUAL)
def test_torchs_code_steps_what_no_backend_takes_with_one_warning(make, options, reason):
    ours = make()
    theirs = [copy.deepcopy(p.detach()).requires_grad_() for p in ours]
    for copied, p in zip(theirs, ours, strict=True):
        copied.grad = p.grad.clone()
    plain = with_gradients(parameter(3))
    if options.get("differentiable"):  # in-place steps of leaves that require grad are for those who ask for them
        for p in (*ours, *theirs, *plain):
            p.requires_grad_(False)
    optimizer = FusedSGD(ours + plain, **SGD_ARGUMENTS | options)
    reference = torch.optim.SGD(theirs, **SGD_ARGUMENTS | options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step()
    assert [reason in str(w.message) for w in caught if "FusedSGD" in str(w.message)] == [True]
    for _ in range(3):
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(torch.as_tensor(a.detach()), torch.as_tensor(b.detach()))


@pytest.mark.parametrize(("make", "options", "reason"), UNUSUAL.values(), ids=UNUSUAL)
def test_an_explicit_backend_refuses_them_before_anything_is_written(make, options, reason, fused_backend):
    plain = with_gradients(parameter(3))
    before = plain[0].detach().clone()
    optimizer = FusedSGD([{"params": plain}, {"params": make()}], **SGD_ARGUMENTS | options, backend=fused_backend)
    with pytest.raises(RuntimeError, match=rf"group [01], parameter 0.*backend=\"{fused_backend}\".*{reason}"):
        optimizer.step()
    assert torch.equal(plain[0], before) and not optimizer.state


def test_what_torchs_code_would_fail_on_half_way_is_an_error_beforehand():
    plain, sparse = with_gradients(parameter(3))[0], sparse_gradient()[0]
    before = plain.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 1: its gradient is sparse.*weight_decay=0\.1"):
        FusedSGD([plain, sparse], lr=0.1, weight_decay=0.1).step()
    optimizer = FusedSGD([plain, sparse], lr=0.1, momentum=0.9)
    optimizer.state[sparse]["momentum_buffer"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"parameter 1: its momentum buffer is float32 \[2\].*afresh"):
        optimizer.step()
    assert torch.equal(plain, before)


def test_a_parameter_given_twice_is_stepped_twice_as_torch_does():
    params = twice_in_a_group()
    copied = twin(params[:1]) * 2
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer, reference = FusedSGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(copied, lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="more than once"):
        optimizer.step()
    optimizer.step()
    reference.step()
    reference.step()
    assert same_bits(params, copied)


def step_plainly(optimizer):
    optimizer.step()


def step_with_a_hook(optimizer):
    optimizer.register_step_post_hook(lambda *_: None)
    optimizer.step()


def step_under_a_scheduler(optimizer):
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()


def step_in_a_profiler(optimizer):
    with torch.profiler.profile():
        optimizer.step()


def step_without_grad(optimizer):
    torch.no_grad()(optimizer.step)()


def step_by_grad_scaler(optimizer):
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)


@pytest.mark.parametrize(
    "step",
    [
        step_plainly,
        step_with_a_hook,
        step_under_a_scheduler,
        step_in_a_profiler,
        step_without_grad,
        step_by_grad_scaler,
    ],
)
def test_a_warning_points_at_the_line_of_the_program_whatever_of_torch_is_in_between(step):
    optimizer = FusedSGD(complex_parameter(), lr=0.1)
    with pytest.warns(UserWarning, match="complex64") as caught:
        step(optimizer)
    lines, first = inspect.getsourcelines(step)
    assert (caught[0].filename, caught[0].lineno) == (__file__, first + len(lines) - 1)  # the last one steps


def test_a_warning_of_loading_points_at_the_line_that_called_torchs_function():
    model = nn.Linear(2, 2)
    state = get_optimizer_state_dict(model, FusedSGD(model.parameters(), lr=0.1, l1_penalty=0.1))
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="l1_penalty") as caught:
        set_optimizer_state_dict(model, optimizer, state)
    assert caught[0].filename == __file__


def test_backends_tells_what_each_parameter_got_and_why(fused_backend):
    optimizer = FusedSGD([{"params": [parameter(3)]}, {"params": complex_parameter()}], lr=0.1)
    ours, theirs = optimizer.backends()
    assert (ours.group, ours.position, ours.backend) == (0, 0, fused_backend)
    assert (theirs.group, theirs.backend, theirs.reason) == (1, "torch", "its dtype is complex64")


def test_backends_tells_of_parameters_as_they_are_now():
    p = with_gradients(parameter(3))[0]
    optimizer = FusedSGD([p], lr=0.1)
    optimizer.step()
    p.data = p.data.to(torch.complex64)
    assert optimizer.backends()[0].backend == "torch"


def test_parameters_in_a_tuple_are_fused_and_groups_in_a_tuple_stepped_by_torch():
    ours = with_gradients(parameter(9))
    theirs = twin(ours)
    optimizer, reference = FusedSGD(ours, **SGD_ARGUMENTS), torch.optim.SGD(theirs, **SGD_ARGUMENTS)
    for each in (optimizer, reference):
        each.param_groups[0]["params"] = tuple(each.param_groups[0]["params"])
        each.step()
    assert optimizer._plans.parts and not optimizer._plans.with_torch
    optimizer.param_groups = tuple(optimizer.param_groups)
    with pytest.warns(UserWarning, match="param_groups must be a list"):
        optimizer.step()
    reference.step()
    assert same_bits(ours, theirs)


# Gradients that cannot be used, and steps that fail


def wrong_shape(p):
    p.grad.data = torch.ones(5)


def wrong_dtype(p):
    p.grad.data = torch.ones(p.shape, dtype=torch.complex64)


@pytest.mark.parametrize("wanted", ["auto", "insists", "torch"])
@pytest.mark.parametrize("spoil", [wrong_shape, wrong_dtype])
def test_a_gradient_that_cannot_be_used_is_named_before_anything_is_written(spoil, wanted, fused_backend):
    backend = fused_backend if wanted == "insists" else wanted
    params = with_gradients(parameter(4), parameter(3), parameter(2))
    optimizer = FusedSGD([{"params": params[:1]}, {"params": params[1:]}], **SGD_ARGUMENTS, backend=backend)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    good = params[2].grad.clone()
    spoil(params[2])
    with pytest.raises(RuntimeError, match="group 1, parameter 1"):
        optimizer.step()
    assert same_bits(params, before)
    params[2].grad = good
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_gradients_that_vanish_in_the_middle_of_a_step_are_used_all_the_same():
    plain = with_gradients(parameter(50_000))

    class Vandal(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.add_:  # torch's code steps this parameter: the gradients have been looked at
                plain[0].grad = None
                gc.collect()
            return super().__torch_function__(func, types, args, kwargs or {})

    expected = twin(plain)
    optimizer = FusedSGD([*plain, *with_gradients(Vandal(torch.randn(5)))], **SGD_ARGUMENTS)
    with pytest.warns(UserWarning, match="__torch_function__"):
        optimizer.step()
    torch.optim.SGD(expected, **SGD_ARGUMENTS).step()
    assert plain[0].grad is None and same_bits(plain, expected)


def test_a_step_that_raises_in_the_closure_or_a_hook_leaves_no_trace():
    ours = with_gradients(parameter(4), parameter(3))
    theirs = twin(ours)
    optimizer, reference = FusedSGD(ours, **SGD_ARGUMENTS), torch.optim.SGD(theirs, **SGD_ARGUMENTS)

    def broken(*_):
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(broken)
        hook = optimizer.register_step_pre_hook(broken)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        hook.remove()
        optimizer.step()
        reference.step()
    assert same_bits(ours, theirs)


def test_a_first_step_that_fails_in_its_last_parameter_makes_no_state():
    params = with_gradients(parameter(4), parameter(3))
    optimizer = FusedSGD(params, **SGD_ARGUMENTS)
    good = params[1].grad.clone()
    wrong_shape(params[1])
    with pytest.raises(RuntimeError, match="parameter 1"):
        optimizer.step()
    assert not optimizer.state
    params[1].grad = good
    theirs = twin(params)
    reference = torch.optim.SGD(theirs, **SGD_ARGUMENTS)
    for _ in range(2):
        optimizer.step()
        reference.step()
    assert same_bits(params, theirs)


def test_a_learning_rate_beyond_float32_is_an_error_as_in_torch():
    params = with_gradients(parameter(4))
    before = params[0].detach().clone()
    for optimizer in (FusedSGD(params, lr=1e300), torch.optim.SGD(params, lr=1e300, foreach=False)):
        with pytest.raises(RuntimeError, match=r"lr=1e\+300|without overflow"):
            optimizer.step()
    assert torch.equal(params[0], before)


def test_optimizers_step_in_several_threads_at_once(fused_backend):
    numel = 20_000 if fused_backend == "triton" else 2_000_000  # enough to give other threads a turn
    runs = []
    for seed in range(4):
        torch.manual_seed(seed)
        ours = with_gradients(parameter(numel), parameter(7))
        theirs = twin(ours)
        runs.append((ours, FusedSGD(ours, **SGD_ARGUMENTS), theirs, torch.optim.SGD(theirs, **SGD_ARGUMENTS)))
    threads = [threading.Thread(target=lambda run=run: [run[1].step() for _ in range(5)]) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, _, theirs, reference in runs:
        for _ in range(5):
            reference.step()
        assert same_bits(ours, theirs)


# The functional form


@pytest.mark.filterwarnings("ignore:`TorchScript` support for functional optimizers")
def test_torchs_functional_sgd_can_be_registered_for_it(monkeypatch):
    """As ZeroRedundancyOptimizer(overlap_with_ddp=True) needs it."""
    known = dict(distributed_optimizers.functional_optim_map)
    monkeypatch.setattr(distributed_optimizers, "functional_optim_map", known)
    with pytest.raises(ValueError, match="does not have a functional counterpart"):
        distributed_optimizers.as_functional_optim(FusedSGD, lr=0.5)
    distributed_optimizers.register_functional_optim(FusedSGD, known[torch.optim.SGD])
    p = torch.ones(3)
    distributed_optimizers.as_functional_optim(FusedSGD, lr=0.5).step_param(p, torch.ones(3))
    assert p.tolist() == [0.5] * 3


class Float(float):
    """As a configuration library may hand it out."""


TAKEN_BY_TORCH = [numpy.float16, numpy.float32, numpy.float64, numpy.longdouble, Float, torch.tensor]
TAKEN_BY_TORCH += [lambda value: torch.tensor(value, dtype=torch.float64)]
REFUSED_BY_TORCH = [numpy.array, Fraction, Decimal, lambda value: torch.tensor([value])]
NUMBERS = {"lr": 0.3, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}


def stepped_with(optimizer_class, numbers, **options):
    torch.manual_seed(3)
    p = torch.randn(67, dtype=torch.float64).requires_grad_()
    optimizer = optimizer_class([p], **numbers, **options)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    return p.detach()


def stepped_by_function(numbers, **options):
    torch.manual_seed(3)
    p, buffers = torch.randn(67, dtype=torch.float64), [None]
    for _ in range(3):
        functional.sgd([p], [torch.randn_like(p)], buffers, **numbers, **options)
    return p


def everyones(numbers):
    return {
        "fused": stepped_with(FusedSGD, numbers),
        "torch's code": stepped_with(FusedSGD, numbers, backend="torch"),
        "with an option": stepped_with(FusedSGD, numbers, max_grad_norm=math.inf),
        "reference": stepped_with(FusedSGD, numbers, max_grad_norm=math.inf, backend="torch"),
        "functional": stepped_by_function(numbers),
        "functional by torch": stepped_by_function(numbers, backend="torch"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TAKEN_BY_TORCH, ids=lambda kind: kind.__name__)
def test_numbers_of_every_kind_have_the_bits_that_they_have_with_torch(kind):
    """In float64, which shows that 1 - dampening is rounded to the kind's own dtype."""
    numbers = {name: kind(value) for name, value in NUMBERS.items()}
    expected = stepped_with(torch.optim.SGD, numbers, foreach=False)
    for who, p in everyones(numbers).items():
        assert torch.equal(p, expected), who


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED_BY_TORCH, ids=lambda kind: kind.__name__)
def test_whatever_float_takes_is_a_number_on_every_path_also_where_torch_refuses_it(kind):
    numbers = {name: kind(value) for name, value in NUMBERS.items()}
    plain = {name: float(value) for name, value in numbers.items()}
    plain["dampening"] = 1 - float(1 - numbers["dampening"])
    expected = stepped_with(torch.optim.SGD, plain, foreach=False)
    for who, p in everyones(numbers).items():
        assert torch.equal(p, expected), who


def test_a_functional_step_that_fails_makes_no_momentum_buffer(fused_backend):
    p, buffers = parameter(6), [None]
    before = p.detach().clone()
    with pytest.raises(ValueError, match="tensor 0: its gradient has shape"):
        functional.sgd([p], [torch.ones(5)], buffers, lr=0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match=r"tensor 0.*does not take it.*complex64"):
        functional.sgd(
            [p], [torch.ones(6, dtype=torch.complex64)], buffers, lr=0.1, momentum=0.9, backend=fused_backend
        )
    base = torch.ones(7)
    with pytest.raises(RuntimeError, match="shares memory"):
        functional.sgd([base[1:]], [base[:-1]], buffers, lr=0.1, momentum=0.9)
    assert buffers == [None] and torch.equal(p, before) and torch.equal(base, torch.ones(7))


def test_a_functional_step_refuses_beforehand_what_torchs_code_would_fail_on():
    p, before = torch.ones(3), torch.ones(3)
    sparse = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"tensor 1: its gradient is sparse.*weight_decay=0\.1"):
        functional.sgd([p, torch.ones(3)], [torch.ones(3), sparse], [None, None], lr=0.1, weight_decay=0.1)
    assert torch.equal(p, before)


def test_a_gradient_in_memory_that_was_a_parameters_is_fused(fused_backend):
    """As an allocator gives it: the plan that knows the memory as a parameter's is stale, and nothing else is wrong."""
    first, second = ours = with_gradients(parameter(4), parameter(4))
    optimizer = FusedSGD(ours, lr=0.1, backend=fused_backend)
    optimizer.step()
    theirs = twin(ours)
    former, second.data = second.data, second.detach().clone()
    first.grad = former
    theirs[0].grad = former.clone()
    optimizer.step()
    torch.optim.SGD(theirs, lr=0.1).step()
    assert same_bits(ours, theirs)


def test_gradients_that_come_back_after_others_were_laid_out_otherwise(fused_backend):
    ours = with_gradients(parameter(3), parameter(5))
    theirs = twin(ours)
    optimizer, reference = FusedSGD(ours, lr=0.1, backend=fused_backend), torch.optim.SGD(theirs, lr=0.1)
    flat, gaps = torch.randn(3), torch.randn(6)[::2]
    for first, second in ((flat, torch.randn(5)), (gaps, None), (flat, torch.randn(5)), (gaps, None), (gaps, None)) * 2:
        for params in (ours, theirs):
            params[0].grad, params[1].grad = first, second
        optimizer.step()
        reference.step()
        assert same_bits(ours, theirs)


def test_a_checkpoint_of_apexs_fused_sgd_goes_on_with_the_same_bits() -> None:
    """It has the momentum buffers of torch's, and fewer keys in its groups."""
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(5, 3, generator=generator) for _ in range(4)]
    expected = [torch.nn.Parameter(values[0].clone())]
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False)
    expected[0].grad = values[1]
    theirs.step()
    keys = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "params")
    saved = copy.deepcopy(theirs.state_dict())
    apexs = {
        "state": saved["state"],
        "param_groups": [{key: group[key] for key in keys} for group in saved["param_groups"]],
    }

    params = [torch.nn.Parameter(expected[0].detach().clone())]
    optimizer = FusedSGD(params, lr=1.0)
    optimizer.load_state_dict(apexs)
    for gradient in values[2:]:
        for own, other in ((params, optimizer), (expected, theirs)):
            own[0].grad = gradient.clone()
            other.step()
    assert torch.equal(params[0], expected[0])
    assert torch.equal(
        *(each.state[own[0]]["momentum_buffer"] for own, each in ((params, optimizer), (expected, theirs)))
    )
