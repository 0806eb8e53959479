"""A step over rows of which some have a tail: plan.py's, and what the options of wd_fused/tail.py add to it.

Called through wd_fused/backends.py, where a parameter group has such an option.
"""

from __future__ import annotations

import itertools
import math
import operator
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import launcher, tail_kernel
from .launcher import INTERPRETED, TailKernel
from .plan import (
    StepPlan,
    _double_word,
    _float_word,
    _Group,
    _here,
    _Moment,
    _OnDevice,
    _PlanRow,
    _seen,
    _Stale,
    why_not_planned,
)
from .table import Dim, TableRow, TailOperands, extent_of, strided_layout, surely_distinct
from .tail_step import TailDeviceStep

if TYPE_CHECKING:
    from wd_fused.backends import Row
    from wd_fused.tail import GroupStep, RowTail, TailStep

ONLY_AVERAGED: int = tail_kernel.ONLY_AVERAGED.value
_ADDRESS: int = tail_kernel.TAIL_ADDRESS.value
_KIND = 0xFF  # of lr, in a group's flags
_EXTRA_KEYS = {"full": "master", "split": "remainder", "split24": "remainder", "kahan": "compensation"}


class _TailRow(_PlanRow):
    """A parameter whose group has an option of the tail."""

    words_of_group = tail_kernel.WORDS_OF_TAIL_GROUP
    takes_any_gradient = True

    def __init__(self, row: Row, tail: RowTail, numerics: str) -> None:
        # Without what the state still has of options that are off by now.
        tail = tail._replace(
            extra=tail.extra if tail.weights in _EXTRA_KEYS else None,
            momentum_scale=tail.momentum_scale if tail.momentum_dtype == torch.int8 else None,
            ema=tail.ema if tail.averages else None,
        )
        self.tail = tail
        self.zeroes = tail.zeroes
        self._numerics = numerics
        self.gradient_dtype = row.param.dtype
        # What the state must hold beside the momentum buffer, by its names there.
        named = {"ema": tail.ema} if tail.averages else {}
        if tail.momentum_dtype == torch.int8:
            named["momentum_scale"] = tail.momentum_scale
        if tail.weights in _EXTRA_KEYS:
            named[_EXTRA_KEYS[tail.weights]] = tail.extra
        self.named = named
        self._own = [tensor for tensor in named.values() if tensor is not None]
        self._own_seen = [_seen(tensor) for tensor in self._own]
        super().__init__(row)

    def laid_out(self, gradient_strides: tuple[int, ...]) -> list[Dim] | None:
        operands = (self.tail.extra, self.tail.ema)
        return strided_layout(
            self.seen.shape,
            self.seen.strides,
            gradient_strides,
            self.seen.strides if self.buffer_seen is None else self.buffer_seen.strides,
            *(self.seen.strides if tensor is None else tensor.stride() for tensor in operands),
        )

    def new_buffer(self) -> Tensor:
        return torch.empty_like(self.param.detach(), dtype=self.tail.momentum_dtype)

    def own_tensors(self) -> list[Tensor]:
        return [*super().own_tensors(), *self._own]

    def is_stale(self, entry: Any) -> bool:
        """Whether the state does not hold these tensors any more, or they are not what they were."""
        in_state = entry if isinstance(entry, dict) else {}
        return (
            any(in_state.get(name) is not tensor for name, tensor in self.named.items())
            or [_seen(tensor) for tensor in self._own] != self._own_seen
        )

    def lacks_state(self, has_momentum: bool) -> bool:
        """Whether a step with a gradient needs what the state has not got yet."""
        lacks_scale = has_momentum and self.tail.momentum_dtype == torch.int8 and self.tail.momentum_scale is None
        return lacks_scale or (self.tail.weights in _EXTRA_KEYS and self.tail.extra is None)

    def table_row(self, group_word: int) -> TableRow:
        tail = self.tail
        dtype = self.seen.dtype
        is_plain = tail.weights == "parameter" and not tail.stochastic and tail.momentum_dtype == dtype
        kernel = TailKernel(
            dtype,
            self._numerics == "torch" and dtype.itemsize == 2 and is_plain and self.gradient_dtype == dtype,
            False,
            tail.weights,
            tail.stochastic,
            self.gradient_dtype,
            tail.momentum_dtype,
            dtype if tail.ema is None else tail.ema.dtype,
            tail.averages,
            tail.zeroes,
        )
        extra, ema, scale = (0 if t is None else t.data_ptr() for t in (tail.extra, tail.ema, tail.momentum_scale))
        operands = TailOperands(extra, ema, scale, self.group, self.position, kernel, tail.clips)
        return super().table_row(group_word)._replace(tail=operands)


