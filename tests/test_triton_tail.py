"""The fused tail on the Triton backend, its kernels interpreted: full and partial tiles of each option against the
reference, what is launched and brought when, the norm's memory, what is noticed in time, graphs. Run by pytest.

Random combinations on all backends: test_tail.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_support
from plan_support import launches, plan_of
from strategies import assert_same_bits
from torch import Tensor, nn
from triton_support import Gpu, kernels, replay

from wd_fused import FusedSGD, backends

pytestmark = pytest.mark.usefixtures("interpreted", "on_the_device")
# Fixtures.
quickly_interpreted = triton_support.quickly_interpreted
interpreted = triton_support.interpreted

plan, tail_step = kernels("plan"), kernels("tail_step")
F32, F64, F16, BF16, INT8 = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8
BASE: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
FULL = 2048  # elements of a float32 tile; half of it with int8 momentum


@pytest.fixture
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("triton",))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    made.install(monkeypatch)
    with_norm = tail_step.with_norm

    def recorded(*arguments: Any) -> Any:
        table, norm = with_norm(*arguments)
        made.tables.append(table)
        return table, norm

    monkeypatch.setattr(tail_step, "with_norm", recorded)
    return made


class Pair:
    """The same parameters, stepped by Triton's kernels and by the reference."""

    def __init__(self, *shapes: Any, dtype: torch.dtype = F32, backend: str = "triton", **options: Any) -> None:
        # Halves: most of their squares add up exactly, so that every order of a sum gives the same norm.
        values = [torch.randint(-64, 65, shape if isinstance(shape, tuple) else (shape,)) / 16 for shape in shapes]
        self.lists = [[nn.Parameter(value.to(dtype, copy=True)) for value in values] for _ in range(2)]
        self.ours = FusedSGD(self.lists[0], **(BASE | options), backend=backend)
        self.theirs = FusedSGD(self.lists[1], **(BASE | options), backend="torch")
        self.params = self.lists[0]
        self.refill()

    def refill(self, which: Callable[[int], bool] = lambda i: True, dtype: torch.dtype | None = None) -> None:
        """New gradients, in new memory, for the parameters that `which` names."""
        self.kept = [param.grad for param in self.params]  # so that they move
        for i, same in enumerate(zip(*self.lists, strict=True)):
            gradient = (torch.randint(-64, 65, same[0].shape) / 16).to(dtype or same[0].dtype)
            for param in same:
                param.grad = None
                if which(i) and gradient.dtype == param.dtype:
                    param.grad = gradient.clone()
                elif which(i):
                    param.grad = torch.empty_like(param)
                    param.grad.data = gradient.clone()

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.refill()
            self.ours.step()
            self.theirs.step()
            self.check()

    def check(self) -> None:
        for i, (mine, other) in enumerate(zip(*self.lists, strict=True)):
            assert_same(mine.detach(), other.detach(), f"parameter {i}")
            own, wanted = (dict(o.state.get(p, {})) for o, p in ((self.ours, mine), (self.theirs, other)))
            assert own.keys() == wanted.keys()
            for name, value in own.items():
                assert_same(value, wanted[name], f"{name} of parameter {i}")
            if mine.grad is not None and other.grad is not None:
                assert_same(mine.grad, other.grad, f"gradient of parameter {i}")
        if self.theirs.grad_norm is not None:
            assert self.ours.grad_norm is not None
            assert_same(self.ours.grad_norm, self.theirs.grad_norm, "the norm")


def assert_same(ours: Tensor, expected: Tensor, what: str) -> None:
    if ours.is_floating_point():
        assert_same_bits(ours, expected, what)
    else:
        assert ours.dtype == expected.dtype and torch.equal(ours, expected), what


