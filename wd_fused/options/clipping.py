"""A step's norms and coefficients: of sums of squares, a group each, float64 on the CPU. Used by the step."""

import math

import torch
from torch import Tensor

from wd_fused.options.spec import StepOptions


def norms(sums: Tensor, step: StepOptions) -> Tensor:
    """The 2-norm of all gradients, [], or of each group's, [groups]: NaN for groups that do not clip or are empty, 0
    for those that clip and have no gradient."""
    squares = [each.item() for each in sums]  # a mode that traces sees item(), and not tolist()
    if step.norm_per_group:
        own = [_root(each) if clips else math.nan for each, clips in zip(squares, _clips(step), strict=True)]
        return torch.tensor(own, dtype=torch.float64, device="cpu").to(step.norm_dtype)
    total = 0.0
    for each in squares:  # in this order, as the plans do
        total += each
    return torch.tensor(_root(total), dtype=torch.float64, device="cpu").to(step.norm_dtype)


def _root(square: float) -> float:
    """Correctly rounded, which torch's on the CPU is not."""
    return square if square != square else math.sqrt(square)


def _clips(step: StepOptions) -> list[bool]:
    return [group is not None and not math.isnan(group.max_norm) for group in step.groups]


NONFINITE = (
    "The total norm of order 2 for gradients is non-finite, so they cannot be clipped. To scale the gradients by it "
    "anyway, set error_if_nonfinite=False"
)


def is_nonfinite(norm: Tensor, step: StepOptions) -> Tensor:
    """Whether one of norms() of the groups that clip is infinite or NaN: bool, [], where the norms are."""
    own = zip(norm.expand(len(step.groups)), _clips(step), strict=True)
    return torch.stack([each for each, clips in own if clips]).isfinite().all().logical_not()


def coefficients(norm: Tensor, step: StepOptions) -> Tensor:
    """What each group's gradients are multiplied with: torch.nn.utils.clip_grads_with_norm_'s, 1 without clipping.

    [groups], where the norm is and of its dtype.
    """
    return torch.stack(
        [
            ((own + 1e-6).reciprocal() * group.max_norm).clamp(max=1.0) if group and clips else torch.ones_like(own)
            for own, group, clips in zip(norm.expand(len(step.groups)), step.groups, _clips(step), strict=True)
        ]
    )
