"""load_state_dict(by_name=True): parameters in another order, in other groups, added and removed since the checkpoint.
Run by pytest.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from strategies import assert_same_bits
from torch import nn

from wd_fused import FusedSGD

SEED = 41
BF16 = torch.bfloat16
NAMES = ("embedding", "body.weight", "body.bias", "head")
SHAPES = {"embedding": (9, 4), "body.weight": (5, 130), "body.bias": (130,), "head": (7, 3), "new": (6, 2)}


def parameters(*names, dtype=torch.float32):
    return {
        name: nn.Parameter(
            torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(SEED + list(SHAPES).index(name))).to(
                dtype
            )
        )
        for name in names
    }


def made(*groups, dtype=torch.float32, cls=FusedSGD, **options):
    """An optimizer with a group for each: names, or a dict with them as its params."""
    given = [group if isinstance(group, dict) else {"params": group} for group in groups]
    params = parameters(*(name for group in given for name in group["params"]), dtype=dtype)
    named = [group | {"params": [(name, params[name]) for name in group["params"]]} for group in given]
    return params, cls(named, **{"lr": 0.1, "momentum": 0.9} | options)


def step(params, optimizer, seed, only=None):
    for name, param in params.items():
        if only is None or name in only:
            source = torch.Generator().manual_seed(100 * seed + list(SHAPES).index(name))
            param.grad = torch.randn(param.shape, generator=source).to(param.dtype)
        else:
            param.grad = None
    optimizer.step()


def stepped(*groups, steps=3, **arguments):
    params, optimizer = made(*groups, **arguments)
    for seed in range(steps):
        step(params, optimizer, seed)
    return params, optimizer


def values_of(source, target):
    for name in target.keys() & source.keys():
        target[name].data.copy_(source[name].data)


def by_names(params, optimizer):
    return {name: optimizer.state.get(param, {}) for name, param in params.items()}


def assert_same_entries(ours, theirs, names):
    for name in names:
        assert ours[name].keys() == theirs[name].keys(), name
        for entry in theirs[name]:
            assert torch.equal(ours[name][entry], theirs[name][entry]), (name, entry)


def numbers_of(group):
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


# What matches

FORMS = {
    "plain": (torch.float32, {}),
    "average": (torch.float32, {"ema_decay": 0.9, "weight_decay": 0.01}),
    "int8 momentum": (torch.float32, {"momentum_dtype": "int8"}),
    "master": (BF16, {"master_weights": "full", "ema_decay": 0.9}),
    "split master": (BF16, {"master_weights": "split"}),
    "kahan": (BF16, {"rounding": "kahan"}),
}


@pytest.mark.parametrize(("dtype", "options"), FORMS.values(), ids=FORMS)
def test_parameters_in_another_order_go_on_with_the_same_bits(dtype, options):
    params, optimizer = stepped(NAMES, dtype=dtype, **options)
    others, other = made(NAMES[::-1], dtype=dtype, **options)
    values_of(params, others)
    result = other.load_state_dict(copy.deepcopy(optimizer.state_dict()), by_name=True)
    assert (sorted(result.matched), result.missing, result.unexpected) == (sorted(NAMES), [], [])
    assert other.param_groups[0]["param_names"] == [*NAMES[::-1]]
    assert_same_entries(by_names(others, other), by_names(params, optimizer), NAMES)
    for seed in range(10, 13):
        step(params, optimizer, seed)
        step(others, other, seed)
    for name in NAMES:
        assert_same_bits(others[name], params[name], f"{name}, seed {SEED}")


def test_by_position_the_same_is_an_error_that_names_the_parameter():
    _, optimizer = stepped(NAMES)
    _, other = made(NAMES[::-1])
    with pytest.raises(ValueError, match=r"group 0, parameter 0 \(head\): the saved \"momentum_buffer\" has shape"):
        other.load_state_dict(optimizer.state_dict())


def test_a_state_of_torchs_optimizer_is_loaded_by_name():
    params, optimizer = stepped(NAMES, cls=torch.optim.SGD, foreach=False)
    others, other = made(("head", "embedding"), ("body.bias", "body.weight"))
    values_of(params, others)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()), by_name=True)
    step(params, optimizer, 9)
    step(others, other, 9)
    for name in NAMES:
        assert_same_bits(others[name], params[name], f"{name}, seed {SEED}")


def test_what_options_differ_in_is_converted_as_by_position():
    _, optimizer = stepped(NAMES, ema_decay=0.9)
    others, other = made(NAMES[::-1], momentum_dtype="bfloat16")
    with pytest.warns(UserWarning, match=r"dropped: ema_decay=0\.9; converted: momentum from float32 to bfloat16"):
        other.load_state_dict(optimizer.state_dict(), by_name=True)
    assert {entry.dtype for state in by_names(others, other).values() for entry in state.values()} == {BF16}


# What does not


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "momentum_dtype": "int8"}], ids=str)
def test_what_matches_is_loaded_and_the_rest_keeps_what_it_has(options):
    params, optimizer = stepped(NAMES, **options)
    others, other = stepped(("new", "head", "body.weight"), steps=1, **options)
    before = {name: dict(state) for name, state in by_names(others, other).items()}
    result = other.load_state_dict(optimizer.state_dict(), by_name=True, strict=False)
    assert result == (["head", "body.weight"], ["new"], ["embedding", "body.bias"])
    assert_same_entries(by_names(others, other), by_names(params, optimizer), ["head", "body.weight"])
    assert all(other.state[others["new"]][name] is entry for name, entry in before["new"].items())
    step(others, other, 5)


def test_a_matched_parameter_without_a_saved_state_starts_afresh_as_by_position():
    params, optimizer = made(NAMES)
    step(params, optimizer, 0, only=["head"])
    others, other = stepped(NAMES[::-1])
    other.load_state_dict(optimizer.state_dict(), by_name=True)
    assert {name for name, state in by_names(others, other).items() if state} == {"head"}


REFUSED = {
    "missing": (("new", *NAMES), {}, r"the saved state has no 'new'; strict=False loads what matches$"),
    "unexpected": (NAMES[:2], {}, r"this optimizer has no 'body\.bias', 'head'; strict=False"),
    "both": (("new", *NAMES[:3]), {}, r"has no 'new'; this optimizer has no 'head'; strict"),
    "nothing in common": (("new",), {"strict": False}, "no name of the saved state is one of this optimizer's"),
}


@pytest.mark.parametrize(("names", "strictness", "message"), REFUSED.values(), ids=REFUSED)
def test_names_that_do_not_match_are_named_and_nothing_has_changed(names, strictness, message):
    _, optimizer = stepped(NAMES, lr=7.0)
    others, other = stepped(names)
    before, state = dict(other.__dict__), {name: dict(each) for name, each in by_names(others, other).items()}
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict(), by_name=True, **strictness)
    assert all(other.__dict__[name] is value for name, value in before.items())
    assert all(other.state[others[name]][entry] is value for name in state for entry, value in state[name].items())
    assert other.param_groups[0]["lr"] == 0.1


def test_a_shape_that_differs_is_an_error_that_names_the_parameter_whatever_is_strict():
    _, optimizer = stepped(NAMES)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = [*NAMES[:2], "head", "body.bias"]
    _, other = made(NAMES)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"parameter 2 \(body\.bias\): .*shape \[7, 3\], and \[130\] is needed"):
            other.load_state_dict(saved, by_name=True, strict=strict)
    assert not other.state


def test_names_must_be_there_and_be_one_parameters_each():
    _, named = stepped(NAMES)
    params = parameters(*NAMES)
    nameless = FusedSGD(params.values(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"group 0 of this optimizer has no names .* model\.named_parameters\(\)"):
        nameless.load_state_dict(named.state_dict(), by_name=True)
    with pytest.raises(ValueError, match="group 0 of the saved state has no names"):
        named.load_state_dict(nameless.state_dict(), by_name=True)
    saved = named.state_dict()
    saved["param_groups"][0]["param_names"] = ["head"] * 4
    with pytest.raises(ValueError, match="'head' names two parameters of the saved state"):
        named.load_state_dict(saved, by_name=True)
    with pytest.raises(ValueError, match="strict=False is about names: give by_name=True"):
        named.load_state_dict(named.state_dict(), strict=False)


def test_many_names_are_not_all_told():
    _, optimizer = stepped(("head",))
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"params": [*range(30)], "param_names": ["head", *map(str, range(29))]}
    with pytest.raises(ValueError, match=r"this optimizer has no '0', .*'9' and 19 more; strict"):
        optimizer.load_state_dict(saved, by_name=True)


# Groups


def test_a_group_takes_the_numbers_of_the_saved_group_that_its_parameters_were_in():
    _, optimizer = stepped(
        {"params": NAMES[:2], "lr": 0.5, "initial_lr": 2.0},
        {"params": NAMES[2:], "weight_decay": 0.25},
        weight_decay=0.5,
    )
    _, other = made(
        {"params": ["new"], "lr": 3.0}, {"params": ["head"]}, {"params": NAMES[:2]}, {"params": ["body.bias"]}
    )
    other.load_state_dict(optimizer.state_dict(), by_name=True, strict=False)
    lrs, decays = ([group[name] for group in other.param_groups] for name in ("lr", "weight_decay"))
    assert (lrs, decays) == ([3.0, 0.1, 0.5, 0.1], [0, 0.25, 0.5, 0.25])
    assert [group.get("initial_lr") for group in other.param_groups] == [None, None, 2.0, None]


@pytest.mark.parametrize("in_a_tensor", [False, True])
def test_groups_that_agree_may_become_one(in_a_tensor):
    lr = torch.tensor(0.7) if in_a_tensor else 0.7
    params, optimizer = stepped(NAMES[:2], NAMES[2:], lr=lr, ema_decay=0.9)
    others, other = made(NAMES, ema_decay=0.9)
    other.load_state_dict(optimizer.state_dict(), by_name=True)
    assert numbers_of(other.param_groups[0]) == numbers_of(optimizer.param_groups[0])
    assert_same_entries(by_names(others, other), by_names(params, optimizer), NAMES)


@pytest.mark.parametrize("differing", [{"lr": 0.5}, {"lr": torch.tensor(0.1)}, {"initial_lr": 1.0}], ids=str)
def test_groups_that_differ_become_one_only_if_it_may_keep_its_own_where_they_do(differing):
    (name,) = differing
    params, optimizer = stepped(NAMES[:2], {"params": NAMES[2:], **differing}, weight_decay=0.25, ema_decay=0.5)
    others, other = made({"params": NAMES, "lr": 0.3, "initial_lr": 0.3}, ema_decay=0.9)
    what = f"group 0 has parameters of 2 saved groups, which differ in {name}"
    with pytest.raises(ValueError, match=f"{what}: make them the same there"):
        other.load_state_dict(optimizer.state_dict(), by_name=True)
    assert not other.state
    with pytest.warns(UserWarning, match=f"{what}: the group keeps its own"):
        other.load_state_dict(optimizer.state_dict(), by_name=True, strict=False)
    group = other.param_groups[0]
    assert (group[name], group["weight_decay"], group["ema_decay"], group["ema_updates"]) == (0.3, 0.25, 0.5, 3)
    assert_same_entries(by_names(others, other), by_names(params, optimizer), NAMES)


def test_an_empty_group_keeps_what_it_has():
    params, optimizer = stepped(NAMES)
    _, other = made(NAMES)
    other.add_param_group({"params": [], "param_names": [], "lr": 5.0})
    other.load_state_dict(optimizer.state_dict(), by_name=True)
    assert [group["lr"] for group in other.param_groups] == [0.1, 5.0]
    optimizer.load_state_dict(other.state_dict(), by_name=True)
    assert len(optimizer.param_groups) == 1 and by_names(params, optimizer)["head"]


# Averages of buffers lie in the state of some parameter


@pytest.mark.parametrize("names", [NAMES[::-1], NAMES[1:], ("new", *NAMES[1:]), ("head", "new")], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_averages_of_buffers_are_loaded_whatever_became_of_their_parameter(names, steps):
    buffers = [torch.randn(3, generator=torch.Generator().manual_seed(SEED)) for _ in range(2)]
    _, optimizer = stepped(NAMES, ema_decay=0.9, ema_buffers=buffers)
    assert "ema_buffers.1" in optimizer.state[optimizer.param_groups[0]["params"][0]]
    params, other = made(names, ema_decay=0.9, ema_buffers=[torch.ones(3)] * 2)
    params[names[0]].requires_grad_(False)  # so that the averages lie with the second
    for seed in range(steps):
        step(params, other, seed, only=names[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(optimizer.state_dict(), by_name=True, strict=False)
    found = [(name, e) for each in other.state.values() for name, e in each.items() if "ema_buffers" in name]
    assert [name for name, _ in found] == ["ema_buffers.0", "ema_buffers.1"]
    assert all(torch.equal(entry, buffer) for (_, entry), buffer in zip(found, buffers, strict=True))


# Around it


def test_hooks_see_what_torchs_see_and_may_rename():
    _, optimizer = stepped(NAMES)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = [f"module.{name}" for name in NAMES]
    _, other = made(NAMES[::-1])
    seen = []

    def rename(_, given):
        group = given["param_groups"][0]
        names = [name.removeprefix("module.") for name in group["param_names"]]
        return given | {"param_groups": [group | {"param_names": names}]}

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)))
    assert other.load_state_dict(saved, by_name=True).missing == [] and seen == [4]
    assert saved["param_groups"][0]["param_names"][0] == "module.embedding"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_loads_by_name_and_the_result_can_be_copied(copied):
    _, optimizer = stepped(NAMES)
    _, other = made(NAMES[::-1])
    own = copied(other)
    result = own.load_state_dict(optimizer.state_dict(), by_name=True)
    assert copied(result) == result and len(copied(own).state) == 4 and not other.state


def test_what_is_given_is_not_changed_and_by_position_nothing_is_returned():
    _, optimizer = stepped(NAMES, ema_decay=0.9, ema_buffers=[torch.ones(2)])
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    _, other = made(NAMES[1:], ema_decay=0.9, ema_buffers=[torch.zeros(2)])
    other.load_state_dict(saved, by_name=True, strict=False)
    assert saved["param_groups"] == before["param_groups"] and saved["state"].keys() == before["state"].keys()
    for key, entries in before["state"].items():
        assert saved["state"][key].keys() == entries.keys()
        assert all(torch.equal(saved["state"][key][name], entry) for name, entry in entries.items())
    assert optimizer.load_state_dict(saved) is None
