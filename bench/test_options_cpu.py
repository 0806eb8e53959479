"""FusedSGD's options on the CPU against torch's calls in sequence. `make bench`.

As in the other suites the report's ratios come from interleaved rounds. All sets of options of a dtype are timed in the
same rounds over the same tensors, so that what one takes beyond the plain step can be told, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from bench import cases
from bench.cases import Case
from bench.cases import options as option_cases
from bench.cases.options import OptionSet
from bench.conftest import tell
from bench.measure import extra_memory
from bench.measure.interleaved import Steps, Workload
from bench.report.options import SUITE

Key = tuple[Case, str]  # the case and the dtype of a workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A workload's rows follow one another, so that one workload at a time is in memory."""
    smoke = metafunc.config.getoption("smoke")
    if metafunc.function is test_options:
        chosen_cases, sets = cases.SMOKE_STEP if smoke else option_cases.STEP, option_cases.OPTION_SETS
    else:
        chosen_cases = cases.SMOKE_MEMORY if smoke else option_cases.MEMORY
        sets = (
            option_cases.OPTION_SETS[-1:] if smoke else option_cases.OPTION_SETS
        )  # seconds each: a process of its own
    metafunc.parametrize(
        ("case", "chosen", "implementation"),
        [
            pytest.param(case, chosen, name, id=f"{case.name}-{chosen.name}-{name}")
            for case in chosen_cases
            for chosen in sets
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
        _name(chosen, implementation): option_cases.stepper(chosen, implementation, params, shared).step
        for chosen in option_cases.OPTION_SETS
        if chosen.dtype == case.dtype
        for implementation in option_cases.IMPLEMENTATIONS
    }
    return Workload(case, steps, smoke)


def _name(chosen: OptionSet, implementation: str) -> str:
    return f"{chosen.name}, {implementation}"


def test_options(
    benchmark: Any,
    smoke: bool,
    workload_of: Callable[[Case, str], Workload],
    case: Case,
    chosen: OptionSet,
    implementation: str,
) -> None:
    workload, name = workload_of(case, chosen.dtype), _name(chosen, implementation)
    told = {"tail": chosen.name, "tail_title": chosen.title, "goal": chosen.goals.get(case.name), "dtype": chosen.dtype}
    tell(benchmark, SUITE, "cpu", case, implementation, {"step": workload.seconds[name]}, **told)
    benchmark.group += f": {chosen.title}"
    benchmark.pedantic(
        workload.steps[name], rounds=2 if smoke else 5, iterations=workload.iterations[name], warmup_rounds=1
    )


def test_options_memory(case: Case, chosen: OptionSet, implementation: str, memory_rows: list[dict[str, Any]]) -> None:
    reason = extra_memory.unavailable()
    if reason is not None:
        pytest.skip(reason)
    named = {"case": case.name, "title": case.title, "tail": chosen.name, "tail_title": chosen.title}
    memory_rows.append(
        named | {"implementation": implementation} | extra_memory.in_a_process(case.name, implementation, chosen.name)
    )
