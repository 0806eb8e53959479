"""What a step costs beside the steps of one plan: tensors replaced before each, a state loaded, a new optimizer, caches
that others have filled, a report. Ratios of medians of interleaved rounds, on the CPU. `make bench`;
python -m bench.replaced
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.optim import SGD, Optimizer

from bench.cases import OPTIONS, Case, many, model, parameters
from wd_fused import FusedSGD

MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "wd_fused": lambda params: FusedSGD(params, **OPTIONS),
    "torch fused=True": lambda params: SGD(params, **OPTIONS, fused=True),
    "torch's default": lambda params: SGD(params, **OPTIONS),
    "report_numerics=100": lambda params: FusedSGD(params, **OPTIONS, report_numerics=100),
}
FUSED, DEFAULT, REPORTING = "torch fused=True", "torch's default", "report_numerics=100"
Turn = tuple[Callable[[], object], Callable[[], object]]  # what comes before a step, untimed, and what is timed


class Row(NamedTuple):
    title: str
    turn: Callable[[Optimizer, list[torch.Tensor]], Turn]
    sizes: tuple[Case, ...]
    against: str = FUSED
    inner: int = 8


def as_ever(optimizer: Optimizer, params: list[torch.Tensor]) -> Turn:
    return lambda: None, optimizer.step


def others_step(optimizer: Optimizer, params: list[torch.Tensor]) -> Turn:
    others = [MAKERS[DEFAULT](parameters(many(1_000, 64))) for _ in range(3)]
    return lambda: [other.step() for other in others], optimizer.step


def replaced_parameters(optimizer: Optimizer, params: list[torch.Tensor]) -> Turn:
    turns = _turns(params)

    def before() -> None:
        for param, values in zip(params, next(turns), strict=True):
            param.data = values

    return before, optimizer.step


def replaced_momentum(optimizer: Optimizer, params: list[torch.Tensor]) -> Turn:
    turns = _turns(params)

    def before() -> None:
        for param, values in zip(params, next(turns), strict=True):
            optimizer.state[param]["momentum_buffer"] = values

    return before, optimizer.step


def loaded_state(optimizer: Optimizer, params: list[torch.Tensor]) -> Turn:
    saved = optimizer.state_dict()

    def load_and_step() -> None:
        optimizer.load_state_dict(saved)
        optimizer.step()

    return lambda: None, load_and_step


def first_step(optimizer: Optimizer, params: list[torch.Tensor]) -> Turn:
    fresh: list[Optimizer] = []
    make = type(optimizer)
    return lambda: fresh.append(make(params, **OPTIONS)), lambda: fresh.pop().step()


def hundred_steps(optimizer: Optimizer, params: list[torch.Tensor]) -> Turn:
    return lambda: None, lambda: [optimizer.step() for _ in range(100)]


def _turns(params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    return itertools.cycle([[torch.randn_like(param) for param in params] for _ in range(2)])


SMALL, MEDIUM = many(161, 64), many(161, 8_192)
ROWS = (
    Row("as ever", as_ever, (many(161, 8), many(1_000, 64))),
    Row("between three other optimizers' steps", others_step, (many(1_000, 64),), inner=3),
    Row("p.data replaced before each step", replaced_parameters, (SMALL, MEDIUM)),
    Row("momentum buffers replaced before each", replaced_momentum, (SMALL, MEDIUM)),
    Row("load_state_dict() and a step", loaded_state, (SMALL, MEDIUM)),
    Row("first step of a new optimizer", first_step, (SMALL,), against=DEFAULT),
    Row("100 steps", hundred_steps, (model("resnet50", "ResNet-50"),), against=REPORTING, inner=1),
)


def seconds(row: Row, case: Case, rounds: int) -> dict[str, float]:
    """Of a step, by name: the median over rounds of a round's median."""
    turns: dict[str, Turn] = {}
    for name in ("wd_fused", row.against):
        params = parameters(case)
        optimizer = MAKERS[name](params)
        optimizer.step()
        turns[name] = row.turn(optimizer, params)
    found: dict[str, list[float]] = {name: [] for name in turns}
    for _, (name, (before, step)) in itertools.product(range(rounds), turns.items()):
        times = []
        for _ in range(row.inner):
            before()
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        found[name].append(statistics.median(times))
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replaced", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"{'case':72}{'wd_fused':>12}{'other':>12}   faster than")
    for row in ROWS:
        for case in row.sizes:
            own, other = (1e6 * each for each in seconds(row, case, rounds).values())
            title = f"{row.title}: {case.title}"
            print(f"{title:72}{own:9,.0f} µs{other:9,.0f} µs   {other / own:.2f} x {row.against}", flush=True)


if __name__ == "__main__":
    main()
