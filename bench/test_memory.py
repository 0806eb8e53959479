"""What a step takes beside time: memory at its peak, and the calls it makes, of torch's operators or to the GPU."""

from __future__ import annotations

from typing import Any

import pytest

from bench import cases
from bench.cases import Case
from bench.cases.implementations import COMPILED, ORDER, Absent
from bench.conftest import grid
from bench.measure import calls, extra_memory


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = metafunc.config.getoption("smoke")
    chosen = cases.SMOKE_MEMORY if smoke else cases.MEMORY
    # In a smoke run few: each is a process that imports torch.
    grid(metafunc, chosen, ORDER[:3] if smoke and metafunc.function is test_extra_memory else ORDER)


def test_extra_memory(
    memory_rows: list[dict[str, Any]], skip_absent: Any, device: str, case: Case, implementation: str
) -> None:
    if implementation == COMPILED:
        skip_absent(device, implementation, "extra memory", None, "compiling takes memory of its own")
    named = {"device": device, "case": case.name, "title": case.title, "implementation": implementation}
    if device == "cuda":
        try:
            memory_rows.append(named | extra_memory.measure_on_gpu(case, implementation))
        except Absent as reason:
            skip_absent(device, implementation, "extra memory", case.name, str(reason))
        return
    if (reason := extra_memory.unavailable()) is not None:
        pytest.skip(reason)
    memory_rows.append(named | extra_memory.in_a_process(case.name, implementation))


def test_calls(
    calls_rows: list[dict[str, Any]], skip_absent: Any, device: str, case: Case, implementation: str
) -> None:
    if implementation == COMPILED and device == "cpu":
        skip_absent(device, implementation, "calls", None, "what it compiles on a CPU are no operators of torch's")
    named = {"device": device, "case": case.name, "title": case.title, "tensors": len(case.shapes)}
    try:
        calls_rows.append(named | {"implementation": implementation} | calls.counted(case, device, implementation))
    except Absent as reason:
        skip_absent(device, implementation, "calls", case.name, str(reason))
