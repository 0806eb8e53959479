"""The CUDA backend's steps with a tail, without a GPU: what the host launches, keeps in device memory and refuses. Run
by pytest.

That the whole backend has the reference's bits is in test_tail.py; the kernels under sanitizers are in
test_cuda_kernel_on_cpu.py.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import Any

import cuda_on_cpu_backend
import pytest
import torch
from plan_support import launches, move_gradients, parameters, plan_of, twins
from strategies import assert_same_bits
from torch import Tensor, nn

from wd_fused import FusedSGD, backends

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
HEADER_BYTES, GROUP_BYTES, LARGE = 104, 88, 32760  # csrc/plan/options_launch.h


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.FUSED, "cuda", cuda_on_cpu_backend.CudaOnCpu())


@pytest.fixture
def capturing(on_the_cpu: None) -> Iterator[Any]:
    """Call it with True: the current stream is capturing a CUDA graph."""
    library = ctypes.CDLL(cuda_on_cpu_backend.module().__file__)
    yield lambda flag: library.cuda_on_cpu_set_capturing(int(flag))
    library.cuda_on_cpu_set_capturing(0)


def small_gradients(*lists: list[nn.Parameter], seed: int = 0) -> None:
    """Multiples of 1/16, the same in each list: their squares add up exactly in any order."""
    generator = torch.Generator().manual_seed(seed)
    for same in zip(*lists, strict=True):
        gradient = torch.randint(-32, 33, same[0].shape, generator=generator) / 16
        for param in same:
            param.grad = gradient.to(param.dtype)


def pair(params: list[nn.Parameter], **options: Any) -> tuple[FusedSGD, FusedSGD, list[nn.Parameter]]:
    theirs = twins(params)
    return (
        FusedSGD(params, **OPTIONS | options, backend="cuda"),
        FusedSGD(theirs, **OPTIONS | options, backend="torch"),
        theirs,
    )


def assert_all_same(ours: Sequence[Tensor | None], expected: Sequence[Tensor | None], what: str) -> None:
    for i, (mine, other) in enumerate(zip(ours, expected, strict=True)):
        assert mine is not None and other is not None
        assert_same_bits(mine.detach(), other.detach(), f"{what} {i}")


def names(optimizer: FusedSGD) -> list[str]:
    return [launch["kernel"] for launch in launches(optimizer)]


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_grad_norm": 1.0}, ["norm_kernel<4096>", "tail_kernel<float32, 4096>"]),
        ({"max_grad_norm": 1.0, "ema_decay": 0.9}, ["norm_kernel<4096>", "tail_kernel<float32, 4096>"]),
        ({"ema_decay": 0.9, "l1_penalty": 1e-4}, ["tail_kernel<float32, 4096>"]),
        ({"momentum_dtype": torch.int8}, ["tail_kernel<opmath float, 4096>"]),
    ],
)
def test_a_step_is_one_launch_or_two_where_it_clips(options: dict[str, Any], expected: list[str]) -> None:
    params = parameters(5, 9000, (3, 4))
    ours, reference, theirs = pair(params, **options)
    for step in range(3):
        small_gradients(params, theirs, seed=step)
        ours.step()
        reference.step()
        assert names(ours) == expected
        assert_all_same(params, theirs, f"step {step}")


@pytest.mark.usefixtures("on_the_cpu")
def test_one_kernel_for_all_dtypes_of_a_device() -> None:
    params = [*parameters(9, 3000), *parameters(5, dtype=torch.float64), *parameters(2000, dtype=torch.bfloat16)]
    ours, reference, theirs = pair(params, max_grad_norm=1.0)
    small_gradients(params, theirs)
    ours.step()
    reference.step()
    assert names(ours) == ["norm_kernel<4096>", "tail_kernel<any, 4096>"]
    assert_all_same(params, theirs, "parameters")


@pytest.mark.usefixtures("on_the_cpu")
def test_more_tensors_than_a_launch_takes_have_one_norm_between_them() -> None:
    fit = (LARGE - HEADER_BYTES - GROUP_BYTES) // 8
    params = parameters(*[2] * (fit + 1))
    ours, reference, theirs = pair(params, max_grad_norm=1.0)
    small_gradients(params, theirs)
    ours.step()
    reference.step()
    assert names(ours) == ["norm_kernel<32760>", "norm_kernel<4096>", "tail_kernel<float32, 32760>",
                           "tail_kernel<float32, 4096>"]  # fmt: skip
    assert_all_same([ours.grad_norm], [reference.grad_norm], "norm")
    assert_all_same(params, theirs, "parameters")


@pytest.mark.usefixtures("on_the_cpu")
def test_norms_of_many_groups() -> None:
    params = parameters(*[3] * 40, 9000, 20_000)
    theirs = twins(params)
    options = OPTIONS | {"norm_per_group": True}
    groups, same = (
        [{"params": [p], "lr": 0.01 * i} | ({"max_grad_norm": 0.1 * i} if i % 3 else {}) for i, p in enumerate(of)]
        for of in (params, theirs)
    )
    ours, reference = FusedSGD(groups, **options, backend="cuda"), FusedSGD(same, **options, backend="torch")
    for step in range(2):
        small_gradients(params, theirs, seed=step)
        ours.step()
        reference.step()
        assert_all_same([ours.grad_norm], [reference.grad_norm], "norms")
        assert ours.grad_norm.isnan().tolist() == [i % 3 == 0 for i in range(len(params))]
        assert_all_same(params, theirs, "parameters")


@pytest.mark.usefixtures("on_the_cpu")
def test_the_sums_of_large_tensors_are_those_of_float64() -> None:
    params = parameters(300_001, 70_000)
    ours, _, _ = pair(params, max_grad_norm=1.0)
    ours.step()
    exact = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params if p.grad is not None))
    assert ours.grad_norm.item() == torch.tensor(exact).float().item()


@pytest.mark.usefixtures("on_the_cpu")
def test_the_table_stays_while_gradients_move_and_are_missing() -> None:
    params = parameters(3000, 5, (8, 9))
    ours, reference, theirs = pair(params, max_grad_norm=1.0, ema_decay=0.5, ema_warmup=True)
    small_gradients(params, theirs)
    ours.step()
    reference.step()
    plan = plan_of(ours)
    for step in range(8):
        kept = move_gradients(params, theirs)
        small_gradients(params, theirs, seed=step)
        if step % 3 == 0:
            params[1].grad = theirs[1].grad = None
        ours.step()
        reference.step()
        assert plan_of(ours) is plan and len(kept) >= 2
    assert_all_same(params, theirs, "parameters")
    assert_all_same([ours.state[p]["ema"] for p in params], [reference.state[p]["ema"] for p in theirs], "averages")


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("per_group", [False, True])
def test_a_norm_that_is_not_finite_skips_a_scaled_step_and_no_other(per_group: bool) -> None:
    params = parameters(9000, 4)
    ours, _, _ = pair(params, max_grad_norm=1.0, norm_per_group=per_group)
    ours.step()
    before = [param.detach().clone() for param in params]
    params[1].grad = torch.full((4,), math.inf)
    ours.grad_scale = torch.tensor(2.0)
    ours.step()
    del ours.grad_scale
    assert_all_same(params, before, "skipped")
    assert ours.grad_norm.isinf().all()
    ours.step()
    assert params[0].isnan().sum() == 0 and params[1].isnan().all()  # as torch: 0 times the gradient


def test_a_captured_step_must_not_depend_on_numbers_of_its_own(capturing: Any) -> None:
    params = parameters(40, dtype=torch.bfloat16)
    stochastic = FusedSGD(params, lr=0.1, rounding="stochastic", backend="cuda")
    stochastic.step()
    capturing(True)
    with pytest.raises(RuntimeError, match="group 0, parameter 0: stochastic rounding cannot be captured"):
        stochastic.step()


def test_an_average_is_captured_after_its_first_step(capturing: Any) -> None:
    params = parameters(40)
    optimizer = FusedSGD(params, lr=0.1, ema_decay=0.9, max_grad_norm=1.0, backend="cuda")
    capturing(True)
    with pytest.raises(RuntimeError, match="the first step of an average cannot be captured"):
        optimizer.step()
    capturing(False)
    optimizer.step()
    capturing(True)
    optimizer.step()
    assert len(launches(optimizer)) == 2


def test_an_average_that_warms_up_is_not_captured(capturing: Any) -> None:
    optimizer = FusedSGD(parameters(40), lr=0.1, ema_decay=0.9, ema_warmup=True, backend="cuda")
    for _ in range(3):
        optimizer.step()
    capturing(True)
    with pytest.raises(RuntimeError, match=r"an average whose decay changes from step to step \(ema_warmup\) cannot"):
        optimizer.step()
