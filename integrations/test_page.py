"""The table of docs/proof.md is what the report makes of the results that it names. Run by pytest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from integrations import report

PAGE = report.ROOT / "docs" / "proof.md"


def named_results() -> Path:
    name = re.search(r"From integrations/results/(\S+\.json)\.", PAGE.read_text(encoding="utf-8"))
    assert name is not None
    return report.RESULTS / name[1]


def test_the_page_has_the_results_that_it_names() -> None:
    page = PAGE.read_text(encoding="utf-8")
    again = "remedy: python -m integrations.report --write docs/proof.md"
    assert page == report.filled(page, named_results()), again


def test_the_results_are_of_all_frameworks_and_passed() -> None:
    rows = report.rows_of(named_results())
    assert {row["framework"] for row in rows} == set(report.NAMES)
    assert {row["outcome"] for row in rows} == {"passed"}


def test_a_failure_shows_in_the_table() -> None:
    row = {"outcome": "passed", "equal_elements": 5, "near_elements": 0}
    assert report.result([row]) == "passed, the same bits in 5 elements"
    assert report.result([row, row | {"outcome": "failed"}]).startswith("1 passed, 1 failed")


def test_a_page_without_a_place_for_the_table_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    assert report.main(["--write", str(page), str(named_results())]) == 1
    assert page.read_text(encoding="utf-8") == "nothing" and "results: begin" in capsys.readouterr().err
