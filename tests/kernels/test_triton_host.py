"""The numbers in docs/triton.md are what the benchmark makes of the results file that they name; the benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report, triton_host
from tests.simulated_gpu import build

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_numbers_are_those_of_its_results_file() -> None:
    page = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
    block = page[page.index(triton_host.BEGIN) : page.index(triton_host.END) + len(triton_host.END)]
    file = report.results_named_in(block)
    run = json.loads((ROOT / "bench" / "results" / file).read_text(encoding="utf-8"))
    assert block == triton_host.block(run, file)


def test_the_benchmark_runs_on_the_simulated_gpu() -> None:
    try:
        build.environment()
    except build.Unavailable as reason:
        pytest.skip(f"the simulated GPU cannot be built: {reason}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulated_gpu", "-m", "bench.triton_host", "--rounds", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert triton_host.MOVED in done.stdout and "161" in done.stdout
