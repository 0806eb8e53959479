"""How benchmarks write numbers: spreads, times, ratios, tables in Markdown. Used by their reports. No torch."""

from __future__ import annotations

import re
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
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def overlaps(self, other: Spread) -> bool:
        """Whether the interquartile ranges have a point in common."""
        return self.low <= other.high and other.low <= self.high


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def significant(value: float) -> str:
    """Three digits, or every digit of a larger whole number; no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def time(seconds: float) -> str:
    if seconds >= 1:
        return f"{significant(seconds)} s"
    return f"{significant(seconds * 1e6)} µs" if seconds < 1e-3 else f"{significant(seconds * 1e3)} ms"


def _digits(ratio: Spread) -> int:
    return 0 if ratio.median >= 100 else 1 if ratio.median >= 10 else 2


def number(ratio: Spread) -> str:
    return f"{ratio.median:,.{_digits(ratio)}f}"


def times(ratio: Spread) -> str:
    return f"{number(ratio)}×"


def quartiles(ratio: Spread) -> str:
    digits = _digits(ratio)
    return f"{ratio.low:,.{digits}f}–{ratio.high:,.{digits}f}"


def times_as_long(ratio: Spread) -> str:
    return f"{times(ratio)} ({quartiles(ratio)})"


def percent(share: float) -> str:
    """Of a whole: 96%, 3.7%, <0.1%."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.0005 else "<0.1%"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def power_of_two(count: int) -> str:
    """2¹⁰ for 1,024; other numbers with their digits."""
    exponent = count.bit_length() - 1
    if count < 1024 or count != 1 << exponent:
        return f"{count:,}"
    return "2" + str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def as_code(implementation: str) -> str:
    """Arguments and calls as code in Markdown: torch `fused=True`."""
    return re.sub(r"\S+=\S+|\S+\(\S*\)", r"`\g<0>`", implementation)