# --- each option, over full tiles and others ---------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {"max_grad_norm": 1.0},
    "clip in float64": {"dtype": F64, "max_grad_norm": 1.0},
    "clip in bfloat16, every operation rounded": {"dtype": BF16, "max_grad_norm": 1.0},
    "penalty": {"l1_penalty": 1 / 3},
    "decoupled decay": {"decoupled_weight_decay": True},
    "decoupled decay beside the L2 term": {"dtype": F64, "decoupled_weight_decay": 1 / 3},
    "average": {"ema_decay": 0.9},
    "average of large steps": {"ema_decay": 0.3, "ema_warmup": True},
    "average in float16": {"dtype": F16, "ema_decay": 0.9},
    "zeroed gradients": {"zero_grads": True},
    "full masters": {"dtype": BF16, "master_weights": "full", "ema_decay": 0.9},
    "full masters of float16": {"dtype": F16, "master_weights": "full"},
    "split masters": {"dtype": BF16, "master_weights": "split", "ema_decay": 0.9},
    "split masters of 24 bits": {"dtype": BF16, "master_weights": "split24", "ema_decay": 0.9},
    "compensation": {"dtype": BF16, "rounding": "kahan", "ema_decay": 0.9},
    "stochastic rounding": {"dtype": BF16, "rounding": "stochastic", "ema_decay": 0.9},
    "momentum in bfloat16": {"momentum_dtype": BF16},
    "momentum in float32": {"dtype": F16, "momentum_dtype": F32},
    "momentum in int8": {"momentum_dtype": INT8},
    "momentum in int8, of bfloat16": {"dtype": BF16, "momentum_dtype": INT8, "nesterov": True},
    "everything": {
        **{"dtype": BF16, "master_weights": "split24", "momentum_dtype": INT8, "ema_decay": 0.9, "zero_grads": True},
        **{"max_grad_norm": 1.0, "l1_penalty": 0.01, "decoupled_weight_decay": 0.1, "maximize": True},
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_full_and_partial_tiles_have_the_references_bits(name: str) -> None:
    pair = Pair(FULL + 300, 5, 0, **OPTIONS[name])
    pair.step(3)


@pytest.mark.parametrize("name", ["clip", "stochastic rounding", "everything"])
def test_rows_that_lie_otherwise_than_their_state(name: str) -> None:
    """Memory order decides blocks of momentum and random numbers: the parameter's, whatever lies beside it."""
    pair = Pair((70, 40), (3, 5), **OPTIONS[name])
    for params in pair.lists:
        params[0].data = params[0].data.T.contiguous().T
        params[1].data = torch.zeros(9, 11, dtype=params[1].dtype)[:3, 1:11:2].copy_(params[1].data)
    pair.step(2)
    for optimizer, params in ((pair.ours, pair.lists[0]), (pair.theirs, pair.lists[1])):
        for param in params:
            for key, value in optimizer.state[param].items():
                if value.shape == param.shape:
                    optimizer.state[param][key] = value.contiguous()
    pair.step(2)


def test_addresses_that_no_vector_fits_are_stepped_by_elements() -> None:
    pair = Pair(FULL, dtype=BF16, master_weights="split", ema_decay=0.9)
    for params in pair.lists:
        params[0].data = torch.zeros(FULL + 1, dtype=BF16)[1:].copy_(params[0].data)
    pair.step(2)


def test_nothing_is_written_behind_the_last_scale() -> None:
    """Of rows that end with a block, and in one."""
    for numel in (128, 3 * 128, 2 * 128 - 1, FULL // 2):
        pair = Pair(numel, momentum_dtype=INT8)
        pair.step()
        state = pair.ours.state[pair.params[0]]
        scales = state["momentum_scale"].numel()
        memory = torch.full((scales + 2,), 7.0)
        state["momentum_scale"] = memory[1:-1].copy_(state["momentum_scale"])
        pair.step(2)
        assert memory[0] == memory[-1] == 7


@pytest.mark.parametrize("gradient", [F64, F16, BF16], ids=str)
def test_gradients_of_another_dtype_have_a_kernel_of_their_own(gpu: Gpu, gradient: torch.dtype) -> None:
    pair = Pair(300, 20, max_grad_norm=1.0)
    pair.step(2)
    tables = len(gpu.tables)
    for dtype in (gradient, F32, F32):
        pair.refill(dtype=dtype)
        pair.ours.step()
        pair.theirs.step()
        pair.check()
    assert len(gpu.tables) == tables + 4  # twice, each first without the norm
    # What is known of a step with all gradients is of another table.
    for dtype, missing in ((gradient, 1), (F32, None)):
        pair.refill(lambda i, missing=missing: i != missing, dtype)
        pair.ours.step()
        pair.theirs.step()
        pair.check()
    assert any(str(gradient).removeprefix("torch.") in name for name in gpu.kernels)


def test_rows_without_a_gradient_are_averaged_and_nothing_else() -> None:
    """Before their first gradient, too, when there is no master or compensation yet."""
    for options in (OPTIONS["full masters"], OPTIONS["split masters"], OPTIONS["compensation"]):
        pair = Pair(FULL + 9, 20, **options)
        for same in zip(*pair.lists, strict=True):
            for param in same:
                param.data[:2] = torch.tensor([-0.0, 0.0])
        for missing in (1, 1, 0, None, 0):
            pair.refill(lambda i, missing=missing: i != missing)
            pair.ours.step()
            pair.theirs.step()
            pair.check()
            with torch.no_grad():  # what somebody else writes is the new weight, and is averaged; zeros, too
                for params in pair.lists:
                    params[0][5:].add_(1)
                    params[0][100:].zero_()


# --- what is launched, what is brought ---------------------------------------------------------------------------


def test_a_step_is_two_launches_whatever_the_number_of_tensors(gpu: Gpu) -> None:
    params = [nn.Parameter(torch.randn(5)) for _ in range(40)]
    for param in params:
        param.grad = torch.randn(5)
    groups = [{"params": params[:15]}, {"params": params[15:], "lr": 0.5, "l1_penalty": 0.1}]
    optimizer = FusedSGD(groups, **BASE, max_grad_norm=1.0, ema_decay=0.5, backend="triton")
    for _ in range(4):
        gpu.launched.clear()
        optimizer.step()
        assert gpu.launched == [("norm_kernel<float32>", 40), ("tail_kernel<float32, averages>", 40)]
        assert [launch["kernel"] for launch in launches(optimizer)] == [name for name, _ in gpu.launched]
    gpu.taken()
    optimizer.step()
    assert gpu.taken() == []  # no number has changed
    optimizer.param_groups[0]["l1_penalty"] = 0.2
    optimizer.step()
    assert gpu.taken() == ["words"]


def test_rows_of_several_kernels_are_clipped_by_one_norm() -> None:
    """Plain rows among them; sums of a group that lie apart in the table are added in one order."""
    options: list[dict[str, Any]] = [
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 0.5, "ema_decay": 0.9},
        {},
        {"ema_decay": 0.5},
        {"max_grad_norm": math.inf},
    ]
    for per_group in (False, True):
        lists = []
        for _ in range(2):
            torch.manual_seed(3)
            lists.append(
                [
                    [
                        nn.Parameter(torch.randint(-9, 9, (n,)).to(dtype))
                        for n, dtype in ((5, F32), (20, F64), (7, BF16))
                    ]
                    for _ in options
                ]
            )
            for param in itertools.chain(*lists[-1]):
                param.grad = torch.randint(-9, 9, param.shape).to(param.dtype)
        optimizers = [
            FusedSGD(
                [{"params": params, **own} for params, own in zip(of_all, options, strict=True)],
                **BASE, norm_per_group=per_group, backend=backend,
            )
            for of_all, backend in zip(lists, ("triton", "torch"), strict=True)
        ]  # fmt: skip
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.step()
            for i, (mine, other) in enumerate(zip(*map(lambda own: itertools.chain(*own), lists), strict=True)):
                # Plain bfloat16 rows: torch's own code rounds otherwise.
                if not (i // 3 == 2 and mine.dtype == BF16):
                    assert_same_bits(mine.detach(), other.detach(), f"parameter {i}")
            assert_same_bits(optimizers[0].grad_norm, optimizers[1].grad_norm, "the norm")
        assert optimizers[0].grad_norm.isnan().tolist() == ([False, False, True, True, False] if per_group else False)


def test_a_step_like_one_before_does_not_look_at_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the options keep, with all gradients or without some, at other addresses."""
    pair = Pair(30, 200, 3, **OPTIONS["everything"])
    for missing in (3, 1, 3, 1):
        pair.refill(lambda i, missing=missing: i != missing)
        pair.ours.step()
        pair.theirs.step()

    def look(self: Any, *arguments: Any) -> None:
        raise AssertionError("each row has been looked at")

    monkeypatch.setattr(plan.StepPlan, "read_rows", look)
    for missing in (1, 3, 3, 1):
        pair.refill(lambda i, missing=missing: i != missing)
        pair.ours.step()
        pair.theirs.step()
        pair.check()


def test_everything_that_is_written_has_a_new_version() -> None:
    pair = Pair(30, 200, **OPTIONS["everything"])
    pair.step(2)
    for _ in range(2):
        pair.refill(lambda i: i == 0)
        state = pair.ours.state
        written = [pair.params[0], pair.params[0].grad, *state[pair.params[0]].values(), state[pair.params[1]]["ema"]]
        alone = [value for name, value in state[pair.params[1]].items() if name != "ema"]
        before = [[tensor._version for tensor in tensors] for tensors in (written, alone)]
        pair.ours.step()
        after = [[tensor._version for tensor in tensors] for tensors in (written, alone)]
        assert [new > old for new, old in zip(after[0], before[0], strict=True)] == [True] * len(written)
        assert after[1] == before[1]
        pair.theirs.step()


# --- what is noticed in time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["remainder", "momentum_scale", "ema", "momentum_buffer"])
@pytest.mark.parametrize("how", ["replaced", "moved"])
def test_state_that_is_edited_is_noticed(key: str, how: str) -> None:
    pair = Pair(300, **OPTIONS["everything"])
    pair.step(3)
    for optimizer, params in ((pair.ours, pair.lists[0]), (pair.theirs, pair.lists[1])):
        value = optimizer.state[params[0]][key]
        edited = value.clone() if value.is_floating_point() else (value // 2)
        if how == "moved":
            value.data = edited
        else:
            optimizer.state[params[0]][key] = edited
    pair.step(2)


def test_options_that_are_turned_off_leave_state_that_does_not_matter() -> None:
    pair = Pair(300, dtype=BF16, momentum_dtype=INT8, ema_decay=0.9, master_weights="full")
    pair.step(2)
    for off in ("ema_decay", "momentum_dtype", "master_weights"):
        for optimizer in (pair.ours, pair.theirs):
            del optimizer.param_groups[0][off]
            optimizer.param_groups[0]["l1_penalty"] = 0.1
        pair.step(2)
        assert {own.backend for own in pair.ours.backends()} == {"triton"}


def test_numbers_that_change_are_followed() -> None:
    pair = Pair(300, max_grad_norm=1.0, decoupled_weight_decay=0.5, l1_penalty=0.1, ema_decay=0.9)
    pair.step(2)
    for edit in (
        {"decoupled_weight_decay": True},
        {"lr": 0.01},
        {"decoupled_weight_decay": 0.25, "weight_decay": 0.5},
        {"max_grad_norm": 0.01},
        {"l1_penalty": 0.0},
        {"ema_decay": 0.4},
        {"max_grad_norm": math.inf},
    ):
        for optimizer in (pair.ours, pair.theirs):
            optimizer.param_groups[0].update(edit)
        pair.step()


def test_a_learning_rate_on_the_device_decays_there(gpu: Gpu) -> None:
    """Without an upload for another: the factor is a multiply-add in float32."""
    lr, decay = torch.tensor(0.3), 0.7
    param = nn.Parameter(torch.randn(50))
    optimizer = FusedSGD([param], lr=lr, decoupled_weight_decay=decay, backend="triton")
    for number in (0.3, 0.1, 1 / 0.7):
        lr.fill_(number)
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        exact = torch.addcmul(torch.ones((), dtype=F64), lr.double(), torch.tensor(decay, dtype=F32).double(), value=-1)
        expected = param.detach() * exact.float()
        gpu.taken()
        optimizer.step()
        assert_same_bits(param.detach(), expected, f"lr={number}")
    assert gpu.taken() == []


def test_a_gradient_to_be_zeroed_shares_memory_with_no_other() -> None:
    """Such a step is done in torch's order; where gradients move apart again, by the kernel."""
    pair = Pair(20, 20, backend="auto", zero_grads=True)
    with pytest.warns(UserWarning, match="shares memory"):
        for k in range(5):
            pair.refill()
            if k in (1, 3):
                for params in pair.lists:
                    memory = torch.arange(30.0)
                    params[0].grad, params[1].grad = memory[:20], memory[10:]
            pair.ours.step()
            pair.theirs.step()
            pair.check()
            assert not any(param.grad.any() for param in pair.params)


def test_a_gradient_with_elements_of_several_indices_is_not_zeroed_by_the_kernel() -> None:
    pair = Pair(20, zero_grads=True)
    pair.params[0].grad = torch.ones(1).expand(20)
    with pytest.raises(RuntimeError, match="zero_grads=True"):
        pair.ours.step()


# --- the norm ----------------------------------------------------------------------------------------------------


def test_the_norm_is_near_the_exact_one_and_the_same_each_time() -> None:
    params = [nn.Parameter(torch.zeros(n)) for n in (40_000, 3, 70_001)]
    source = torch.Generator().manual_seed(5)
    for param in params:
        param.grad = torch.randn(param.shape, generator=source) * 1e-3
    params[1].grad.fill_(1e-20)
    optimizer = FusedSGD(params, lr=0.0, max_grad_norm=1.0, backend="triton")
    exact = torch.cat([param.grad.double() for param in params]).norm()
    norms = []
    for _ in range(2):
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert_same_bits(norms[0], exact.float(), "the norm")
    assert_same_bits(norms[1], norms[0], "the norm")


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_clips_as_torchs(bad: float) -> None:
    pair = Pair(20, 5, max_grad_norm=1.0)
    pair.step()
    for params in pair.lists:
        params[1].grad[2] = bad
    pair.ours.step()
    pair.theirs.step()
    pair.check()
    assert not pair.ours.grad_norm.isfinite()


@pytest.mark.parametrize("per_group", [False, True])
def test_such_a_norm_is_an_error_if_it_is_to_be_and_nothing_is_written(per_group: bool) -> None:
    pair = Pair(20, 5, max_grad_norm=1.0, ema_decay=0.9, error_if_nonfinite=True, norm_per_group=per_group)
    pair.step(2)
    before = [param.detach().clone() for param in pair.params] + [pair.ours.state[pair.params[0]]["ema"].clone()]
    gradient = pair.params[1].grad.clone()
    pair.params[1].grad[2] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        pair.ours.step()
    after = [*pair.params, pair.ours.state[pair.params[0]]["ema"]]
    for i, (tensor, old) in enumerate(zip(after, before, strict=True)):
        assert_same_bits(tensor.detach(), old, f"tensor {i}")
    pair.params[1].grad.copy_(gradient)
    pair.step()


def test_under_a_scale_alone_such_a_norm_skips_the_step() -> None:
    """Of plain rows, too; with GradScaler's own verdict beside it, that decides."""
    plain = nn.Parameter(torch.ones(3))
    clipped = nn.Parameter(torch.ones(5))
    groups = [{"params": [plain]}, {"params": [clipped], "max_grad_norm": 1.0, "ema_decay": 0.5}]
    optimizer = FusedSGD(groups, lr=0.1, backend="triton")
    optimizer.grad_scale = torch.tensor(4.0)
    found_inf: list[Tensor | None] = [None, None, None, torch.tensor(1.0), torch.tensor(0.0), None]
    gradients = [4.0, math.inf, 4.0, math.nan, math.inf, 4.0]
    for k, (verdict, gradient) in enumerate(zip(found_inf, gradients, strict=True)):
        optimizer.found_inf = verdict
        plain.grad, clipped.grad = torch.full((3,), 4.0), torch.full((5,), gradient)
        before = [tensor.detach().clone() for tensor in (plain, clipped, *optimizer.state.get(clipped, {}).values())]
        updates = optimizer.param_groups[1].get("ema_updates", 0)
        optimizer.step()
        steps = k in (0, 2, 4, 5)
        assert optimizer.param_groups[1]["ema_updates"] == updates + steps
        assert (not torch.equal(plain.detach(), before[0])) == steps
        if not steps:
            assert_same_bits(clipped.detach(), before[1], f"step {k}")
            assert_same_bits(optimizer.state[clipped]["ema"], before[2], f"average of step {k}")
        if k == 0:
            assert_same_bits(optimizer.grad_norm, torch.tensor(5.0).sqrt(), "the norm, unscaled")


def test_a_norm_of_nothing_is_zero() -> None:
    param, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))
    for params in ([param], [empty], [param, empty]):
        optimizer = FusedSGD(params, lr=0.1, max_grad_norm=1.0, backend="triton")
        for _ in range(2):
            optimizer.step()
            assert optimizer.grad_norm is not None and optimizer.grad_norm.tolist() == 0.0
        param.grad = torch.full((3,), 2.0)
        optimizer.step()
        assert optimizer.grad_norm.tolist() == pytest.approx(0.0 if params[0] is empty else 12**0.5)
        param.grad = None
        optimizer.step()
        assert optimizer.grad_norm.tolist() == 0.0


