"""Every benchmark once, small, and the report of what they wrote. `make bench-smoke`, apart from `make test`, with the
other libraries that are compared with.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, report
from bench.cases import options
from bench.cases.implementations import LIMIT, OURS, TRITON, available
from bench.report import OPTIONS, STEP
from bench.report import options as options_report
from tests.simulated_gpu import build

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("pytest_benchmark")
WITHOUT_XDIST = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=WITHOUT_XDIST | environment, capture_output=True, text=True, timeout=900
    )


def implementations(run: dict[str, Any], suite: str, device: str) -> set[str]:
    infos = [row["extra_info"] for row in run["benchmarks"]]
    return {info["implementation"] for info in infos if (info["suite"], info["device"]) == (suite, device)}


def test_every_benchmark_runs_and_the_report_reads_what_they_wrote(tmp_path: Path) -> None:
    path = tmp_path / "cpu-smoke.json"
    done = run("pytest", "bench", "--smoke", f"--benchmark-json={path}", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    found = report.load(path)
    here, absent = available("cpu")
    for suite in ("step", "host", "growth", "elements", "training"):
        own = implementations(found, suite, "cpu") - {LIMIT}
        left_out = {row["implementation"] for row in found["absent"] if row["suite"] in (suite, None)}
        assert own | left_out >= {*here, *absent} - {"torch.compile(step)"}, suite
        assert own <= set(here), suite
    hosts = [row["extra_info"] for row in found["benchmarks"] if row["extra_info"]["suite"] == "host"]
    assert all(set(info["seconds"]) == {"step", "cold"} for info in hosts)
    assert LIMIT in implementations(found, "step", "cpu") and LIMIT in implementations(found, "elements", "cpu")
    assert {row["implementation"] for row in found["calls"]} >= {OURS}
    assert len(report.timed_cases(found, "step")) == len(cases.SMOKE_STEP)
    assert len(report.timed_cases(found, "growth")) == len(cases.SMOKE_GROWTH)
    text = STEP.markdown(found)
    for case in (*cases.SMOKE_STEP, *cases.SMOKE_MEMORY):
        assert f"| {case.title} |" in text
    for reason in absent.values():
        assert reason in text
    assert len(options_report.timed_options(found)) == len(cases.SMOKE_STEP) * len(options.OPTION_SETS)
    text = OPTIONS.markdown(found)
    for chosen in options.OPTION_SETS:
        assert text.count(f"| {chosen.title} |") >= len(cases.SMOKE_STEP)
    assert "A smoke run" in text

    done = run("bench.report", "--results", str(path), "--plots", str(tmp_path / "plots"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert any((tmp_path / "plots").glob("*.png"))
    done = run("bench.report", "--results", str(path), "--write", str(tmp_path))
    assert done.returncode == 1 and "smoke run" in done.stderr


# Of the streaming kernels the simulated GPU has no PTX.
NO_LIMIT = """
from bench.measure import limit
from bench.cases.implementations import Absent

def kernels(device):
    raise Absent("not on a simulated GPU")

limit.kernels = kernels
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_suites_of_a_gpu_run_on_a_simulated_one_and_are_reported(tmp_path: Path) -> None:
    try:
        build.environment()
    except build.Unavailable as reason:
        pytest.skip(f"the simulated GPU cannot be built: {reason}")
    path = tmp_path / "cuda-smoke.json"
    (tmp_path / "no_limit.py").write_text(NO_LIMIT)
    suites = [f"bench/test_{name}.py" for name in ("step", "growth", "training", "memory")]
    done = run(
        *("tests.simulated_gpu", "-m", "pytest", *suites, "-p", "no_limit", "--smoke", "-k", "cuda"),
        *(f"--benchmark-json={path}", "-p", "no:cacheprovider"),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = report.load(path)
    for suite in ("step", "growth", "elements", "training"):
        assert implementations(found, suite, "cuda") >= {OURS, TRITON}, suite
    seconds = [row["extra_info"]["seconds"] for row in found["benchmarks"] if row["extra_info"]["suite"] == "step"]
    assert all(set(one) == {"host", "device", "whole"} for one in seconds)
    assert {row["implementation"]: row["kernels"] for row in found["calls"]}[OURS] == 1
    text = STEP.markdown(found)
    for name in (OURS, TRITON, found["machine_info"]["gpu"]["name"], "not on a simulated GPU"):
        assert name in text, name
