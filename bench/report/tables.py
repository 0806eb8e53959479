"""What the report says of a run, as tables: of cells, not of text, so that the terminal and Markdown show the same.

terminal.py and markdown.py print them. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.cases import OPTIONS
from bench.cases.implementations import LIMIT, OWN
from bench.report import formats
from bench.report.formats import Spread
from bench.report.run import (
    STEP_QUANTITIES,
    Limits,
    Run,
    TimedCase,
    devices,
    in_order,
    memory_rows,
    present_name,
    timed_cases,
    told_cases,
)

# More columns than these are not read; the pictures show every size.
MOST_COLUMNS = 8
ON = {"cpu": "", "cuda": ", GPU"}
OF = {"step": "", "host": ", host's time", "device": ", device's time", "cold": ", cold caches"}


@dataclass(frozen=True)
class Cell:
    """What stands in a table.

    Attributes:
        text, detail: the second is printed smaller, below.
        fastest: of its row, or the column of those of its size.
        best_peer: of the fastest of those that are not wd_fused.
    """

    text: str
    detail: str = ""
    fastest: bool = False
    best_peer: bool = False


DASH = Cell("–")


@dataclass(frozen=True)
class Table:
    """A table with its heading, and what its numbers are."""

    title: str
    about: str
    head: list[str]
    rows: list[list[Cell]]


def sections(run: Run) -> dict[tuple[str, str], list[Table]]:
    """By suite and device what the run has of the section "How fast", in the order of the report."""
    makers: dict[str, Callable[[Run, str], list[Table]]] = {
        "step": steps,
        "host": host,
        "training": training,
        "calls": calls,
        "memory": memory,
        "growth": growth,
        "elements": elements,
    }
    made = {
        (suite, device): [table for table in make(run, device) if table.rows]
        for device in devices(run)
        for suite, make in makers.items()
    }
    return {key: tables for key, tables in made.items() if tables}


def implementations_in(cases: Iterable[TimedCase]) -> list[str]:
    return [name for name in in_order(name for case in cases for name in case.seconds) if name != LIMIT]


def verdict(case: TimedCase, quantity: str) -> tuple[str, set[str]]:
    """Who is the fastest, in words and as names: ours and the best of the others where the quartiles do not decide."""
    ours = case.ours
    assert ours is not None
    others = [name for name in case.seconds if name not in (ours, LIMIT) and case.has(name, quantity)]
    best = min(others, key=lambda name: case.ratio(name, quantity).median, default=None)
    if best is None or case.ratio(best, quantity).low > 1:
        return ours, {ours}
    if case.ratio(best, quantity).high < 1:
        return best, {best}
    return f"even: {best}", {ours, best}


def ratios(
    cases: list[TimedCase], quantity: str, share: Callable[[TimedCase], float | None] | None
) -> list[list[Cell]]:
    """A row a case: our time, the share of the limit (where ``share`` tells it), who is the fastest, others' ratios."""
    names = implementations_in(cases)
    rows = []
    for case in cases:
        ours = names[0]
        if not case.has(ours, quantity):  # dashes: no time that the others' could be compared with
            rows.append([Cell(case.title), *[DASH] * (len(names) + (1 if share is None else 2))])
            continue
        words, winners = verdict(case, quantity)
        lost = ours not in winners
        row = [Cell(case.title), Cell(formats.time(case.time(ours, quantity).median), fastest=not lost)]
        if share is not None:
            reached = share(case)
            row.append(DASH if reached is None else Cell(formats.percent(reached)))
        row.append(Cell(words, fastest=lost, best_peer=lost and not winners <= set(OWN)))
        for name in names[1:]:
            if not case.has(name, quantity):
                row.append(DASH)
                continue
            ratio = case.ratio(name, quantity)
            best = name == case.best_peer(quantity)
            row.append(Cell(formats.times(ratio), formats.quartiles(ratio), name in winners, best))
        rows.append(row)
    return rows


def steps(run: Run, device: str) -> list[Table]:
    cases = told_cases(run, "step", device)
    names = implementations_in(cases)
    limits = Limits(run, device)
    made = []
    for quantity in STEP_QUANTITIES[device]:
        limited = quantity == limits.quantity and any(limits.share(case, str(case.ours)) for case in cases)
        rows = ratios(cases, quantity, (lambda case: limits.share(case, str(case.ours))) if limited else None)
        head = ["tensors", *names[:1], *(["of the limit"] if limited else []), "fastest", *names[1:]]
        what = {
            "step": "The whole `step()`, called from Python",
            "host": "On a GPU, the host's time: until `step()` returns, on an idle GPU",
            "device": "On a GPU, the device's time: between two events, without waiting for the host",
        }[quantity]
        about = (
            f"{what}; float32 where nothing is said, momentum {OPTIONS['momentum']}, weight decay "
            f"{OPTIONS['weight_decay']}. {names[0] if names else 'wd_fused'}: time of a step. {meaning(names)} Medians "
            "of the rounds, quartiles below."
        )
        if limited:
            about += (
                " Of the limit: 100% is the time of whatever read and wrote the same bytes fastest in the same rounds, "
                "plain copying kernels among them."
            )
        about += compiling(cases)
        made.append(Table(f"A step{ON[device]}{OF[quantity]}", about, head, rows))
    return made


