"""What a step knows of its optimizer. Used by the other files of this folder."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wd_fused import backends
from wd_fused.backends import Plan, Row
from wd_fused.options import clipping
from wd_fused.options.averages import AveragedBuffers, Exchange
from wd_fused.options.loading import Report
from wd_fused.options.reader import Reader
from wd_fused.options.spec import StepOptions
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


class Base(torch.optim.SGD):
    """FusedSGD, as the functions of this folder see it: they read and write all of this."""

    grad_scale: Tensor | None  # only there while torch.amp.GradScaler, or somebody else, has put it there
    _backend: str
    _numerics: backends.Numerics
    _settings: dict[str, Any]
    _option_defaults: dict[str, Any]
    _reader_settings: tuple[bool, bool, int]
    _ranks: sharded.Ranks | None = None  # of process_group
    _averaged_buffers: AveragedBuffers | None

    def _forget_plans(self) -> None:
        self._plans: Plans | None = None
        self._reader = Reader(*self._reader_settings, self._ranks is not None)
        self._norm: Plan | Tensor | None = None  # who has the last norm
        # Not 0: so was the last step under a gradient scale. A StepOptions: the norm tells, once it is asked.
        self._skipped: bool | Tensor | StepOptions = False
        self._was_scaled = False  # the last step was under a gradient scale
        self._last_step: StepOptions | None = None
        self._numerics_report: Any = None  # of report_numerics: a Numerics of last_step.py
        self._steps_unreported = 0  # since then
        self._warned: set[str] = set()
        self._claims: dict[object, None] = {}  # of steps under way
        # Momentum buffers that no step has written yet, and the versions of their memory: see make_first_state().
        self._unwritten: list[tuple[Tensor, Tensor, int]] = []
        self._swapped: dict[str, Exchange] = {}  # the one of swap_ema(), inside it
        self._loading: tuple[list[dict[str, Any]], list[dict[str, Any]], Report] | None = None

    def _refuse_while_swapped(self, what: str) -> None:
        if getattr(self, "_swapped", None):
            raise RuntimeError(f"{what} inside swap_ema(): parameters and averages have traded places; leave it first")

    def _buffer(self, param: Tensor) -> Any:
        state = self.state.get(param)  # not [param]: that would put an entry there
        return state.get("momentum_buffer") if state else None

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of the gradients of the last step with ``max_grad_norm``, before clipping, on their device.

        A new tensor, [], float32, or float64 if a clipped parameter is; with ``norm_per_group`` [groups], NaN for
        groups that do not clip or are empty, 0 for those that have no gradient. None before the first such step. Of a
        step that was skipped for torch.amp.GradScaler as well: then it is infinite or NaN as a rule.

        Examples:
            >>> weight = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = FusedSGD([weight], lr=1.0, max_grad_norm=1.0)
            >>> weight.grad = torch.tensor([3.0, 4.0])
            >>> optimizer.step()
            >>> optimizer.grad_norm
            tensor(5.)
        """
        norm = self._norm if self._norm is None or isinstance(self._norm, Tensor) else self._norm.grad_norm()
        return None if norm is None else norm.clone()

    @property
    def last_step_skipped(self) -> bool | Tensor:
        """Whether the last step under a gradient scale wrote nothing, for a gradient that is infinite or NaN.

        With ``fused=True`` torch.amp.GradScaler has step() skip; else it does not call step(), and this stays what it
        was, as it does in steps without a scale. A bool, or, where only a GPU knows, a Tensor of one, []: ``if`` waits.

        Examples:
            >>> weight = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = FusedSGD([weight], lr=1.0, fused=True)
            >>> scaler = torch.amp.GradScaler("cpu")
            >>> scaler.scale(weight.sum() * torch.inf).backward()
            >>> scaler.step(optimizer)
            >>> optimizer.last_step_skipped
            True
        """
        skipped = self._skipped
        if isinstance(skipped, StepOptions):
            norm = self.grad_norm
            assert norm is not None, "it has clipped"
            skipped = clipping.is_nonfinite(norm, skipped)
        if isinstance(skipped, bool):
            return skipped
        word = (skipped != 0).any()
        return bool(word) if word.is_cpu else word
