"""Clipping by the norm of the step before, where all gradients are never there at once. Used by in_backward.py."""

import threading

import torch
from torch import Tensor


class LaggedNorm:
    """The norms of a round's gradients, one by one, and what the next round's gradients are divided by.

    A round is what one backward() steps, and what optimizer.step() finds after it, which ends it.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm
        self.norm: Tensor | None = None  # of all gradients of the last whole round: float64, []
        self._scale: Tensor | None = None  # float32, []; None in the first round
        self._backward = -1
        self._norms: list[Tensor] = []  # of this round
        self._lock = threading.Lock()  # backward() has a thread for each device

    def scale(self, backward: int, device: torch.device) -> Tensor | None:
        """What a gradient is divided by. backward: the number of the backward() under way; -1 outside of one."""
        with self._lock:
            if backward not in (-1, self._backward):
                self._backward = backward
                self._end_round()
            return None if self._scale is None else self._scale.to(device)

    def end_round(self) -> None:
        with self._lock:
            self._end_round()

    def note(self, norm: Tensor) -> None:
        """norm: of a gradient that has been divided."""
        with self._lock:
            self._norms.append(norm)

    def _end_round(self) -> None:
        if not self._norms:
            return
        device, before = self._norms[0].device, self._scale
        norm = torch.stack([each.to(device, torch.float64) for each in self._norms]).square().sum().sqrt()
        self._norms.clear()
        if before is not None:
            norm = norm * before
        self.norm = norm
        scale = ((norm + 1e-6) / self.max_norm).clamp(min=1.0).float()
        # A gradient that is not finite has not been stepped, and says nothing of the next.
        self._scale = torch.where(norm.isfinite(), scale, torch.ones_like(scale) if before is None else before)
