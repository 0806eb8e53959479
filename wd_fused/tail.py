"""The options of the fused tail: what they are called, which values they take, and what a plan is told of them.

sgd.py reads them from the parameter groups; backends and the reference get the tuples below. The arithmetic stands in
reference.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowTail(NamedTuple):
    """What the options make of a parameter, fixed while a plan lives."""

    weights: str  # where its value is kept: "parameter", "full", "split", "split24", "kahan"
    stochastic: bool  # rounding="stochastic"
    momentum_dtype: torch.dtype  # of the momentum buffer
    extra: Tensor | None  # the state's master, remainder or compensation, as it is now
    momentum_scale: Tensor | None  # float32, a scale for each block of an int8 momentum buffer
    ema: Tensor | None
    averages: bool
    clips: bool
    zeroes: bool


class GroupStep(NamedTuple):
    """The numbers of one step for a parameter group."""

    max_norm: float  # nan: the group does not clip
    l1: float
    decoupled: float  # c in p·(1 − lr·c); 0: none
    l2: bool  # False: weight_decay makes no L2 term
    average_weight: float  # of the new value in the average, 1 − decay
    random_key: int  # 64 bits


class TailStep(NamedTuple):
    """The numbers of one step."""

    groups: tuple[GroupStep | None, ...]  # None: no option is on
    norm_per_group: bool
    error_if_nonfinite: bool
    norm_dtype: torch.dtype
    clips: bool  # some group does
