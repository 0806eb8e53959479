"""How benchmarks write numbers: spreads, times, ratios, tables in Markdown. Used by their reports. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def significant(value: float) -> str:
    """Three digits, or every digit of a larger whole number; no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def time(seconds: float) -> str:
    return f"{significant(seconds * 1e6)} µs" if seconds < 1e-3 else f"{significant(seconds * 1e3)} ms"


def times_as_long(ratio: Spread) -> str:
    digits = 0 if ratio.median >= 100 else 1 if ratio.median >= 10 else 2
    return f"{ratio.median:,.{digits}f}× ({ratio.low:,.{digits}f}–{ratio.high:,.{digits}f})"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