def meaning(names: list[str]) -> str:
    """What × says, by an example of the table's own."""
    example = formats.as_code(names[1]) if len(names) > 1 else "another column"
    return f"1.07× below {example} means: {example} takes 1.07 times as long as {names[0] if names else 'wd_fused'}."


def compiling(cases: list[TimedCase]) -> str:
    """A sentence about what was compiled before it could be timed."""
    taken: dict[str, list[str]] = {}
    for case in cases:
        for name, told in case.details.items():
            if "compile_seconds" in told:
                taken.setdefault(name, []).append(f"{formats.time(told['compile_seconds'])} ({case.title})")
    return "".join(
        f" Compiling took {formats.as_code(name)} {'; '.join(times)} before it was timed."
        for name, times in taken.items()
    )


def host(run: Run, device: str) -> list[Table]:
    cases = timed_cases(run, "host", device)
    names = implementations_in(cases)
    title = "What a step costs on the host"
    head = ["tensors", *names[:1], "fastest", *names[1:]]
    about = (
        "The same lists with one element in each tensor: what a step costs beside its arithmetic. wd_fused: time of a "
        f"step. {meaning(names)}"
    )
    made = [Table(title, about, head, ratios(cases, "step", None))]
    cold_cases = [case for case in cases if case.has(case.ours, "cold")]  # earlier files have none
    about = (
        "The same, but before each step something else fills the caches, as forward and backward do: little of "
        "Python's, torch's and the optimizer's code and data is left there."
    )
    return [*made, Table(f"{title}{OF['cold']}", about, head, ratios(cold_cases, "cold", None))]


def training(run: Run, device: str) -> list[Table]:
    """A row an implementation of a model: time of an iteration, and what step() has of it."""
    rows = []
    for case in timed_cases(run, "training", device):
        if not case.has(case.ours, "iteration"):
            continue
        _, winners = verdict(case, "iteration")
        title = case.title
        for name in in_order(case.seconds):
            if not case.has(name, "iteration"):
                continue
            iteration = case.time(name, "iteration").median
            ratio = DASH
            if name != case.ours:
                compared = case.ratio(name, "iteration")
                ratio = Cell(formats.times(compared), formats.quartiles(compared))
            step = [DASH, DASH]
            if case.has(name, "step"):
                median = case.time(name, "step").median
                step = [Cell(milliseconds(median)), Cell(formats.percent(median / iteration))]
            optimizer = Cell(name, "", name in winners, name == case.best_peer("iteration"))
            rows.append([Cell(title), optimizer, Cell(milliseconds(iteration)), ratio, *step])
            title = ""  # of the rows below
    host = ", the host's part of it on a GPU" if device == "cuda" else ""
    about = (
        "Time of a whole iteration (forward, backward, step), how many times as long it takes as with wd_fused "
        f"(median, quartiles), what `step()` takes of it{host}, and which share that is."
    )
    head = ["model", "optimizer", "iteration", "times as long", "step", "share"]
    return [Table(f"Training{ON[device]}", about, head, rows)]


def milliseconds(seconds: float) -> str:
    return f"{formats.significant(seconds * 1e3)} ms"


def calls(run: Run, device: str) -> list[Table]:
    """What a step asks for: torch operators on the CPU; kernels, copies and fills on a GPU."""
    found = [row for row in run.get("calls", []) if row["device"] == device]
    names = in_order(present_name(row["implementation"]) for row in found)
    by_case: dict[str, dict[str, Cell]] = {}
    for row in found:
        if device == "cpu":
            cell = Cell(f"{row['operators']:,}")
        else:
            copies = row.get("memcpys", 0) + row.get("memsets", 0)
            cell = Cell(f"{row['kernels']:,g}", f"and {copies:,g} copies" if copies else "")
        by_case.setdefault(row["title"], {})[present_name(row["implementation"])] = cell
    rows = [[Cell(title), *(cells.get(name, DASH) for name in names)] for title, cells in by_case.items()]
    what = "Operators of torch that one step calls"
    if device != "cpu":
        what = "Kernels that one step launches, copies and fills"
    return [Table(f"Calls of a step{ON[device]}", f"{what}.", ["tensors", *names], rows)]


def memory(run: Run, device: str) -> list[Table]:
    found = memory_rows(run, device)
    names = in_order(row["implementation"] for row in found)
    by_case: dict[str, dict[str, Any]] = {}
    for row in found:
        by_case.setdefault(row["title"], {})[row["implementation"]] = row
    rows = []
    for title, measured in by_case.items():
        buffers = formats.mebibytes(next(iter(measured.values()))["momentum_buffers"])
        peaks = {name: max(row["first_step"], row["later_step"]) for name, row in measured.items()}
        cells = [Cell(formats.mebibytes(peaks[name])) if name in peaks else DASH for name in names]
        rows.append([Cell(title), Cell(buffers), *cells])
    how = "resident size of a fresh process" if device == "cpu" else "of torch's allocator"
    about = (
        f"Peak memory that a step takes beyond parameters, gradients and momentum buffers ({how}; the larger of the "
        "first step and later ones)."
    )
    return [Table(f"Memory{ON[device]}", about, ["tensors", "momentum buffers", *names], rows)]


