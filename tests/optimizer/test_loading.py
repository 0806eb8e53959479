"""What load_state_dict() takes, in which order model and optimizer are loaded, and what it refuses: nothing has changed
then. Run by pytest.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from wd_fused import FusedSGD

BF16 = torch.bfloat16


def stepped(dtype=torch.float32, lr=0.1, **options):
    torch.manual_seed(1)
    p = nn.Parameter(torch.randn(300).to(dtype))
    optimizer = FusedSGD([p], lr=lr, momentum=0.9, **options)
    step(p, optimizer)
    return p, optimizer


def step(p, optimizer):
    p.grad = torch.randn(300, generator=torch.Generator().manual_seed(2)).to(p.dtype)
    optimizer.step()


def entry(name, value):
    return lambda saved: saved["state"][0].__setitem__(name, value)


def number(name, value):
    return lambda saved: saved["param_groups"][0].__setitem__(name, value)


def short_storage(saved):
    saved["state"][0]["momentum_buffer"].untyped_storage().resize_(4)


AVERAGE, INT8, STOCHASTIC, MASTER = (
    (torch.float32, {"ema_decay": 0.9}),
    (torch.float32, {"momentum_dtype": torch.int8}),
    (BF16, {"rounding": "stochastic"}),
    (BF16, {"master_weights": "full"}),
)
REFUSED = {
    "buffers that are a number": (AVERAGE, lambda s: s.update(ema_buffers=5), '"ema_buffers" is a int, not a list'),
    "a sparse average": (AVERAGE, entry("ema", torch.ones(300).to_sparse()), '"ema" is torch.sparse_coo'),
    "an expanded average": (AVERAGE, entry("ema", torch.ones(1).expand(300)), '"ema" is expanded'),
    "an average of integers": (AVERAGE, entry("ema", torch.ones(300, dtype=torch.int64)), '"ema" is torch.int64'),
    "an average of bools": (AVERAGE, entry("ema", torch.ones(300, dtype=torch.bool)), '"ema" is torch.bool'),
    "a complex average": (AVERAGE, entry("ema", torch.ones(300, dtype=torch.complex64)), '"ema" is torch.complex64'),
    "an average on meta": (AVERAGE, entry("ema", torch.ones(300, device="meta")), '"ema" is on meta'),
    "a master of doubles": (MASTER, entry("master", torch.ones(300).double()), '"master" is torch.float64'),
    "scales of integers": (INT8, entry("momentum_scale", torch.ones(3).long()), '"momentum_scale" is torch.int64'),
    "too few scales": (INT8, entry("momentum_scale", torch.ones(2)), r'"momentum_scale" has shape \[2\], and \[3\]'),
    "momentum of text": ({}, entry("momentum_buffer", "x"), '"momentum_buffer" is a str, not a Tensor'),
    "momentum of integers": ({}, entry("momentum_buffer", torch.ones(300).long()), '"momentum_buffer" is torch.int64'),
    "complex momentum": ({}, entry("momentum_buffer", torch.ones(300) * 1j), '"momentum_buffer" is torch.complex64'),
    "momentum of another shape": ({}, entry("momentum_buffer", torch.ones(3)), r"shape \[3\], and \[300\] is needed"),
    "momentum without its memory": ({}, short_storage, "storage of 4 bytes, and its shape and strides need 1200"),
    "a state of text": ({}, lambda s: s["state"].update({0: "x"}), "parameter 0: its saved state is a str"),
    "lr of text": ({}, number("lr", "x"), "group 0: the saved lr='x': a str is not a number"),
    "no lr": ({}, number("lr", None), "group 0: the saved lr=None"),
    "a complex lr": ({}, number("lr", 0.1j), "saved lr=0.1j"),
    "two rates": ({}, number("lr", torch.ones(2)), r"a torch.float32 Tensor of shape \[2\]"),
    "momentum beyond a float": ({}, number("momentum", 10**400), "momentum=a number of 1329 bits: it does not fit"),
    "nesterov of text": ({}, number("nesterov", "yes"), "nesterov='yes': use True or False"),
    "no count of averages": (AVERAGE, number("ema_updates", None), "saved ema_updates: it is None"),
    "a broken count of averages": (AVERAGE, number("ema_updates", 1.5), "saved ema_updates: it is 1.5"),
    "no count of roundings": (STOCHASTIC, number("rounding_steps", None), "saved rounding_steps: it is None"),
    "an option out of range": (AVERAGE, number("ema_decay", 1.5), r"group 0 of the saved state: .*ema_decay=1\.5"),
    "an initial lr of text": ({}, number("initial_lr", "x"), "saved initial_lr='x'"),
}


@pytest.mark.parametrize(("kind", "spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_step_could_use_is_refused_and_nothing_has_changed(kind, spoil, message):
    dtype, options = kind or (torch.float32, {})
    if options == {"ema_decay": 0.9}:
        options["ema_buffers"] = nn.BatchNorm1d(2)
    (p, optimizer), (q, twin) = (stepped(dtype, **options) for _ in range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for name in saved["state"][0]:
        saved["state"][0][name] = torch.zeros_like(saved["state"][0][name])
    saved["param_groups"][0]["lr"] = 7.0
    spoil(saved)
    before = dict(optimizer.__dict__)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.__dict__.keys() == before.keys()
    assert all(optimizer.__dict__[name] is value for name, value in before.items())
    step(p, optimizer)
    step(q, twin)
    assert torch.equal(p, q)
    assert all(torch.equal(optimizer.state[p][name], entry) for name, entry in twin.state[q].items())


def test_a_hook_that_raises_after_loading_leaves_the_optimizer_as_it_was():
    _, optimizer = stepped()
    optimizer.register_load_state_dict_post_hook(lambda _: 1 / 0)
    before = dict(optimizer.__dict__)
    with pytest.raises(ZeroDivisionError):
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(optimizer.__dict__[name] is value for name, value in before.items())


OTHERS = {
    "Adam": (lambda p: torch.optim.Adam([p]), "has no momentum, dampening, but lr, betas"),
    "RMSprop": (lambda p: torch.optim.RMSprop([p], momentum=0.9), "has no dampening, but"),
    "Adagrad": (lambda p: torch.optim.Adagrad([p]), "it was not saved by an SGD"),
}


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_the_state_of_another_optimizer_is_refused(make, message):
    p, optimizer = stepped()
    other = make(p)
    step(p, other)
    with pytest.raises(ValueError, match=f"group 0 of the saved state .*{message}"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda _: "checkpoint.pt", TypeError, "'checkpoint.pt'; torch.load"),
        (lambda _: {"weight": torch.ones(2)}, ValueError, "has 'weight'; load what an optimizer's"),
        (lambda _: {}, ValueError, "has nothing; load what"),
        (lambda saved: {"model": {}, "optimizer": saved, "epoch": 3}, ValueError, "the entry 'optimizer' has them"),
    ],
    ids=["path", "model", "nothing", "checkpoint"],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_what_is_no_optimizers_state_is_told_apart(given, error, message, by_name):
    _, optimizer = stepped()
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(given(optimizer.state_dict()), by_name=by_name)


def test_momentum_under_another_name_is_named():
    _, optimizer = stepped()
    saved = optimizer.state_dict()
    saved["state"][0]["of the user"] = 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    saved["state"][0] = {"exp_avg": torch.ones(300)}
    with pytest.warns(UserWarning, match='of no use to SGD: "exp_avg"'):
        optimizer.load_state_dict(saved)


def test_entries_of_none_are_none_there():
    (p, optimizer), (q, twin) = (stepped(BF16, master_weights="full", ema_decay=0.9, lr=0.0) for _ in range(2))
    saved = optimizer.state_dict()
    saved["state"][0] |= {"momentum_scale": None, "compensation": None}
    optimizer.load_state_dict(saved)
    optimizer.state[p]["remainder"] = None
    step(p, optimizer)
    step(q, twin)
    assert torch.equal(p, q) and optimizer.state[p].keys() == twin.state[q].keys()


# Model and optimizer, in either order

FORMS = {
    "full": {"master_weights": "full"},
    "split": {"master_weights": "split"},
    "split24": {"master_weights": "split24"},
    "kahan": {"rounding": "kahan"},
}


@pytest.mark.parametrize("order", ["optimizer first", "model first", "both by torch"])
@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize("old", FORMS)
@pytest.mark.filterwarnings("ignore:FusedSGD.load_state_dict")
def test_further_digits_are_loaded_exactly_in_either_order(old, new, order):
    torch.manual_seed(3)
    weights = torch.randn(400, 5)

    def made(form):
        model = nn.Linear(5, 400, bias=False).bfloat16()
        return model, FusedSGD(model.parameters(), lr=0.0, momentum=0.9, **FORMS[form])

    model, optimizer = made(old)
    optimizer.load_master_parameters([weights])
    exact = optimizer.master_parameters()[0]
    other, loaded = made(new)
    if order == "both by torch":
        model(torch.ones(1, 5, dtype=BF16)).sum().backward()
        optimizer.step()
        exact = optimizer.master_parameters()[0]
        of_model, of_optimizer = get_state_dict(model, optimizer)
        set_state_dict(other, loaded, model_state_dict=of_model, optim_state_dict=of_optimizer)
    else:
        steps = [
            lambda: loaded.load_state_dict(optimizer.state_dict()),
            lambda: other.load_state_dict(model.state_dict()),
        ]
        for load in steps if order == "optimizer first" else reversed(steps):
            load()
    before = loaded.master_parameters()[0]
    other.weight.grad = torch.zeros_like(other.weight)
    loaded.step()
    now = loaded.master_parameters()[0]
    precision = {"full": 2**-23, "split": 2**-23, "split24": 2**-15, "kahan": 2**-17}[new]
    torch.testing.assert_close(before, exact, rtol=0, atol=0)
    torch.testing.assert_close(now, exact, rtol=precision, atol=0)
    if {old, new} <= {"full", "split"}:
        assert torch.equal(now, exact)  # there is no tie among these


def nearest_24_bits(weights):
    bits = weights.view(torch.int32).long()
    return ((bits + 0x7F + (bits // 256) % 2) // 256 * 256).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("how", ["loaded", "edited"])
@pytest.mark.filterwarnings("ignore:FusedSGD.load_state_dict")
def test_a_full_master_is_rounded_to_24_bits_as_near_as_its_parameter_allows(how):
    torch.manual_seed(4)
    weights = torch.randn(50_000)
    p = nn.Parameter(weights.to(BF16))
    optimizer = FusedSGD([p], lr=0.0, master_weights="full")
    optimizer.load_master_parameters([weights])
    if how == "loaded":
        saved = optimizer.state_dict()
        optimizer = FusedSGD([p], lr=0.0, master_weights="split24")
        optimizer.load_state_dict(saved)
    else:
        optimizer.param_groups[0]["master_weights"] = "split24"
    p.grad = torch.zeros_like(p)
    optimizer.step()
    got, nearest = optimizer.master_parameters()[0], nearest_24_bits(weights)
    # Of numbers in the last 512th before the middle between two bfloat16 the parameter shows the lower one.
    units = (got.view(torch.int32) - nearest.view(torch.int32)).abs() // 256
    is_before_middle = (weights.view(torch.int32).long() - (p.detach().float().view(torch.int32).long())) >= 0x7F80
    assert torch.equal(units, is_before_middle.to(units.dtype)) and is_before_middle.any()
    optimizer.load_master_parameters([weights])
    assert torch.equal(optimizer.master_parameters()[0], nearest)
