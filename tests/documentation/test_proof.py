"""docs/proof.md says of the tests what tests/results has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import record

PAGE = Path(__file__).resolve().parents[2] / "docs" / "proof.md"


def test_the_tables_are_those_of_the_recorded_runs():
    text = PAGE.read_text(encoding="utf-8")
    assert record.page(text) == text, "make it again: python -m tests.record --write docs/proof.md"


def test_no_recorded_run_has_failed():
    assert [run["commit"] for run in record.runs() for counts in run["tests"].values() if counts.get("failed")] == []


@pytest.mark.parametrize(
    ("nodeid", "simulated", "subject"),
    [
        ("tests/bits/test_bits.py::test_random[cpu]", False, "cpu"),
        ("tests/bits/test_bits.py::test_random[cuda]", True, "cuda"),
        ("tests/gpu/test_gpu_streams.py::test_a[triton-torch-torch.float32]", True, "triton"),
        ("tests/gpu/test_gpu_plan.py::test_b", True, "other"),
        ("tests/simulated_gpu/test_queues.py::test_c[cuda]", True, "simulated_gpu"),
        ("tests/optimizer/test_loading.py::test_d", False, "optimizer"),
    ],
)
def test_what_a_test_is_of(nodeid: str, simulated: bool, subject: str) -> None:
    assert record.subject_of(nodeid, simulated) == subject


def test_counts_are_added_and_a_run_is_known_by_its_versions():
    plain = {"simulated_gpu": False, "datetime": "2026-01-01T00:00:00", "commit": "a", "seconds": 3, "system": "S"}
    plain |= {"torch": "2.9.0", "python": "3.11.1", "triton": None}
    old = plain | {"tests": {"cpu": {"passed": 1_200, "skipped": 3}, "documentation": {"passed": 2}}}
    new = plain | {"datetime": "2026-02-01T00:00:00", "torch": "2.10.0", "tests": {"cpu": {"passed": 7}}}
    simulated = plain | {"simulated_gpu": True, "tests": {"cuda": {"passed": 5, "failed": 1}}}
    found = [old, new, simulated]
    assert "| the CPU's arithmetic against torch and the reference | 1,200 passed, 3 skipped |" in record.counts_table(
        found
    )
    assert "| the CUDA backend, on a simulated GPU | 5 passed, 1 failed |" in record.counts_table(found)
    assert record.versions_table(found).splitlines()[2:] == [
        "| 2.10.0 | 3.11.1 | – | 7 passed | not run |",
        "| 2.9.0 | 3.11.1 | – | 1,202 passed, 3 skipped | 5 passed, 1 failed |",
    ]
