"""FusedSGD's options on every fused backend, bit for bit against the reference: FusedSGD(backend="torch"). Run by
pytest.

Where gradients are clipped they are small multiples of 1/16, whose squares add up exactly in float64: every order gives
the same norm.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FLOATS,
    GRADIENT_LAYOUTS,
    HALVES,
    LAYOUTS,
    NICE,
    SHAPES,
    assert_same_bits,
    laid_out,
    memory,
    numbers,
)
from torch import Tensor

from wd_fused import FusedSGD
from wd_fused.options import kept

pytestmark = [
    pytest.mark.usefixtures("fused_backend"),
    # Gradients that share memory with others, and those that zeros cannot be written to in one pass.
    pytest.mark.filterwarnings("ignore:FusedSGD. plain torch operations step", "ignore:FusedSGD. torch's own code"),
]

MORE_SHAPES = (*SHAPES, (128,), (129,), (3, 200), (2, 3, 8, 16))
LARGE_SHAPES = ((16_385,), (129, 257), (2, 5, 83, 101))
ENTRIES = ("momentum_buffer", "momentum_scale", "master", "remainder", "compensation", "ema")


# --- cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    gradient_dtype: torch.dtype | None = None
    has_gradient: tuple[bool, ...] = (True, True, True)
    special: float = 0.0


@dataclass(frozen=True)
class GroupSpec:
    tensors: tuple[TensorSpec, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Case:
    groups: tuple[GroupSpec, ...]
    seed: int
    options: dict[str, Any]
    numerics: str = "torch"
    steps: int = 3
    scale: float | None = None
    found_inf: tuple[float | None, ...] = (None, None, None)
    edits: tuple[tuple[int, int, dict[str, Any]], ...] = ()  # before which step, group, what

    def source(self, *place: int) -> torch.Generator:
        seed = self.seed
        for number in place:
            seed = seed * 10_007 + number + 1
        return torch.Generator().manual_seed(seed % 2**63)

    def clips(self) -> bool:
        edited = [edit for _, _, edit in self.edits]
        return any("max_grad_norm" in options for options in (*(g.options for g in self.groups), *edited))

    def can_be_captured(self) -> bool:
        """The last step: its numbers are those of the one before, and all has been stepped before."""
        tensors = [tensor for group in self.groups for tensor in group.tensors]
        changes = any(
            group.options.get("rounding") == "stochastic" or group.options.get("ema_warmup") for group in self.groups
        )
        return not changes and not self.edits and not any(self.found_inf) and all(all(t.has_gradient) for t in tensors)


class Run:
    """A case stepped by an optimizer; that of the reference on the CPU."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case = case
        self.devices = [torch.device("cpu") if backend == "torch" else strategies.DEVICE] * len(case.groups)
        if self.devices[0].type == "cuda" and case.seed % 3 == 0 and torch.cuda.device_count() > 1:
            self.devices = [torch.device("cuda", g % 2) for g in range(len(case.groups))]
        self.params: list[list[torch.nn.Parameter]] = []
        for g, group in enumerate(case.groups):
            self.params.append(
                [
                    torch.nn.Parameter(
                        laid_out(numbers(t.shape, t.dtype, case.source(g, i, 0), t.special, self.devices[g]), t.layout)
                    )
                    for i, t in enumerate(group.tensors)
                ]
            )
        groups = [
            {"params": params, **copy.deepcopy(group.options)}
            for params, group in zip(self.params, case.groups, strict=True)
        ]
        self.optimizer = FusedSGD(groups, backend=backend, **case.options)
        self.optimizer._numerics = case.numerics  # the reference has both, though torch's own code has one

    def gradient(self, g: int, i: int, step: int) -> Tensor | None:
        spec = self.case.groups[g].tensors[i]
        if not spec.has_gradient[step]:
            return None
        dtype, source = spec.gradient_dtype or spec.dtype, self.case.source(g, i, 1 + step)
        if self.case.clips():
            values = (torch.randint(-128, 129, spec.shape, generator=source) / 16).to(self.devices[g], dtype)
        else:
            values = numbers(spec.shape, dtype, source, spec.special, self.devices[g])
        return laid_out(values * (self.case.scale or 1), spec.gradient_layout)

    def step(self, step: int) -> None:
        for at, g, edit in self.case.edits:
            if at == step:
                self.optimizer.param_groups[g].update(edit)
        for g, params in enumerate(self.params):
            for i, param in enumerate(params):
                set_gradient(param, self.gradient(g, i, step))
        if self.case.scale is not None:
            self.optimizer.grad_scale = torch.tensor(self.case.scale, device=self.devices[0])
            self.optimizer.found_inf = None
            if (found := self.case.found_inf[step]) is not None:
                self.optimizer.found_inf = torch.tensor(found, device=self.devices[0])
        on_gpus = {device for device in self.devices if device.type == "cuda"}
        with strategies.side_streams(on_gpus if self.case.seed % 2 else ()):
            if len(on_gpus) == 1 and step == 2 and self.case.can_be_captured():
                strategies.replayed(self.optimizer.step)
            else:
                self.optimizer.step()


