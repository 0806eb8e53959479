"""What every part of a step knows of its optimizer. Used by the other files of this folder."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wd_fused import backends
from wd_fused.backends import Plan, Row
from wd_fused.options import clipping, kept
from wd_fused.options.averages import AveragedBuffers, Exchange
from wd_fused.options.loading import Report
from wd_fused.options.reader import Reader
from wd_fused.options.spec import RowOptions, StepOptions
from wd_fused.step import sharded


class ParameterBackend(NamedTuple):
    """Which backend steps a parameter, and why: an entry of ``FusedSGD.backends``."""

    group: int
    position: int
    backend: str
    reason: str


class Part(NamedTuple):
    """The rows of one backend, which its plan points to, and the plan."""

    backend: str
    rows: list[Row]
    plan: Plan
    has_options: bool  # a row of it has
    ranks: sharded.Ranks | None  # whose gradients count in a norm, where those of this process are not all


class Plans(NamedTuple):
    """What is fixed between steps."""

    parts: list[Part]
    with_torch: list[ParameterBackend]  # parameters that torch's code steps
    may_return: list[ParameterBackend]  # those of them that a fused backend may take when they change
    torch_extents: list[tuple[int, int]]  # the memory that torch's code writes
    by_reference: list[tuple[Any, ...]]  # what the parameters with options that no plan has were
    groups: list[list[Tensor]]  # keeps alive what the plans compare with
    structure: tuple[Any, ...]  # of the options, as Reader has it


REPEATED = "it appears more than once in the parameter groups"
ENTANGLED = "parameters of which torch's code must step some share memory: only torch's order gives torch's result"
SEEN_BY_MODES = "a TorchDispatchMode is active, which sees what goes through torch's dispatcher"
UNREADABLE = "param_groups must be a list of dicts, each with a list of parameters, and state a dict of dicts"


class Base(torch.optim.SGD):
    _backend: str
    _numerics: backends.Numerics
    _settings: dict[str, Any]
    _option_defaults: dict[str, Any]
    _reader_settings: tuple[bool, bool, int]
    _averaged_buffers: AveragedBuffers | None

    def _forget_plans(self) -> None:
        self._plans: Plans | None = None
        self._reader = Reader(*self._reader_settings)
        self._norm: Plan | Tensor | None = None  # who has the last norm
        # Not 0: so was the last step under a gradient scale. A StepOptions: the norm tells, once it is asked.
        self._skipped: bool | Tensor | StepOptions = False
        self._warned: set[str] = set()
        self._claims: dict[object, None] = {}  # of steps under way
        # Momentum buffers that no step has written yet, and the versions of their memory: see _make_first_state().
        self._unwritten: list[tuple[Tensor, Tensor, int]] = []
        self._swapped: dict[str, Exchange] = {}  # the one of swap_ema(), inside it
        self._loading: tuple[list[dict[str, Any]], list[dict[str, Any]], Report] | None = None

    def _refuse_while_swapped(self, what: str) -> None:
        if getattr(self, "_swapped", None):
            raise RuntimeError(f"{what} inside swap_ema(): parameters and averages have traded places; leave it first")

    def _buffer(self, param: Tensor) -> Any:
        state = self.state.get(param)  # not [param]: that would put an entry there
        return state.get("momentum_buffer") if state else None

    def _row_options(self, param: Tensor, group: int) -> RowOptions:
        options = self._reader.options[group]
        assert options is not None, "asked for of groups with options"
        return kept.row_options(param, self.state.get(param), options)

    def _last_norm(self) -> Tensor | None:
        """A copy, as grad_norm has it."""
        norm = self._norm if self._norm is None or isinstance(self._norm, Tensor) else self._norm.grad_norm()
        return None if norm is None else norm.clone()

    def _was_skipped(self) -> bool | Tensor:
        """As last_step_skipped has it."""
        skipped = self._skipped
        if isinstance(skipped, StepOptions):
            skipped = clipping.is_nonfinite(cast(Tensor, self._last_norm()), skipped)
        if isinstance(skipped, bool):
            return skipped
        word = (skipped != 0).any()
        return bool(word) if word.is_cpu else word
