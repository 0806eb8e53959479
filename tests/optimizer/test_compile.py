"""torch.compile, torch.export and fake tensors: a compiled step and the operator have the bits of an eager step.

Most cases are traced with backend="aot_eager", which functionalizes as inductor does and generates no code.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from wd_fused import FusedSGD, backends, operators
from wd_fused.build import extension

ROOT = Path(__file__).resolve().parents[2]
SGD_ARGUMENTS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
OPERATOR = "wd_fused.sgd_"  # and sgd_with_tensors_


@pytest.fixture(autouse=True)
def fresh_compiler(threads: int) -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backward_in_graphs() -> Iterator[None]:
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch does not trace backward()")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


def graph_breaks() -> int:
    return sum(counters["graph_break"].values())


class Recorder:
    """A backend that counts the operator's calls in each graph it is given, and runs it as aot_eager does."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, inputs):
        targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        self.calls.append(sum(OPERATOR in target for target in targets))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(seed):
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))


def tensors(shapes, dtype=torch.float32, seed=0, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [t.to(memory_format=memory_format) if t.dim() == 4 else t for t in made]


SHAPES = ((3, 5), (7,), (2, 3, 4, 4), ())


def parameters(dtype=torch.float32, memory_format=torch.contiguous_format):
    return [t.requires_grad_() for t in tensors(SHAPES, dtype, memory_format=memory_format)]


def assert_compiled_steps_agree(
    make,
    steps=3,
    optimizer_class=FusedSGD,
    backend=None,
    fullgraph=True,
    between=None,
    momentum=True,
    make_other=None,
    traced=False,
):
    """step() compiled and step() of the other, over the same gradients; the backend that recorded the graphs.

    ``make`` makes parameters and FusedSGD's arguments; ``between(optimizer, step)`` runs before each step. ``traced``:
    torch's code is, whose bits not every version of the compiler keeps.
    """
    groups, arguments = make()
    other_groups, other_arguments = (make_other or make)()
    ours, theirs = FusedSGD(groups, **arguments), optimizer_class(other_groups, **other_arguments)
    recorder = Recorder() if backend is None else backend
    compiled = torch.compile(ours.step, backend=recorder, fullgraph=fullgraph)
    params = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in (ours, theirs)]
    for step in range(steps):
        for optimizer, own in ((ours, params[0]), (theirs, params[1])):
            for seed, p in enumerate(own):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + seed)).to(p.dtype)
            if between is not None:
                between(optimizer, step)
        compiled()
        theirs.step()
        for p, q in zip(*params, strict=True):
            if traced:
                torch.testing.assert_close(p, q)
                continue
            assert torch.equal(p, q), f"step {step}"
            if momentum and p.grad is not None:
                assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])
    return recorder


# A compiled model with an eager step

needs_inductor = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="torch's Inductor calls openssl, which is not on PATH"
)


@needs_inductor
def test_a_compiled_model_with_an_eager_step_has_the_bits_of_torch_optim_sgd():
    models = [small_model(), small_model()]
    compiled = [torch.compile(model, backend="inductor") for model in models]
    optimizers = [
        cls(model.parameters(), **SGD_ARGUMENTS) for cls, model in zip((FusedSGD, torch.optim.SGD), models, strict=True)
    ]
    for seed in range(3):
        for model, optimizer in zip(compiled, optimizers, strict=True):
            optimizer.zero_grad()
            model(batch(seed)).square().mean().backward()
            optimizer.step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert {own.backend for own in optimizers[0].backends()} == {"cpu"} or extension.load() is None


# A compiled step


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": 0.1},
        SGD_ARGUMENTS,
        SGD_ARGUMENTS | {"nesterov": True, "maximize": True},
        SGD_ARGUMENTS | {"dampening": 0.3},
    ],
    ids=str,
)
def test_a_compiled_step_is_one_graph_with_one_call_and_the_bits_of_torch_optim_sgd(arguments):
    recorder = assert_compiled_steps_agree(
        lambda: (parameters(), arguments), optimizer_class=torch.optim.SGD, momentum="momentum" in arguments
    )
    assert set(recorder.calls) == {1}
    assert counters["stats"]["unique_graphs"] == (2 if "momentum" in arguments else 1)  # the first makes the buffers


