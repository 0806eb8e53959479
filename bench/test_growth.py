"""How a step grows with the number of tensors, and with the elements of one tensor. `make bench`."""

from __future__ import annotations

from typing import Any

import pytest

from bench import cases
from bench.cases import Case
from bench.cases.implementations import COMPILED, LIMIT, ORDER, Absent
from bench.conftest import grid

# Compiling again for each size takes minutes in all, and tells nothing of growth that the cases of test_step.py do not.
NAMES = tuple(name for name in ORDER if name != COMPILED)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke, full = metafunc.config.getoption("smoke"), metafunc.config.getoption("full")
    if metafunc.function is test_growth:
        grid(metafunc, cases.SMOKE_GROWTH if smoke else cases.GROWTH, NAMES)
    else:
        chosen = (*cases.ELEMENTS, *(cases.MORE_ELEMENTS if full else ()))
        grid(metafunc, cases.SMOKE_ELEMENTS if smoke else chosen, (*NAMES, LIMIT))


def test_growth(row: Any, measured_of: Any, device: str, case: Case, implementation: str) -> None:
    row("growth", measured_of(device, case, NAMES), implementation)


def test_elements(row: Any, measured_of: Any, skip_absent: Any, device: str, case: Case, implementation: str) -> None:
    try:
        found = measured_of(device, case, (*NAMES, LIMIT), uncut=True)
    except Absent as reason:
        skip_absent(device, None, "elements", case.name, str(reason))
    row("elements", found, implementation)