class _OnTailDevice(_OnDevice):
    """The rows of one device, of which some have a tail."""

    step: TailDeviceStep

    def bring_all(
        self, words: list[int], groups: dict[int, _Group], tails: dict[int, _GroupTail], limits: array[int]
    ) -> None:
        """limits: the groups' max_norm, behind all other words."""
        if not self.is_moved:
            return self.step.bring(None)
        wanted = array("q", words if len(words) == len(self._places) else [words[r] for r in self._places])
        for g, in_double in self._group_words:
            wanted.extend(groups[g].in_double if in_double else groups[g].in_float)
            if g in tails:
                wanted.extend(tails[g].in_double if in_double else tails[g].in_float)
        wanted.extend(limits)
        self.step.bring(wanted.tobytes())
        self.is_moved = False
        return None


class _GroupTail:
    """A group's numbers of the tail as the kernel reads them: see tail_kernel.WORDS_OF_TAIL_GROUP."""

    def __init__(self, g: int, groups: int, step: GroupStep, group: _Group) -> None:
        self.step = step
        self.group = group
        words = group.in_float or group.in_double
        # An lr that the kernel reads: it forms what decoupled decay keeps, too.
        keeps = step.decoupled if words[4] & _KIND else 1 - float(group.values[0]) * step.decoupled
        named = {"l1_penalty": step.l1, "1 - lr * decoupled weight decay": keeps, "ema_decay": step.average_weight}
        key = step.random_key - (1 << 64 if step.random_key >= 1 << 63 else 0)
        places = (-1, -1) if math.isnan(step.max_norm) else (8 * groups + 4 * g, 8 * g)

        def in_words(word_of: Any, place: int) -> list[int]:
            return [*(word_of(value, name, g) for name, value in named.items()), key, place]

        self.in_float = in_words(_float_word, places[0]) if group.in_float else []
        self.in_double = in_words(_double_word, places[1]) if group.in_double else []


