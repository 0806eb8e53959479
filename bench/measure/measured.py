"""A case on a device, measured: who took part, and the seconds of each round. Used by the suites' rows and the report.

On the CPU the time of a step, with cold caches, too, if asked for; on a GPU the host's, the device's and the whole
one's apart (speed.Measurement).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from bench import cases
from bench.cases import Case
from bench.cases.implementations import Absent
from bench.cases.lineup import Lineup
from bench.measure import interleaved
from bench.measure.caches import Sweep

# Of the memory that is free, how much parameters, gradients and momentum buffers may take together: some
# implementations have states or gradients of their own, or copies for a while, three times as much together.
SHARE_OF_FREE_MEMORY = 0.25

COLD_ROUNDS = 21


@dataclass
class Measured:
    """What a case's rows are made of.

    Attributes:
        lineup: the tensors and the steps.
        seconds: by implementation and quantity ("step", "cold"; on a GPU "host", "device", "whole"), one per round.
        iterations: steps in a block, by implementation.
    """

    lineup: Lineup
    seconds: dict[str, dict[str, list[float]]]
    iterations: dict[str, int] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        return self.lineup.case


def free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return available["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def fitted(case: Case, device: str, full: bool) -> Case:
    """As much of the case as there is memory for and, on a CPU unless ``full``, as is soon done."""
    most_elements = cases.MOST_ELEMENTS if device == "cpu" and not full else None
    return cases.fitted(case, most_elements, most_bytes(device))


def most_bytes(device: str) -> int:
    return int(SHARE_OF_FREE_MEMORY * free_memory(device))


def measure(
    case: Case,
    device: str,
    names: Collection[str],
    smoke: bool,
    full: bool,
    *,
    cold: bool = False,
    uncut: bool = False,
) -> Measured:
    """The case, as much of it as fits.

    Args:
        cold: on the CPU also steps after something else has filled the caches.
        uncut: all of the case, or Absent.
    """
    if uncut and case.bytes_held > most_bytes(device):
        share = f"{SHARE_OF_FREE_MEMORY:.0%} of the free memory"
        raise Absent(f"parameters, gradients and momentum buffers take more than {share}")
    lineup = Lineup(case if uncut else fitted(case, device, full), device, names, full)
    if device == "cpu":
        workload = interleaved.Workload(lineup.case, lineup.steps, smoke, interleaved.CASE_SECONDS * (5 if full else 1))
        seconds = {name: {"step": own} for name, own in workload.seconds.items()}
        if cold:
            samples = interleaved.cold(lineup.steps, 2 if smoke else COLD_ROUNDS, Sweep())
            for name, own in samples.items():
                seconds[name]["cold"] = own
        return Measured(lineup, seconds, workload.iterations)
    from bench.gpu import speed

    rounds = 2 if smoke else min(lineup.case.rounds, 21)
    measurement = speed.Measurement(lineup.case, _timer(), lineup.steps, rounds)
    return Measured(
        lineup,
        {
            name: {"host": measurement.host[name], "device": measurement.device[name], "whole": measurement.whole[name]}
            for name in lineup.steps
        },
    )


@cache
def _timer() -> Any:
    from bench.gpu.timing import Timer

    return Timer()
