"""`python -m bench.gpu.check` (`make gpu-check`): all that only a machine with a GPU can tell, in one JSON.

Three parts, each of use alone: correctness, speed, and Triton's. Each stage is a process of its own with a time limit,
so that one which fails, hangs or breaks the GPU's context costs only itself. A summary is printed last.

The JSON goes to bench/results/. Exits with 1 if a check of correctness failed or could not be finished, with 2 if there
is no GPU. `python -m bench.gpu.report FILE` makes Markdown of the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.gpu import environment as gpu_environment
from bench.gpu import goals, report
from bench.gpu.stage import ROOT, as_text, why_no_gpu

RESULTS = Path(__file__).resolve().parents[1] / "results"
TESTS = "tests/gpu"
PART_SECONDS = 560
HANGS = 90  # seconds after which a test's stack is printed: it hangs, or nearly
LEAST_SECONDS = 10  # with fewer left, a stage is not begun
KEPT = 3000  # characters of a failed stage's output that are kept


@dataclass(frozen=True)
class Step:
    """A stage, and how it is started."""

    name: str
    part: str
    arguments: tuple[str, ...]  # of python
    seconds: float  # at most
    correctness: bool = True  # whether the exit status depends on it
    tests: str | None = None  # those of pytest's that have these marks; None: not a run of pytest


CORRECTNESS, SPEED, TRITONS = PARTS = ("correctness", "speed", "triton")
STEPS = (
    Step("build", CORRECTNESS, ("-m", "bench.gpu.environment"), 240),
    Step("first-step", CORRECTNESS, ("-m", "bench.gpu.first_step"), 90),
    Step("tests", CORRECTNESS, ("-m", "pytest", TESTS), 180, tests="gpu and not triton"),
    Step("arithmetic", CORRECTNESS, ("-m", "bench.gpu.arithmetic"), 90),
    Step("launches", CORRECTNESS, ("-m", "bench.gpu.launches"), 90),
    Step("sanitizer", CORRECTNESS, ("-m", "bench.gpu.tools", "sanitizer"), 280),
    Step("roofline", SPEED, ("-m", "bench.gpu.roofline"), 60, correctness=False),
    Step("speed", SPEED, ("-m", "bench.gpu.speed"), 180, correctness=False),
    Step("options", SPEED, ("-m", "bench.gpu.options"), 120, correctness=False),
    Step("host", SPEED, ("-m", "bench.gpu.host"), 60, correctness=False),
    Step("ncu", SPEED, ("-m", "bench.gpu.tools", "ncu"), 120, correctness=False),
    Step("tests-triton", TRITONS, ("-m", "pytest", TESTS), 300, tests="gpu and triton"),
    Step("tiles", TRITONS, ("-m", "bench.gpu.tiles"), 150, correctness=False),
)


class Runner:
    """Runs stages and keeps what they found.

    Args:
        seconds: that the stages of a part have together, from the first of them on.
    """

    def __init__(self, folder: Path, quick: bool, seconds: float) -> None:
        self.stages: dict[str, dict[str, Any]] = {}
        self._folder = folder
        self._quick = quick
        self._seconds = seconds
        self._ends: dict[str, float] = {}

    def run(self, step: Step) -> None:
        left = self._ends.setdefault(step.part, time.monotonic() + self._seconds) - time.monotonic()
        limit = min(step.seconds, left)
        if left < LEAST_SECONDS:
            self.stages[step.name] = {"status": "no time left", "seconds": 0.0, "failures": [], "data": {}}
            print(f"{step.name}: no time left", flush=True)
            return
        print(f"{step.name}: at most {limit:.0f} s", flush=True)
        began = time.monotonic()
        out, given, log = (self._folder / f"{step.name}{end}" for end in (".json", ".given.json", ".log"))
        given.write_text(json.dumps({name: stage["data"] for name, stage in self.stages.items()}), encoding="utf-8")
        if step.tests is not None:
            out = out.with_suffix(".xml")
            own = ["-v", "-m", step.tests, f"--confcutdir={TESTS}", f"--junitxml={out}", "--durations=8"]
            own += ["-p", "no:cacheprovider", "-o", f"faulthandler_timeout={HANGS}"]
        else:
            own = ["--out", str(out), "--given", str(given)] + ["--quick"] * self._quick
        status = started([sys.executable, *step.arguments, *own], log, limit)
        said = gpu_environment.without_paths(log.read_text(encoding="utf-8", errors="replace"))
        stage = of_stage(status, out, said) if step.tests is None else of_tests(status, out, said)
        stage["seconds"] = round(time.monotonic() - began, 1)
        self.stages[step.name] = stage
        print(f"{step.name}: {stage['status']} in {stage['seconds']:.0f} s", flush=True)
        for failure in stage["failures"][:5]:
            print(f"  {failure}", flush=True)


def started(command: list[str], log: Path, limit: float) -> int | None:
    """Runs a program with its output in a file; its exit status, or None if it was stopped at the limit."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": _with_root()}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:  # whatever it has started goes with it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _with_root() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def of_stage(status: int | None, out: Path, said: str) -> dict[str, Any]:
    """What a stage of bench/ left, and how it ended."""
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {"data": {}, "failures": []}
    failures = found["failures"]
    verdict = {0: "passed", 1: "failed", None: "out of time"}.get(status, "error")
    if status == 1 and not failures:
        verdict = "error"  # Python's status for an exception
    if "absent" in found["data"] and status == 0:
        verdict = "absent"
    stage = {"status": verdict, "failures": failures, "data": found["data"]}
    if verdict in ("error", "out of time"):
        stage["said"] = said[-KEPT:].splitlines()
        failures.append(last_line(said) if verdict == "error" else "stopped at its time limit")
    return stage


