"""The README's numbers are what the report makes of the results file that they name; the report; the benchmarks run."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench is not an installed package

from bench import cases, report, tail_cases, tail_report  # noqa: E402
from bench.report import SHARDED, STEP, TAIL, Block  # noqa: E402

EMPTY_README = "\n\n".join(["# Title", *(f"{block.begin}\n{block.end}" for block in report.BLOCKS), "The end.\n"])


def row(suite: str, case: str, tensors: int, implementation: str, seconds: list[float]) -> dict[str, Any]:
    info = {"suite": suite, "case": case, "title": f"title of {case}", "tensors": tensors}
    return {"extra_info": info | {"implementation": implementation, "interleaved_seconds": seconds}}


def tail_row(tail: str, dtype: str, goal: float | None, implementation: str, seconds: list[float]) -> dict[str, Any]:
    made = row("tail", "small", 161, implementation, seconds)
    made["extra_info"] |= {"tail": tail, "tail_title": f"title of {tail}", "dtype": dtype, "goal": goal}
    return made


def memory_row(implementation: str, first_step: int, later_step: int) -> dict[str, Any]:
    peaks = {"first_step": first_step, "later_step": later_step, "momentum_buffers": 64 << 20}
    return {"case": "big", "title": "title of big", "implementation": implementation} | peaks


def tail_memory_row(implementation: str, first_step: int, later_step: int) -> dict[str, Any]:
    tail = {"case": "big", "title": "title of big", "tail": "clip", "tail_title": "title of clip"}
    peaks = {"first_step": first_step, "later_step": later_step, "states": 80 << 20}
    return tail | {"implementation": implementation} | peaks


@pytest.fixture
def run() -> dict[str, Any]:
    """A run as report.load() gives it. The peers take 4, 10 and 0.5 times as long as wd_fused in the median round."""
    # The second and third rounds are three times as slow for everybody: medians of times alone would hide the ratios.
    ours = [1e-3, 3e-3, 3e-3]
    factors = {"torch fused=True": [4, 3, 5], "torch default": [10, 10, 10], "torch foreach=True": [0.5, 0.4, 0.6]}
    seconds = {"wd_fused": ours} | {
        name: [factor * own for factor, own in zip(by_round, ours, strict=True)] for name, by_round in factors.items()
    }
    return {
        "machine_info": {
            "machine": "x86_64",
            "system": "Linux",
            "python_version": "3.12.1",
            "cpu": "Some CPU",
            "cores": 8,
            "memory_bytes": 32 << 30,
            "torch": "2.99.0",
            "threads": 4,
            "cpu_isa": "avx2",
            "load_average_at_start": [0.1, 0.2, 0.3],
            "cores_used_by_others": 0.01,
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [
            *(row("step", "small", 161, name, values) for name, values in seconds.items()),
            *(row("growth", "10x64", 10, name, values) for name, values in seconds.items()),
            *(row("growth", "2000x64", 2000, name, values) for name, values in seconds.items()),
            *(row("sharded", "many", 200, name, seconds[name]) for name in seconds if "fused=" not in name),
            tail_row("plain", "float32", None, "wd_fused", ours),
            tail_row("plain", "float32", None, "torch", [2 * own for own in ours]),
            tail_row("clip", "float32", 3.0, "wd_fused", [2 * own for own in ours]),
            tail_row("clip", "float32", 3.0, "torch", [6e-3, 24e-3, 21e-3]),
            tail_row("master-full", "bfloat16", 4.0, "wd_fused", ours),
            tail_row("master-full", "bfloat16", 4.0, "torch", [3 * own for own in ours]),
        ],
        "extra_memory": [
            memory_row("wd_fused", 0, 0),
            memory_row("torch fused=True", 512 << 10, 0),
            memory_row("torch default", 1 << 20, 3 << 20),
            memory_row("torch foreach=True", 1500 << 20, 0),
            tail_memory_row("wd_fused", 1 << 20, 2 << 20),
            tail_memory_row("torch", 3 << 20, 0),
        ],
        "datetime": "2031-02-03T04:05:06.789+00:00",
        "smoke": False,
        "file": "cpu-2031-02-03-040506.json",
    }


def table_row(text: str, first_cell: str) -> list[str]:
    """The cells after the first of the only row that begins so."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first_cell} |")]
    assert len(found) == 1, f"{len(found)} rows {first_cell!r} in\n{text}"
    return [cell.strip() for cell in found[0].strip("|").split("|")][1:]


# The README itself.


def shown(block: Block) -> tuple[str, dict[str, Any]]:
    """The README's block, and the run that it names."""
    text = block.find((ROOT / "README.md").read_text(encoding="utf-8"))
    path = report.RESULTS / report.results_named_in(text)
    assert path.is_file(), f"{path} is not there: `make bench`, then `python -m bench.report --write README.md`"
    return text, report.load(path)


@pytest.mark.parametrize("block", report.BLOCKS, ids=lambda block: block.suite)
def test_the_readme_shows_what_the_report_makes_of_the_results_it_names(block: Block) -> None:
    text, run = shown(block)
    assert text == block.text(run), "make it again: `python -m bench.report --write README.md`"
    assert not run["smoke"]


