"""A second of stepping that compares FusedSGD with torch.optim.SGD bit for bit. Called by the environment report.

It is for a machine that the tests have not seen (its compiler, its processor, its torch); the tests go further.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wd_fused.sgd import FusedSGD

SEED = 20
STEPS = 3
DTYPES = (torch.float32, torch.float64)
# An odd size after a vector's end, a matrix, a channels_last image, an empty tensor, a scalar, and enough for threads.
Shapes = tuple[tuple[int, ...], ...]
SHAPES: Shapes = ((7,), (1025,), (33, 17), (4, 3, 5, 5), (0,), (), (40_001,))


@dataclass(frozen=True)
class Result:
    """One dtype on one backend: ``elements`` compared after the last step, of which ``differing`` have other bits."""

    backend: str
    device: str
    dtype: torch.dtype
    elements: int
    differing: int
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and self.differing == 0


def run(backend: str) -> list[Result]:
    """Step with ``backend`` and with torch.optim.SGD(foreach=False) under every mix of options, once a dtype."""
    device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    results = []
    for dtype in DTYPES:
        elements = differing = 0
        error = None
        try:
            for options in _options():
                ours = _trained(FusedSGD, SHAPES, device, dtype, backend=backend, **options)
                theirs = _trained(torch.optim.SGD, SHAPES, device, dtype, foreach=False, **options)
                for mine, other in zip(ours, theirs, strict=True):
                    elements += mine.numel()
                    differing += int((_bits(mine) != _bits(other)).sum())
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        results.append(Result(backend, device, dtype, elements, differing, error))
    return results


def _options() -> list[dict[str, Any]]:
    momenta: list[dict[str, Any]] = [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
    ]
    return [
        momentum | {"lr": 0.1, "weight_decay": weight_decay}
        for momentum, weight_decay in itertools.product(momenta, (0.0, 5e-4))
    ]


def _trained(
    optimizer_class: type[torch.optim.Optimizer], shapes: Shapes, device: str, dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """Parameters and momentum buffers after some steps on gradients that are the same for every class."""
    generator = torch.Generator().manual_seed(SEED)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        made = torch.randn(shape, dtype=dtype, generator=generator)
        return (made.to(memory_format=torch.channels_last) if len(shape) == 4 else made).to(device)

    parameters = [torch.nn.Parameter(tensor(shape)) for shape in shapes]
    optimizer = optimizer_class(parameters, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(STEPS):
            for parameter, shape in zip(parameters, shapes, strict=True):
                parameter.grad = tensor(shape)
            optimizer.step()
    buffers = [optimizer.state[parameter].get("momentum_buffer") for parameter in parameters]
    return [parameter.detach() for parameter in parameters] + [buffer for buffer in buffers if buffer is not None]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)
