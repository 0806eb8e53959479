"""The tail of a training step on the CPU: FusedSGD's options against torch's calls in sequence. `make bench`.

As in the other suites the report's ratios come from interleaved rounds. All tails of a dtype are timed in the same
rounds over the same tensors, so that what a tail takes beyond the plain step can be told, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from bench import cases
from bench.cases import Case
from bench.cases import options as option_cases
from bench.cases.options import Tail
from bench.conftest import tell
from bench.measure import extra_memory
from bench.measure.interleaved import Steps, Workload

Key = tuple[Case, str]  # the case and the dtype of a workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A workload's rows follow one another, so that one workload at a time is in memory."""
    smoke = metafunc.config.getoption("smoke")
    if metafunc.function is test_options:
        chosen, tails = cases.SMOKE_STEP if smoke else option_cases.STEP, option_cases.TAILS
    else:
        chosen = cases.SMOKE_MEMORY if smoke else option_cases.MEMORY
        tails = option_cases.TAILS[-1:] if smoke else option_cases.TAILS  # seconds each: a process that imports torch
    metafunc.parametrize(
        ("case", "tail", "implementation"),
        [
            pytest.param(case, tail, name, id=f"{case.name}-{tail.name}-{name}")
            for case in chosen
            for tail in tails
            for name in option_cases.IMPLEMENTATIONS
        ],
    )


@pytest.fixture(scope="module")
def workload_of(request: pytest.FixtureRequest) -> Callable[[Case, str], Workload]:
    """The measured workload of a case and a dtype; only the last one asked for is kept."""
    kept: dict[Key, Workload] = {}

    def workload_of(case: Case, dtype: str) -> Workload:
        if (case, dtype) not in kept:
            kept.clear()
            kept[case, dtype] = _workload(dataclasses.replace(case, dtype=dtype), request.config.getoption("smoke"))
        return kept[case, dtype]

    return workload_of


def _workload(case: Case, smoke: bool) -> Workload:
    params, shared = cases.parameters(case), option_cases.Shared()
    steps: Steps = {
        _name(tail, implementation): option_cases.stepper(tail, implementation, params, shared).step
        for tail in option_cases.TAILS
        if tail.dtype == case.dtype
        for implementation in option_cases.IMPLEMENTATIONS
    }
    return Workload(case, steps, smoke)


def _name(tail: Tail, implementation: str) -> str:
    return f"{tail.name}, {implementation}"


def test_options(
    benchmark: Any,
    smoke: bool,
    workload_of: Callable[[Case, str], Workload],
    case: Case,
    tail: Tail,
    implementation: str,
) -> None:
    workload, name = workload_of(case, tail.dtype), _name(tail, implementation)
    told = {"tail": tail.name, "tail_title": tail.title, "goal": tail.goals.get(case.name), "dtype": tail.dtype}
    tell(benchmark, "tail", "cpu", case, implementation, {"step": workload.seconds[name]}, **told)
    benchmark.group += f": {tail.title}"
    benchmark.pedantic(
        workload.steps[name], rounds=2 if smoke else 5, iterations=workload.iterations[name], warmup_rounds=1
    )


def test_options_memory(case: Case, tail: Tail, implementation: str, memory_rows: list[dict[str, Any]]) -> None:
    reason = extra_memory.unavailable()
    if reason is not None:
        pytest.skip(reason)
    named = {"case": case.name, "title": case.title, "tail": tail.name, "tail_title": tail.title}
    memory_rows.append(
        named | {"implementation": implementation} | extra_memory.in_a_process(case.name, implementation, tail.name)
    )
