""".ci/run's verdict, with a `make` that only prints: what fails it, and which lines it closes on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CI = Path(__file__).resolve().parents[2] / ".ci" / "run"
SUMMARY = "===== 3 passed in 1.00s ====="
ON_IT = "===== 2 passed, 1 skipped in 2.00s ====="
TESTS = f"{SUMMARY}\nsimulated GPU: SIMULATED_GPU_SEED=1\n{ON_IT}"
NOT_BUILT = f"{SUMMARY}\nsimulated GPU: not built: no g++\n===== 3 skipped in 2.00s ====="

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run(tmp_path: Path, printed: str, nvcc: bool, fails: str = "none", other: str = "") -> tuple[int, str]:
    """Its exit status and what it closed on. `fails`: the target whose status is 2."""
    copy = tmp_path / ".ci" / "run"
    copy.parent.mkdir()
    shutil.copy(CI, copy)
    for name in ("dirname", "mktemp", "tee", "grep", "tail", "rm", "cp", "bash", "cat"):
        os.symlink(str(shutil.which(name)), tmp_path / name)
    (tmp_path / "printed").write_text(f"{printed}\n")
    (tmp_path / "other").write_text(f"{other}\n")
    file = f'if [ "$1" = test ]; then cat "{tmp_path}/printed"; else cat "{tmp_path}/other"; fi'
    program(tmp_path / "make", f'{file}; [ "$1" != {fails} ] || exit 2')
    if nvcc:
        program(tmp_path / "nvcc", "")
    done = subprocess.run([copy], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_it_closes_on_the_two_summaries(tmp_path: Path) -> None:
    status, printed = run(tmp_path, TESTS, nvcc=True)
    assert status == 0 and printed.splitlines()[-2:] == [SUMMARY, ON_IT]


def test_a_simulated_gpu_that_is_not_built_fails_it_where_nvcc_is(tmp_path: Path) -> None:
    status, printed = run(tmp_path, NOT_BUILT, nvcc=True)
    assert status == 1 and "nothing ran on the simulated GPU" in printed


def test_without_nvcc_it_does_not(tmp_path: Path) -> None:
    assert run(tmp_path, NOT_BUILT, nvcc=False)[0] == 0


@pytest.mark.parametrize("target", ["test", "integrations", "bench-smoke", "docs", "lint"])
def test_whatever_fails_fails_it(tmp_path: Path, target: str) -> None:
    other = "===== 1 failed in 3.00s =====" if target in ("integrations", "bench-smoke") else ""
    status, printed = run(tmp_path, TESTS, nvcc=True, fails=target, other=other)
    assert status == 1 and printed.splitlines()[-1] == (other or ON_IT)


def test_tests_that_never_ran_fail_it(tmp_path: Path) -> None:
    status, printed = run(tmp_path, "make: *** no rule", nvcc=False)
    assert status == 1 and "did not get as far as its summary" in printed
