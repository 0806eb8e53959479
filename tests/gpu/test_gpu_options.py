"""What a step with options does beside its arithmetic (test_gpu_option_bits.py) on a GPU: what it notices, writes and
leaves alone; the norm of odd gradients; what a graph cannot repeat.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, assert_same_bits, backend_in_use, synchronize
from torch import Tensor, nn

from wd_fused import FusedSGD

F32, F64, F16, BF16, INT8 = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8
BASE: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
EVERYTHING: dict[str, Any] = {
    **{"dtype": BF16, "master_weights": "split24", "momentum_dtype": INT8, "ema_decay": 0.9, "zero_grads": True},
    **{"max_grad_norm": 1.0, "l1_penalty": 0.01, "decoupled_weight_decay": 0.1, "maximize": True},
}


def halves(*shape: int) -> Tensor:
    """Most of their squares add up exactly, so that every order of a sum gives the same norm."""
    return torch.randint(-64, 65, shape) / 16


class Pair:
    """The same parameters on the GPU and, stepped by the reference, on the CPU."""

    def __init__(self, *sizes: int, dtype: torch.dtype = F32, backend: str | None = None, **options: Any) -> None:
        torch.manual_seed(7)
        values = [halves(size) for size in sizes]
        self.lists = [[nn.Parameter(v.to(device, dtype, copy=True)) for v in values] for device in (DEVICE, "cpu")]
        self.params = self.lists[0]
        self.ours = FusedSGD(self.params, **(BASE | options), backend=backend or backend_in_use())
        self.theirs = FusedSGD(self.lists[1], **(BASE | options), backend="torch")
        self.refill()

    def refill(self, which: Callable[[int], bool] = lambda i: True, dtype: torch.dtype | None = None) -> None:
        """New gradients, in new memory, for the parameters that `which` names."""
        self.kept = [param.grad for param in self.params]  # so that they move
        for i, same in enumerate(zip(*self.lists, strict=True)):
            gradient = halves(*same[0].shape).to(dtype or same[0].dtype)
            for param in same:
                param.grad = None
                if which(i):
                    param.grad = torch.empty_like(param)
                    param.grad.data = gradient.to(param.device, copy=True)

    def step_both(self) -> None:
        self.ours.step()
        self.theirs.step()
        self.check()

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.refill()
            self.step_both()

    def check(self) -> None:
        for i, (mine, other) in enumerate(zip(*self.lists, strict=True)):
            assert_same(mine, other, f"parameter {i}")
            own, wanted = self.ours.state.get(mine, {}), self.theirs.state.get(other, {})
            assert own.keys() == wanted.keys()
            for name, value in own.items():
                assert_same(value, wanted[name], f"{name} of parameter {i}")
            if mine.grad is not None and other.grad is not None:
                assert_same(mine.grad, other.grad, f"gradient of parameter {i}")
        if self.theirs.grad_norm is not None:
            assert_same(self.ours.grad_norm, self.theirs.grad_norm, "the norm")


def assert_same(ours: Tensor, expected: Tensor, what: str) -> None:
    if ours.is_floating_point():
        assert_same_bits([ours.detach().cpu()], [expected.detach()], what)
    else:
        assert ours.dtype == expected.dtype and torch.equal(ours.cpu(), expected), what


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [F64, F16, BF16], ids=str)
def test_gradients_of_another_dtype_come_and_go(gradient):
    pair = Pair(300, 20, max_grad_norm=1.0)
    pair.step(2)
    for dtype, missing in ((gradient, None), (F32, None), (gradient, 1), (F32, None)):
        pair.refill(lambda i, missing=missing: i != missing, dtype)
        pair.step_both()


@pytest.mark.parametrize("options", [{"master_weights": "full"}, {"master_weights": "split"}, {"rounding": "kahan"}])
def test_rows_without_a_gradient_are_averaged_and_nothing_else(options):
    """Before their first gradient, too, when there is no master or compensation yet."""
    pair = Pair(2_057, 20, dtype=BF16, ema_decay=0.9, **options)
    for same in zip(*pair.lists, strict=True):
        for param in same:
            param.data[:2] = torch.tensor([-0.0, 0.0])
    for missing in (1, 1, 0, None, 0):
        pair.refill(lambda i, missing=missing: i != missing)
        pair.step_both()
        with torch.no_grad():  # what somebody else writes is the new weight, and is averaged; zeros, too
            for params in pair.lists:
                params[0][5:].add_(1)
                params[0][100:].zero_()


@pytest.mark.parametrize("per_group", [False, True])
def test_rows_of_several_kinds_are_clipped_by_one_norm(per_group):
    """Plain rows among them; sums of a group that lie apart in the table are added in one order."""
    options: list[dict[str, Any]] = [
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 0.5, "ema_decay": 0.9},
        {},
        {"ema_decay": 0.5},
        {"max_grad_norm": math.inf},
    ]
    torch.manual_seed(3)
    values = [[(halves(n).to(d), halves(n).to(d)) for n, d in ((5, F32), (20, F64), (7, BF16))] for _ in options]
    lists, optimizers = [], []
    for device, backend in ((DEVICE, backend_in_use()), ("cpu", "torch")):
        groups = [[nn.Parameter(value.to(device, copy=True)) for value, _ in own] for own in values]
        for param, (_, gradient) in zip(itertools.chain(*groups), itertools.chain(*values), strict=True):
            param.grad = gradient.to(device, copy=True)
        lists.append([*itertools.chain(*groups)])
        of_groups = [{"params": params, **own} for params, own in zip(groups, options, strict=True)]
        optimizers.append(FusedSGD(of_groups, **BASE, norm_per_group=per_group, backend=backend))
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
        for i, (mine, other) in enumerate(zip(*lists, strict=True)):
            if not (i // 3 == 2 and mine.dtype == BF16):  # a plain row: torch's own code rounds otherwise on the CPU
                assert_same(mine, other, f"parameter {i}")
        assert_same(optimizers[0].grad_norm, optimizers[1].grad_norm, "the norm")
    assert optimizers[0].grad_norm.isnan().tolist() == ([False, False, True, True, False] if per_group else False)


@pytest.mark.parametrize("per_group", [False, True])
def test_many_groups_some_with_many_sums_have_one_norm_each(per_group):
    sizes = [*(3,) * 40, 1_400_000, *(5,) * 30]
    params = [nn.Parameter(torch.zeros(size, device=DEVICE)) for size in sizes]
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, (i % 7) / 8)
    groups = [{"params": [param], "max_grad_norm": 1.0} for param in params]
    optimizer = FusedSGD(groups, lr=0.1, norm_per_group=per_group, backend=backend_in_use())
    squares = [size * ((i % 7) / 8) ** 2 for i, size in enumerate(sizes)]
    expected = torch.tensor([*map(math.sqrt, squares)] if per_group else math.sqrt(sum(squares)))
    for _ in range(2):
        optimizer.step()
        assert_same(optimizer.grad_norm, expected, "the norm")


# --- what is noticed, and what is written ------------------------------------------------------------------------


def test_everything_that_is_written_has_a_new_version():
    pair = Pair(30, 200, **EVERYTHING)
    pair.step(2)
    for _ in range(2):
        pair.refill(lambda i: i == 0)
        state = pair.ours.state
        written = [pair.params[0], pair.params[0].grad, *state[pair.params[0]].values(), state[pair.params[1]]["ema"]]
        alone = [value for name, value in state[pair.params[1]].items() if name != "ema"]
        before = [[tensor._version for tensor in tensors] for tensors in (written, alone)]
        pair.step_both()
        after = [[tensor._version for tensor in tensors] for tensors in (written, alone)]
        assert [new > old for new, old in zip(after[0], before[0], strict=True)] == [True] * len(written)
        assert after[1] == before[1]


@pytest.mark.parametrize("key", ["remainder", "momentum_scale", "ema", "momentum_buffer"])
@pytest.mark.parametrize("how", ["replaced", "moved"])
def test_state_that_is_edited_is_noticed(key, how):
    pair = Pair(300, **EVERYTHING)
    pair.step(3)
    for optimizer, params in ((pair.ours, pair.lists[0]), (pair.theirs, pair.lists[1])):
        value = optimizer.state[params[0]][key]
        edited = value.clone() if value.is_floating_point() else value // 2
        if how == "moved":
            value.data = edited
        else:
            optimizer.state[params[0]][key] = edited
    pair.step(2)


def test_options_that_are_turned_off_leave_state_that_does_not_matter():
    pair = Pair(300, dtype=BF16, momentum_dtype=INT8, ema_decay=0.9, master_weights="full")
    pair.step(2)
    for off in ("ema_decay", "momentum_dtype", "master_weights"):
        for optimizer in (pair.ours, pair.theirs):
            del optimizer.param_groups[0][off]
            optimizer.param_groups[0]["l1_penalty"] = 0.1
        pair.step(2)
        assert {own.backend for own in pair.ours.backends()} == {backend_in_use()}


def test_numbers_that_change_are_followed():
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


def test_a_learning_rate_on_the_gpu_decays_there():
    """The factor is a multiply-add in float32."""
    lr, decay = torch.tensor(0.3, device=DEVICE), 0.7
    param = nn.Parameter(torch.randn(50, device=DEVICE))
    param.grad = torch.zeros_like(param)
    optimizer = FusedSGD([param], lr=lr, decoupled_weight_decay=decay, backend=backend_in_use())
    for number in (0.3, 0.1, 1 / 0.7):
        lr.fill_(number)
        c = torch.tensor(decay, dtype=F32).double()
        exact = torch.addcmul(torch.ones((), dtype=F64), torch.tensor(number, dtype=F32).double(), c, value=-1)
        expected = param.detach().cpu() * exact.float()
        optimizer.step()
        assert_same(param, expected, f"lr={number}")


def test_a_gradient_to_be_zeroed_shares_memory_with_no_other():
    """Such a step is done in torch's order; where gradients move apart again, by the kernel."""
    pair = Pair(20, 20, backend="auto", zero_grads=True)
    with pytest.warns(UserWarning, match="shares memory"):
        for k in range(5):
            pair.refill()
            if k in (1, 3):
                for params, device in zip(pair.lists, (DEVICE, "cpu"), strict=True):
                    memory = torch.arange(30.0, device=device)
                    params[0].grad, params[1].grad = memory[:20], memory[10:]
            pair.step_both()
            assert not any(param.grad.any() for param in pair.params)


