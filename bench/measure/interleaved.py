"""Times several steps over the same tensors, in interleaved rounds. Used by the benchmark suites.

A machine's speed changes from second to second. Times taken in one round, milliseconds apart, share its mood; their
ratio is what is reported, and the spread of the rounds' ratios tells how far to believe it.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from bench.cases import Case

# A block of steps long enough for the clock, and for one interrupt not to decide it.
BLOCK_SECONDS = 5e-3
# What the rounds of a case may take together, and the fewest that a median and quartiles are made of even so.
CASE_SECONDS = 3.5
FEWEST_ROUNDS = 7
# Cases of more bytes leave nothing of use in any cache from one step to the next.
BEYOND_CACHES = 1 << 29

Steps = dict[str, Callable[[], object]]
Name = TypeVar("Name", str, int)
Sample = TypeVar("Sample")


class Workload:
    """A case, what steps its tensors, by name, and the seconds that each takes.

    All steps are over the same tensors, so that none is lucky with its pages or its place in the caches, and one
    implementation's memory is enough for all of them.

    Attributes:
        seconds: of a step, by name and round.
        iterations: steps in a block, by name.
    """

    def __init__(self, case: Case, steps: Steps, smoke: bool, case_seconds: float = CASE_SECONDS) -> None:
        self.case = case
        self.steps = steps
        self._block_seconds = 0.0 if smoke else BLOCK_SECONDS
        self._cold = case.bytes_held > BEYOND_CACHES
        self.iterations: dict[str, int] = {}
        round_seconds = 0.0
        for name, step in steps.items():
            taken = self._calibrated(step)
            self.iterations[name] = max(1, math.ceil(self._block_seconds / taken))
            round_seconds += taken * (self.iterations[name] + (not self._cold))
        self._rounds = 2 if smoke else max(FEWEST_ROUNDS, min(case.rounds, int(case_seconds / round_seconds)))
        self.seconds = interleave(steps, self._rounds, self._timed)

    def _calibrated(self, step: Callable[[], object]) -> float:
        """Warms up; about how long a step takes."""
        for _ in range(1 if self._cold else 3):
            step()
        return min(block(step, 1) for _ in range(1 if self._cold else 3))

    def _timed(self, name: str) -> float:
        if not self._cold:
            self.steps[name]()  # the caches hold what this implementation leaves in them, not its neighbour
        return block(self.steps[name], self.iterations[name])


def cold(steps: Steps, rounds: int, sweep: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of single steps, each after the caches were filled with something else, by name and round."""

    def timed(name: str) -> float:
        sweep()
        return block(steps[name], 1)

    return interleave(steps, rounds, timed)


def interleave(names: Iterable[Name], rounds: int, timed: Callable[[Name], Sample]) -> dict[Name, list[Sample]]:
    """What ``timed`` gives for each name in each round; in a round every name comes once, in an order shuffled anew."""
    samples: dict[Name, list[Sample]] = {name: [] for name in names}
    order = list(samples)
    shuffle = random.Random(0).shuffle  # nobody always follows the same neighbour
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(timed(name))
    finally:
        if was_enabled:
            gc.enable()
    return samples


def block(step: Callable[[], object], iterations: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(iterations):
        step()
    return (time.perf_counter_ns() - begin) * 1e-9 / iterations
