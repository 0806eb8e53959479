"""What the tests of the frameworks share, and the file of results that `--write-results` leaves. Read by pytest.

A test's first line of documentation says what was run, `FRAMEWORK` of its module the distribution it was run with, and
the fixture `evidence` counts what was compared. integrations/report.py makes the table of docs/proof.md of it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # nothing is fetched: weights are random

import pytest
import torch
from torch import Tensor

from wd_fused import FusedSGD

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # by the bytes of an element

sys.path.insert(0, str(ROOT / "examples"))  # the tests import the examples, and run them

_rows = pytest.StashKey[list[dict[str, Any]]]()
_start = pytest.StashKey[float]()


class Evidence:
    """What one test has compared."""

    def __init__(self) -> None:
        self.equal_elements = self.near_elements = 0

    def same_bits(self, ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape), f"tensor {i}"
            integer = INTEGER[mine.dtype.itemsize]
            a, b = (tensor.detach().contiguous().view(integer) for tensor in (mine, other))
            assert torch.equal(a, b), f"tensor {i}: {int((a != b).sum())} of {mine.numel()} elements differ"
            self.equal_elements += mine.numel()

    def near(self, ours: Iterable[Tensor], theirs: Iterable[Tensor], tolerance: float) -> None:
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
            self.near_elements += mine.numel()


def fused(optimizer: Any) -> FusedSGD:
    """The FusedSGD in what a framework has made of it; its CPU backend must step every parameter."""
    while not isinstance(optimizer, FusedSGD):
        optimizer = optimizer.optimizer
    assert {choice.backend for choice in optimizer.backends()} == {"cpu"}
    return optimizer


def momentum_buffers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [optimizer.state[param]["momentum_buffer"] for param in params]


def run_example(name: str, folder: Path) -> str:
    """What the example prints, run in its own process; all steps must have been fused."""
    command = [sys.executable, "-W", "error:FusedSGD:UserWarning", str(ROOT / "examples" / name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "['cpu']" in done.stdout
    return done.stdout


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Evidence:
    request.node.evidence = Evidence()
    return request.node.evidence


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """Models this small gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="write integrations/results/DATE-TIME.json")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error:FusedSGD")  # whatever is left to torch's code
    config.stash[_rows] = []
    config.stash[_start] = time.monotonic()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    framework = getattr(item.module, "FRAMEWORK", None)  # type: ignore[attr-defined]
    if framework is not None and (report.when == "call" or report.outcome != "passed"):
        found = getattr(item, "evidence", Evidence())
        what = (item.function.__doc__ or item.name).splitlines()[0]  # type: ignore[attr-defined]
        row = {"framework": framework, "version": version(framework), "test": item.name, "what": what.rstrip(".")}
        row |= {"outcome": report.outcome, "seconds": round(report.duration, 1)} | vars(found)
        item.config.stash[_rows].append(row)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--write-results") or not session.config.stash[_rows]:
        return
    now = datetime.now(timezone.utc)
    result = {
        "datetime": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - session.config.stash[_start], 1),
        "rows": session.config.stash[_rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