@needs_inductor
def test_inductor_leaves_the_operators_bits_alone():
    assert_compiled_steps_agree(
        lambda: (parameters(), SGD_ARGUMENTS), optimizer_class=torch.optim.SGD, backend="inductor"
    )


@pytest.mark.parametrize("numerics", ["torch", "opmath"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_compiled_step_has_the_bits_of_an_eager_one_for_every_dtype(dtype, numerics):
    recorder = assert_compiled_steps_agree(
        lambda: (parameters(dtype, torch.channels_last), SGD_ARGUMENTS | {"numerics": numerics}), steps=2
    )
    assert set(recorder.calls) == {1}


def test_groups_missing_gradients_and_hyperparameters_that_change():
    def make():
        params = parameters()
        return [{"params": params[:2], "lr": 0.2}, {"params": params[2:], "weight_decay": 0.0}], SGD_ARGUMENTS

    def between(optimizer, step):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if step in (0, 2):
            params[step].grad = None
        if step == 3:
            optimizer.param_groups[0]["lr"] *= 0.5
            optimizer.param_groups[1]["weight_decay"] = 0.1

    recorder = assert_compiled_steps_agree(make, 5, torch.optim.SGD, between=between)
    assert set(recorder.calls) == {2}


def test_eager_and_compiled_steps_take_turns():
    params = parameters()
    ours, theirs = (FusedSGD(own, **SGD_ARGUMENTS) for own in (params, copy.deepcopy(params)))
    compiled = torch.compile(ours.step, backend="aot_eager", fullgraph=True)
    for step in range(6):
        for p, q in zip(params, theirs.param_groups[0]["params"], strict=True):
            p.grad = torch.full_like(p, 0.5 + step)
            q.grad = p.grad.clone()
        (ours.step if step % 2 else compiled)()
        theirs.step()
    assert all(map(torch.equal, params, theirs.param_groups[0]["params"]))
    assert all(torch.equal(*(o.state_dict()["state"][i]["momentum_buffer"] for o in (ours, theirs))) for i in range(4))


@pytest.mark.usefixtures("backward_in_graphs")
def test_a_whole_training_step_is_one_graph():
    """Which torch.optim.SGD is not: its step() asks for a break."""

    def train(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        model.zero_grad()  # torch leaves the optimizer's zero_grad() out of graphs
        return loss.detach()

    models = [small_model(), small_model()]
    ours = FusedSGD(models[0].parameters(), **SGD_ARGUMENTS)
    theirs = torch.optim.SGD(models[1].parameters(), **SGD_ARGUMENTS)
    recorder = Recorder()
    compiled = torch.compile(train, backend=recorder, fullgraph=True)
    for seed in range(3):
        assert torch.equal(compiled(models[0], ours, batch(seed)), train(models[1], theirs, batch(seed)))
        assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert set(recorder.calls) == {1} and counters["stats"]["unique_graphs"] == 2
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        torch.compile(train, backend="eager", fullgraph=True)(models[1], theirs, batch(3))


def test_a_training_step_with_torchs_breaks_at_backward_and_zero_grad_and_none_at_step():
    def train(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    breaks = []
    models = [small_model(), small_model()]
    ours = FusedSGD(models[0].parameters(), **SGD_ARGUMENTS)
    theirs = torch.optim.SGD(models[1].parameters(), **SGD_ARGUMENTS)
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(train, backend="aot_eager")
        for seed in range(3):
            compiled(model, optimizer, batch(seed))
        breaks.append(graph_breaks())
    torch.testing.assert_close([*models[0].parameters()], [*models[1].parameters()])
    reasons = [reason.replace(str(ROOT), "") for reason in counters["graph_break"]]  # a clone is called wd_fused, too
    assert not any("wd_fused" in reason for reason in reasons) and breaks[0] <= breaks[1]


@pytest.mark.parametrize("names", [("lr",), ("weight_decay",), ("lr", "weight_decay")], ids=str)
def test_numbers_in_tensors_change_without_a_new_graph(names):
    """With the bits of an eager step; torch traces other operators for such numbers than it runs."""

    def between(optimizer, step):
        for name in names:
            optimizer.param_groups[0][name].mul_(0.9)

    def make():
        return parameters(), SGD_ARGUMENTS | {name: torch.tensor(SGD_ARGUMENTS[name]) for name in names}

    recorder = assert_compiled_steps_agree(make, 8, torch.optim.SGD, between=between)
    assert set(recorder.calls) == {1} and counters["stats"]["unique_graphs"] == 2


SCHEDULED = {
    "lr": lambda step: 0.1 / (1 + step),
    "momentum": lambda step: 0.85 + 0.005 * step,
    "dampening": lambda step: 0.01 * (1 + step),
    "weight_decay": lambda step: 0.01 / (1 + step),
}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["a float", "a Tensor"])
@pytest.mark.parametrize("names", [*((name,) for name in SCHEDULED), tuple(SCHEDULED)], ids="-".join)
def test_floats_that_a_scheduler_changes_take_one_more_graph_and_no_other(names, lr):
    """The first for the numbers as they were, with the first step's of momentum; then one for any, as torch's SGD."""

    def between(optimizer, step):
        group = optimizer.param_groups[0]
        for name in names:
            if isinstance(group[name], torch.Tensor):
                group[name].fill_(SCHEDULED[name](step))
            else:
                group[name] = SCHEDULED[name](step)

    def make():
        return parameters(), SGD_ARGUMENTS | {"lr": lr if isinstance(lr, float) else lr.clone()}

    recorder = assert_compiled_steps_agree(make, 12, torch.optim.SGD, between=between)
    assert set(recorder.calls) == {1} and counters["stats"]["unique_graphs"] <= 3


def test_schedulers_wrap_step_in_code_that_torch_leaves_out_of_graphs_and_the_step_within_is_compiled():
    def rate():
        return SGD_ARGUMENTS | {"lr": torch.tensor(0.1)}

    params, twins, recorder = parameters(), parameters(), Recorder()
    ours, theirs = FusedSGD(params, **rate()), torch.optim.SGD(twins, **rate())
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in (ours, theirs)]
    compiled = torch.compile(ours.step, backend=recorder)
    for step in range(6):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.full_like(p, 0.5 + step)
            q.grad = p.grad.clone()
        compiled()
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
    assert all(map(torch.equal, params, twins)) and ours.param_groups[0]["lr"] == 0.0125
    assert set(recorder.calls) == {1} and counters["stats"]["unique_graphs"] == 2


def test_the_example_agrees(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    sys.modules.pop("compiled_step", None)
    import compiled_step as example

    monkeypatch.setattr(example, "STEPS", 3)
    assert example.main("aot_eager")
    assert capsys.readouterr().out.count("the bits of torch.optim.SGD") == 2


# What the operator does not take


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_torchs_code_is_traced_where_the_operator_is_not_wanted_or_does_not_take_a_group(name, monkeypatch):
    """As it is where there is no extension."""
    if name == "auto":
        monkeypatch.setattr(backends.Backend, "unavailable", lambda self: "no compiler")
    recorder = assert_compiled_steps_agree(
        lambda: (parameters(), SGD_ARGUMENTS | {"backend": name}),
        optimizer_class=torch.optim.SGD,
        make_other=lambda: (parameters(), SGD_ARGUMENTS),
        traced=True,
    )
    assert set(recorder.calls) == {0}


def strided():
    base = torch.arange(24.0).view(4, 6)
    return [base[:, ::2].requires_grad_(), torch.ones(3, requires_grad=True)]


def test_strided_parameters_beside_a_group_that_the_operator_takes():
    def make():
        params = strided()
        return [{"params": params[:1]}, {"params": params[1:]}], SGD_ARGUMENTS

    assert set(assert_compiled_steps_agree(make, 2, torch.optim.SGD, traced=True).calls) == {1}


def test_a_parameter_twice_in_a_group():
    def make():
        p = torch.ones(4, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that it is
            return [p, p], SGD_ARGUMENTS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorder = assert_compiled_steps_agree(make, 2, torch.optim.SGD, fullgraph=False)
    assert not any(recorder.calls)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_that_share_memory(tied):
    def make():
        base = torch.arange(12.0)
        params = [nn.Parameter(torch.zeros(12)) for _ in range(2)] if tied else []
        for param in params:
            param.data = base
        return params or [nn.Parameter(base[:8]), nn.Parameter(base[6:])], SGD_ARGUMENTS

    assert_compiled_steps_agree(make, 2, torch.optim.SGD, fullgraph=False)


# Where the step stays outside of graphs


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_grad_norm": 0.1, "ema_decay": 0.9},
        {"l1_penalty": 0.01, "zero_grads": True},
        {"momentum_dtype": torch.int8},
        {"report_numerics": True},
    ],
    ids=str,
)
def test_options_break_the_graph_and_step_right(arguments):
    def make():
        return parameters(), SGD_ARGUMENTS | arguments

    recorder = assert_compiled_steps_agree(make, 3, fullgraph=False)
    assert not any(recorder.calls) and graph_breaks() > 0
    groups, own = make()
    optimizer = FusedSGD(groups, **own)
    groups[0].grad = torch.ones_like(groups[0])
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def test_a_backend_that_was_asked_for_is_never_left_silently():
    params = strided()[:1]
    assert_compiled_steps_agree(
        lambda: (strided()[:1], SGD_ARGUMENTS | {"backend": "cpu"}), 2, fullgraph=False
    )  # an eager step does take it
    params = [torch.ones(3, dtype=torch.complex64, requires_grad=True)]
    params[0].grad = torch.ones(3, dtype=torch.complex64)
    optimizer = FusedSGD(params, lr=0.1, backend="cpu")
    with pytest.raises(RuntimeError, match=r'group 0, parameter 0: backend="cpu" does not take it'):
        torch.compile(optimizer.step, backend="eager")()
    assert torch.equal(params[0], torch.ones(3, dtype=torch.complex64))


@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_grad_scalers_scale_and_overflow_are_heeded(overflow):
    def between(optimizer, step):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(overflow)

    assert_compiled_steps_agree(
        lambda: (parameters(), {"lr": 0.1, "fused": True}), 2, fullgraph=False, between=between, momentum=False
    )


def test_a_step_with_averages_in_the_models_place_is_an_error():
    optimizer = FusedSGD(parameters(), lr=0.1, ema_decay=0.9)
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="inside swap_ema"):
        torch.compile(optimizer.step, backend="eager")()


def test_a_closure():
    models = [small_model(), small_model()]
    optimizers = [FusedSGD(model.parameters(), **SGD_ARGUMENTS) for model in models]
    compiled = torch.compile(optimizers[0].step, backend="aot_eager")

    def closure_of(model, optimizer, seed):
        def closure():
            optimizer.zero_grad()
            loss = model(batch(seed)).square().mean()
            loss.backward()
            return loss

        return closure

    for seed in range(2):
        loss = compiled(closure_of(models[0], optimizers[0], seed))
        assert torch.equal(loss, optimizers[1].step(closure_of(models[1], optimizers[1], seed)))
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


# The operator


def operands(dtype=torch.float32, momentum=0.9, first=False, requires_grad=False, memory_format=None, **options):
    """Arguments of the operator: positional, and by keyword."""
    memory_format = memory_format or torch.contiguous_format
    params, grads, buffers = (tensors(SHAPES, dtype, seed, memory_format) for seed in range(3))
    params = [p.requires_grad_(requires_grad) for p in params]
    buffers = buffers if momentum else []
    keywords = {"lr": 0.1, "momentum": momentum, "dampening": 0.0, "weight_decay": 0.01, "nesterov": False}
    return (params, grads, buffers, [first] * len(buffers)), keywords | {"maximize": False} | options


@pytest.fixture
def operator() -> Any:
    if extension.load() is None:
        pytest.skip("no C++ extension")
    return torch.ops.wd_fused.sgd_


@pytest.mark.parametrize(
    "case",
    [
        {"momentum": 0.0},
        {},
        {"first": True},
        {"nesterov": True, "maximize": True, "dtype": torch.float64},
        {"dtype": torch.bfloat16, "opmath": True},
        {"dtype": torch.float16, "dampening": 0.5},
        {"requires_grad": True},
        {"memory_format": torch.channels_last},
    ],
    ids=str,
)
def test_the_operator_passes_opcheck(case, operator):
    torch.library.opcheck(operator.default, *operands(**case))


@pytest.mark.parametrize("case", [{"momentum": 0.0}, {"first": True}, {"requires_grad": True}], ids=str)
def test_the_operator_with_numbers_in_tensors_passes_opcheck_and_does_the_same(case, operator):
    operators.define()
    with_tensors = torch.ops.wd_fused.sgd_with_tensors_.default
    runs = [operands(**case) for _ in range(2)]
    args, keywords = runs[0]
    names = ("lr", "momentum", "dampening", "weight_decay")
    numbers = [torch.tensor(keywords.pop(name), dtype=torch.float64) for name in names]
    torch.library.opcheck(with_tensors, (*args, *numbers), keywords)
    with torch.no_grad():
        with_tensors(*args, *numbers, **keywords)
        operator(*runs[1][0], **runs[1][1])
    assert all(map(torch.equal, args[0] + args[2], runs[1][0][0] + runs[1][0][2]))
    mode = FakeTensorMode()
    fake = [[mode.from_tensor(tensor.detach()) for tensor in own] for own in args[:3]]
    with mode, pytest.raises(ValueError, match="lr must have one element, not shape"):
        with_tensors(*fake, args[3], torch.ones(2), *[torch.ones(())] * 3, **keywords)


class Step(nn.Module):
    """Steps its buffers and returns them: what can be exported."""

    def __init__(self):
        super().__init__()
        (params, grads, buffers, self.first_steps), self.keywords = operands()
        for name, values in (("param", params), ("grad", grads), ("momentum", buffers)):
            for i, value in enumerate(values):
                self.register_buffer(f"{name}{i}", value)

    def forward(self, scale):
        params, grads, buffers = (
            [getattr(self, f"{name}{i}") for i in range(len(SHAPES))] for name in ("param", "grad", "momentum")
        )
        torch.ops.wd_fused.sgd_(params, [g * scale for g in grads], buffers, self.first_steps, **self.keywords)
        return [p.clone() for p in params]


@pytest.mark.usefixtures("operator")
def test_a_module_that_calls_the_operator_is_exported():
    scale = torch.tensor(0.5)
    program = torch.export.export(Step(), (scale,))
    assert sum(OPERATOR in str(node.target) for node in program.graph.nodes) == 1
    exported, expected = program.module(), Step()
    for _ in range(2):
        assert all(map(torch.equal, exported(scale), expected(scale)))
    lowered = torch.export.export(Step(), (scale,)).run_decompositions()
    assert any("auto_functionalized" in str(node.target) for node in lowered.graph.nodes)
    expected = Step()
    assert all(map(torch.equal, lowered.module()(scale), expected(scale)))


def test_make_fx_traces_the_operator(operator):
    args, keywords = operands()

    def step(params, grads, buffers):
        operator(params, grads, buffers, args[3], **keywords)
        return params

    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(step, tracing_mode=mode)(*(copy.deepcopy(own) for own in args[:3]))
        assert sum(OPERATOR in str(node.target) for node in traced.graph.nodes) == 1
        results = [call(*(copy.deepcopy(own) for own in args[:3])) for call in (traced, step)]
        assert all(map(torch.equal, *results)), mode


TRACED: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "foreach": True},
    {"momentum": 0.9, "backend": "torch"},
    {"l1_penalty": 0.01, "decoupled_weight_decay": 0.1, "ema_decay": 0.9, "momentum": 0.9},
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16, "zero_grads": True},
]


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("arguments", TRACED, ids=str)
def test_make_fx_traces_a_step(arguments, tracing_mode):
    def train(w, g):
        optimizer = FusedSGD([w], lr=0.5, **arguments)
        for factor in (1, 2):
            w.grad = g * factor
            optimizer.step()
        return w * 1

    traced = make_fx(train, tracing_mode=tracing_mode)(torch.ones(5), torch.ones(5))
    w, g = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(traced(w.clone(), g), train(w.clone(), g))
    assert not torch.equal(train(w.clone(), g), w)


