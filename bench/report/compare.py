"""`python -m bench.report --compare OLD NEW`: what became slower or faster between two runs, and beyond the spread.

A machine's speed changes between two runs. The ratio to something that was timed in the same rounds of the same run (a
plain kernel, or torch's loop) does not change with it. Files of earlier versions are compared, too. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.cases.implementations import LIMIT, LOOP
from bench.report import formats
from bench.report.formats import Spread
from bench.report.run import Run, TimedCase, devices, in_order, infos, timed_cases
from bench.report.tables import DASH, Cell, Table

# What a run's times are related to: the first one that both runs have in a case. Options are timed against "torch".
REFERENCES = (LIMIT, LOOP, "torch")

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Change:
    """A median of the old and one of the new run; quartiles tell whether they differ beyond the spread.

    Attributes:
        old, new: seconds, or how many times as long as the reference.
    """

    old: Spread
    new: Spread

    @property
    def relative(self) -> float:
        """0.1: the new one is 10% larger."""
        return self.new.median / self.old.median - 1

    @property
    def beyond_the_spread(self) -> bool:
        return not self.old.overlaps(self.new)


@dataclass(frozen=True)
class Row:
    """What an implementation took in a case of both runs.

    Attributes:
        time: of a step or of an iteration, in seconds.
        ratio: to the reference's time in the same run; None where the runs have none in common.
    """

    case: TimedCase
    implementation: str
    quantity: str
    time: Change
    ratio: Change | None = None
    reference: str | None = None

    @property
    def flags(self) -> list[str]:
        """Which of "time" and "ratio" differ beyond the spread."""
        changes = {"time": self.time, "ratio": self.ratio}
        return [name for name, change in changes.items() if change is not None and change.beyond_the_spread]

    @property
    def rank(self) -> tuple[int, float]:
        """Flagged rows first: those by the ratio, then those by the time alone; the largest change first."""
        by_ratio = self.ratio is not None and self.ratio.beyond_the_spread
        change = self.ratio if by_ratio and self.ratio is not None else self.time
        return (0 if by_ratio else 1 if self.flags else 2), -abs(math.log1p(change.relative))


@dataclass
class Comparison:
    """Two runs side by side.

    Attributes:
        rows: what both have, flagged rows first.
        only_old, only_new: what one of them has.
        resized: cases that have other sizes in the two.
        differences: of machine and versions.
    """

    rows: list[Row] = field(default_factory=list)
    only_old: list[str] = field(default_factory=list)
    only_new: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def compare(old: Run, new: Run) -> Comparison:
    found = Comparison(differences=differences(old, new))
    old_cases, new_cases = (dict(cases_of(run)) for run in (old, new))
    for key, case in new_cases.items():
        before = old_cases.get(key)
        if before is None:
            continue
        if (before.tensors, before.elements) != (case.tensors, case.elements):
            found.resized.append(f"{case.suite}, {case.device}: {before.title}; {case.title}")
            continue
        found.rows += rows_of(before, case)
    found.rows.sort(key=lambda row: row.rank)
    found.only_old = missing(old_cases, new_cases)
    found.only_new = missing(new_cases, old_cases)
    return found


def missing(here: dict[Key, TimedCase], there: dict[Key, TimedCase]) -> list[str]:
    """What ``here`` has and ``there`` lacks: a line for the cases of a suite, one for an implementation in others."""
    titles: dict[str, list[str]] = {}
    for key, case in here.items():
        place = f"{case.suite}, {case.device}"
        if key not in there:
            titles.setdefault(place, []).append(case.title)
            continue
        for name in in_order(case.seconds):
            if name not in there[key].seconds:
                titles.setdefault(f"{place}, {name}", []).append(case.title)
    return [f"{place}: {'; '.join(found)}" for place, found in titles.items()]


def cases_of(run: Run) -> Iterator[tuple[Key, TimedCase]]:
    for device in devices(run):
        for suite in dict.fromkeys(info["suite"] for info in infos(run)):
            for case in timed_cases(run, suite, device):
                yield (suite, device, case.name), case


def rows_of(before: TimedCase, after: TimedCase) -> Iterator[Row]:
    for name in in_order(after.seconds):
        for quantity in after.seconds[name]:
            if not (before.has(name, quantity) and after.has(name, quantity)):
                continue
            time = Change(before.time(name, quantity), after.time(name, quantity))
            reference = next(
                (one for one in REFERENCES if before.has(one, quantity) and after.has(one, quantity)), None
            )
            if reference is None or reference == name:
                yield Row(after, name, quantity, time)
                continue
            ratio = Change(before.ratio(name, quantity, to=reference), after.ratio(name, quantity, to=reference))
            yield Row(after, name, quantity, time, ratio, reference)


def differences(old: Run, new: Run) -> list[str]:
    """Sentences about what makes two runs less comparable."""
    mine, other = old["machine_info"], new["machine_info"]
    wanted = (
        "cpu",
        "cores",
        "threads",
        "memory_bytes",
        "system",
        "python_version",
        "torch",
        "cpu_isa",
        "gpu",
        "packages",
    )
    parts = [
        f"{name}: {shown(mine.get(name))} in the old run, {shown(other.get(name))} in the new one"
        for name in wanted
        if mine.get(name) != other.get(name)
    ]
    parts += [f"{run['file']} is of a smoke run, whose numbers mean nothing" for run in (old, new) if run.get("smoke")]
    return parts


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return "not told" if value is None else str(value)


def table(found: Comparison) -> Table:
    flagged = sum(bool(row.flags) for row in found.rows)
    about = (
        f"{flagged} of {len(found.rows)} rows are beyond the spread, and marked with an arrow: the ranges between the "
        f"quartiles of the rounds do not overlap. Ratio: to the time of {', '.join(map(formats.as_code, REFERENCES))}, "
        "the first of them that both runs have in a case, in the same rounds, which takes the machine's mood out."
    )
    head = ["case, suite: implementation", "old", "new", "change", "ratio, old", "ratio, new", "change"]
    return Table("Old and new", about, head, [cells(row) for row in found.rows])


def cells(row: Row) -> list[Cell]:
    words = [row.case.title, row.case.suite, *(["GPU"] if row.case.device == "cuda" else [])]
    words += [] if row.quantity == row.case.suite else [row.quantity]
    against = [DASH, DASH, DASH]
    if row.ratio is not None:
        old, new = row.ratio.old, row.ratio.new
        against = [*map(multiple, (old, new)), marked(row.ratio, f"of {row.reference}")]
    return [
        Cell(f"{', '.join(words)}: {row.implementation}"),
        *(Cell(formats.time(one.median), time_quartiles(one)) for one in (row.time.old, row.time.new)),
        marked(row.time),
        *against,
    ]


def multiple(ratio: Spread) -> Cell:
    median, low, high = (formats.significant(value) for value in (ratio.median, ratio.low, ratio.high))
    return Cell(f"{median}×", f"{low}–{high}")


def marked(change: Change, detail: str = "") -> Cell:
    """+12.3% ↑ where it is beyond the spread."""
    beyond = change.beyond_the_spread
    arrow = "" if not beyond else " ↑" if change.relative > 0 else " ↓"
    return Cell(percentage(change.relative) + arrow, detail, fastest=beyond)


def time_quartiles(spread: Spread) -> str:
    return f"{formats.time(spread.low)}–{formats.time(spread.high)}"


def percentage(relative: float) -> str:
    return f"{relative:+,.1%}".replace("-", "−")


def lists(found: Comparison) -> dict[str, list[str]]:
    """What stands beside the table, by heading."""
    made = {
        "Only in the old run": found.only_old,
        "Only in the new run": found.only_new,
        "Of other sizes in the two runs, not compared": found.resized,
    }
    return {heading: lines for heading, lines in made.items() if lines}