# --- streams, graphs ---------------------------------------------------------------------------------------------


def test_streams_do_not_share_the_memory_of_the_norm(gpu: Gpu) -> None:
    pair = Pair(20, 5, max_grad_norm=1.0)
    pair.step(2)
    own = plan_of(pair.ours)._on_devices[0].step
    first = own._workspace
    pair.step()
    assert own._workspace is first
    gpu.stream = 2
    pair.step()
    assert own._workspace is not first


def test_a_norm_that_ends_between_two_launches_spoils_none_after_it(gpu: Gpu) -> None:
    """Of float32 and float64, which have a kernel each; the last program to count itself forms the norm."""
    runs = []
    for interrupts in (False, True):
        torch.manual_seed(5)
        params = [nn.Parameter(torch.randn(20).to(dtype)) for dtype in (F32, F64)]
        optimizer = FusedSGD(params, **BASE, max_grad_norm=0.1, backend="triton")
        norms = []
        for step in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            launches = 0

            def second_fails(what: str) -> None:
                nonlocal launches
                launches += what == "launch"
                if launches == 2:
                    raise KeyboardInterrupt

            if interrupts and step == 1:
                gpu.before = second_fails
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
                assert launches == 2
                gpu.before = lambda what: None
            optimizer.step()
            assert optimizer.grad_norm is not None
            norms.append(optimizer.grad_norm)
        runs.append([*norms, *params])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("stream", [1, 7])