def test_functionalized_steps_are_traced():
    def train(w, g):
        optimizer = FusedSGD([w], lr=0.5)
        w.grad = g
        optimizer.step()
        return w * 1

    traced = make_fx(torch.func.functionalize(train))(torch.ones(2), torch.ones(2))
    assert traced(torch.zeros(2), torch.ones(2)).tolist() == [-0.5, -0.5]


def test_a_norm_cannot_be_traced_and_torch_says_so():
    def train(w, g):
        optimizer = FusedSGD([w], lr=0.5, max_grad_norm=1.0)
        w.grad = g
        optimizer.step()
        return w * 1

    with pytest.raises(RuntimeError, match="tracing tensor"):
        make_fx(train)(torch.ones(2), torch.ones(2))


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "arguments", "seen"),
    [
        (torch.float32, {}, "wd_fused.sgd_"),
        (torch.bfloat16, {}, "wd_fused.sgd_"),
        (torch.bfloat16, {"numerics": "opmath", "backend": "cpu"}, "wd_fused.sgd_"),
        (torch.float32, {"backend": "torch"}, "aten.add_"),
        (torch.float32, {"max_grad_norm": 0.1, "ema_decay": 0.9}, "aten.copy_"),
        (torch.bfloat16, {"master_weights": "split", "backend": "cpu"}, "aten.copy_"),
    ],
    ids=str,
)
def test_a_mode_sees_the_step_which_has_the_same_bits_and_goes_on_fused(dtype, arguments, seen):
    runs = []
    for watched in (True, False):
        params = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
        optimizer = FusedSGD(params, **SGD_ARGUMENTS, **arguments)
        for step in range(4):
            torch.manual_seed(step)
            for p in params:
                p.grad = torch.randn_like(p)
            counter = Counter()
            with counter if watched and step in (0, 2) else contextlib.nullcontext():
                optimizer.step()
            assert any(seen in name for name in counter.names) == (watched and step in (0, 2))
        runs.append([*params, *(t for state in optimizer.state.values() for t in state.values())])
    assert all(map(torch.equal, *runs)) and len(runs[0]) == len(runs[1])


