"""The whole step() on the CPU, from Python: FusedSGD against torch.optim.SGD's three implementations. `make bench`.

Rows of pytest-benchmark time one implementation after another. The ratios that the report gives come from interleaved
rounds over the same tensors (interleaved.py), which ride along in each row's extra_info.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import cases, extra_memory
from bench.cases import Case
from bench.interleaved import Workload, step_workload

ROOT = Path(__file__).resolve().parent.parent


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A case's four implementations follow one another, so that one workload at a time is in memory."""
    smoke = metafunc.config.getoption("smoke")
    chosen = {
        "test_step": cases.SMOKE_STEP if smoke else cases.STEP,
        "test_growth": cases.SMOKE_GROWTH if smoke else cases.GROWTH,
        "test_extra_memory": cases.SMOKE_MEMORY if smoke else cases.MEMORY,
    }[metafunc.function.__name__]
    implementations: tuple[str, ...] = cases.IMPLEMENTATIONS
    if smoke and metafunc.function is test_extra_memory:
        implementations = implementations[:2]  # seconds each: a process that imports torch
    metafunc.parametrize(
        ("case", "implementation"),
        [pytest.param(case, name, id=f"{case.name}-{name}") for case in chosen for name in implementations],
    )


@pytest.fixture(scope="session")
def workload_of(request: pytest.FixtureRequest) -> Callable[[Case], Workload]:
    """The measured workload of a case; only the last one asked for is kept."""
    kept: list[Workload] = []

    def workload_of(case: Case) -> Workload:
        if not kept or kept[0].case != case:
            kept.clear()
            kept.append(step_workload(case, smoke=request.config.getoption("smoke")))
        return kept[0]

    return workload_of


def row(benchmark: Any, suite: str, workload: Workload, implementation: str, rounds: int) -> None:
    """A row of pytest-benchmark's table, with the interleaved rounds beside it for the report."""
    case = workload.case
    benchmark.group = f"{suite}: {case.title}"
    benchmark.extra_info.update(
        suite=suite,
        case=case.name,
        title=case.title,
        tensors=len(case.shapes),
        elements=case.elements,
        implementation=implementation,
        interleaved_seconds=[float(f"{seconds:.5g}") for seconds in workload.seconds[implementation]],
    )
    benchmark.pedantic(
        workload.steps[implementation],
        rounds=rounds,
        iterations=workload.iterations[implementation],
        warmup_rounds=1,
    )


def test_step(
    benchmark: Any, smoke: bool, workload_of: Callable[[Case], Workload], case: Case, implementation: str
) -> None:
    row(benchmark, "step", workload_of(case), implementation, rounds=2 if smoke else 5)


def test_growth(
    benchmark: Any, smoke: bool, workload_of: Callable[[Case], Workload], case: Case, implementation: str
) -> None:
    row(benchmark, "growth", workload_of(case), implementation, rounds=2 if smoke else 5)


def test_extra_memory(case: Case, implementation: str, memory_rows: list[dict[str, Any]]) -> None:
    reason = extra_memory.unavailable()
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-m", "bench.extra_memory", case.name, implementation],
        cwd=ROOT,
        env=os.environ | extra_memory.ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    memory_rows.append(
        {"case": case.name, "title": case.title, "implementation": implementation} | json.loads(done.stdout)
    )