class TailPlan(StepPlan):
    """A StepPlan of rows of which some have a tail. Its norm and what clips are formed on the device."""

    def __init__(
        self, rows: Sequence[Row], groups: list[list[Tensor]], state: dict[Tensor, Any], numerics: str
    ) -> None:
        self._numerics = numerics
        self._tail: TailStep | None = None
        self._tails: dict[int, _GroupTail] = {}
        self._limits = array("q")
        self._norm: Tensor | None = None
        self._skip_flag: Tensor | None = None  # of the last step, where it may have been skipped for its norm
        self._warming_up: list[int] = []  # groups whose next average will have another weight
        self._number_of_groups = len(groups)
        self._state_names: list[Any] = []  # of what the state holds
        self._state_tensors: list[Any] = []
        super().__init__(rows, groups, state, numerics)
        self._idle = [
            ONLY_AVERAGED if isinstance(row, _TailRow) and row.tail.averages and row.seen.shape.numel() else 0
            for row in self._rows
        ]
        tail_rows = [row for row in self._rows if isinstance(row, _TailRow)]
        self._tail_groups = sorted({row.group for row in tail_rows})
        self._averaging = {row.group for row in tail_rows if row.tail.averages}
        self._random = [row for row in tail_rows if row.tail.stochastic]
        self._zeroes = any(row.zeroes for row in tail_rows)

    # --- rows

    @staticmethod
    def _refusal(row: Row) -> str | None:
        if row.tail is None:
            return StepPlan._refusal(row)
        tail = row.tail
        kept = (tail.extra, tail.momentum_scale, tail.ema, row.momentum_buffer)
        if (reason := why_not_planned(row.param)) is not None:
            return reason
        for tensor in kept:
            if tensor is not None and (reason := why_not_planned(tensor, launcher.TYPES)) is not None:
                return reason
        if row.momentum_buffer is not None and row.momentum_buffer.dtype != tail.momentum_dtype:
            return f"its momentum buffer is {row.momentum_buffer.dtype}, not {tail.momentum_dtype}"
        return None

    def _planned(self, row: Row) -> _PlanRow:
        return _PlanRow(row) if row.tail is None else _TailRow(row, row.tail, self._numerics)

    @property
    def _on_devices(self) -> list[_OnTailDevice]:
        return cast("list[_OnTailDevice]", list(self._devices.values()))

    def _on_device(self, device: torch.device, places: list[int], rows: list[_PlanRow], numerics: str) -> _OnDevice:
        return _OnTailDevice(device, places, rows, TailDeviceStep(device, numerics, self._number_of_groups))

    # --- what backends.Plan asks for

    def prepare(self, groups: list[dict[str, Any]], state: dict[Tensor, Any], tail: TailStep | None = None) -> int:
        with self._abandoned_if_it_fails():
            return self._check(groups, state) if self._take_tail(tail) else -1

    def sums(self, grad_scale: Tensor | None = None) -> list[Tensor]:
        with self._abandoned_if_it_fails():
            self._bring()
            return [device.step.sums() for device in self._measured(grad_scale)]

    def launch(
        self, coefficients: Sequence[float] | Tensor | None = None, grad_scale: Tensor | None = None
    ) -> list[tuple[int, Tensor]]:
        with self._abandoned_if_it_fails():
            self._skip_flag = None
            self._bring()
            for device in self._on_devices:
                device.step.set_coefficients(coefficients)
            return self._launch(grad_scale, None)

    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        tail: TailStep | None = None,
    ) -> list[tuple[int, Tensor]] | None:
        self._skip_flag = None
        if torch._C._len_torch_dispatch_stack() != 0:  # a mode sees what goes through torch's dispatcher
            return None
        has_amp = grad_scale is not None or found_inf is not None
        if has_amp and not (self._is_amp_word(grad_scale) and self._is_amp_word(found_inf)):
            return None
        if tail is not None and tail.clips and len(self._devices) != 1:
            return None
        with self._abandoned_if_it_fails():
            # Under GradScaler only the device knows whether a step fills the momentum buffers that it would make.
            if not self._take_tail(tail) or self._check(groups, state) != 0 or (has_amp and self._fresh):
                self.abandon()
                return None
            return self._step(grad_scale, found_inf)

    def grad_norm(self) -> Tensor | None:
        if self._norm is not None:
            launcher.note_reading(self._norm)  # it lies in the workspace, which goes with the optimizer
        return self._norm

    def was_skipped(self) -> bool:
        return INTERPRETED and self._skip_flag is not None and self._skip_flag.item() != 0

    # --- the numbers of a step

    def _take_tail(self, tail: TailStep | None) -> bool:
        """False: not the numbers of the groups that the plan was built on."""
        if tail is None or len(tail.groups) != self._number_of_groups:
            return False
        steps = {g: tail.groups[g] for g in self._tail_groups}
        if None in steps.values():
            return False
        for device in self._on_devices:
            device.step.begin()
        before = self._tail
        if before is None or before.norm_dtype != tail.norm_dtype:
            for device in self._on_devices:
                device.step.norm_dtype = tail.norm_dtype
                device.is_changed = True
        for g, step in steps.items():
            earlier = None if before is None else before.groups[g]
            if earlier is not None and step is not None and earlier.l2 != step.l2:
                self._hyperparameters.pop(g, None)
        self._tail = tail
        return True

    def _same_options(self, groups: list[dict[str, Any]]) -> bool:
        return True  # _take_tail() has seen to that

    def _in_words(self, g: int, values: tuple[Any, ...]) -> _Group:
        step = None if self._tail is None else self._tail.groups[g]
        if step is None or step.l2:
            return super()._in_words(g, values)
        lr, momentum, dampening, _, *rest = values
        return super()._in_words(g, (lr, momentum, dampening, 0.0, *rest))._replace(values=values)

    def _read_hyperparameters(self, groups: list[dict[str, Any]]) -> bool:
        if not super()._read_hyperparameters(groups):
            return False
        tail = self._tail
        assert tail is not None, "_take_tail() comes first"
        for g in self._tail_groups:
            step, group, known = tail.groups[g], self._hyperparameters[g], self._tails.get(g)
            assert step is not None, "_take_tail() has looked"
            if known is None or known.group is not group or known.step != step:
                self._tails[g] = _GroupTail(g, self._number_of_groups, step, group)
                self._words_changed()
        limits = [math.nan if step is None else step.max_norm for step in tail.groups]
        limit_words = array("q", array("d", limits).tobytes())
        if limit_words != self._limits:
            self._limits = limit_words
            self._words_changed()
        self._warming_up = [g for g in self._averaging if _is_warming_up(groups[g], tail.groups[g])]
        return True

    # --- checks

    def _buffers_in(self, state: dict[Tensor, Any]) -> list[Tensor | None] | None:
        for row in self._rows:
            if isinstance(row, _TailRow) and row.is_stale(state.get(row.param)):
                return None
        return super()._buffers_in(state)

    def read_rows(self, gradients: Sequence[Tensor | None], buffers: Sequence[Tensor | None]) -> None:
        super().read_rows(gradients, buffers)
        if not self._zeroes or self._left:
            return
        places = [(r, gradient) for r, gradient in enumerate(gradients) if gradient is not None]
        extents = [extent_of(gradient) for _, gradient in places]
        if (r := self._entangled([r for r, _ in places], extents)) is not None:
            self.abandon()
            reason = f"zero_grads: the gradient of {self._rows[r]} shares memory with another"
            self._left = [(own, reason) for own in range(len(self._rows))]

    def _entangled(self, rows: Sequence[int], extents: Sequence[tuple[int, int]]) -> int | None:
        """A row whose gradient is to be zeroed and shares memory with another's."""
        reach, at_reach = 0, -1
        for (begin, end), r in sorted(zip(extents, rows, strict=True)):
            if begin == end:
                continue
            if begin < reach:
                for each in (r, at_reach):
                    if self._rows[each].zeroes:
                        return each
            if end > reach:
                reach, at_reach = end, r
        return None

    def _read_row(self, r: int, gradient: Tensor | None, buffer: Tensor | None) -> str | None:
        row = self._rows[r]
        if not isinstance(row, _TailRow):
            return super()._read_row(r, gradient, buffer)
        if row.tail.averages and row.tail.ema is None:
            raise _Stale
        reason = super()._read_row(r, gradient, buffer)
        if gradient is None:
            self._words[r] = self._idle[r]
            if row.tail.ema is not None:
                self._written.append(row.tail.ema)
        return reason

    def _read_gradient(self, r: int, gradient: Tensor) -> str | None:
        row = self._rows[r]
        if not isinstance(row, _TailRow):
            return super()._read_gradient(r, gradient)
        has_momentum = self._hyperparameters[row.group].has_momentum
        if row.lacks_state(has_momentum):
            raise _Stale
        if row.zeroes:
            if gradient.is_neg() or gradient._is_zerotensor():
                return "its gradient carries a lazy negation, which zero_grads=True would have to end"
            if not surely_distinct(gradient.shape, gradient.stride()):
                return "several elements of its gradient, which zero_grads=True writes, may share memory"
        if gradient.dtype != row.gradient_dtype:
            row.gradient_dtype = gradient.dtype
            self._devices[row.seen.device].is_changed = True
            self._moments.clear()  # which were of another table
        reason = super()._read_gradient(r, gradient)
        written = [row.tail.extra, row.tail.ema, row.tail.momentum_scale if has_momentum else None]
        self._written += [tensor for tensor in written if tensor is not None]
        return reason

    # --- the usual step

    def _same_tensors(self, state: dict[Tensor, Any]) -> bool:
        names, tensors = _contents_of(state)
        return names == self._state_names and all(map(operator.is_, tensors, self._state_tensors))

    def _remember_tensors(self, state: dict[Tensor, Any]) -> bool:
        self._state_names, self._state_tensors = _contents_of(state)
        return True

    def _may_lie_at(self, moment: _Moment, addresses: list[int]) -> bool:
        if not self._zeroes:
            return True
        extents = [(address, address + size) for address, size in zip(addresses, moment.sizes, strict=True)]
        return self._entangled(moment.rows, extents) is None

    # --- the step itself

    def _step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> list[tuple[int, Tensor]]:
        """All of it, on one device where it clips."""
        tail = self._tail
        assert tail is not None, "_take_tail() comes first"
        skips: Tensor | None = found_inf
        self._bring()
        if tail.clips:
            (device,) = self._measured(grad_scale)
            norms = device.step.norms()
            first = next(g for g, step in enumerate(tail.groups) if step is not None and step.max_norm == step.max_norm)
            self._norm = norms if tail.norm_per_group else norms[first]
            if grad_scale is not None and found_inf is None:
                skips = device.step.flag()
            elif (
                tail.error_if_nonfinite
                and device.step.flag().item()
                and not (found_inf is not None and found_inf.item())
            ):
                raise RuntimeError(
                    "The total norm for gradients is non-finite, so it cannot be clipped (error_if_nonfinite=True); "
                    "nothing has been written"
                )
        self._skip_flag = skips
        return self._launch(grad_scale, skips)

    def _bring(self) -> None:
        if any(device.step.is_capturing() for device in self._on_devices):
            self._check_capture()
        self._has_stepped = any(self._words) or (self._tail is not None and self._tail.clips)
        for device in self._on_devices:  # all of them: none has written anything if this fails
            device.bring_all(self._words, self._hyperparameters, self._tails, self._limits)

    def _check_capture(self) -> None:
        """Raises for numbers that the host forms for each step: a graph would replay one step's."""
        for g in self._warming_up:
            raise RuntimeError(
                f"group {g}: the weight of its average still changes from step to step (the first average, or "
                "ema_warmup), and a CUDA graph would repeat this one: capture a later step"
            )
        for row in self._random:
            raise RuntimeError(
                f"{row}: rounding='stochastic' draws new numbers at every step, and a CUDA graph would repeat those of "
                "one: such a step cannot be captured"
            )
        if self._tail is not None and self._tail.clips and self._tail.error_if_nonfinite:
            raise RuntimeError("error_if_nonfinite=True waits for the norm, which a step in a CUDA graph cannot do")

    def _measured(self, grad_scale: Tensor | None) -> list[_OnTailDevice]:
        """The devices, their sums and norms under way."""
        assert self._tail is not None, "_take_tail() comes first"
        for device in self._on_devices:
            scale = _here(grad_scale, device.device)
            device.step.measure(0 if scale is None else scale.data_ptr(), device.words, self._tail.norm_per_group)
        return self._on_devices

    def _launch(self, grad_scale: Tensor | None, skips: Tensor | None) -> list[tuple[int, Tensor]]:
        for device in self._on_devices:
            amp = [_here(word, device.device) for word in (grad_scale, skips)]
            device.step.launch(*(0 if word is None else word.data_ptr() for word in amp))
        torch._C._increment_version(self._written)
        if self._zeroes:
            stepped = [row.param.grad for r, row in enumerate(self._rows) if row.zeroes and self._words[r] & _ADDRESS]
            torch._C._increment_version([gradient for gradient in stepped if gradient is not None])
        return self._made()


def _is_warming_up(group: dict[str, Any], step: GroupStep | None) -> bool:
    """Whether the weight of the average is another one than later steps will have."""
    decay = group.get("ema_decay")
    return step is not None and step.average_weight != (step.average_weight if decay is None else 1 - decay)


def _contents_of(state: dict[Tensor, Any]) -> tuple[list[Any], list[Any]]:
    """What the entries of a state are called, and what they are: an entry's number, then its names."""
    entries = list(state.values())
    return (
        [*map(len, entries), *itertools.chain.from_iterable(entries)],
        list(itertools.chain.from_iterable(map(dict.values, entries))),
    )