def test_a_gradient_that_is_another_parameter_is_read_in_torchs_order_under_a_mode():
    runs = []
    for cls in (FusedSGD, torch.optim.SGD):
        torch.manual_seed(3)
        params = [nn.Parameter(torch.randn(4)) for _ in range(3)]
        optimizer = cls(params, **SGD_ARGUMENTS)
        for p, grad in zip(params, (torch.ones(4), params[0].detach(), params[0].detach()), strict=True):
            p.grad = grad
        with Counter():
            optimizer.step()
            optimizer.step()
        runs.append(params)
    assert all(map(torch.equal, *runs))


def test_real_parameters_are_not_stepped_behind_a_fake_modes_back():
    params = parameters()
    optimizer = FusedSGD(params, **SGD_ARGUMENTS)
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    with FakeTensorMode(), pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and not any(optimizer.state.values())
    optimizer.step()
    assert not any(map(torch.equal, params, before))


def test_a_mode_that_refuses_the_operator_leaves_no_momentum_buffer():
    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if OPERATOR in str(operator):
                raise ValueError("refused")
            return operator(*args, **(kwargs or {}))

    params = parameters()
    optimizer = FusedSGD(params, **SGD_ARGUMENTS)
    for p in params:
        p.grad = torch.ones_like(p)
    with Refuses(), pytest.raises(ValueError, match="refused"):
        optimizer.step()
    assert not any(optimizer.state.values())


