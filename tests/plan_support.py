"""What the tests of the GPU backends' plans share: parameters, their twins, and what a plan has launched.

Used by the tests of the Triton backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wd_fused import FusedSGD

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def parameters(*shapes: tuple[int, ...] | int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for param in made:
        param.grad = torch.randn_like(param)
    return made


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    for copied, param in zip(copies, params, strict=True):
        copied.grad = None if param.grad is None else param.grad.clone()
    return copies


def plan_of(optimizer: FusedSGD) -> Any:
    assert optimizer._plans is not None
    (part,) = optimizer._plans.parts
    return part.plan


def launches(optimizer: FusedSGD) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = plan_of(optimizer).launches()
    return made


def move_gradients(*lists: list[nn.Parameter]) -> list[Tensor]:
    """Fresh memory for every gradient, the same numbers in each list; what they replace is kept, so that it moves."""
    replaced = []
    for same in zip(*lists, strict=True):
        gradient = torch.randn_like(same[0])
        for param in same:
            replaced.append(param.grad)
            param.grad = gradient.clone()
    return [gradient for gradient in replaced if gradient is not None]
