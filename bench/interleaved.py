"""Times several steps over the same tensors, in interleaved rounds. Used by the benchmark suites.

A machine's speed changes from second to second. Times taken in one round, milliseconds apart, share its mood; their
ratio is what is reported, and the spread of the rounds' ratios tells how far to believe it.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable

import torch

from bench.cases import Case, optimizers, parameters

# A block of steps long enough for the clock, and for one interrupt not to decide it.
BLOCK_SECONDS = 5e-3
WARM_UP_STEPS = 3

Steps = dict[str, Callable[[], object]]


class Workload:
    """A case, what steps its tensors, by name, and the seconds that each takes.

    All steps are over the same tensors, so that none is lucky with its pages or its place in the caches, and one
    implementation's memory is enough for all of them.
    """

    def __init__(self, case: Case, steps: Steps, smoke: bool) -> None:
        self.case = case
        self.steps = steps
        self._block_seconds = 0.0 if smoke else BLOCK_SECONDS
        self._rounds = 2 if smoke else case.rounds
        self.iterations = {name: self._calibrated(step) for name, step in steps.items()}
        self.seconds = self._measured()

    def _calibrated(self, step: Callable[[], object]) -> int:
        """Warms up; how many steps make a block."""
        for _ in range(WARM_UP_STEPS):
            step()
        taken = min(_block(step, 1) for _ in range(3))
        return max(1, math.ceil(self._block_seconds / taken))

    def _measured(self) -> dict[str, list[float]]:
        """Seconds of a step, per name and round."""
        seconds: dict[str, list[float]] = {name: [] for name in self.steps}
        order = list(self.steps)
        shuffle = random.Random(0).shuffle  # nobody always follows the same neighbour
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            for _ in range(self._rounds):
                shuffle(order)
                for name in order:
                    self.steps[name]()  # the caches hold what this implementation leaves in them, not its neighbour
                    seconds[name].append(_block(self.steps[name], self.iterations[name]))
        finally:
            if was_enabled:
                gc.enable()
        return seconds


def step_workload(case: Case, smoke: bool) -> Workload:
    """Every implementation's optimizer over a case: the same parameters, gradients and momentum buffers for all."""
    params = parameters(case)
    buffers = [torch.zeros_like(param) for param in params]
    steps: Steps = {}
    for name, make in optimizers().items():
        optimizer = make(params)
        for param, buffer in zip(params, buffers, strict=True):
            optimizer.state[param]["momentum_buffer"] = buffer
        steps[name] = optimizer.step
    return Workload(case, steps, smoke)


def _block(step: Callable[[], object], iterations: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(iterations):
        step()
    return (time.perf_counter_ns() - begin) * 1e-9 / iterations