def set_gradient(param: Tensor, gradient: Tensor | None) -> None:
    param.grad = None
    if gradient is not None and gradient.dtype == param.dtype:
        param.grad = gradient
    elif gradient is not None:
        param.grad = torch.empty_like(param)
        param.grad.data = gradient


def assert_same(ours: Run, expected: Run, what: str) -> None:
    for g, (params, others) in enumerate(zip(ours.params, expected.params, strict=True)):
        own = ("params", "backend")  # of an optimizer
        keys = [{k: v for k, v in run.optimizer.param_groups[g].items() if k not in own} for run in (ours, expected)]
        assert keys[0] == keys[1], f"{what}, group {g}"
        for i, (param, other) in enumerate(zip(params, others, strict=True)):
            name = f"{what}, group {g}, parameter {i}"
            assert_same_bits(param, other, name)
            assert_same_bits(memory(param), memory(other), f"memory of {name}")
            states = [dict(run.optimizer.state.get(p, {})) for run, p in ((ours, param), (expected, other))]
            for entry in ENTRIES:
                own, wanted = (state.get(entry) for state in states)
                assert (own is None) == (wanted is None), f"{entry} of {name}: {own}, expected {wanted}"
                if own is not None:
                    assert_same_numbers(own, wanted, f"{entry} of {name}")
            if param.grad is not None and ours.case.scale is None:
                assert_same_bits(param.grad, other.grad, f"gradient of {name}")
            if param.grad is not None and ours.optimizer.param_groups[g].get("zero_grads"):
                zeroed = [not p.grad.any() for p in (param, other)]
                assert zeroed[0] == zeroed[1], f"gradient of {name}"
    norms = [run.optimizer.grad_norm for run in (ours, expected)]
    assert (norms[0] is None) == (norms[1] is None), f"{what}: {norms}"
    if norms[0] is not None:
        assert_same_bits(*norms, f"{what}, grad_norm")


def assert_same_numbers(ours: Tensor, expected: Tensor, what: str) -> None:
    if ours.is_floating_point():
        assert_same_bits(ours, expected, what)
    else:
        assert ours.dtype == expected.dtype and torch.equal(ours.cpu(), expected), what


def compare(case: Case, backend: str) -> None:
    ours, expected = Run(case, "auto"), Run(case, "torch")
    for step in range(case.steps):
        ours.step(step)
        expected.step(step)
        # Of both: it makes what the options keep, where a step that was skipped has not.
        assert [{b.backend for b in run.optimizer.backends()} for run in (ours, expected)] == [{backend}, {"torch"}]
        assert_same(ours, expected, f"step {step}")


# --- random cases ------------------------------------------------------------------------------------------------

PLAIN = 6  # those of a group without options
WEIGHTS: tuple[dict[str, Any], ...] = (
    {},
    {"master_weights": "full"},
    {"master_weights": "split"},
    {"master_weights": "split24"},
    {"rounding": "kahan"},
    {"rounding": "stochastic"},
)


def dtypes_for(options: dict[str, Any]) -> tuple[torch.dtype, ...]:
    other = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}.get(options.get("ema_dtype"))
    return tuple(dtype for dtype in _dtypes_for(options) if dtype != other)


def _dtypes_for(options: dict[str, Any]) -> tuple[torch.dtype, ...]:
    if len(options) == PLAIN:
        return FLOATS  # torch's own code rounds half precision otherwise
    if options.get("master_weights") in ("split", "split24") or options.get("rounding") == "stochastic":
        return (torch.bfloat16,)
    if "master_weights" in options or "rounding" in options:
        return HALVES
    return (torch.float32, *HALVES) if "momentum_dtype" in options else FLOATS + HALVES


