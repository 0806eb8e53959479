"""Reads results files of the benchmarks: which is the newest, what was timed in it, by whom, and what was not.

Files of earlier versions are read as the present ones. Used by the reports, the plots and the comparison. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cases.implementations import LIMIT, LOOP, ORDER, OWN
from bench.report.formats import Spread

RESULTS = Path(__file__).resolve().parents[1] / "results"

# What every results file has.
KEYS = {"machine_info", "commit_info", "datetime", "smoke", "benchmarks", "extra_memory"}
MACHINE_KEYS = {"cpu", "cores", "threads", "memory_bytes", "torch", "load_average_at_start", "cores_used_by_others"}

Run = dict[str, Any]
Seconds = list[float]

# What stands for the time of a step on a device, in the order of the report.
STEP_QUANTITIES = {"cpu": ("step",), "cuda": ("host", "device")}
# Earlier files: on the CPU torch's choice is the loop, unless it is told otherwise.
EARLIER_NAMES = {"torch default": LOOP}


class ReportError(Exception):
    """There is nothing to report, or nowhere to write it. The message says what to do."""


@dataclass(frozen=True)
class TimedCase:
    """A case of a suite on a device.

    Attributes:
        suite, device, name, title: as the run has them.
        dtype: as torch calls it; None in earlier files.
        tensors, elements: how many there are.
        bytes_moved: the least that a later step with momentum reads and writes; None in earlier files.
        one_of: each tensor has one of so many parts of its elements, so that the case fits.
        seconds: by implementation and quantity ("step", "cold"; "host", "device", "whole"; "iteration"), one for each
            interleaved round. The n-th ones of all implementations are of the same round.
        details: by implementation, what else its row says ("compile_seconds", "kernel").
    """

    suite: str
    device: str
    name: str
    title: str
    dtype: str | None
    tensors: int
    elements: int
    bytes_moved: int | None
    one_of: int
    seconds: dict[str, dict[str, Seconds]] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ours(self) -> str | None:
        """Whose time the others are compared with: wd_fused, or its Triton backend where there is no other."""
        return next((name for name in OWN if name in self.seconds), None)

    @property
    def peers(self) -> list[str]:
        """Those that are neither wd_fused nor the limit."""
        return [name for name in in_order(self.seconds) if name not in (*OWN, LIMIT)]

    def has(self, implementation: str | None, quantity: str) -> bool:
        return implementation is not None and bool(self.seconds.get(implementation, {}).get(quantity))

    def time(self, implementation: str, quantity: str = "step") -> Spread:
        return Spread.of(self.seconds[implementation][quantity])

    def ratio(self, implementation: str, quantity: str = "step", to: str | None = None) -> Spread:
        """How many times as long as ours (or as ``to``'s) the implementation's time is, over the rounds."""
        reference = self.ours if to is None else to
        assert reference is not None
        ours, theirs = self.seconds[reference][quantity], self.seconds[implementation][quantity]
        return Spread.of([a / b for a, b in zip(theirs, ours, strict=True)])

    def best_peer(self, quantity: str = "step") -> str | None:
        """The fastest of the others."""
        peers = [name for name in self.peers if self.has(name, quantity)]
        return min(peers, key=lambda name: self.ratio(name, quantity).median, default=None)

    def bandwidth(self, implementation: str, quantity: str) -> float | None:
        """Bytes that must be moved, a second."""
        if self.bytes_moved is None or not self.has(implementation, quantity):
            return None
        return self.bytes_moved / self.time(implementation, quantity).median


def load(path: Path) -> Run:
    """A results file, with its name as "file"."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path}: there is no such file; `make bench` writes one into bench/results") from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror}): name a file of bench/results") from None
    except ValueError as error:  # neither JSON nor UTF-8
        raise ReportError(f"{path}: not JSON ({error}): name a file that `make bench` wrote") from None
    if not is_results(run):
        raise ReportError(
            f"{path}: not a results file of `make bench`: name one of bench/results/cpu-*.json "
            "(`python -m bench.gpu.report` shows those of `make gpu-check`)"
        )
    return {**run, "file": path.name}


def is_results(run: Any) -> bool:
    """Whether it is what `make bench` writes, of this version or an earlier one."""
    if not isinstance(run, dict) or not set(run) >= KEYS or not isinstance(run["machine_info"], dict):
        return False
    if not set(run["machine_info"]) >= MACHINE_KEYS:
        return False
    rows = run["benchmarks"]
    named = {"suite", "case", "title", "tensors", "implementation"}
    return isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("extra_info"), dict) and named <= set(row["extra_info"])
        for row in rows
    )