def test_the_picture_shows_the_run_that_the_readme_names() -> None:
    _, run = shown(STEP)
    assert report.growth_digest(run).encode() in (ROOT / report.PLOT).read_bytes(), f"{report.PLOT} shows another run"


def test_the_results_that_the_readme_names_are_complete() -> None:
    _, run = shown(STEP)
    for suite, expected in (("step", cases.STEP), ("growth", cases.GROWTH)):
        assert [case.title for case in report.timed_cases(run, suite)] == [case.title for case in expected]
    assert {(row["case"], row["implementation"]) for row in run["extra_memory"] if "tail" not in row} == {
        (case.name, name) for case in cases.MEMORY for name in cases.IMPLEMENTATIONS
    }
    _, run = shown(TAIL)
    assert list(tail_report.timed_tails(run)) == [
        (case.name, tail.name) for case in tail_cases.STEP for tail in tail_cases.TAILS
    ]
    assert [(row["case"], row["tail"], row["implementation"]) for row in run["extra_memory"] if "tail" in row] == [
        (case.name, tail.name, name)
        for case in tail_cases.MEMORY
        for tail in tail_cases.TAILS
        for name in tail_cases.IMPLEMENTATIONS
    ]


# The report.


def test_ratios_are_formed_within_each_round_and_given_as_median_and_quartiles(run: dict[str, Any]) -> None:
    assert table_row(STEP.markdown(run), "title of small") == [
        "3.00 ms",
        "4.00× (3.50–4.50)",
        "10.0× (10.0–10.0)",
        "0.50× (0.45–0.55)",
    ]


def test_a_lost_comparison_and_one_within_the_spread_are_named_and_won_ones_are_not(run: dict[str, Any]) -> None:
    for benchmark in run["benchmarks"]:
        if benchmark["extra_info"]["implementation"] == "torch default":
            benchmark["extra_info"]["interleaved_seconds"] = [0.9e-3, 3.3e-3, 3.6e-3]
    text = STEP.markdown(run)
    assert "- title of small: torch `foreach=True` is faster than wd_fused." in text
    assert "- title of small: torch default is as fast as wd_fused, within the spread." in text
    assert "- title of small: torch `fused=True`" not in text


def test_memory_is_the_larger_of_the_first_step_and_later_ones(run: dict[str, Any]) -> None:
    assert table_row(STEP.markdown(run), "title of big") == [
        "64.0 MiB",
        "0.0 MiB",
        "0.5 MiB",
        "3.0 MiB",
        "1,500.0 MiB",
    ]


def test_growth_is_the_time_of_a_step_divided_by_the_number_of_tensors(run: dict[str, Any]) -> None:
    text = STEP.markdown(run)
    growth = text[text.index("divided by the number of tensors") :]
    assert table_row(growth, "tensors") == ["10", "2,000"]
    assert table_row(growth, "wd_fused") == ["300", "1.50"]  # 3 ms in the median round
    assert table_row(growth, "torch default") == ["3,000", "15.0"]


def test_a_tail_is_told_beside_the_plain_step_torch_and_its_goal(run: dict[str, Any]) -> None:
    times = TAIL.markdown(run).split("Memory that a tail takes")[0]
    assert table_row(times, "title of plain") == ["3.00 ms", "–", "20, 20: 1.00×", "2.00× (2.00–2.00)", "–"]
    assert table_row(times, "title of clip") == [
        "6.00 ms",
        "2.00×",
        "24, 32: 1.33×",  # norm 4, parameter and buffer 16, gradient 4; torch's clipping reads and writes it once more
        "3.50× (3.25–3.75)",
        "3×, reached",
    ]
    # Not of the plain step's dtype, so not timed in its rounds.
    assert table_row(times, "title of master-full") == [
        "3.00 ms",
        "–",
        "22, 32: 1.45×",
        "3.00× (3.00–3.00)",
        "4×, missed",
    ]


def test_who_cannot_step_dtensors_is_told(run: dict[str, Any]) -> None:
    assert table_row(SHARDED.markdown(run), "title of many") == [
        "3.00 ms",
        "cannot",
        "10.0× (10.0–10.0)",
        "0.50× (0.45–0.55)",
    ]


def test_memory_of_a_tail_is_what_it_takes_beyond_its_states(run: dict[str, Any]) -> None:
    text = TAIL.markdown(run)
    memory = text[text.index("Memory that a tail takes") :]
    assert table_row(memory, "title of clip") == ["80.0 MiB", "2.0 MiB", "3.0 MiB"]


@pytest.mark.parametrize("block", report.BLOCKS, ids=lambda block: block.suite)
def test_machine_date_torch_commit_load_and_file_are_told(run: dict[str, Any], block: Block) -> None:
    text = block.markdown(run)
    assert (
        "Measured on 2031-02-03: Some CPU, 8 cores, 4 threads, 32 GiB, Linux; torch 2.99.0, Python 3.12.1; avx2 code "
        "of commit 0123456789. Load average 0.1 at the start; meanwhile other processes had 1% of the cores' time. "
        "From bench/results/cpu-2031-02-03-040506.json"
    ) in text


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("load_average_at_start", [3.0, 0.0, 0.0], "The machine was not idle"),
        ("cores_used_by_others", 0.4, "The machine was not idle"),
    ],
)
def test_a_busy_machine_is_told(run: dict[str, Any], name: str, value: object, told: str) -> None:
    assert told not in STEP.markdown(run)
    run["machine_info"][name] = value
    assert told in STEP.markdown(run)