def test_fake_tensors_are_not_computed_and_errors_stay_errors(operator):
    args, keywords = operands()
    with FakeTensorMode() as mode:
        params, grads, buffers = ([mode.from_tensor(t) for t in own] for own in args[:3])
        assert operator(params, grads, buffers, args[3], **keywords) is None
        assert [p.shape for p in params] == [p.shape for p in args[0]]
        with pytest.raises(ValueError, match="4 params but 3 grads"):
            operator(params, grads[1:], buffers, args[3], **keywords)
        with pytest.raises(ValueError, match="needs 4 momentum_buffers"):
            operator(params, grads, [], [], **keywords)
        with pytest.raises(ValueError, match=r"tensor 0: param has shape \[3, 5\], grad \[7\]"):
            operator(params, [grads[1], *grads[1:]], buffers, args[3], **keywords)
        with pytest.raises(ValueError, match=r"tensor 1: param has shape \[7\], momentum buffer \[3, 5\]"):
            operator(params, grads, [buffers[0], buffers[0], *buffers[2:]], args[3], **keywords)
    assert all(map(torch.equal, args[0], operands()[0][0]))


def test_errors_of_a_compiled_step_are_those_of_an_eager_one():
    params = parameters()
    optimizer = FusedSGD(params, **SGD_ARGUMENTS)
    for p in params:
        p.grad = torch.ones_like(p)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    before = [p.detach().clone() for p in params]
    for state_is_there in (False, True):
        optimizer.param_groups[0]["lr"] = 1e300
        for step in (compiled, optimizer.step):
            with pytest.raises(RuntimeError, match=r"does not fit into float32|cannot be converted to"):
                step()
            assert any(optimizer.state.values()) == state_is_there
        assert all(map(torch.equal, params, before))
        optimizer.param_groups[0]["lr"] = 0.1
        compiled()
        before = [p.detach().clone() for p in params]