def of_tests(status: int | None, junit: Path, said: str) -> dict[str, Any]:
    """Counts and failures of a run of pytest: from its XML, or where it did not get so far, from what it printed."""
    failures: list[str] = []
    data: dict[str, Any] = {}
    try:
        cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        counts = {word.lower(): len(re.findall(rf"^\S+::.* {word}", said, re.MULTILINE)) for word in _WORDS}
        data["counts"] = {name: count for name, count in counts.items() if count}
        failures += re.findall(r"^(\S+::.*) (?:FAILED|ERROR)", said, re.MULTILINE)
    else:
        data["counts"], data["failed"], data["skipped"] = {"passed": 0}, [], {}
        for case in cases:
            kind, name = "passed", f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            for found in case:
                if found.tag in ("failure", "error", "skipped"):
                    kind = {"failure": "failed", "error": "errors", "skipped": "skipped"}[found.tag]
                    message = (found.get("message") or "").strip()
                    if kind == "skipped":
                        data["skipped"][name] = message
                    else:
                        failures.append(f"{name}: {message.splitlines()[0][:300] if message else kind}")
                        data["failed"].append(
                            {"test": name, "text": (found.text or message)[-KEPT // 2 :].splitlines()}
                        )
            data["counts"][kind] = data["counts"].get(kind, 0) + 1
        data["failed"] = data["failed"][:20]
    if status == 0 and junit.is_file() and data.get("skipped") and not data["counts"]["passed"]:
        data["absent"] = Counter(data["skipped"].values()).most_common(1)[0][0]  # a backend that cannot be used here
        return {"status": "absent", "failures": failures, "data": data}
    if status in (0, 1) and junit.is_file():
        passed = status == 0 and not failures and data["counts"]["passed"]
        return {"status": "passed" if passed else "failed", "failures": failures, "data": data}
    stopped = status is None
    failures.append("stopped at its time limit" if stopped else f"pytest ended with {status}: {last_line(said)}")
    verdict = "out of time" if stopped else "error"
    return {"status": verdict, "failures": failures, "data": data, "said": said[-KEPT:].splitlines()}


_WORDS = ("PASSED", "FAILED", "ERROR", "SKIPPED")


def last_line(said: str) -> str:
    """The last line that says something: of a traceback, the exception."""
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def results_file(machine: dict[str, Any], now: datetime) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", str(machine["gpu"]).lower().replace("nvidia", "")).strip("-")
    return RESULTS / f"gpu-{name or 'unknown'}-{now:%Y-%m-%d-%H%M%S}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    names = [step.name for step in STEPS]
    told = "; ".join(f"{part}: {', '.join(step.name for step in STEPS if step.part == part)}" for part in PARTS)
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.check", description="Checks and measures on a GPU.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON (default: bench/results/gpu-NAME-DATE.json)")
    parser.add_argument("--only", metavar="PART,STAGE,…", help=f"parts or stages ({told}; default: all)")
    parser.add_argument("--quick", action="store_true", help="small cases only: does it all work?")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="for each part (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    wanted = set(PARTS if chosen.only is None else chosen.only.split(","))
    if unknown := sorted(wanted - {*names, *PARTS}):
        parser.error(f"no part or stage {', '.join(unknown)}; there are {told}")

    now = datetime.now(timezone.utc)
    run: dict[str, Any] = {
        "kind": "gpu-check",
        "datetime": f"{now:%Y-%m-%d %H:%M:%S} UTC",
        "commit": gpu_environment.commit(),
        "quick": chosen.quick,
        "machine": gpu_environment.machine(),
        "missing": gpu_environment.missing(),
        "stages": {},
        "goals": [],
    }
    for reason in run["missing"]:
        print(f"missing here: {reason}", flush=True)
    if (reason := why_no_gpu()) is not None:
        run["no_gpu"] = reason
        print(f"gpu_check: nothing can be checked here: {reason}")
        if chosen.out is not None:
            chosen.out.write_text(as_text(run), encoding="utf-8")
        return 2

    path = chosen.out or results_file(run["machine"], now)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        runner = Runner(Path(folder), chosen.quick, chosen.seconds)
        for step in STEPS:
            if not wanted.isdisjoint((step.name, step.part)):
                runner.run(step)
                run["stages"] = runner.stages
                run["goals"] = goals.reached(*(report.data(run, name) for name in ("speed", "options")))
                path.write_text(as_text(run), encoding="utf-8")  # so far: nothing is lost if this process is stopped
    print("\n" + report.short(run))
    print(f"\n{path}")
    return 1 if any(failed(step, run["stages"]) for step in STEPS) else 0


def failed(step: Step, stages: dict[str, Any]) -> bool:
    """Whether a check of correctness found something, or could not be finished."""
    status = stages.get(step.name, {}).get("status", "not wanted")
    return step.correctness and status in ("failed", "error", "out of time", "no time left")


if __name__ == "__main__":
    sys.exit(main())
