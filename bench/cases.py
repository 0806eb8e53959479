"""What is stepped, and by whom: the cases (lists of parameter shapes) and the implementations of SGD.

Used by the benchmark suites, by extra_memory.py, by gpu_cases.py and, for names and order, by report.py.
No torch at import.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

SHAPES = Path(__file__).with_name("shapes.json")
Shape = tuple[int, ...]

OURS = "wd_fused"
PEERS = ("torch fused=True", "torch default", "torch foreach=True")
IMPLEMENTATIONS = (OURS, *PEERS)

# Options of the commonest training recipe for ResNet-50. They do not change the number of passes over memory.
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Case:
    """A list of parameters.

    Attributes:
        name: short, for the names of tests.
        title: as the report prints it.
        shapes: one per tensor.
        rounds: how often each implementation is timed.
        dtype: of all of them, as torch calls it.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    rounds: int = 41
    dtype: str = "float32"

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes_moved(self) -> int:
        """The least that a later step with momentum moves: p, g and b are read, p and b written."""
        return 5 * self.elements * ITEMSIZE[self.dtype]

    @property
    def bytes_held(self) -> int:
        return 3 * self.elements * ITEMSIZE[self.dtype]


@cache
def model_shapes(name: str) -> tuple[Shape, ...]:
    return tuple(tuple(shape) for shape in json.loads(SHAPES.read_text(encoding="utf-8"))[name]["shapes"])


def many(count: int, numel: int, rounds: int = 41) -> Case:
    return Case(f"{count}x{numel}", f"{count:,} of {numel} elements", ((numel,),) * count, rounds)


STEP = (
    many(161, 8),
    many(1_000, 64),
    Case("resnet50", "ResNet-50's 161 tensors, 25.6 M elements", model_shapes("resnet50")),
    Case("1x100M", "one of 100 M elements", ((100_000_000,),), rounds=15),
)
GROWTH = tuple(many(count, 64, rounds=21) for count in (10, 30, 100, 300, 1_000, 3_000, 10_000))
MEMORY = STEP[2:]
SHARDED = Case("200 DTensors", "200 DTensors of 2,048 elements", ((32, 64),) * 200, rounds=15)

# Too small for a number worth having: they tell whether a benchmark runs at all.
_ONE_MILLION = Case("1x1M", "one of 1 M elements", ((1_000_000,),))
SMOKE_STEP = (many(3, 8), _ONE_MILLION)
SMOKE_GROWTH = (many(1, 64), many(10, 64))
SMOKE_MEMORY = (_ONE_MILLION,)

BY_NAME = {case.name: case for case in (*STEP, *GROWTH, *SMOKE_STEP, *SMOKE_GROWTH)}


def optimizers() -> dict[str, Callable[[list[Tensor]], Optimizer]]:
    """Every implementation's constructor. backend="cpu" raises where the compiled part is missing."""
    import torch

    from wd_fused import FusedSGD

    return {
        "wd_fused": partial(FusedSGD, **OPTIONS, backend="cpu"),
        "torch fused=True": partial(torch.optim.SGD, **OPTIONS, fused=True),
        "torch default": partial(torch.optim.SGD, **OPTIONS),
        "torch foreach=True": partial(torch.optim.SGD, **OPTIONS, foreach=True),
    }


def parameters(case: Case, device: str = "cpu") -> list[Tensor]:
    """The case's parameters, random, each with a random gradient; made from a fixed seed."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def made(shape: Shape) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1, generator=generator)

    params = []
    for shape in case.shapes:
        param = made(shape).requires_grad_()
        param.grad = made(shape)
        params.append(param)
    return params