def newest(suite: str | None = None, folder: Path = RESULTS) -> Run:
    """The latest run, or the latest that has the suite; by the date inside, since a checkout gives every file the same
    one outside."""
    runs = [load(path) for path in sorted(folder.glob("cpu-*.json"))]
    runs = [run for run in runs if suite is None or has_suite(run, suite)]
    if not runs:
        what = "results" if suite is None else f"results of the suite {suite!r}"
        raise ReportError(f"no {what} in {folder}: `make bench` writes them")
    return max(runs, key=lambda run: str(run["datetime"]))


def has_suite(run: Run, suite: str, device: str | None = None) -> bool:
    return any(info["suite"] == suite and device in (None, info["device"]) for info in infos(run))


def infos(run: Run) -> Iterator[dict[str, Any]]:
    """What each row says of itself, with the keys that earlier files lack."""
    for row in run["benchmarks"]:
        info = {"device": "cpu", "dtype": None, "elements": 0, "bytes_moved": None, "one_of": 1} | row["extra_info"]
        info["implementation"] = present_name(info["implementation"])
        yield info


def present_name(implementation: str) -> str:
    return EARLIER_NAMES.get(implementation, implementation)


def seconds_of(info: dict[str, Any]) -> dict[str, Seconds]:
    """By quantity. Earlier files have only "interleaved_seconds", those of the step."""
    kept: dict[str, Seconds] = info.get("seconds") or {"step": info.get("interleaved_seconds", [])}
    return kept


def timed_cases(run: Run, suite: str, device: str = "cpu") -> list[TimedCase]:
    """The suite's cases that wd_fused has a row in, in the order of the run; each set of options of a case is one."""
    cases: dict[str, TimedCase] = {}
    for info in infos(run):
        if (info["suite"], info["device"]) != (suite, device):
            continue
        name, title = info["case"], info["title"]
        if "tail" in info:
            name, title = f"{name}, {info['tail']}", f"{title}: {info['tail_title']}"
        if name not in cases:
            kept = (info[key] for key in ("dtype", "tensors", "elements", "bytes_moved", "one_of"))
            cases[name] = TimedCase(suite, device, name, title, *kept)
        case = cases[name]
        case.seconds[info["implementation"]] = seconds_of(info)
        case.details[info["implementation"]] = {key: info[key] for key in ("compile_seconds", "kernel") if key in info}
    return [case for case in cases.values() if case.ours is not None]


def told_cases(run: Run, suite: str, device: str) -> list[TimedCase]:
    """The suite's, but for those of the models' suite that others time as well: a case has one time in the report."""
    cases = timed_cases(run, suite, device)
    if suite != "step":
        return cases
    elsewhere = {
        (case.title, case.dtype) for other in ("growth", "elements") for case in timed_cases(run, other, device)
    }
    return [case for case in cases if (case.title, case.dtype) not in elsewhere]


def devices(run: Run) -> list[str]:
    found = {info["device"] for info in infos(run)}
    return [device for device in STEP_QUANTITIES if device in found]


def in_order(implementations: Any) -> list[str]:
    """In the order of the report, the limit last; a name that it does not know comes before that."""
    order = {name: place for place, name in enumerate(ORDER)} | {LIMIT: len(ORDER) + 1}
    return sorted(dict.fromkeys(implementations), key=lambda name: order.get(name, len(ORDER)))


class Limits:
    """The memory's speed in a run, as the plain kernels of LIMIT reach it, and what share of it a step reaches."""

    def __init__(self, run: Run, device: str) -> None:
        self.quantity = STEP_QUANTITIES[device][-1]
        self._on_gpu = device == "cuda"
        self._best: dict[str | None, float] = {}
        for suite in ("step", "elements"):
            for case in timed_cases(run, suite, device):
                found = case.bandwidth(LIMIT, self.quantity)
                if found is not None:
                    self._best[case.dtype] = max(found, self._best.get(case.dtype, 0.0))

    def best(self, dtype: str | None) -> float | None:
        """Bytes a second, of the dtype's fastest row."""
        return self._best.get(dtype)

    def share(self, case: TimedCase, implementation: str) -> float | None:
        """1: as fast as the fastest in the same rounds, of plain kernels and implementations; or, on a GPU, where most
        cases have no such kernel, as the dtype's best."""
        if not case.has(implementation, self.quantity):
            return None
        if case.has(LIMIT, self.quantity):
            timed = [name for name in case.seconds if case.has(name, self.quantity)]
            return min(1 / case.ratio(implementation, self.quantity, to=name).median for name in timed)
        best, reached = self.best(case.dtype), case.bandwidth(implementation, self.quantity)
        return reached / best if self._on_gpu and best and reached else None


def memory_rows(run: Run, device: str = "cpu") -> list[dict[str, Any]]:
    """What a step takes beside its states, without the rows of options."""
    rows = [{"device": "cpu"} | row for row in run.get("extra_memory", []) if "tail" not in row]
    return [row | {"implementation": present_name(row["implementation"])} for row in rows if row["device"] == device]
