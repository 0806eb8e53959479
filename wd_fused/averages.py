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
            if isinstance(source, Tensor) or not isinstance(source, Iterable):
                raise ValueError(f"ema_buffers must be a module or a list of tensors, not {source!r}")
            tensors = dict(enumerate(source))
            for i, tensor in tensors.items():
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"ema_buffers must be a module or tensors, but element {i} is {tensor!r}")
            self._places = [(tensors, i) for i in tensors]
        with torch.inference_mode(False), torch.no_grad():
            self.averages = [place[name].detach().clone() for place, name in self._places]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The buffers that are there now, each with its average: begun anew where the buffer has another shape."""
        result = []
        with torch.inference_mode(False), torch.no_grad():
            for i, (place, name) in enumerate(self._places):
                buffer, average = place.get(name), self.averages[i]
                if not isinstance(buffer, Tensor):
                    continue  # deleted, or None: it may come back
                if buffer.shape != average.shape:
                    average = buffer.detach().clone()
                elif buffer.dtype != average.dtype or buffer.device != average.device or average.is_inference():
                    average = average.to(buffer.device, buffer.dtype, copy=True)
                self.averages[i] = average
                result.append((buffer, average))
        return result

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """weight: of the new value, 1 − decay."""
        averages, buffers = [], []
        for buffer, average in self.pairs():
            if weight == 1 or not (buffer.is_floating_point() or buffer.is_complex()):
                average.copy_(buffer)
            else:
                averages.append(average)
                buffers.append(buffer.detach())
        if averages:
            torch._foreach_lerp_(averages, buffers, weight)

    def load(self, averages: Iterable[Any]) -> bool:
        """Takes over what a state_dict has; False where that does not fit."""
        if isinstance(averages, Tensor) or not isinstance(averages, Iterable):
            raise ValueError(f'the saved "ema_buffers" is a {type(averages).__name__}, not a list of Tensors')
        given = list(averages)
        fits = len(given) == len(self.averages) and all(
            isinstance(new, Tensor) and new.shape == own.shape for new, own in zip(given, self.averages, strict=True)
        )
        if fits:
            for own, new in zip(self.averages, given, strict=True):
                own.copy_(new)
        return fits

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is in the buffers at the end is in those that have taken their place meanwhile, too, as of half()."""
        before = [place.get(name) for place, name in self._places]
        try:
            yield
        finally:
            with torch.no_grad():
                for (place, name), old in zip(self._places, before, strict=True):
                    new = place.get(name)
                    if new is old or not (isinstance(new, Tensor) and isinstance(old, Tensor)):
                        continue
                    if new.shape == old.shape:
                        new.detach().copy_(old)


@contextmanager
def exchanged(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, the first of each pair holds what the second held; afterwards all hold what they did before.

    Of one dtype, the two trade places, one pair after the other. Else the first is written with the second, rounded,
    and a copy of what it held is kept meanwhile.
    """
    undone: list[tuple[Tensor, Tensor, Tensor | None]] = []
    failure: Exception | None = None
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
                try:
                    before = shown.detach().clone() if kept is None else kept
                    shown.detach().copy_(average if kept is None else kept)
                    if kept is None:
                        average.detach().copy_(before)
                except Exception as error:  # somebody has resized it: the others are put back all the same
                    failure = error
        if failure is not None:
            raise failure