def test_a_graph_has_memory_of_its_own_for_the_norm(gpu: Gpu, stream: int) -> None:
    pair = Pair(20, 5, max_grad_norm=1.0)
    pair.step(2)
    own = plan_of(pair.ours)._on_devices[0].step
    of_steps = own._workspace
    with gpu.capture(stream):
        pair.ours.step()
    of_graph = own._workspace
    assert of_graph is not of_steps
    pair.ours.step()
    assert own._workspace is not of_graph


def test_the_memory_of_the_norm_grows_with_its_tiles(gpu: Gpu) -> None:
    """Of float64 gradients half as many elements make a tile."""
    pair = Pair(20_000, max_grad_norm=1.0)
    pair.step(2)
    own = plan_of(pair.ours)._on_devices[0].step
    sizes = []
    for dtype in (F32, F64):
        pair.refill(dtype=dtype)
        pair.ours.step()
        sizes.append((own._norm.programs, own._workspace.numel()))
    assert sizes == [(1, 2 + 4 + 1), (2, 2 + 4 + 2)]


def test_a_captured_step_is_replayed_with_other_gradients(gpu: Gpu) -> None:
    """Each graph forms its norms in memory of its own; steps outside of it go on."""
    pair = Pair(20, 5, max_grad_norm=1.0, ema_decay=0.9, decoupled_weight_decay=0.1, zero_grads=True)
    pair.step(3)
    with gpu.capture(stream=7) as graph:
        pair.ours.step()
    outside = pair.ours
    for _ in range(2):
        for params in pair.lists:
            torch.manual_seed(11)
            for param in params:
                param.grad.copy_(torch.randint(-64, 65, param.shape) / 16)
        replay(graph)
        pair.theirs.step()
        for i, same in enumerate(zip(*pair.lists, strict=True)):
            assert_same_bits(same[0].detach(), same[1].detach(), f"parameter {i}")
            assert_same_bits(same[0].grad, same[1].grad, f"gradient {i}")
    assert_same_bits(outside.grad_norm, pair.theirs.grad_norm, "the graph's norm")
    gradients = [param.grad for param in pair.params]
    pair.step()
    assert all(param.grad is not gradient for param, gradient in zip(pair.params, gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "warm_steps", "message"),
    [
        ({"ema_decay": 0.9}, 0, "group 0: the weight of its average still changes"),
        ({"ema_decay": 0.9, "ema_warmup": True}, 3, "group 0: the weight of its average still changes"),
        ({"ema_decay": 0.2, "ema_warmup": True}, 3, None),
        ({"ema_decay": 0.9}, 1, None),
        ({"dtype": BF16, "rounding": "stochastic"}, 2, "group 0, parameter 0: rounding='stochastic'"),
        ({"max_grad_norm": 1.0, "error_if_nonfinite": True}, 2, "error_if_nonfinite=True waits"),
    ],
)
def test_what_a_graph_would_repeat_cannot_be_captured(
    gpu: Gpu, options: dict[str, Any], warm_steps: int, message: str | None
) -> None:
    pair = Pair(20, momentum=0.0, **options)
    pair.step(warm_steps)
    with gpu.capture(stream=7) as graph:
        if message is None:
            pair.ours.step()
        else:
            with pytest.raises(RuntimeError, match=message):
                pair.ours.step()
            assert not graph
    if message is None:
        replay(graph)
        pair.theirs.step()
        pair.check()