@st.composite
def group_options(draw: st.DrawFn, may_clip: bool) -> dict[str, Any]:
    momentum = draw(st.sampled_from((0.0, 0.9, 0.9, 1 / 3)))
    nesterov = momentum > 0 and draw(st.booleans())
    options: dict[str, Any] = {
        "lr": draw(st.sampled_from(NICE)),
        "momentum": momentum,
        "dampening": 0.0 if nesterov else draw(st.sampled_from((0.0, 0.0, 0.3))),
        "weight_decay": draw(st.sampled_from((0.0, *NICE))),
        "nesterov": nesterov,
        "maximize": draw(st.booleans()),
    }
    if draw(st.integers(0, 5)) == 0:
        return options
    options |= draw(st.sampled_from(WEIGHTS))
    if draw(st.booleans()):
        options["momentum_dtype"] = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.int8)))
    if may_clip and draw(st.booleans()):
        options["max_grad_norm"] = draw(st.sampled_from((0.01, 1.0, 1e6, math.inf, 0.0)))
    if draw(st.booleans()):
        options["l1_penalty"] = draw(st.sampled_from((1e-3, 1 / 3)))
    if draw(st.booleans()):
        options["decoupled_weight_decay"] = draw(st.sampled_from((True, True, 0.01)))
        options["decouple_lr"] = draw(st.booleans()) and bool(options["lr"] > 0)
    if draw(st.booleans()):
        options["ema_decay"] = draw(st.sampled_from((0.999, 0.9, 0.5, 0.3, 0.0)))
        options["ema_warmup"] = draw(st.booleans())
        options["ema_dtype"] = draw(st.sampled_from((None, None, torch.float32, *HALVES)))
        if not dtypes_for(options):
            del options["ema_dtype"]
    if draw(st.integers(0, 3)) == 0:
        options["zero_grads"] = True
    if not options.get("decoupled_weight_decay") and draw(st.integers(0, 3)) == 0:
        options["lr"] = torch.tensor(options["lr"])  # read on a device, the factor of the decay rounds otherwise
    return options


@st.composite
def tensor_specs(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], has_options: bool, is_large: bool) -> TensorSpec:
    dtype = draw(st.sampled_from(dtypes))
    return TensorSpec(
        dtype=dtype,
        shape=draw(st.sampled_from(LARGE_SHAPES if is_large else MORE_SHAPES)),
        layout=draw(st.sampled_from(("contiguous", *LAYOUTS))),
        gradient_layout=draw(st.one_of(st.just("contiguous"), st.sampled_from(GRADIENT_LAYOUTS))),
        gradient_dtype=draw(st.sampled_from((None, None, *FLOATS, *HALVES))) if has_options else None,
        has_gradient=draw(st.tuples(*[st.sampled_from((True, True, True, False))] * 3)),
        special=draw(st.sampled_from((0.0, 0.0, 0.3))),
    )


@st.composite
def edits(draw: st.DrawFn, groups: tuple[GroupSpec, ...], may_clip: bool) -> tuple[int, int, dict[str, Any]]:
    g = draw(st.integers(0, len(groups) - 1))
    options = groups[g].options
    lr = options["lr"] / 2 if options.get("decouple_lr") else 0.2  # far above its highest, it is refused
    choices: list[dict[str, Any]] = [{"lr": lr}, {"l1_penalty": 0.25}, {"ema_decay": 0.7}, {"zero_grads": True}]
    if may_clip:
        choices += [{"max_grad_norm": 0.5}, {"max_grad_norm": None}]
    if groups[g].tensors and all(t.dtype != torch.float64 for t in groups[g].tensors):
        choices += [{"momentum_dtype": torch.int8}, {"momentum_dtype": torch.float32}]
    return draw(st.integers(1, 2)), g, draw(st.sampled_from(choices))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    may_clip = draw(st.booleans())
    groups = []
    for _ in range(draw(st.integers(1, 2 if strategies.is_simulated() else 3))):
        options = draw(group_options(may_clip))
        has_options = len(options) > PLAIN
        is_large = draw(st.integers(0, 19)) == 0 and not strategies.is_simulated()
        most = 1 if is_large else 2 if strategies.is_simulated() else 4
        specs = tensor_specs(dtypes_for(options), has_options, is_large)
        groups.append(GroupSpec(tuple(draw(st.lists(specs, min_size=1, max_size=most))), options))
    common: dict[str, Any] = {}
    if any("max_grad_norm" in group.options for group in groups):
        common["norm_per_group"] = draw(st.booleans())
    if draw(st.booleans()):
        common["rounding_seed"] = draw(st.integers(-(2**63), 2**64))
    has_options = [len(group.options) > PLAIN for group in groups]
    # Without options, gradients are unscaled in place, which torch does not do to expanded ones.
    scale = draw(st.sampled_from((None, None, 0.25, 1024.0))) if all(has_options) else None
    changes = tuple(draw(st.lists(edits(tuple(groups), may_clip), max_size=2))) if all(has_options) else ()
    # Whether a GPU skips a step the host does not know, and counts it among those of the average or the rounding.
    all_options = (*(group.options for group in groups), *(edit for *_, edit in changes))
    counts = any("ema_decay" in options or options.get("rounding") == "stochastic" for options in all_options)
    counts = counts and strategies.is_simulated()
    found = st.sampled_from((None, 0.0) if counts else (None, 0.0, 0.0, 1.0))
    return Case(
        groups=tuple(groups),
        seed=draw(st.integers(0, 2**31)),
        options=common,
        numerics=draw(st.sampled_from(("torch", "torch", "opmath"))) if all(has_options) else "torch",
        scale=scale,
        found_inf=draw(st.tuples(found, found, found)),
        edits=changes,
    )


