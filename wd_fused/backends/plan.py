"""What a step asks of a backend's plan. Built over rows, one a parameter, by wd_fused/step/plans.py."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from wd_fused.options.spec import RowOptions, StepOptions

Numerics = Literal["torch", "opmath"]
NUMERICS: tuple[Numerics, ...] = ("torch", "opmath")


class Row(NamedTuple):
    """A parameter as a plan sees it: its momentum buffer if it has one, its group, its place in the group."""

    param: Tensor
    momentum_buffer: Tensor | None
    group: int
    position: int
    options: RowOptions | None = None  # where an option is on for its group


class Plan(Protocol):
    """A step over fixed rows, in two calls, so that several plans can all check before any writes.

    ``options`` is None where no group has an option.
    """

    def prepare(
        self, groups: list[dict[str, Any]], state: dict[Tensor, Any], options: StepOptions | None = ..., /
    ) -> int:
        """Checks everything, writes nothing. -1: no longer what the plan was built on; else how many rows it leaves."""

    def left(self) -> list[tuple[int, str]]:
        """The rows that the last prepare() leaves to torch's code, with the reason."""

    def keep_off(self, others: list[tuple[int, int]]) -> bool:
        """Whether a row lies in memory that others write, [begin, end). A row that moves there later ends the plan."""

    def abandon(self) -> None:
        """Forgets what prepare() read: launch() will not come."""

    def sums(self, grad_scale: Tensor | None = ..., /) -> list[Tensor]:
        """After prepare(): on each device of the plan the groups' sums of squared gradients, float64 [groups].

        Of the groups that clip, zero for the others; of the rows that the plan steps itself.
        """

    def launch(
        self, coefficients: Sequence[float] | Tensor | None = ..., grad_scale: Tensor | None = ..., /
    ) -> list[tuple[int, Tensor]]:
        """Does the step; the momentum buffers that it made, with their rows.

        ``coefficients``: what each group's gradients are multiplied with to clip them, float64 on the CPU, 1.0 where
        a group does not clip; None: no group does.
        """

    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        options: StepOptions | None = ...,
        /,
    ) -> list[tuple[int, Tensor]] | None:
        """prepare() and launch() in one where nothing is left to others; else None, and nothing is done.

        ``grad_scale`` and ``found_inf`` are torch.amp.GradScaler's: a plan that can have them read on its device does
        so, and one that cannot says None. Norm and coefficients are formed where the rows are, if on one device.
        """

    def grad_norm(self) -> Tensor | None:
        """The norm of the last step() that clipped, of the norm_dtype: [] or [groups]; the plan's own tensor."""

    def was_skipped(self) -> bool:
        """Whether the last step() wrote nothing for a non-finite norm under a scale, where the host knows."""

    def read_state(self, state: dict[Tensor, Any]) -> None:
        """Takes the state as it is now for what the plan was built on."""
