"""The report on FusedSGD's options: time against torch's calls in sequence, goals, memory. For report.py. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.cases import OPTIONS, options
from bench.cases.implementations import OURS
from bench.cases.options import EMA_DECAY, IMPLEMENTATIONS, MAX_GRAD_NORM, PLAIN, TORCH
from bench.report import formats
from bench.report.formats import Spread
from bench.report.run import infos, seconds_of

SUITE = "tail"  # what results on the disk call the options, in their keys as well


@dataclass(frozen=True)
class TimedOptions:
    """A set of options over a case: seconds per implementation and interleaved round."""

    title: str
    case: str
    dtype: str
    goal: float | None
    seconds: dict[str, list[float]]

    def ratio(self, numerator: list[float], denominator: list[float]) -> Spread:
        return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])

    def against_torch(self) -> Spread:
        """How many times as long as ours torch's calls take."""
        return self.ratio(self.seconds[TORCH], self.seconds[OURS])

    def beyond(self, plain: TimedOptions | None) -> str:
        """How many times as long as the plain step this takes; a dash where that is of another dtype."""
        if plain is None or plain is self or plain.dtype != self.dtype:
            return "–"
        return formats.number(self.ratio(self.seconds[OURS], plain.seconds[OURS]))

    def verdict(self) -> str:
        if self.goal is None:
            return "–"
        return f"{self.goal:g}, {'reached' if self.against_torch().median >= self.goal else 'missed'}"


def timed_options(run: dict[str, Any]) -> dict[tuple[str, str], TimedOptions]:
    """By case and options, in the order of the run; what lacks an implementation is left out."""
    timed: dict[tuple[str, str], TimedOptions] = {}
    for info in infos(run):
        if (info["suite"], info["device"]) == (SUITE, "cpu"):
            made = TimedOptions(info["tail_title"], info["title"], info["dtype"], info["goal"], {})
            one = timed.setdefault((info["case"], info["tail"]), made)
            one.seconds[info["implementation"]] = seconds_of(info)["step"]
    return {key: one for key, one in timed.items() if set(one.seconds) >= set(IMPLEMENTATIONS)}


def markdown(run: dict[str, Any]) -> str:
    parts = [_times(timed_options(run)), _memory([row for row in run["extra_memory"] if "tail" in row])]
    return "\n\n".join(part for part in parts if part)


def cost(run: dict[str, Any]) -> str:
    """How many times as long as a plain step one with options takes: a row the options, a column the case."""
    timed = timed_options(run)
    told = [key for key, one in timed.items() if one.beyond(timed.get((key[0], PLAIN.name))) != "–"]
    cases, names = dict.fromkeys(case for case, _ in told), dict.fromkeys(name for _, name in told)
    rows = [
        [timed[next(key for key in told if key[1] == name)].title]
        + [timed[case, name].beyond(timed[case, PLAIN.name]) if (case, name) in told else "–" for case in cases]
        for name in names
    ]
    titles = [next(one.case for key, one in timed.items() if key[0] == case) for case in cases]
    return formats.table(["options", *titles], rows)


def _times(timed: dict[tuple[str, str], TimedOptions]) -> str | None:
    if not timed:
        return None
    tables: dict[str, list[list[str]]] = {}
    for (case, name), one in timed.items():
        ours, theirs = (options.BY_NAME[name].bytes_an_element(one) for one in (OURS, TORCH))
        tables.setdefault(one.case, []).append(
            [
                one.title,
                one.beyond(timed.get((case, PLAIN.name))),
                f"{ours}, {theirs}",
                formats.times_as_long(one.against_torch()),
                one.verdict(),
            ]
        )
    return "\n\n".join(
        [
            "The whole `step()` with options of FusedSGD, called from Python; "
            f"momentum {OPTIONS['momentum']}, weight decay {OPTIONS['weight_decay']}, gradients clipped to norm "
            f"{MAX_GRAD_NORM:g}, average of decay {EMA_DECAY}; float32 where nothing is said. Of its plain step: how "
            "many times as long wd_fused takes as without options. torch in sequence: 1.50× means that torch's own "
            "functions, one after another, each in its fastest form, take 1.50 times as long as wd_fused, over the "
            "same tensors in the same run (median of the rounds, quartiles in brackets). Bytes: what wd_fused and "
            "torch must read and write for an element where nothing stays in a cache. "
            "Goal: of the column before, set beforehand.",
            *(
                formats.table([case, "of its plain step", "bytes", "torch in sequence", "goal"], rows)
                for case, rows in tables.items()
            ),
        ]
    )


def _memory(measured: list[dict[str, Any]]) -> str | None:
    if not measured:
        return None
    extra: dict[tuple[str, str], dict[str, int]] = {}
    states: dict[tuple[str, str], int] = {}
    for row in measured:
        key = row["title"], row["tail_title"]
        extra.setdefault(key, {})[row["implementation"]] = max(row["first_step"], row["later_step"])
        if row["implementation"] == OURS:
            states[key] = row["states"]
    tables: dict[str, list[list[str]]] = {}
    for (case, title), taken in extra.items():
        own = formats.mebibytes(states[case, title]) if (case, title) in states else "–"
        beyond = [formats.mebibytes(taken[name]) if name in taken else "–" for name in IMPLEMENTATIONS]
        tables.setdefault(case, []).append([title, own, *beyond])
    return "\n\n".join(
        [
            "Memory that a step takes beyond parameters, gradients and the states that its options name (momentum "
            "buffers, masters or remainders, averages; peak resident size of a fresh process).",
            *(
                formats.table([case, "states of wd_fused", "wd_fused beyond", "torch beyond"], rows)
                for case, rows in tables.items()
            ),
        ]
    )