# --- a norm that is odd ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_clips_as_torchs(bad):
    pair = Pair(20, 5, max_grad_norm=1.0)
    pair.step()
    for params in pair.lists:
        params[1].grad[2] = bad
    pair.step_both()
    assert not pair.ours.grad_norm.isfinite()


@pytest.mark.parametrize("per_group", [False, True])
def test_such_a_norm_is_an_error_if_it_is_to_be_and_nothing_is_written(per_group):
    pair = Pair(20, 5, max_grad_norm=1.0, ema_decay=0.9, error_if_nonfinite=True, norm_per_group=per_group)
    pair.step(2)
    tensors = [*pair.params, pair.ours.state[pair.params[0]]["ema"]]
    before = [tensor.detach().clone() for tensor in tensors]
    gradient = pair.params[1].grad.clone()
    pair.params[1].grad[2] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        pair.ours.step()
    assert_same_bits(tensors, before)
    pair.params[1].grad.copy_(gradient)
    pair.step()


def test_a_norm_of_nothing_is_zero():
    param, empty = (nn.Parameter(torch.ones(size, device=DEVICE)) for size in (3, 0))
    for params in ([param], [empty], [param, empty]):
        param.grad = None
        optimizer = FusedSGD(params, lr=0.1, max_grad_norm=1.0, backend=backend_in_use())
        for gradient in (None, None, torch.full_like(param, 2.0), None):
            param.grad = gradient
            optimizer.step()
            has_norm = gradient is not None and params[0] is param
            assert optimizer.grad_norm.item() == pytest.approx(12**0.5 if has_norm else 0.0)


# --- graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "warm_steps", "message"),
    [
        ({"ema_decay": 0.9}, 0, "the first step of an average cannot be captured"),
        ({"ema_decay": 0.9, "ema_warmup": True}, 1, "an average whose decay changes from step to step"),
        ({"ema_decay": 0.9, "ema_warmup": True}, 3, "an average whose decay changes from step to step"),
        ({"ema_decay": 0.2, "ema_warmup": True}, 3, None),
        ({"ema_decay": 0.9}, 1, None),
        ({"dtype": BF16, "rounding": "stochastic"}, 2, "group 0, parameter 0: stochastic rounding"),
        ({"max_grad_norm": 1.0, "error_if_nonfinite": True}, 2, "forms the norm on the host"),
    ],
)
def test_what_a_graph_would_repeat_cannot_be_captured(options, warm_steps, message):
    pair = Pair(20, momentum=0.0, **options)
    pair.step(warm_steps)
    before = [param.detach().clone() for param in pair.params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if message is None:
            pair.ours.step()
        else:
            with pytest.raises(RuntimeError, match=message):
                pair.ours.step()
    if message is None:
        graph.replay()
        pair.theirs.step()
        pair.check()
    else:
        synchronize()
        assert_same_bits(pair.params, before)
