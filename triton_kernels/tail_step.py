"""A device's rows where some have a tail, and what a step does there: beyond device_step.py, the norm that clips.

Called by tail_plan.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launcher, tail_kernel
from .device_step import WORD, DeviceStep, undisturbed
from .launcher import Launcher, TailKernel
from .table import Norm, PlannedLaunch, Table, TableRow, with_norm

_FLAG: int = tail_kernel.NORM_FLAG.value
_NORMS: int = tail_kernel.NORM_NORMS.value


class TailDeviceStep(DeviceStep):
    """Steps the rows of one device: as DeviceStep, with measure() and set_coefficients() between bring() and launch().

    Args:
        device, numerics: DeviceStep's.
        groups: the number of the optimizer's parameter groups.
    """

    def __init__(self, device: torch.device, numerics: str, groups: int) -> None:
        super().__init__(device, numerics)
        self._groups = groups
        self.norm_dtype = torch.float32
        self._norm = Norm([], 0)
        self._norm_launches: list[tuple[PlannedLaunch, Launcher]] = []
        self._has_measured = False
        self._workspace: Tensor | None = None  # float64; laid out as tail_kernel.NORM_FLAG has it
        self._workspace_stream = -1
        self._coefficients: Tensor | None = None  # those of the step under way, where they come from elsewhere
        self._coefficients_at = 0

    # --- DeviceStep's

    def make_ready(self, rows: Sequence[Sequence[Any]]) -> None:
        super().make_ready(rows)
        self._norm_launches = self._loaded(self._norm.launches)
        self._workspace = None

    def _table_of(self, rows: Sequence[TableRow]) -> Table:
        in_double = self.norm_dtype == torch.float64
        made, self._norm = with_norm(super()._table_of(rows), rows, self._groups, in_double)
        return made

    def _needs_words(self) -> bool:
        return True

    def launch(self, grad_scale: int, found_inf: int) -> None:
        table_at, layouts, words = self._at
        with launcher.on(self._device):
            stream = launcher.current_stream(self._device)
            for launch, run in self._launched:
                own = (self._coefficients_at,) if isinstance(launch.kernel, TailKernel) else ()
                run(table_at + launch.at * WORD, layouts, words, grad_scale, found_inf, *own, stream=stream)

    def launches(self) -> list[dict[str, Any]]:
        norms = self._norm_launches if self._has_measured else []
        return [
            {"kernel": launch.kernel.name, "tensors": len(launch.rows), "tiles": launch.tiles, "blocks": launch.tiles}
            for launch, _ in [*norms, *self._launched]
        ]

    # --- the norm

    def begin(self) -> None:
        """Forgets what the last step clipped with."""
        self._coefficients = None
        self._coefficients_at = 0
        self._has_measured = False

    def measure(self, grad_scale: int, max_norms_at: int, per_group: bool) -> None:
        """Forms sums, norms and coefficients of the gradients that bring() told of, and has launch() clip with them.

        max_norms_at: where the groups' max_norm lie in the words that were brought.
        """
        table_at, layouts, words = self._at
        with launcher.on(self._device):
            stream = launcher.current_stream(self._device)
            workspace, kept = self._workspace_on(stream), self._workspace
            self._workspace = None  # if this ends between two launches: its counter is not at 0 then
            for launch, run in self._norm_launches:
                run(
                    table_at + launch.at * WORD,
                    layouts,
                    words,
                    grad_scale,
                    workspace,
                    table_at + self._norm.ranges_at * WORD,
                    words + max_norms_at * WORD,
                    self._groups,
                    self._norm.programs,
                    int(per_group),
                    stream=stream,
                )
            self._workspace = kept
        self._coefficients_at = workspace + (_NORMS + self._groups) * WORD
        self._has_measured = True

    def set_coefficients(self, coefficients: Sequence[float] | Tensor | None) -> None:
        """Has launch() clip with these, a float64 number a group; None: not clip."""
        if coefficients is None:
            self._coefficients_at = 0
            return
        with launcher.on(self._device), undisturbed():
            if isinstance(coefficients, Tensor):
                in_double = coefficients.detach().to(self._device, torch.float64, non_blocking=True)
            else:
                in_double = torch.tensor(coefficients, dtype=torch.float64, device=self._device)
            both = torch.zeros(2 * self._groups, dtype=torch.float64, device=self._device)
            both[: self._groups] = in_double
            both.view(torch.float32)[2 * self._groups : 3 * self._groups] = in_double
            launcher.keep_if_captured(both)
        self._coefficients = both
        self._coefficients_at = both.data_ptr()

    def sums(self) -> Tensor:
        """The groups' sums of squares that measure() formed, float64."""
        return self._formed()[_NORMS + 3 * self._groups :][: self._groups]

    def norms(self) -> Tensor:
        """The groups' norms that measure() formed, of norm_dtype; each is that of all groups, if it was to be so."""
        return self._formed()[_NORMS : _NORMS + self._groups].view(self.norm_dtype)[: self._groups]

    def flag(self) -> Tensor:
        """Whether a norm was not finite: 0 or 1, float32, one element."""
        return self._formed()[_FLAG : _FLAG + 1].view(torch.float32)[0]

    def _formed(self) -> Tensor:
        assert self._workspace is not None, "measure() makes it"
        return self._workspace

    def _workspace_on(self, stream: int) -> int:
        """The address of memory to form the norm in, which no other stream uses. What a graph uses, only that does."""
        is_capturing = launcher.is_capturing()
        if self._workspace is None or stream != self._workspace_stream or is_capturing:
            programs = self._norm.programs
            with undisturbed():
                self._workspace = launcher.zeroed(_NORMS + 4 * self._groups + programs, self._device)
            self._workspace_stream = -1 if is_capturing else stream
        return self._workspace.data_ptr()
