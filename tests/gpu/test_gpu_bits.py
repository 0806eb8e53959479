"""FusedSGD on a GPU, bit for bit: against wd_fused.reference, and against torch.optim.SGD's loop and foreach there.

Both hold in all four dtypes, says the design. They are tests of their own, so that a failure tells which claim is
wrong: that the kernel computes what the reference says, or that the reference is what torch computes on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    FULL,
    HALVES,
    LAYOUTS,
    Reference,
    affordable,
    assert_same_bits,
    buffers_of,
    copy_gradients,
    difference,
    fewest_launches,
    fused,
    give_gradients,
    laid_out,
    launches,
    numbers,
    parameters,
    source,
    twin,
)

STEPS = 3


def mixes() -> Iterator[dict[str, Any]]:
    """Every combination of the options that changes the formula."""
    for maximize in (False, True):
        for weight_decay in (0.0, 5e-4):
            common = {"lr": 0.1, "weight_decay": weight_decay, "maximize": maximize}
            yield {**common, "momentum": 0.0}
            for dampening, nesterov in ((0.0, False), (0.1, False), (0.0, True)):
                yield {**common, "momentum": 0.9, "dampening": dampening, "nesterov": nesterov}


def assert_in_every_mix(check: Callable[[dict[str, Any]], None]) -> None:
    wrong = []
    for mix in mixes():
        try:
            check(mix)
        except AssertionError as error:
            wrong.append(f"{mix}: {error}")
    assert not wrong, f"in {len(wrong)} of 16 mixes:\n" + "\n".join(wrong[:4])


def agrees_with_reference(dtype: torch.dtype, numerics: str, special: float = 0) -> Callable[[dict[str, Any]], None]:
    def check(mix: dict[str, Any]) -> None:
        params = parameters(dtype, seed=1, special=special)
        ours = fused(params, **mix, numerics=numerics)
        expected = Reference(ours, numerics)
        for step in range(STEPS):
            give_gradients(params, seed=10 + step, special=special)
            ours.step()
            expected.step()
            expected.assert_agrees(f"step {step}")

    return check


def agrees_with_torch(dtype: torch.dtype, special: float = 0, **choice: Any) -> Callable[[dict[str, Any]], None]:
    def check(mix: dict[str, Any]) -> None:
        params = parameters(dtype, seed=2, special=special)
        twins = twin(params)
        ours, theirs = fused(params, **mix), torch.optim.SGD(twins, **mix, **choice)
        for step in range(STEPS):
            give_gradients(params, seed=20 + step, special=special)
            copy_gradients(params, twins)
            ours.step()
            theirs.step()
            assert_same_bits(params, twins, f"step {step}, parameters")
            assert_same_bits(buffers_of(ours), buffers_of(theirs), f"step {step}, momentum buffers")

    return check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numerics", ["torch", "opmath"])
def test_bits_are_the_references(dtype, numerics):
    assert_in_every_mix(agrees_with_reference(dtype, numerics))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_references_for_infinities_nan_and_subnormals(dtype):
    assert_in_every_mix(agrees_with_reference(dtype, "torch", special=0.3))


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
def test_full_precision_bits_are_torchs(dtype, foreach):
    assert_in_every_mix(agrees_with_torch(dtype, foreach=foreach))


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
def test_full_precision_bits_are_torchs_for_infinities_nan_and_subnormals(dtype, foreach):
    assert_in_every_mix(agrees_with_torch(dtype, special=0.3, foreach=foreach))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
def test_half_precision_bits_are_torchs(dtype, foreach):
    assert_in_every_mix(agrees_with_torch(dtype, foreach=foreach))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_number_is_stepped_as_the_reference_does(dtype):
    """All 65,536 parameters, with gradients of all sizes: NaN and infinities among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    gradients = numbers(2**16, dtype, source(4)) * 10.0
    for mix in ({"momentum": 0.0}, {"momentum": 0.9, "nesterov": True}):
        for numerics in ("torch", "opmath"):
            params = [every.clone().to(DEVICE).requires_grad_()]
            ours = fused(params, **mix, numerics=numerics)
            expected = Reference(ours, numerics)
            for _ in range(2):
                params[0].grad = gradients
                ours.step()
                expected.step()
            expected.assert_agrees(f"{mix} {numerics}")


def random_case(seed: int) -> None:
    """Random groups, tensors of random dtypes and layouts, gradients missing now and then: three steps."""
    choose = random.Random(seed)
    generator = source(seed)
    shapes = [(5,), (1_500,), (4, 3, 5), (2, 3, 4, 5), (8, 16, 3, 3), (70, 129), (0, 4), (), (20_011,)]
    groups = []
    for _ in range(choose.randint(1, 4)):
        params = []
        for _ in range(choose.randint(1, 6)):
            values = numbers(choose.choice(shapes), choose.choice(DTYPES), generator, choose.choice((0, 0, 0.3)))
            params.append(laid_out(values, choose.choice(LAYOUTS)).requires_grad_())
        momentum = choose.choice((0.0, 0.9, 0.9, choose.random()))
        nesterov = momentum > 0 and choose.random() < 0.3
        groups.append(
            {
                "params": params,
                "lr": choose.choice((0.1, 1e-3, choose.random())),
                "momentum": momentum,
                "dampening": 0.0 if nesterov else choose.choice((0.0, 0.0, choose.random())),
                "weight_decay": choose.choice((0.0, 5e-4, choose.random())),
                "nesterov": nesterov,
                "maximize": choose.random() < 0.3,
            }
        )
    numerics = choose.choice(("torch", "opmath"))
    ours = fused(groups, numerics=numerics)
    expected = Reference(ours, numerics)
    for step in range(STEPS):
        for group in ours.param_groups:
            for param in group["params"]:
                param.grad = None
                if choose.random() < 0.85:
                    values = numbers(param.shape, param.dtype, generator)
                    param.grad = laid_out(values, choose.choice(LAYOUTS))
        ours.step()
        expected.step()
        expected.assert_agrees(f"random case {seed}, step {step}:")
    params = [param for group in ours.param_groups for param in group["params"]]
    strided = [launch for launch in launches(ours) if "strided" in launch["kernel"] or "general" in launch["kernel"]]
    assert max(len(strided), len(launches(ours)) - len(strided)) <= fewest_launches(params)


@pytest.mark.parametrize("block", range(4))
def test_random_cases_have_the_references_bits(block):
    for seed in range(1_000 * block, 1_000 * block + affordable(25, 5)):
        random_case(seed)


@pytest.mark.gpu_backend("cuda")  # of none, so once
def test_a_differing_bit_is_seen():
    """Of the comparison itself."""
    params = parameters(torch.float32, sizes=(1_000,))
    changed = twin(params)
    changed[0].detach()[500].mul_(1 + 2.0**-23)
    assert difference(params[0], changed[0]) is not None
    with pytest.raises(AssertionError, match="1 of 1000 elements differ, first 500"):
        assert_same_bits(params, changed)
