"""The whole step() over the parameters of real models: everybody, on every device, beside the limit. `make bench`."""

from __future__ import annotations

from typing import Any

import pytest

from bench import cases
from bench.cases import Case
from bench.cases.implementations import LIMIT, ORDER
from bench.conftest import grid

STEP = (*ORDER, LIMIT)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = metafunc.config.getoption("smoke")
    if metafunc.function is test_step:
        grid(metafunc, cases.SMOKE_STEP if smoke else cases.STEP, STEP)
    else:
        grid(metafunc, cases.SMOKE_HOST if smoke else cases.HOST, ORDER, devices=("cpu",))


def test_step(row: Any, measured_of: Any, device: str, case: Case, implementation: str) -> None:
    row("step", measured_of(device, case, STEP), implementation)


def test_host(row: Any, measured_of: Any, device: str, case: Case, implementation: str) -> None:
    """As many tensors of one element each: what a step costs beside the arithmetic, also with cold caches. On a GPU
    test_step has it apart."""
    row("host", measured_of(device, case, ORDER, cold=True), implementation)
