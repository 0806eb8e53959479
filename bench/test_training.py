"""Whole training iterations of small real models, and step()'s share of them. `make bench`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from bench.cases import Case
from bench.cases.implementations import COMPILED, ORDER
from bench.conftest import grid, tell
from bench.measure.training import BATCH, Training, perceptron, resnet20

MODELS = {"digits": resnet20, "digits-perceptron": perceptron}
# A model is no list of shapes: the case is its name.
CASES = (
    Case("digits", f"ResNet-20 on handwritten digits, {BATCH} a batch", ()),
    Case("digits-perceptron", f"two layers of 2,048 on handwritten digits, {BATCH} a batch", ()),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    grid(metafunc, CASES, ORDER)


@pytest.fixture(scope="module")
def training_of(request: pytest.FixtureRequest) -> Callable[[str, str], Training]:
    pytest.importorskip("sklearn", reason="scikit-learn, of which the digits are, is not installed")
    smoke = request.config.getoption("smoke")
    names = tuple(name for name in ORDER if not (smoke and name == COMPILED))  # which takes as long as all the rest
    return cache(lambda model, device: Training(MODELS[model], device, names, smoke))


def test_training(
    benchmark: Any, smoke: bool, skip_absent: Any, training_of: Any, device: str, case: Case, implementation: str
) -> None:
    training = training_of(case.name, device)
    if implementation not in training.trainers:
        reason = training.absent.get(implementation, "left out of smoke runs")
        skip_absent(device, implementation, "training", case.name, reason)
    counted = {
        "tensors": len(training.parameters),
        "elements": sum(parameter.numel() for parameter in training.parameters),
    }
    tell(benchmark, "training", device, case, implementation, training.seconds[implementation], **counted)
    benchmark.pedantic(lambda: training.trainers[implementation].iterations(1), rounds=1 if smoke else 3)