def growth(run: Run, device: str) -> list[Table]:
    cases = thinned(timed_cases(run, "growth", device))
    made = []
    for quantity in STEP_QUANTITIES[device]:
        rows = by_size(cases, quantity, lambda case, time: formats.significant(time.median / case.tensors * 1e6))
        about = f"Time of a step divided by the number of tensors{OF[quantity]}, in µs; tensors of 64 elements."
        title = f"By the number of tensors{ON[device]}{OF[quantity]}"
        made.append(Table(title, about, ["tensors", *(f"{case.tensors:,}" for case in cases)], rows))
    return made


def elements(run: Run, device: str) -> list[Table]:
    cases = thinned(timed_cases(run, "elements", device))

    def gigabytes(case: TimedCase, time: Spread) -> str:
        return formats.significant((case.bytes_moved or 0) / time.median / 1e9)

    made = []
    for quantity in STEP_QUANTITIES[device]:
        if quantity == "host":
            continue
        rows = by_size(cases, quantity, gigabytes, [LIMIT])
        about = "Bytes that a step of one tensor must read and write, divided by its time, in GB/s."
        if rows and rows[-1][0].text == LIMIT:
            about += " The last row is a plain kernel that moves the same bytes."
        head = ["elements", *(formats.power_of_two(case.elements) for case in cases)]
        made.append(Table(f"By the number of elements{ON[device]}{OF[quantity]}", about, head, rows))
    return made


def by_size(
    cases: list[TimedCase], quantity: str, text: Callable[[TimedCase, Spread], str], more: Iterable[str] = ()
) -> list[list[Cell]]:
    """A row an implementation, a column a case; the fastest of each column is marked. ``more`` come last, unmarked."""
    winners = [verdict(case, quantity)[1] if case.has(case.ours, quantity) else set() for case in cases]
    rows = []
    for name in [*implementations_in(cases), *more]:
        if any(case.has(name, quantity) for case in cases):
            cells = [
                Cell(text(case, case.time(name, quantity)), "", name in won, name in won and name not in OWN)
                if case.has(name, quantity)
                else DASH
                for case, won in zip(cases, winners, strict=True)
            ]
            rows.append([Cell(name), *cells])
    return rows


def thinned(cases: list[TimedCase]) -> list[TimedCase]:
    """At most MOST_COLUMNS of them, evenly, with the first and the last."""
    if len(cases) <= MOST_COLUMNS:
        return cases
    step = (len(cases) - 1) / (MOST_COLUMNS - 1)
    return [cases[round(place * step)] for place in range(MOST_COLUMNS)]


def comparisons(run: Run) -> Iterator[tuple[TimedCase, str]]:
    """Every case with every quantity that it is told by."""
    for device in devices(run):
        for suite in dict.fromkeys(row["extra_info"]["suite"] for row in run["benchmarks"]):
            quantities = {"training": ("iteration",), "host": ("step", "cold")}.get(suite, STEP_QUANTITIES[device])
            for case in told_cases(run, suite, device):
                yield from ((case, quantity) for quantity in quantities if case.has(case.ours, quantity))


def not_faster(run: Run) -> list[str]:
    """Comparisons that are lost, or too close to call: the quartiles of the ratio do not lie above 1. In Markdown."""
    return [line for case, quantity in comparisons(run) if (line := _lost(case, quantity))]


WHERE = {"host": ", one element each", "training": ", training iteration"}


def enumerated(names: list[str]) -> str:
    """a, b and c."""
    return " and ".join([part for part in (", ".join(names[:-1]), names[-1]) if part])


def _lost(case: TimedCase, quantity: str) -> str | None:
    """A line for the peers that are faster in a case, and for those that are as fast."""
    ratios = {name: case.ratio(name, quantity) for name in case.peers if case.has(name, quantity)}
    faster = [
        f"{formats.as_code(name)} is faster ({formats.times(ratio)})"
        for name, ratio in ratios.items()
        if ratio.high < 1
    ]
    even = [formats.as_code(name) for name, ratio in ratios.items() if ratio.low <= 1 <= ratio.high]
    if even:
        faster.append(f"{enumerated(even)} {'is' if len(even) == 1 else 'are'} as fast, within the spread")
    # In a table these titles stand below "tensors".
    title = re.sub(r"^(one|[\d,]+) of ", lambda m: f"{m[1]} tensor{'s' * (m[1] != 'one')} of ", case.title)
    where = f"{title}{WHERE.get(case.suite, '')}{ON[case.device]}{OF.get(quantity, '')}"
    return f"{where}: {'; '.join(faster)}." if faster else None
