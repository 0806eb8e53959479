"""The average of a model's buffers beside that of its parameters, and the exchange of both with the model. Used by
sgd.py and step/checkpoint.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from wd_fused.options.kept import OF_BUFFERS, outside_inference
from wd_fused.options.spec import average_dtype


class AveragedBuffers:
    """An average of each buffer, as torch.optim.swa_utils.AveragedModel(use_buffers=True) keeps it.

    Floating-point buffers are averaged, others (a count of batches) are copied. The averages lie in the state of a
    parameter that is trained: torch.distributed.checkpoint keeps the state of those and the groups' numbers, and
    nothing else of an optimizer.
    """

    _home: tuple[Tensor, dict[str, Any]] | None = None  # a parameter and its state, where the averages lie

    def __init__(self, source: nn.Module | Iterable[Tensor], groups: Iterable[Mapping[str, Any]]) -> None:
        if not any(map(_averages, groups)):
            raise ValueError("ema_buffers are averaged with ema_decay: give it as well, such as ema_decay=0.999")
        # Where the tensors are found at each step: module.half() and the like replace a module's buffers.
        self._places: list[tuple[dict[Any, Any], Any]] = []
        if isinstance(source, nn.Module):
            for name, _ in source.named_buffers():
                module, _, own = name.rpartition(".")
                self._places.append((source.get_submodule(module)._buffers, own))
        else:
            if isinstance(source, Tensor) or not isinstance(source, Iterable):
                raise ValueError(f"ema_buffers must be a module or a list of tensors, not {source!r}")
            tensors = dict(enumerate(source))
            for i, tensor in tensors.items():
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"ema_buffers must be a module or tensors, but element {i} is {tensor!r}")
            self._places = [(tensors, i) for i in tensors]

    def places(self) -> list[tuple[dict[Any, Any], Any, Any]]:
        """Where the buffers are found, and what is there now."""
        return [(place, name, place.get(name)) for place, name in self._places]

    def pairs(self, state: dict[Tensor, Any], groups: Sequence[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
        """The buffers that are there now, each with its average: begun anew where the buffer has another shape.

        state, groups: the optimizer's. The first group that averages says how: see ema_dtype.
        """
        entries, result = self._entries(state, groups), []
        dtype = next((group.get("ema_dtype") for group in groups if _averages(group)), None)
        for i, (_, _, buffer) in enumerate(self.places()):
            if not isinstance(buffer, Tensor):
                continue  # deleted, or None: it may come back
            average, kind = entries.get(f"{OF_BUFFERS}{i}"), average_dtype(buffer, dtype)
            if not isinstance(average, Tensor) or buffer.shape != average.shape:
                average = entries[f"{OF_BUFFERS}{i}"] = _copied(buffer, buffer.device, kind)
            elif kind != average.dtype or buffer.device != average.device or average.is_inference():
                average = entries[f"{OF_BUFFERS}{i}"] = _copied(average, buffer.device, kind)
            result.append((buffer, average))
        return result

    @torch.no_grad()
    def update(self, state: dict[Tensor, Any], groups: Sequence[dict[str, Any]], weight: float) -> None:
        """weight: of the new value, 1 − decay."""
        averages, buffers = [], []
        for buffer, average in self.pairs(state, groups):
            if weight == 1 or not (buffer.is_floating_point() or buffer.is_complex()):
                average.copy_(buffer)
            else:
                averages.append(average)
                buffers.append(buffer.detach().to(average.dtype))
        if averages:
            torch._foreach_lerp_(averages, buffers, weight)

    def load(self, state: dict[Tensor, Any], groups: Sequence[dict[str, Any]], saved: Mapping[int, Tensor]) -> bool:
        """Takes over what saved_averages() has found; False where that does not fit."""
        there = {i: buffer for i, (_, _, buffer) in enumerate(self.places()) if isinstance(buffer, Tensor)}
        fits = saved.keys() >= there.keys() and len(saved) <= len(self._places)
        fits = fits and all(saved[i].shape == buffer.shape for i, buffer in there.items())
        if fits:
            self._entries(state, groups).update({f"{OF_BUFFERS}{i}": average for i, average in saved.items()})
        return fits

    def _entries(self, state: dict[Tensor, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state that has the averages. They move where a checkpoint has put them elsewhere, or their parameter is
        not trained any more."""
        if self._home is None or not self._home[0].requires_grad or state.get(self._home[0]) is not self._home[1]:
            found = removed_averages(state)
            for i, average in enumerate(self.__dict__.pop("averages", ())):  # of an older pickle
                found.setdefault(f"{OF_BUFFERS}{i}", average)
            params = [param for group in groups if _averages(group) for param in group["params"]]
            home = next((param for param in params if param.requires_grad), params[0] if params else None)
            if home is None:
                return found
            self._home = home, state.setdefault(home, {})
            self._home[1].update(found)
        return self._home[1]


def _averages(group: Mapping[str, Any]) -> bool:
    return group.get("ema_decay") is not None


