"""FusedSGD.last_step on every backend: counted from the weights, element by element. Run by pytest."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import strategies
import torch
from strategies import assert_same_bits
from torch import Tensor

from wd_fused import FusedSGD, step_in_backward

pytestmark = pytest.mark.usefixtures("fused_backend")

BF16 = torch.bfloat16
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64, no momentum": (torch.float64, {"momentum": 0.0}),
    "bfloat16": (BF16, {}),
    "bfloat16, no momentum, zeroed gradients": (BF16, {"momentum": 0.0, "zero_grads": True}),
    "full, int8": (BF16, {"master_weights": "full", "momentum_dtype": "int8"}),
    "split, clipped": (BF16, {"master_weights": "split", "max_grad_norm": 0.125}),
    "kahan": (BF16, {"rounding": "kahan"}),
    "stochastic": (BF16, {"rounding": "stochastic"}),
}


def parameters(dtype: torch.dtype, seed: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(300, 3), (7,), (), (0, 4), (129,)]
    return [torch.nn.Parameter(torch.randn(s, generator=source).to(strategies.DEVICE, dtype)) for s in shapes]


def set_gradients(params: list[Tensor], seed: int) -> None:
    """Small ones, of which a fifth is 0; the second parameter has none."""
    source = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=source) * (torch.rand(p.shape, generator=source) < 0.8)
        p.grad = None if i == 1 else (1e-2 * grad).to(p.device, p.dtype)


def numbers(tensors: list[Tensor]) -> list[float]:
    return [number for tensor in tensors for number in tensor.detach().double().flatten().tolist()]


@pytest.mark.parametrize("dtype, options", KINDS.values(), ids=KINDS)
def test_numerics_are_what_the_weights_show_and_the_step_is_that_without_them(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    runs = [parameters(dtype, seed), parameters(dtype, seed)]
    common = {"lr": 1e-2, "momentum": 0.9} | options
    ours, plain = (
        FusedSGD([{"params": own[:2]}, {"params": own[2:], "lr": 1e-3}], **common, **more)
        for own, more in zip(runs, ({"report_numerics": True}, {}), strict=True)
    )
    for step in range(3):
        for params in runs:
            set_gradients(params, seed + step)
        gradients = [None if p.grad is None else p.grad.clone() for p in runs[0]]
        before = ours.master_parameters()
        ours.step()
        plain.step()
        after = ours.master_parameters()
        numerics = ours.last_step.numerics
        assert numerics is not None and all(each.device.type == strategies.DEVICE.type for each in numerics)
        for g, group in enumerate(ours.param_groups):
            places = [i for i, p in enumerate(group["params"]) if p.grad is not None]
            first = 2 * g
            buffers = [ours.state[group["params"][i]].get("momentum_buffer") for i in places if common["momentum"]]
            drives = numbers(buffers if common["momentum"] else [gradients[first + i] for i in places])
            old, new = (numbers([weights[first + i] for i in places]) for weights in (before, after))
            rows = list(zip(drives, old, new, strict=True))
            assert numerics.updates[g] == sum(drive != 0 for drive, _, _ in rows)
            assert numerics.lost[g] == sum(drive != 0 and a == b for drive, a, b in rows)
            at_end = sum(abs(drive) == 127 for drive in drives) if "momentum_dtype" in options else 0
            assert numerics.int8_at_end[g] == at_end
            assert numerics.largest_update[g].item() == pytest.approx(max(abs(a - b) for _, a, b in rows), rel=1e-6)
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b, f"seed {seed}")
    assert plain.last_step.numerics is None


def test_every_nth_step_is_looked_at_and_the_first() -> None:
    p = torch.nn.Parameter(torch.ones(3, device=strategies.DEVICE))
    optimizer = FusedSGD([p], lr=0.5, report_numerics=3)
    largest = []
    for step in range(1, 8):
        p.grad = torch.full_like(p, float(step))
        optimizer.step()
        largest.append(optimizer.last_step.numerics.largest_update.item())
    assert largest == [0.5, 0.5, 0.5, 2.0, 2.0, 2.0, 3.5]


def test_norm_and_coefficients_are_those_of_the_last_step_alone() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(2, device=strategies.DEVICE)) for _ in range(2))
    a.grad, b.grad = torch.tensor([3.0, 4.0]).to(a), torch.ones_like(b)
    groups = [{"params": [a], "max_grad_norm": 1.0}, {"params": [b], "max_grad_norm": None}]
    optimizer = FusedSGD(groups, lr=1.0)
    assert optimizer.last_step == (False, None, None, None)
    optimizer.step()
    skipped, norm, coefficients, numerics = optimizer.last_step
    assert (skipped, norm, numerics) == (False, 5.0, None)
    expected = [torch.clamp(1 / (torch.tensor(5.0) + 1e-6), max=1.0).item(), 1.0]
    assert coefficients.tolist() == expected and coefficients.device == a.device
    assert_same_bits(a, -a.grad * expected[0], "clipped by it")
    optimizer.param_groups[0]["max_grad_norm"] = None
    optimizer.step()
    assert optimizer.last_step == (False, None, None, None) and optimizer.grad_norm == 5.0


def test_a_skipped_step_is_that_and_the_next_is_not() -> None:
    p = torch.nn.Parameter(torch.ones(300, device=strategies.DEVICE))
    optimizer = FusedSGD([p], lr=0.5, momentum=0.9, fused=True, report_numerics=True)
    for found, updates in ((0.0, 300), (1.0, 0), (None, 300)):
        p.grad = torch.ones_like(p)
        optimizer.grad_scale, optimizer.found_inf = None, None
        if found is not None:
            optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x).to(p.device) for x in (2.0, found))
        optimizer.step()
        last = optimizer.last_step
        assert bool(last.skipped) is (found == 1)
        if found != 1 or isinstance(last.skipped, Tensor):  # where the host knows, nothing was looked at
            assert last.numerics.updates.tolist() == [updates]
        assert bool(optimizer.last_step_skipped) is (found != 0.0)  # of steps under a scale


def test_a_skipped_step_is_looked_at_in_the_next_where_the_host_knows() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([p], lr=0.5, fused=True, report_numerics=2)
    optimizer.grad_scale = torch.tensor(1.0)
    largest = []
    for value, found in ((1.0, 0.0), (2.0, 0.0), (3.0, 1.0), (4.0, 0.0)):
        p.grad, optimizer.found_inf = torch.full_like(p, value), torch.tensor(found)
        optimizer.step()
        largest.append(optimizer.last_step.numerics.largest_update.item())
    assert largest == [0.5, 0.5, 0.5, 2.0]


def test_of_a_step_that_raises_nothing_is_told() -> None:
    params = [torch.nn.Parameter(torch.ones(2, device=strategies.DEVICE)) for _ in range(2)]
    groups = [{"params": [p]} for p in params]
    optimizer = FusedSGD(groups, lr=0.5, max_grad_norm=1.0, norm_per_group=True, report_numerics=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    numerics = optimizer.last_step.numerics
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, device=strategies.DEVICE))]})
    optimizer.param_groups[1]["lr"] = "high"
    with pytest.raises(TypeError, match="lr='high'"):
        optimizer.step()
    assert optimizer.last_step == (False, None, None, numerics)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_what_torchs_code_steps(kind: str, momentum: float) -> None:
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64 if kind == "complex" else None))
    grad = torch.tensor([3 + 4j, 0]) if kind == "complex" else torch.tensor([5.0, 0.0]).to_sparse()
    optimizer = FusedSGD([p], lr=1.0, momentum=momentum, report_numerics=True)
    with pytest.warns(UserWarning, match="parameter 0"):
        for step in range(2):
            p.grad = grad.clone()
            optimizer.step()
            assert [each.item() for each in optimizer.last_step.numerics] == [1, 0, 0, 5 * (1 + step * momentum)]


def test_a_compiled_step_is_looked_at() -> None:
    p = torch.nn.Parameter(torch.ones(2, device=strategies.DEVICE))
    optimizer = FusedSGD([p], lr=0.5, report_numerics=True)
    p.grad = torch.ones_like(p)
    torch.compile(optimizer.step, backend="eager")()
    assert optimizer.last_step.numerics.largest_update.item() == 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU, real or simulated")
def test_nothing_waits_for_a_gpu() -> None:
    p = torch.nn.Parameter(torch.ones(300, dtype=BF16, device=strategies.DEVICE))
    optimizer = FusedSGD([p], lr=0.5, momentum=0.9, max_grad_norm=math.inf, report_numerics=True)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        last = optimizer.last_step
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last.numerics.updates.tolist() == [300]


def test_bad_input() -> None:
    p = torch.nn.Parameter(torch.ones(3, device=strategies.DEVICE))
    for value in (-1, 2.5, "all", None):
        with pytest.raises(ValueError, match=f"Invalid report_numerics={value!r}: use True for each step"):
            FusedSGD([p], report_numerics=value)
    for values in ((5, False), (False, 5)):
        with pytest.raises(ValueError, match="give it as an argument, report_numerics=5"):
            FusedSGD([{"params": [], "report_numerics": value} for value in values])
    with pytest.raises(ValueError, match="report_numerics: it looks at whole steps; leave it out"):
        step_in_backward([p], FusedSGD([p], report_numerics=True))
