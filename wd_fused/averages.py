"""The average of a model's buffers beside that of its parameters, and the exchange of both with the model. Used by
sgd.py.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AveragedBuffers:
    """An average of each buffer, as torch.optim.swa_utils.AveragedModel(use_buffers=True) keeps it.

    Floating-point buffers are averaged, others (a count of batches) are copied.
    """

    def __init__(self, source: nn.Module | Iterable[Tensor]) -> None:
        # Where the tensors are found at each step: module.half() and the like replace a module's buffers.
        self._places: list[tuple[dict[Any, Any], Any]] = []
        if isinstance(source, nn.Module):
            seen: set[int] = set()
            for module in source.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None and id(buffer) not in seen:
                        seen.add(id(buffer))
                        self._places.append((module._buffers, name))
        else:
            tensors = dict(enumerate(source))
            for i, tensor in tensors.items():
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"ema_buffers must be a module or tensors, but element {i} is {tensor!r}")
            self._places = [(tensors, i) for i in tensors]
        self.averages = [buffer.detach().clone() for buffer in self.sources()]

    def sources(self) -> list[Tensor]:
        return [place[name] for place, name in self._places]

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """weight: of the new value, 1 − decay."""
        averages, buffers = [], []
        for i, buffer in enumerate(self.sources()):
            if self.averages[i].dtype != buffer.dtype or self.averages[i].device != buffer.device:
                self.averages[i] = self.averages[i].to(buffer.device, buffer.dtype)
            if weight == 1 or not (buffer.is_floating_point() or buffer.is_complex()):
                self.averages[i].copy_(buffer)
            else:
                averages.append(self.averages[i])
                buffers.append(buffer.detach())
        if averages:
            torch._foreach_lerp_(averages, buffers, weight)

    def load(self, averages: Iterable[Any]) -> bool:
        """Takes over what a state_dict has; False where that does not fit."""
        given = list(averages)
        fits = len(given) == len(self.averages) and all(
            isinstance(new, Tensor) and new.shape == own.shape for new, own in zip(given, self.averages, strict=True)
        )
        if fits:
            for own, new in zip(self.averages, given, strict=True):
                own.copy_(new)
        return fits


@contextmanager
def exchanged(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, the first of each pair holds what the second held; afterwards all hold what they did before.

    Of one dtype, the two trade places, one pair after the other. Else the first is written with the second, rounded,
    and a copy of what it held is kept meanwhile.
    """
    undone: list[tuple[Tensor, Tensor, Tensor | None]] = []
    try:
        with torch.no_grad():
            for shown, average in pairs:
                before = shown.detach().clone()
                trade = shown.dtype == average.dtype
                shown.detach().copy_(average)
                if trade:
                    average.detach().copy_(before)
                undone.append((shown, average, None if trade else before))
        yield
    finally:
        with torch.no_grad():
            for shown, average, kept in reversed(undone):
                before = shown.detach().clone() if kept is None else kept
                shown.detach().copy_(average if kept is None else kept)
                if kept is None:
                    average.detach().copy_(before)