@given(case=cases())
def test_random_options_have_the_references_bits(case: Case, fused_backend: str) -> None:
    compare(case, fused_backend)


def simple_case(**changes: Any) -> Case:
    """Options in every dtype that they take, a tensor of several tiles and blocks among them."""
    shapes = ((7,), (3, 200), (2, 3, 4, 5), (65,))
    layouts = ("contiguous", "contiguous", "channels_last", "column gaps")

    def group(dtype: torch.dtype, **options: Any) -> GroupSpec:
        tensors = tuple(TensorSpec(dtype, s, layout) for s, layout in zip(shapes, layouts, strict=True))
        return GroupSpec(tensors, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options})

    groups = (
        group(torch.float32, max_grad_norm=1.0, ema_decay=0.9, l1_penalty=0.01, zero_grads=True),
        group(torch.bfloat16, master_weights="split", momentum_dtype=torch.int8, ema_decay=0.5, max_grad_norm=2.0),
        group(torch.bfloat16, rounding="stochastic", decoupled_weight_decay=True),
        group(torch.float16, master_weights="full"),
    )
    return Case(groups, seed=1, options={}, **changes)


# Of shards: shape, layouts of parameter and gradient, the first element's place in the whole parameter, and how far
# apart neighbours along each dimension are.
PLACES: tuple[tuple[tuple[int, ...], str, str, tuple[int, ...]], ...] = (
    ((300,), "contiguous", "contiguous", (0, 1)),
    ((31, 129), "contiguous", "contiguous", (7 * 129, 129, 1)),
    ((9_001,), "odd offset", "contiguous", (2**32 - 5_003, 1)),  # over the edge within a tile and a chunk of 1,024
    ((1_030,), "contiguous", "odd offset", (5 * 2**32 + 7, 1)),
    ((30, 129), "contiguous", "reversed", (7 * 129, 129, 1)),
    ((40, 33), "contiguous", "contiguous", (96, 129, 1)),  # columns of a wider matrix
    ((6, 5), "contiguous", "contiguous", (11, 2**32 - 3, 1)),
    ((5, 7), "contiguous", "contiguous", (3, 1, 9)),  # of a whole that lies in memory column by column
    ((9, 1), "contiguous", "contiguous", (4, 5, 1)),
    ((2, 3, 4, 5), "channels_last", "contiguous", (2**40, 1_000, 100, 10, 1)),
    ((1, 1), "contiguous", "contiguous", (2**33 + 1, 3, 1)),
)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5, "zero_grads": True}], ids=str)
def test_a_shard_is_rounded_by_its_elements_places_in_the_whole(
    options: dict[str, Any], fused_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a DTensor's local tensor is: tests/distributed has those."""
    places = {shape: place for shape, _, _, place in PLACES}
    row_options = kept.row_options
    monkeypatch.setattr(
        kept,
        "row_options",
        lambda param, *others: row_options(param, *others)._replace(place=places[tuple(param.shape)]),
    )
    tensors = tuple(TensorSpec(torch.bfloat16, shape, layout, of_gradient) for shape, layout, of_gradient, _ in PLACES)
    case = Case(
        (GroupSpec(tensors, {"lr": 0.1, "momentum": 0.9, "rounding": "stochastic", **options}),), seed=3, options={}
    )
    compare(case, fused_backend)


def full(shape: Any, value: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((shape,) if isinstance(shape, int) else shape, value, dtype=dtype, device=strategies.DEVICE)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_without_a_gradient_what_the_next_forward_pass_sees_is_averaged(
    weights: dict[str, Any], fused_backend: str
) -> None:
    """And of master weights all digits; in float32, of what torch.lerp is given."""
    param = torch.nn.Parameter(numbers((1000,), torch.bfloat16, torch.Generator().manual_seed(1)))
    param.grad = numbers((1000,), torch.bfloat16, torch.Generator().manual_seed(2))
    optimizer = FusedSGD([param], lr=0.01, ema_decay=0.5, **weights)
    optimizer.step()
    before = optimizer.state[param]["ema"].clone()
    seen = optimizer.master_parameters()[0] if "master_weights" in weights else param.detach().float()
    assert before.dtype == torch.float32 and torch.equal(before, seen)
    param.data.mul_(1.5)  # by somebody else
    param.grad = None
    seen = optimizer.master_parameters()[0] if "master_weights" in weights else param.detach().float()
    optimizer.step()
    assert torch.equal(optimizer.state[param]["ema"], torch.lerp(before, seen, 0.5))
    assert {entry.backend for entry in optimizer.backends()} == {fused_backend}


def test_a_checkpoint_continues_with_the_same_bits(fused_backend: str) -> None:
    case = simple_case()
    ours, expected = Run(case, "auto"), Run(case, "torch")
    for run in (ours, expected):
        run.step(0)
        run.step(1)
    after = Run(case, "auto")
    for mine, theirs in zip(after.params, ours.params, strict=True):
        for param, other in zip(mine, theirs, strict=True):
            param.data.copy_(other)
    after.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    after.step(2)
    expected.step(2)
    assert_same(after, expected, "after loading")


def test_state_that_is_edited_or_lost_between_steps_is_noticed(fused_backend: str) -> None:
    case = simple_case()
    ours, expected = Run(case, "auto"), Run(case, "torch")

    def lose(run: Run, g: int, entry: str) -> None:
        del run.optimizer.state[run.params[g][0]][entry]

    def replace(run: Run, g: int, entry: str) -> None:
        state = run.optimizer.state[run.params[g][1]]
        state[entry] = state[entry].clone().mul_(0.5) if state[entry].is_floating_point() else state[entry].clone()

    def write(run: Run, g: int, entry: str) -> None:
        run.params[g][2].data.mul_(2)

    def clear(run: Run, g: int, entry: str) -> None:
        run.optimizer.state.clear()

    edits = [(lose, 1, "remainder"), (lose, 0, "ema"), (replace, 0, "ema"), (replace, 3, "master"), (write, 1, "")]
    edits += [(write, 3, ""), (replace, 1, "momentum_scale"), (clear, 0, "")]
    for edit, g, entry in edits[::2] if fused_backend == "triton" else edits:
        for run in (ours, expected):
            run.step(0)
            edit(run, g, entry)
            run.step(1)
        assert_same(ours, expected, f"{edit.__name__} {entry}")


def test_a_step_that_raises_writes_nothing(fused_backend: str) -> None:
    case = simple_case()
    run = Run(case, "auto")
    run.optimizer._reader.error_if_nonfinite = True
    run.step(0)
    for g, params in enumerate(run.params):
        for i, param in enumerate(params):
            set_gradient(param, run.gradient(g, i, 1))
    run.params[0][1].grad[0, 0] = math.inf
    tensors = [p for params in run.params for p in params]
    tensors += [entry for p in list(tensors) for entry in run.optimizer.state[p].values()]
    before = [t.detach().clone() for t in tensors]
    updates = run.optimizer.param_groups[0]["ema_updates"]
    with pytest.raises(RuntimeError, match="non-finite"):
        run.optimizer.step()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert run.optimizer.param_groups[0]["ema_updates"] == updates == 1


def test_a_norm_that_is_not_finite_skips_a_scaled_step(fused_backend: str) -> None:
    p = torch.nn.Parameter(full(300))
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9, max_grad_norm=1.0, ema_decay=0.9)
    for gradient, moves in ((1.0, True), (math.inf, False), (math.nan, False), (1.0, True)):
        before, updates = p.detach().clone(), optimizer.param_groups[0]["ema_updates"]
        p.grad = full(300, gradient)
        optimizer.grad_scale, optimizer.found_inf = full((), 4.0), None
        optimizer.step()
        assert torch.equal(p, before) != moves
        if optimizer.state[p]["momentum_buffer"].device.type == "cpu" and fused_backend == "cpu":
            assert optimizer.param_groups[0]["ema_updates"] == updates + moves


def test_a_plain_group_beside_one_with_options_is_unscaled_once(fused_backend: str) -> None:
    ours = [torch.nn.Parameter(full(300)), torch.nn.Parameter(full(300))]
    theirs = [torch.nn.Parameter(full(300)), torch.nn.Parameter(full(300))]
    groups = [[{"params": [p]}, {"params": [q], "l1_penalty": 0.01}] for p, q in (ours, theirs)]
    scaled, plain = FusedSGD(groups[0], lr=0.1, momentum=0.9, fused=True), FusedSGD(groups[1], lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(strategies.DEVICE.type, init_scale=1024.0)
    scaler.scale(full(1))
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad, q.grad = torch.full_like(p, 2048.0), torch.full_like(q, 2.0)
        scaler.step(scaled)
        scaler.update()
        plain.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_gradients_of_a_skipped_step_are_zeroed(fused_backend: str) -> None:
    p = torch.nn.Parameter(full(300))
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9, max_grad_norm=1.0, zero_grads=True)
    for gradient, found in ((1.0, None), (math.inf, None), (1.0, 1.0), (1.0, 0.0)):
        p.grad = full(300, gradient)
        optimizer.grad_scale = full((), 4.0)
        optimizer.found_inf = None if found is None else full((), found)
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(p, before) == (gradient == math.inf or found == 1)
        assert not p.grad.any()


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("beside", [False, True], ids=["one plan", "beside a complex parameter"])
@pytest.mark.filterwarnings("ignore:FusedSGD")
def test_a_skipped_step_says_so_and_its_norm_is_that_of_its_gradients(
    fused_backend: str, beside: bool, per_group: bool
) -> None:
    p = torch.nn.Parameter(full(300))
    groups: list[Any] = [{"params": [p]}, {"params": [torch.nn.Parameter(full(3))], "max_grad_norm": None}]
    if beside:
        groups.append({"params": [torch.nn.Parameter(full(4, dtype=torch.complex64))]})
    optimizer = FusedSGD(groups, lr=0.1, momentum=0.9, max_grad_norm=1.0, norm_per_group=per_group)
    assert optimizer.last_step_skipped is False
    optimizer.step()  # without gradients
    for gradient, found, skips in (
        (1.0, 0.0, False), (2.0, 1.0, True), (3.0, 0.0, False), (math.inf, 1.0, True), (4.0, 0.0, False),
        (math.inf, None, True), (5.0, None, False), (math.nan, None, True), (6.0, 1.0, True),
    ):  # fmt: skip
        p.grad = full(300, gradient)
        optimizer.grad_scale = full((), 4.0)
        optimizer.found_inf = None if found is None else full((), found)
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(p, before) == skips
        assert bool(optimizer.last_step_skipped) is skips, (gradient, found)
        assert optimizer.grad_norm is not None
        norm = optimizer.grad_norm.view(-1)[0]
        wanted = torch.full((300,), gradient / 4, dtype=torch.float64).norm().float()
        torch.testing.assert_close(norm.cpu(), wanted, equal_nan=True, rtol=1e-6, atol=0)
    del optimizer.grad_scale, optimizer.found_inf
    optimizer.step()
    assert bool(optimizer.last_step_skipped)  # still: it is of steps under a scale


def test_several_plans_share_one_norm(fused_backend: str) -> None:
    """Complex parameters are stepped by the reference: their gradients count in the same norm."""
    ours = [torch.nn.Parameter(full(300)), torch.nn.Parameter(full(4, dtype=torch.complex64))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.full_like(a, 2.0)
        b.grad = a.grad.clone()
    optimizer = FusedSGD(ours, lr=0.1, momentum=0.9, max_grad_norm=1.0)
    optimizer.step()
    norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD(theirs, lr=0.1, momentum=0.9).step()
    torch.testing.assert_close(optimizer.grad_norm, norm)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
