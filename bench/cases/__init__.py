"""What is stepped: the cases, lists of parameter shapes. Who steps them: implementations.py.

Used by the benchmark suites, by extra_memory.py, by gpu/cases.py and, for names and order, by the reports. No torch at
import.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = Path(__file__).with_name("shapes.json")
Shape = tuple[int, ...]

# Options of the commonest training recipe for ResNet-50. They do not change the number of passes over memory.
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}

ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}

# On a CPU cases are cut down to as many elements unless all of them are asked for: 1.1 GiB of parameters, gradients and
# momentum buffers are beyond any cache, and a round of all implementations takes a second or so.
MOST_ELEMENTS = 100_000_000


@dataclass(frozen=True)
class Case:
    """A list of parameters.

    Attributes:
        name: short, for the names of tests.
        title: as the report prints it.
        shapes: one per tensor.
        rounds: how often each implementation is timed, if there is time.
        dtype: of all of them, as torch calls it.
        one_of: each tensor has one of so many parts of its elements (fitted()); 1: all of them.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    rounds: int = 41
    dtype: str = "float32"
    one_of: int = 1

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


def one(numel: int, rounds: int = 21) -> Case:
    return Case(f"1x{numel}", f"one of {numel:,} elements", ((numel,),), rounds)


def model(name: str, title: str, dtype: str = "float32") -> Case:
    shapes = model_shapes(name)
    case = Case(name if dtype == "float32" else f"{name}-{dtype}", "", shapes, dtype=dtype)
    return _titled(case, title)


def _titled(case: Case, title: str) -> Case:
    elements, part = case.elements, "" if case.one_of == 1 else f", each 1/{case.one_of} of it"
    amount = f"{elements / 1e9:.2f} G" if elements >= 1e9 else f"{elements / 1e6:.3g} M"
    dtype = "" if case.dtype == "float32" else f", {case.dtype}"
    return dataclasses.replace(case, title=f"{title}'s {len(case.shapes)} tensors{part}, {amount} elements{dtype}")


def fitted(case: Case, most_elements: int | None, most_bytes: int) -> Case:
    """The case, or one of as many tensors, of which each has 1/2, 1/4, ... of its elements.

    Args:
        most_elements: of all tensors together; None: as many as there are.
        most_bytes: of parameters, gradients and momentum buffers together.
    """
    parts = 1
    while (most_elements and case.elements / parts > most_elements) or case.bytes_held / parts > most_bytes:
        parts *= 2
    if parts == 1:
        return case
    shapes = tuple((max(1, math.prod(shape) // parts),) for shape in case.shapes)
    if len(shapes) == 1:
        return dataclasses.replace(one(shapes[0][0], case.rounds), name=case.name, dtype=case.dtype)
    smaller = dataclasses.replace(case, shapes=shapes, one_of=parts)
    return _titled(smaller, _owner(case))


def _owner(case: Case) -> str:
    """The model that a title begins with."""
    return case.title.split("'s ")[0]


def bare(case: Case) -> Case:
    """As many tensors, of one element each: what a step costs beside the arithmetic."""
    title = f"{_owner(case)}'s {len(case.shapes)} tensors"
    return dataclasses.replace(case, title=title, shapes=((1,),) * len(case.shapes), one_of=1)


RESNET50 = model("resnet50", "ResNet-50")
MODELS = (
    RESNET50,
    model("rt_detr_v2", "RT-DETRv2"),
    model("vit_l_16", "ViT-L/16"),
    model("bert_large", "BERT-large"),
    model("gpt2_xl", "GPT-2 XL"),
    model("llama_3_8b", "Llama-3-8B"),
    model("dlrm", "DLRM"),
)
HALVES = tuple(model("resnet50", "ResNet-50", dtype) for dtype in ("bfloat16", "float16"))
HUGE = dataclasses.replace(one(1 << 30), name="huge")
STEP = (*MODELS, *HALVES, HUGE, many(161, 8), many(1_000, 64))
HOST = tuple(bare(case) for case in MODELS)
GROWTH = tuple(many(count, 64, rounds=21) for count in (10, 30, 100, 300, 1_000, 3_000, 10_000))
ELEMENTS = tuple(one(1 << exponent) for exponent in (10, 13, 16, 19, 22, 24, 26))
MORE_ELEMENTS = tuple(one(1 << exponent) for exponent in (27, 28, 29, 30))
MEMORY = (RESNET50,)
SHARDED = Case("200 DTensors", "200 DTensors of 2,048 elements", ((32, 64),) * 200, rounds=15)

# Too small for a number worth having: they tell whether a benchmark runs at all.
_ONE_MILLION = Case("1x1M", "one of 1 M elements", ((1_000_000,),))
SMOKE_STEP = (many(3, 8), _ONE_MILLION)
SMOKE_HOST = (many(2, 1),)
SMOKE_GROWTH = (many(1, 64), many(10, 64))
SMOKE_ELEMENTS = (one(1 << 10), one(1 << 13))
SMOKE_MEMORY = (_ONE_MILLION,)

BY_NAME = {case.name: case for case in (*STEP, *GROWTH, *SMOKE_STEP, *SMOKE_GROWTH)}


def parameters(case: Case, device: str = "cpu") -> list[Tensor]:
    """The case's parameters, each with a gradient: random between -1 and 1; the numbers come again after a million."""
    import torch

    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.empty(1 << 20, dtype=dtype, device=device).uniform_(-1, 1, generator=generator)
    taken = 0

    def made(shape: Shape) -> Tensor:
        nonlocal taken
        tensor = torch.empty(shape, dtype=dtype, device=device)
        rest = tensor.view(-1)
        while rest.numel():
            part = numbers[taken : taken + rest.numel()]
            rest[: part.numel()] = part
            rest = rest[part.numel() :]
            taken = (taken + part.numel()) % numbers.numel()
        return tensor

    params = []
    for shape in case.shapes:
        param = made(shape).requires_grad_()
        param.grad = made(shape)
        params.append(param)
    return params