@outside_inference()
def _copied(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(device, dtype, copy=True)


def _unusual(state: Iterable[Any]) -> list[Any]:
    """The entries of all parameters but those that have a momentum buffer alone, as most have."""
    return [each for each in state if type(each) is not dict or len(each) != 1 or "momentum_buffer" not in each]


def removed_averages(state: dict[Tensor, Any]) -> dict[str, Any]:
    """The averages of buffers, taken out of an optimizer's state."""
    of_parameters = [entries for entries in _unusual(state.values()) if isinstance(entries, dict)]
    names = [(entries, name) for entries in of_parameters for name in entries if _number_of(name) is not None]
    return {name: entries.pop(name) for entries, name in names}


def saved_averages(saved: Mapping[str, Any]) -> dict[int, Tensor]:
    """The averages of buffers that a state_dict has, by their numbers. Changes nothing.

    Raises ValueError for what is no tensor.
    """
    found = dict(enumerate(_listed(saved.get("ema_buffers", ()))))  # a key of its own in older ones
    found |= {
        number: entries[name]
        for entries in _unusual(saved["state"].values())
        for name in entries
        if (number := _number_of(name)) is not None
    }
    # An empty dict is what torch.distributed.checkpoint finds in a flat state_dict for what is not there.
    found = {number: average for number, average in found.items() if isinstance(average, Tensor) or average != {}}
    for number, average in found.items():
        fault = None if isinstance(average, Tensor) else f"a {type(average).__name__}, not a Tensor"
        if fault is None and (average.is_meta or average.layout != torch.strided):
            fault = f"a {average.layout} Tensor on {average.device}"
        if fault is not None:
            raise ValueError(f'the saved average {number} of "ema_buffers" is {fault}')
    return found


def _listed(averages: Any) -> Iterable[Any]:
    if isinstance(averages, Tensor) or not isinstance(averages, Iterable):
        raise ValueError(f'the saved "ema_buffers" is a {type(averages).__name__}, not a list of Tensors')
    return averages


def _number_of(name: Any) -> int | None:
    if not isinstance(name, str) or not name.startswith(OF_BUFFERS):
        return None
    number = name.removeprefix(OF_BUFFERS)
    return int(number) if number.isdecimal() else None


class Exchange:
    """Shows averages in the place of what they are averages of, for a while.

    enter() and leave() may be cut short anywhere, by an interrupt: leave(), called again, brings back every number.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]], buffers: AveragedBuffers | None) -> None:
        self._pairs = [_Pair(shown, average) for shown, average in pairs]
        self._places = [] if buffers is None else buffers.places()

    def enter(self) -> None:
        for pair in self._pairs:
            pair.enter()

    def leave(self) -> Exception | None:
        """All hold what they did before; so do buffers that have taken the place of others meanwhile, as of half().

        Returns the error of a tensor for which that cannot be done: the others are put back all the same.
        """
        failure: Exception | None = None
        for pair in reversed(self._pairs):
            try:
                pair.leave()
            except Exception as error:  # somebody has resized it; or a handler of signals has raised this
                failure = error
                with suppress(Exception):
                    pair.leave()
        for place, name, old in self._places:
            new = place.get(name)
            if new is old or not (isinstance(new, Tensor) and isinstance(old, Tensor)) or new.shape != old.shape:
                continue
            new.detach().copy_(old.detach())
        return failure


class _Pair:
    """A tensor and its average.

    Of one dtype, the two trade places; else the first is written with the second, rounded, and its own numbers are kept
    here. Before the first write of an exchange all that is to be written is noted, in one go and with copies of the
    numbers: at every moment both are somewhere, and the writes can be done again.
    """

    def __init__(self, shown: Tensor, average: Tensor) -> None:
        self._shown = shown
        self._average = average
        self._kept: Tensor | None = None
        self._noted: tuple[bool, tuple[tuple[Tensor, Tensor], ...]] = (False, ())  # exchanged, when these are written

    def enter(self) -> None:
        own = self._shown.detach().clone()
        if own.dtype == self._average.dtype:
            self._write(True, (self._shown, self._average.detach().clone()), (self._average, own))
        else:
            self._kept = own
            self._write(True, (self._shown, self._average))

    def leave(self) -> None:
        self._write(self._noted[0], *self._noted[1])
        if not self._noted[0]:
            return
        shown, average = self._shown.detach(), self._average.detach()
        if shown.shape != average.shape:
            raise RuntimeError(
                f"a tensor of shape {list(average.shape)} has got shape {list(shown.shape)} inside swap_ema(): what it "
                "held before cannot be put back"
            )
        if self._kept is not None:
            self._write(False, (self._shown, self._kept))
        else:
            self._write(False, (self._shown, average.clone()), (self._average, shown.clone()))

    def _write(self, is_exchanged: bool, *writes: tuple[Tensor, Tensor]) -> None:
        self._noted = (is_exchanged, writes)
        for tensor, numbers in writes:
            tensor.detach().copy_(numbers.detach())  # no torch.no_grad(): an interrupt might leave that on
        self._noted = (is_exchanged, ())