def test_changes_that_are_not_committed_are_told(run: dict[str, Any]) -> None:
    run["commit_info"]["dirty"] = True
    assert "commit 0123456789, with changes not committed." in STEP.markdown(run)


def test_the_newest_results_are_the_latest_by_the_date_inside(run: dict[str, Any], tmp_path: Path) -> None:
    for name, date in (("cpu-a.json", "2031-02-03"), ("cpu-b.json", "2031-02-04"), ("cpu-c.json", "2030-12-31")):
        (tmp_path / name).write_text(json.dumps(run | {"datetime": date}))
    assert report.newest("step", tmp_path)["file"] == "cpu-b.json"


def test_each_block_is_made_of_the_newest_run_that_has_its_suite(run: dict[str, Any], tmp_path: Path) -> None:
    tails = [row for row in run["benchmarks"] if row["extra_info"]["suite"] == "tail"]
    (tmp_path / "cpu-a.json").write_text(json.dumps(run))
    (tmp_path / "cpu-b.json").write_text(json.dumps(run | {"benchmarks": tails, "datetime": "2031-02-04"}))
    files = {block: newest["file"] for block, newest in report.newest_blocks(tmp_path).items()}
    assert files == {STEP: "cpu-a.json", TAIL: "cpu-b.json", SHARDED: "cpu-a.json"}
    assert list(report.blocks_of(report.load(tmp_path / "cpu-b.json"))) == [TAIL]
    (tmp_path / "cpu-a.json").unlink()
    assert list(report.newest_blocks(tmp_path)) == [TAIL]


def test_no_results_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match="make bench"):
        report.newest_blocks(tmp_path)


def test_writing_replaces_the_block_and_nothing_else_and_draws_the_picture(run: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY_README, encoding="utf-8")
    for _ in range(2):  # over the empty blocks, and over its own
        report.write(report.blocks_of(run), readme)
        text = readme.read_text(encoding="utf-8")
        assert text == "\n\n".join(["# Title", *(block.text(run) for block in report.BLOCKS), "The end.\n"])
    assert all(report.results_named_in(block.find(text)) == run["file"] for block in report.BLOCKS)
    picture = (tmp_path / report.PLOT).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert report.growth_digest(run).encode() in picture


def test_the_picture_tells_other_numbers_apart(run: dict[str, Any]) -> None:
    other = copy.deepcopy(run)
    grown = [row for row in other["benchmarks"] if row["extra_info"]["suite"] == "growth"]
    grown[-1]["extra_info"]["interleaved_seconds"][0] *= 1.01
    assert report.growth_digest(other) != report.growth_digest(run)


@pytest.mark.parametrize("text", ["no markers", STEP.begin, f"{STEP.end}\n{STEP.begin}", EMPTY_README * 2])
def test_a_readme_without_one_pair_of_markers_is_refused_and_left_alone(
    run: dict[str, Any], tmp_path: Path, text: str
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(report.ReportError, match="numbers: begin"):
        report.write(report.blocks_of(run), readme)
    assert readme.read_text(encoding="utf-8") == text
    assert not (tmp_path / report.PLOT).exists()


# The benchmarks.


def test_resnet50_has_its_161_tensors() -> None:
    resnet50 = next(case for case in cases.STEP if case.name == "resnet50")
    assert len(resnet50.shapes) == 161
    assert resnet50.elements == 25_557_032


def test_every_benchmark_runs_and_the_report_reads_what_they_wrote(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    path, readme = tmp_path / "cpu-smoke.json", tmp_path / "README.md"
    readme.write_text(EMPTY_README, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "bench", "--smoke", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    run = report.load(path)
    assert len(report.timed_cases(run, "step")) == len(cases.SMOKE_STEP)
    assert len(report.timed_cases(run, "growth")) == len(cases.SMOKE_GROWTH)
    text = STEP.markdown(run)
    for case in (*cases.SMOKE_STEP, *cases.SMOKE_MEMORY):
        assert f"| {case.title} |" in text
    assert len(tail_report.timed_tails(run)) == len(cases.SMOKE_STEP) * len(tail_cases.TAILS)
    text = TAIL.markdown(run)
    for case in cases.SMOKE_STEP:
        assert f"| {case.title} | wd_fused |" in text
    for tail in tail_cases.TAILS:
        assert text.count(f"| {tail.title} |") >= len(cases.SMOKE_STEP)
    assert "A smoke run" in text

    command = [sys.executable, "-m", "bench.report", "--results", str(path), "--write", str(readme)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "smoke run" in done.stderr
    assert readme.read_text(encoding="utf-8") == EMPTY_README
