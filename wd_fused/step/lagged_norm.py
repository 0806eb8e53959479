"""Clipping by the norm of the step before, where all gradients are never there at once. Used by in_backward.py."""

import torch
from torch import Tensor


class LaggedNorm:
    """The norms of a round's gradients, one by one, and what the next round's gradients are divided by.

    A round is what one backward() steps, and what optimizer.step() finds after it.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm
        self.norm: Tensor | None = None  # of all gradients of the last whole round: float64, []
        self._scale: Tensor | None = None  # float32, []; None in the first round
        self._norms: list[Tensor] = []  # of this round; backward() has a thread for each device

    def scale(self, device: torch.device) -> Tensor:
        """What a gradient is divided by. Its own norm is clipped to max_norm then, which exact clipping would, too."""
        scale = self._scale
        return torch.ones((), dtype=torch.float32, device=device) if scale is None else scale.to(device)

    def note(self, norm: Tensor) -> None:
        """norm: of a gradient that has been divided."""
        self._norms.append(norm)

    def end_round(self) -> None:
        norms, self._norms = self._norms, []
        if not norms:
            return
        device = norms[0].device
        before = self.scale(device)
        own = torch.stack([each.to(device, torch.float64) for each in norms])
        self.norm = own.square().sum().sqrt() * before
        finite = torch.where(own.isfinite(), own, 0.0).square().sum().sqrt() * before
        scale = ((finite + 1e-6) / self.max_norm).clamp(1.0, 2.0**100).float()  # from inf no norm would come back
        # A gradient that is not finite has not been stepped, and may hide how large the next will be.
        self._scale = torch.where(self.norm.isfinite(), scale, torch.maximum(scale, before))
