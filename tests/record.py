"""What a run of the tests found, kept as JSON: `pytest -p tests.record --record tests/results/NAME.json`.

`python -m tests.record` prints the tables of docs/proof.md, `--write docs/proof.md` puts them into the page:
tests/documentation/test_proof.py makes them again and compares. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
OTHERS = ("--", ".", ":!tests/results")  # what a run is of
OUTCOMES = ("passed", "failed", "skipped")
BLOCK = "<!-- {0}: begin -->\n{1}<!-- {0}: end -->"
SUBJECTS = {  # by the folder, or by what stands in a GPU's tests' names
    "cpu": "the CPU's arithmetic against torch and the reference",
    "optimizer": "the optimizer's behaviour, on the CPU",
    "distributed": "several processes, on the CPU",
    "cuda": "the CUDA backend, on a simulated GPU",
    "triton": "the Triton backend, on a simulated GPU",
    "simulated_gpu": "the simulated GPU itself: opcodes, queues, races, planted faults",
    "kernels": "machine code of the kernels",
    "install": "building and installing",
    "documentation": "pages, examples, demo",
    "benchmarks": "the benchmarks and their reports",
    "other": "other tests on a simulated GPU",
}


def subject_of(nodeid: str, simulated: bool) -> str:
    folder = nodeid.split("/")[1]
    if folder not in ("bits", "gpu"):
        return folder
    if not simulated:
        return "cpu"
    named = re.search(r"\b(cuda|triton)\b", nodeid.partition("[")[2] or nodeid.rpartition("/")[2])
    return named[0] if named else "other"


# --- a run ---------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write what the run found")


def pytest_configure(config: Any) -> None:
    if config.getoption("record") is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("record")))


class Recorder:
    def __init__(self, file: Path) -> None:
        self.file, self.begin = file, time.monotonic()
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            before = self.outcomes.get(report.nodeid)
            self.outcomes[report.nodeid] = "failed" if before == "failed" else report.outcome

    def pytest_sessionfinish(self) -> None:
        simulated = "SIMULATED_GPU_LIBRARY" in os.environ
        counts: dict[str, Counter[str]] = {}
        for nodeid, outcome in self.outcomes.items():
            counts.setdefault(subject_of(nodeid, simulated), Counter())[outcome] += 1
        found = {
            "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": _git("rev-parse", "HEAD")[:10] + ("+changes" if _git("status", "--porcelain", *OTHERS) else ""),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton")},
            "simulated_gpu": simulated,
            "seconds": round(time.monotonic() - self.begin),
            "tests": {subject: dict(counts[subject]) for subject in sorted(counts)},
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- the page ------------------------------------------------------------------------------------------------------


def runs() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def counted(counts: list[dict[str, int]]) -> str:
    total = {outcome: sum(each.get(outcome, 0) for each in counts) for outcome in OUTCOMES}
    return ", ".join(f"{number:,} {outcome}" for outcome, number in total.items() if number) or "none"


def of_whole_suite(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest runs of all tests, without and on the simulated GPU."""
    whole = [run for run in found if {"documentation"} <= set(run["tests"]) or run["simulated_gpu"]]
    newest = {run["simulated_gpu"]: run for run in sorted(whole, key=lambda run: run["datetime"])}
    return [newest[simulated] for simulated in sorted(newest)]


def counts_table(found: list[dict[str, Any]]) -> str:
    chosen = of_whole_suite(found)
    lines = ["| tests of | result |", "| --- | --- |"]
    for subject, title in SUBJECTS.items():
        counts = [run["tests"][subject] for run in chosen if subject in run["tests"]]
        if counts:
            lines.append(f"| {title} | {counted(counts)} |")
    how = {False: "On the CPU", True: "On the simulated GPU"}
    where = ". ".join(
        f"{how[run['simulated_gpu']]}: {run['seconds']} s, {run['datetime'][:10]}, commit {run['commit']}"
        for run in chosen
    )
    first = chosen[0]
    about = f"{first['system']}, Python {first['python']}, torch {first['torch']}, Triton {first['triton']}. {where}."
    return "\n".join([*lines, "", about, ""])


def versions_table(found: list[dict[str, Any]]) -> str:
    lines = ["| torch | Python | Triton | on the CPU | on a simulated GPU |", "| --- | --- | --- | --- | --- |"]
    keys = {(run["torch"], run["python"], run["triton"]) for run in found}
    for key in sorted(keys, key=lambda key: (release(key[0]), release(key[1])), reverse=True):
        cells = []
        for simulated in (False, True):
            of_both = [
                run
                for run in found
                if (run["torch"], run["python"], run["triton"]) == key and run["simulated_gpu"] == simulated
            ]
            newest = max(of_both, key=lambda run: run["datetime"], default=None)
            cells.append("not run" if newest is None else counted(list(newest["tests"].values())))
        lines.append("| " + " | ".join([key[0], key[1], key[2] or "–", *cells]) + " |")
    return "\n".join([*lines, ""])


def page(text: str) -> str:
    found = runs()
    for name, table in (("counts", counts_table(found)), ("versions", versions_table(found))):
        block = re.compile(BLOCK.format(name, ".*?"), re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"no place for the table {name!r}: it wants {BLOCK.format(name, '')!r}")
        text = block.sub(lambda _, name=name, table=table: BLOCK.format(name, table), text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.record", description="What the recorded runs found.")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    chosen = parser.parse_args()
    if chosen.write is None:
        sys.stdout.write(f"{counts_table(runs())}\n{versions_table(runs())}")
    else:
        chosen.write.write_text(page(chosen.write.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
