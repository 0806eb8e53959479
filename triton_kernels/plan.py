"""What is fixed between steps, and the check that it still holds: csrc/step_plan and csrc/module once more, in Python.

For a process without the C++ extension. As long as tensors, groups and state are what they were in an earlier step,
some calls that each go through all tensors in C find that out, and pick up the gradients' addresses. Whatever differs
sends the step through read_rows(), which looks at every tensor by itself. Called through wd_fused/backends.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
import struct
from array import array
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import launcher, sgd_kernel
from .device_step import DeviceStep, undisturbed
from .launcher import DEVICE_TYPE
from .table import (
    DTYPES,
    Dim,
    ExtentSet,
    TableRow,
    extent_bytes,
    extent_of,
    rows_that_meet,
    strided_layout,
    surely_distinct,
)

if TYPE_CHECKING:
    from wd_fused.backends import Row
    from wd_fused.tail import TailStep

FIRST: int = sgd_kernel.FIRST.value
RUNNING: int = sgd_kernel.RUNNING.value
DECAYS: int = sgd_kernel.DECAYS.value
NESTEROV: int = sgd_kernel.NESTEROV.value
MAXIMIZE: int = sgd_kernel.MAXIMIZE.value
WEIGHT_DECAY_KIND: int = sgd_kernel.WEIGHT_DECAY_KIND.value
WORDS_OF_GROUP = sgd_kernel.WORDS_OF_GROUP

_KIND_OF = {dtype: place + 1 for place, dtype in enumerate(DTYPES)}
_HYPERPARAMETERS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "differentiable")
_hyperparameters_of = operator.itemgetter(*_HYPERPARAMETERS)
_grad_of = operator.attrgetter("grad")
_buffer_of = operator.itemgetter("momentum_buffer")
_storage_of = Tensor.untyped_storage
_bytes_of = torch.UntypedStorage.nbytes


# --- tensors -----------------------------------------------------------------------------------------------------


def _keys(tensor: Tensor) -> int:
    """The tensor's dispatch keys: they tell device, layout, subclass and lazy bits at once."""
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    return keys


@functools.cache
def _plain_keys(device_type: str) -> int:
    """Of a tensor that is nothing but a tensor."""
    with undisturbed():
        return _keys(torch.empty(0, device=device_type))


def _missing_memory(tensor: Tensor) -> str | None:
    """Why it cannot be read to its end, as when somebody has resized its storage; None if it can."""
    storage, needed = tensor.untyped_storage(), _needed_bytes(tensor)
    if needed <= storage.nbytes() and (needed == 0 or storage.data_ptr() != 0):
        return None
    return f"has a storage of {storage.nbytes()} bytes, and its shape and strides need {needed}"


def _needed_bytes(tensor: Tensor) -> int:
    """Of its storage, from the beginning."""
    offset = int(tensor.storage_offset())
    return offset * tensor.element_size() + extent_bytes(tensor) if tensor.numel() else 0


def _is_misaligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % tensor.element_size() != 0


def why_not_planned(tensor: Tensor, dtypes: Collection[torch.dtype] = tuple(launcher.STORAGES)) -> str | None:
    """Why a plan does not take this parameter or momentum buffer; None if it does.

    It takes strided tensors of four dtypes on the device that Triton compiles for, of no subclass that dispatches to
    Python, no lazy negation, no inference tensor, no element under two indices. dtypes: others, of what a tail keeps.
    """
    if torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
        return "it is a tensor subclass with its own dispatch"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"its layout is {tensor.layout}"
    if tensor.device.type != DEVICE_TYPE:
        return launcher.why_not_on(tensor.device, tensor.dtype)
    if tensor.dtype not in dtypes:
        return f"its dtype is {_name_of(tensor.dtype)}"
    if tensor.is_inference():
        return "it was made in inference mode"
    if _keys(tensor) != _plain_keys(DEVICE_TYPE):
        return "it carries a lazy negation or a function transform"
    if (missing := _missing_memory(tensor)) is not None:
        return f"it {missing}"
    if _is_misaligned(tensor):
        return "its address is no multiple of its element size"
    if not surely_distinct(tensor.shape, tensor.stride()):
        return "several of its elements may share memory"
    return launcher.why_not_on(tensor.device, tensor.dtype) if tensor.dtype in launcher.STORAGES else None


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Seen(NamedTuple):
    """What was seen of a tensor when the plan was built on it. It was a plain one."""

    address: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    strides: tuple[int, ...]
    has_memory: bool


def _seen(tensor: Tensor) -> _Seen:
    is_plain = _keys(tensor) == _plain_keys(DEVICE_TYPE)
    address, strides = (tensor.data_ptr(), tensor.stride()) if is_plain else (-1, ())
    has_memory = is_plain and _missing_memory(tensor) is None
    return _Seen(address, tensor.dtype, tensor.device, tensor.shape, strides, has_memory)


class _Likeness:
    """Tells whether tensors still are what they were, but for addresses: type, keys, dtype, device, sizes, strides.

    torch.compile's own guard does it for all of them in one call; it is no public part of torch, so where it is missing
    each tensor is asked.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        try:
            from torch._C._dynamo.guards import TensorGuards

            guards: Any = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            self._check = guards.check
            if not self._check(*tensors):
                raise RuntimeError("a guard that refuses what it was made of")
        except (ImportError, AttributeError, TypeError, RuntimeError):
            seen = [self._looks(tensor) for tensor in tensors]
            self._check = lambda *now: [self._looks(tensor) for tensor in now] == seen

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == 0 or bool(self._check(*tensors))

    @staticmethod
    def _looks(tensor: Tensor) -> tuple[Any, ...]:
        return type(tensor), _keys(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


# --- groups ------------------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """A group's hyperparameters as the kernel reads them."""

    values: tuple[Any, ...]  # as the group holds them
    has_momentum: bool
    in_float: list[int]  # words; empty where no row needs them
    in_double: list[int]


def _number(value: Any, name: str, group: int) -> float:
    try:
        return math.ldexp(value, 0)  # as C converts it: not from text
    except (TypeError, ValueError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else RuntimeError
        raise kind(f"group {group}: {name}={value!r}: {error}") from None
    except OverflowError as error:
        raise RuntimeError(f"group {group}: {name}=a number of hundreds of digits: {error}") from None


def _float_word(value: float, name: str, group: int) -> int:
    try:
        (word,) = struct.unpack("<q", struct.pack("<f4x", value))
    except OverflowError:
        given = -value if name == "lr" else value
        raise RuntimeError(f"group {group}: {name}={given:g} does not fit into float32") from None
    return int(word)


def _double_word(value: float, name: str, group: int) -> int:
    (word,) = struct.unpack("<q", struct.pack("<d", value))
    return int(word)


# --- rows --------------------------------------------------------------------------------------------------------


class _PlanRow:
    """A parameter of the plan. The caller keeps it alive."""

    words_of_group = WORDS_OF_GROUP  # that its group's hyperparameters take
    takes_any_gradient = False  # of another dtype than its own, too
    zeroes = False  # the gradient, in the end

    def __init__(self, row: Row) -> None:
        self.param = row.param
        self.group = row.group
        self.position = row.position
        self.buffer = row.momentum_buffer
        self.is_serial = False
        self.is_fresh = False  # the step under way made its buffer
        self.seen = _seen(row.param)
        self.buffer_seen = None if self.buffer is None else _seen(self.buffer)
        self.gradient_strides = self.seen.strides
        self.layout = self.laid_out(self.gradient_strides)

    def laid_out(self, gradient_strides: tuple[int, ...]) -> list[Dim] | None:
        """How the operands lie with such a gradient."""
        buffer = self.seen.strides if self.buffer_seen is None else self.buffer_seen.strides
        return strided_layout(self.seen.shape, self.seen.strides, gradient_strides, buffer)

    def new_buffer(self) -> Tensor:
        return torch.empty_like(self.param.detach())

    def own_tensors(self) -> list[Tensor]:
        """All that a step may write, but for the gradient."""
        return [self.param] if self.buffer is None else [self.param, self.buffer]

    def table_row(self, group_word: int) -> TableRow:
        return TableRow(
            self.seen.address,
            0 if self.buffer_seen is None else self.buffer_seen.address,
            self.seen.shape.numel(),
            DTYPES.index(self.seen.dtype),
            group_word,
            self.layout,
            self.is_serial,
        )

    def __str__(self) -> str:
        return f"group {self.group}, parameter {self.position}"


class _Stale(Exception):
    """The plan is not what it was built on any more."""


class _LeaveAll(Exception):
    """Only torch's own order gives torch's result."""


class _Moment(NamedTuple):
    """The gradients of a step, as a later step may have them again."""

    rows: list[int]  # that have one
    likeness: _Likeness
    kinds: list[int]  # what each row's step does with its momentum buffer
    sizes: list[int]  # of their memory, in bytes
    needed: list[int]  # bytes of their storages
    masks: list[int]  # the bits of an address that must not be set
    written: list[Tensor]


_ADDRESSES = 1 << 14
_MOMENTS = 16  # that a plan remembers: gradients come and go in few patterns, if in more than one


class StepPlan:
    """A step over fixed rows; its methods are those of backends.Plan.

    Args:
        rows: what to step. The caller keeps the parameters alive.
        groups: the parameters of every group, planned or not: a change there is noticed.
        state: the optimizer's, with the rows' momentum buffers.
        numerics: "torch" or "opmath".

    Raises:
        RuntimeError: a tensor is not what why_not_planned() takes.
    """

    _last: tuple[_Moment, list[int]] | None  # what self._words was made of, if of a step like one before

    def __init__(
        self, rows: Sequence[Row], groups: list[list[Tensor]], state: dict[Tensor, Any], numerics: str
    ) -> None:
        for row in rows:
            if (reason := self._refusal(row)) is not None:
                raise RuntimeError(f"group {row.group}, parameter {row.position} cannot be planned: {reason}")
        self._rows = [self._planned(row) for row in rows]
        self._params = [row.param for row in self._rows]
        self._groups = groups
        self._keys_of_groups: list[list[str]] = []  # when they were first read
        self._used_groups = sorted({row.group for row in self._rows})
        extents = [(*extent_of(tensor), r) for r, row in enumerate(self._rows) for tensor in row.own_tensors()]
        self._written_memory = ExtentSet()
        self._written_memory.add([(begin, end) for begin, end, _ in extents])
        by_device: dict[torch.device, list[int]] = {}
        for r, meets in enumerate(rows_that_meet(extents, len(rows))):
            self._rows[r].is_serial = meets
            by_device.setdefault(self._rows[r].seen.device, []).append(r)
        self._devices = {
            device: self._on_device(device, own, [self._rows[r] for r in own], numerics)
            for device, own in by_device.items()
        }
        self._hyperparameters: dict[int, _Group] = {}
        self._must_forget = False  # them after the step: they are not plain numbers, which cannot change
        self._has_stepped = False
        self._idle = [0] * len(rows)  # the words of rows without a gradient
        self._words = [0] * len(rows)  # of the step under way
        self._left: list[tuple[int, str]] = []
        self._fresh: list[int] = []
        self._gradients: list[Tensor] = []  # of the step under way
        self._written: list[Tensor] = []
        self._keys: list[Any] = []
        self._row_of_key: list[int] = []
        self._forget_past()
        self.read_state(state)

    # --- what tail_plan.py does otherwise, too

    @staticmethod
    def _refusal(row: Row) -> str | None:
        for tensor in (row.param, row.momentum_buffer):
            if tensor is not None and (reason := why_not_planned(tensor)) is not None:
                return reason
        return None

    def _planned(self, row: Row) -> _PlanRow:
        return _PlanRow(row)

    def _on_device(self, device: torch.device, places: list[int], rows: list[_PlanRow], numerics: str) -> _OnDevice:
        return _OnDevice(device, places, rows, DeviceStep(device, numerics))

    # --- what backends.Plan asks for

    def prepare(self, groups: list[dict[str, Any]], state: dict[Tensor, Any], tail: TailStep | None = None) -> int:
        with self._abandoned_if_it_fails():
            return self._check(groups, state)

    def left(self) -> list[tuple[int, str]]:
        return self._left

    def abandon(self) -> None:
        for r in self._fresh:
            row = self._rows[r]
            if row.is_fresh:
                row.buffer = row.buffer_seen = None
                row.is_fresh = False
                self._devices[row.seen.device].is_changed = True
        self._words = [0] * len(self._rows)
        self._words_changed()
        self._last = None
        self._forget()

    def sums(self, grad_scale: Tensor | None = None) -> list[Tensor]:
        return []  # no row counts in a norm

    def launch(
        self, coefficients: Sequence[float] | Tensor | None = None, grad_scale: Tensor | None = None
    ) -> list[tuple[int, Tensor]]:
        with self._abandoned_if_it_fails():
            return self._run(grad_scale, None)

    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        tail: TailStep | None = None,
    ) -> list[tuple[int, Tensor]] | None:
        if torch._C._len_torch_dispatch_stack() != 0:  # a mode sees what goes through torch's dispatcher
            return None
        has_amp = grad_scale is not None or found_inf is not None
        if has_amp and not (self._is_amp_word(grad_scale) and self._is_amp_word(found_inf)):
            return None
        with self._abandoned_if_it_fails():
            # Under GradScaler only the device knows whether a step fills the momentum buffers that it would make.
            if self._check(groups, state) != 0 or (has_amp and self._fresh):
                self.abandon()
                return None
            return self._run(grad_scale, found_inf)

    def grad_norm(self) -> Tensor | None:
        return None

    def was_skipped(self) -> bool:
        return False

    def read_state(self, state: dict[Tensor, Any]) -> None:
        keys = list(state)
        if len(keys) != len(self._keys) or not all(map(operator.is_, keys, self._keys)):
            row_of = {id(param): r for r, param in enumerate(self._params)}
            self._forget_past()
            self._row_of_key = [row_of.get(id(key), -1) for key in keys]
            self._keys = keys

    def launches(self) -> list[dict[str, Any]]:
        """What the last step launched: for tests and measurements."""
        devices = self._devices.values() if self._has_stepped else ()
        return [launch for device in devices for launch in device.step.launches()]

    def once(self, gradients: Sequence[Tensor], hyperparameters: dict[str, Any]) -> list[Tensor | None]:
        """A step with these gradients, of a plan with one group; the momentum buffers."""
        with self._abandoned_if_it_fails():
            self._read_hyperparameters([{**hyperparameters, "differentiable": False}])
            self.read_rows(gradients, [row.buffer for row in self._rows])
            if self._left:
                r, reason = self._left[0]
                raise RuntimeError(f"{self._rows[r]}: {reason}")
            self.make_ready()
            self._run(None, None)
        return [row.buffer for row in self._rows]

    # --- checks

    @contextlib.contextmanager
    def _abandoned_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # nothing of the step stays behind
            self.abandon()
            raise

    def _check(self, groups: Any, state: Any) -> int:
        """Reads all of a step: -1 if the plan no longer holds, else how many rows it leaves."""
        if self._read_as_before(groups, state):
            return 0
        self.abandon()
        if not (isinstance(groups, list) and isinstance(state, dict)):
            return -1
        if not (self._same_groups(groups) and self._read_hyperparameters(groups)):
            return -1
        buffers = self._buffers_in(state)
        if buffers is None:
            return -1
        try:
            self.read_rows([param.grad for param in self._params], buffers)
        except _Stale:
            self.abandon()
            return -1
        self.make_ready()
        self._remember(state)
        return len(self._left)

    def read_rows(self, gradients: Sequence[Tensor | None], buffers: Sequence[Tensor | None]) -> None:
        """Looks at every row by itself. Writes nothing, but makes the momentum buffers that there are none of."""
        why_all = None
        for r, row in enumerate(self._rows):
            try:
                reason = self._read_row(r, gradients[r], buffers[r])
            except _LeaveAll as leave_all:  # unless a later row is stale: then it was of memory that is not the plan's
                why_all = why_all or str(leave_all)
                continue
            if reason is not None and row.is_serial:
                why_all = why_all or f"{reason}, and it shares memory with another parameter"
            elif reason is not None:
                self._left.append((r, reason))
        if why_all is not None:
            self.abandon()
            self._left = [(r, why_all) for r in range(len(self._rows))]

    def _same_groups(self, groups: Any) -> bool:
        if len(groups) != len(self._groups):
            return False
        for group, own in zip(groups, self._groups, strict=True):
            if not isinstance(group, dict):
                return False
            params = group["params"]
            if not isinstance(params, (list, tuple)) or len(params) != len(own):
                return False
            if not all(map(operator.is_, params, own)):
                return False
        return self._same_options(groups)

    def _same_options(self, groups: list[dict[str, Any]]) -> bool:
        """Whether no group can have got an option of the tail, which would be a key more."""
        keys = [*map(list, groups)]
        self._keys_of_groups = self._keys_of_groups or keys
        return keys == self._keys_of_groups

    def _same_keys(self, state: dict[Tensor, Any]) -> bool:
        return len(state) == len(self._keys) and all(map(operator.is_, state, self._keys))

    def _read_hyperparameters(self, groups: list[dict[str, Any]]) -> bool:
        """False: autograd is to run through the step."""
        for g in self._used_groups:
            values = _hyperparameters_of(groups[g])
            known = self._hyperparameters.get(g)
            # The same numbers, not equal ones: -0.0 equals 0.0.
            if known is not None and all(map(operator.is_, values, known.values)):
                continue
            if values[-1] or any(isinstance(value, Tensor) and value.requires_grad for value in values):
                return False
            self._must_forget |= not {type(value) for value in values} <= {float, int, bool}
            self._hyperparameters[g] = self._in_words(g, values)
            self._words_changed()
        return True

    def _in_words(self, g: int, values: tuple[Any, ...]) -> _Group:
        lr, momentum, dampening, weight_decay, nesterov, maximize, _ = values
        kinds = [_KIND_OF[value.dtype] if self._is_on_device(value) else 0 for value in (lr, weight_decay)]
        numbers = [
            0.0 if kind else _number(value, name, g)
            for kind, name, value in zip(kinds, ("lr", "weight_decay"), (lr, weight_decay), strict=True)
        ]
        momentum = _number(momentum, "momentum", g)
        _number(dampening, "dampening", g)
        flags = kinds[0] | kinds[1] << WEIGHT_DECAY_KIND | (DECAYS if numbers[1] != 0 else 0)
        flags |= (NESTEROV if nesterov else 0) | (MAXIMIZE if maximize else 0)
        named = {"lr": -numbers[0], "weight_decay": numbers[1], "momentum": momentum}
        named["1 - dampening"] = float(1 - dampening)  # as torch forms it: in the type of what was given
        addresses = [value.data_ptr() if kind else None for kind, value in zip(kinds, (lr, weight_decay), strict=True)]

        def words(word_of: Any) -> list[int]:
            made = [word_of(value, name, g) for name, value in named.items()]
            for place, address in enumerate(addresses):
                made[place] = made[place] if address is None else address
            return [*made, flags]

        dtypes = {row.seen.dtype for row in self._rows if row.group == g}
        return _Group(
            values,
            momentum != 0,
            words(_float_word) if dtypes - {torch.float64} else [],
            words(_double_word) if torch.float64 in dtypes else [],
        )

    def _is_on_device(self, value: Any) -> bool:
        """Whether the step reads this hyperparameter on its device: to ask for it now would wait."""
        return isinstance(value, Tensor) and list(self._devices) == [value.device] and self._is_readable(value)

    def _is_readable(self, value: Tensor) -> bool:
        return (
            _keys(value) == _plain_keys(DEVICE_TYPE)
            and value.numel() == 1
            and value.dtype in _KIND_OF
            and _missing_memory(value) is None
            and not _is_misaligned(value)
            and not self._written_memory.meets(extent_of(value))
        )

    def _is_amp_word(self, word: Tensor | None) -> bool:
        return word is None or (word.dtype == torch.float32 and self._is_readable(word))

    def _buffers_in(self, state: dict[Tensor, Any]) -> list[Tensor | None] | None:
        """The rows' momentum buffers as the state has them; None: not what the plan can read."""
        if not self._same_keys(state):
            return None
        buffers: list[Tensor | None] = [None] * len(self._rows)
        for r, entry in zip(self._row_of_key, state.values(), strict=True):
            if r < 0:
                continue
            buffer = entry.get("momentum_buffer") if isinstance(entry, dict) else entry
            if buffer is not None and not isinstance(buffer, Tensor):
                return None
            buffers[r] = buffer
        return buffers

    def _read_row(self, r: int, gradient: Tensor | None, buffer: Tensor | None) -> str | None:
        """Takes a row into the step under way, or tells why it is left to others."""
        row = self._rows[r]
        if _seen(row.param) != row.seen or buffer is not row.buffer:
            raise _Stale
        if row.buffer is not None and _seen(row.buffer) != row.buffer_seen:
            raise _Stale
        if gradient is None:
            return None
        if (reason := _why_left(row, gradient)) is not None:
            return reason
        return self._read_gradient(r, gradient)

    def _read_gradient(self, r: int, gradient: Tensor) -> str | None:
        """The same of a row that is as it was."""
        row = self._rows[r]
        if gradient.is_neg() or gradient._is_zerotensor():
            with undisturbed():
                gradient = gradient.resolve_neg().clone()
        # p.grad may be p itself: an element is read before it is written. Any other overlap depends on torch's order.
        is_param = gradient.data_ptr() == row.seen.address and gradient.stride() == row.seen.strides
        is_param = is_param and gradient.dtype == row.seen.dtype and not row.zeroes
        if not is_param and self._written_memory.meets(extent_of(gradient)):
            raise _LeaveAll(f"the gradient of {row} shares memory with a parameter or a momentum buffer")

        kind = 0
        on_device = self._devices[row.seen.device]
        if self._hyperparameters[row.group].has_momentum:
            kind = RUNNING
            if row.buffer is None:
                with undisturbed():
                    row.buffer = row.new_buffer()
                row.buffer_seen = _seen(row.buffer)
                row.is_fresh = True
                self._fresh.append(r)
                kind = FIRST
                on_device.is_changed = True
            self._written.append(row.buffer)
        if row.is_fresh or gradient.stride() != row.gradient_strides:
            layout = row.laid_out(gradient.stride())
            if layout != row.layout:
                on_device.is_changed = True
                self._moments.clear()  # which were of another table
                row.layout = layout
            row.gradient_strides = gradient.stride()
        self._words[r] = gradient.data_ptr() | kind if gradient.numel() else 0
        self._gradients.append(gradient)
        self._written.append(row.param)
        return None

    # --- the usual step

    def _forget_past(self) -> None:
        self._moments: dict[tuple[bool, ...], _Moment] = {}
        self._apart: dict[int, int] = {}  # addresses, and how many bytes from there are not written
        self._likeness: _Likeness | None = None  # of parameters and momentum buffers
        self._addresses: list[int] = []  # of the same
        self._buffers: list[Tensor] = []  # the rows' own
        self._state_buffers: list[Any] = []  # all that the state has, in its order
        self._last = None

    def _read_as_before(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> bool:
        """Whether the step is like one before, but for gradients' addresses and hyperparameters; if so it is read.

        If not, nothing is said: read_rows() will tell what is different, and whether it matters.
        """
        if self._likeness is None or any(device.is_changed for device in self._devices.values()):
            return False
        try:
            if not (self._same_groups(groups) and self._read_hyperparameters(groups) and self._same_keys(state)):
                return False
            if not self._same_tensors(state):
                return False
            gradients = list(map(_grad_of, self._params))
            moment = self._moments.get(self._pattern(gradients))
            if moment is None:
                return False
            if len(moment.rows) != len(gradients):
                gradients = [gradients[r] for r in moment.rows]
            tensors = self._params + self._buffers
            if not (self._likeness.holds(tensors) and moment.likeness.holds(gradients)):
                return False
            if list(map(Tensor.data_ptr, tensors)) != self._addresses:
                return False
            addresses = list(map(Tensor.data_ptr, gradients))
        except (KeyError, TypeError, AttributeError):
            return False
        if self._last is None or self._last[0] is not moment or self._last[1] != addresses:
            # A storage that is resized moves, so that only those that have moved are asked how large they are.
            if not all(map(operator.ge, map(_bytes_of, map(_storage_of, gradients)), moment.needed)):
                return False
            for address, size, mask in zip(addresses, moment.sizes, moment.masks, strict=True):
                if address & mask or (address == 0 and size != 0):
                    return False
                if self._apart.get(address, -1) < size and not self._is_apart(address, size):
                    return False
            if not self._may_lie_at(moment, addresses):
                return False
            self._words = list(self._idle)
            for r, address, kind in zip(moment.rows, addresses, moment.kinds, strict=True):
                self._words[r] = address | kind
            self._words_changed()
            self._last = moment, addresses
        self._left = []
        self._gradients = gradients
        self._written = moment.written
        return True

    def _same_tensors(self, state: dict[Tensor, Any]) -> bool:
        """Whether the state holds what it held when _remember() looked."""
        return all(map(operator.is_, map(_buffer_of, state.values()), self._state_buffers))

    def _may_lie_at(self, moment: _Moment, addresses: list[int]) -> bool:
        """Whether gradients may lie there, that share no memory with what is written."""
        return True

    def _is_apart(self, address: int, size: int) -> bool:
        """Whether so many bytes share none with what is written. Kept: allocators give the same addresses again."""
        if self._written_memory.meets((address, address + size)):
            return False
        if len(self._apart) >= _ADDRESSES:
            self._apart.clear()
        self._apart[address] = size
        return True

    def _pattern(self, gradients: Sequence[Tensor | None]) -> tuple[bool, ...]:
        """Which gradients there are, and which groups have momentum."""
        momenta = [self._hyperparameters[g].has_momentum for g in self._used_groups]
        return (*map(operator.is_, gradients, itertools.repeat(None)), *momenta)

    def _remember(self, state: dict[Tensor, Any]) -> None:
        """Has later steps that are like the one just read known by _read_as_before()."""
        gradients = [param.grad for param in self._params]
        there = [(r, gradient) for r, gradient in enumerate(gradients) if gradient is not None]
        if self._left or self._fresh or not all(map(operator.is_, (g for _, g in there), self._gradients)):
            return  # or copies of gradients were taken
        if not all(isinstance(entry, dict) for entry in state.values()):
            return
        if self._likeness is None or not self._likeness.holds(self._params + self._buffers):
            if not self._remember_tensors(state):
                return
            self._moments.clear()
            self._buffers = [tensor for row in self._rows for tensor in row.own_tensors()[1:]]
            tensors = self._params + self._buffers
            self._likeness = _Likeness(tensors)
            self._addresses = list(map(Tensor.data_ptr, tensors))
        if len(self._moments) == _MOMENTS:
            self._moments.clear()
        self._moments[self._pattern(gradients)] = _Moment(
            [r for r, _ in there],
            _Likeness([gradient for _, gradient in there]),
            [self._words[r] & (FIRST | RUNNING) for r, _ in there],
            [extent_bytes(gradient) for _, gradient in there],
            [_needed_bytes(gradient) for _, gradient in there],
            [gradient.element_size() - 1 for _, gradient in there],
            self._written,
        )

    def _remember_tensors(self, state: dict[Tensor, Any]) -> bool:
        """Takes what _same_tensors() compares with; False: it could not."""
        if not all("momentum_buffer" in entry for entry in state.values()):
            return False
        self._state_buffers = list(map(_buffer_of, state.values()))
        return True

    # --- the step itself

    def _words_changed(self) -> None:
        for device in self._devices.values():
            device.is_moved = True

    def make_ready(self) -> None:
        """Does what may take long, or fail, and reads or writes no tensor of the user's."""
        self._words_changed()
        for device in self._devices.values():
            first = next((row for r in self._fresh if (row := self._rows[r]).seen.device == device.device), None)
            # Captured, a first step would fill the buffer anew at every replay.
            if first is not None and device.step.is_capturing():
                raise RuntimeError(
                    f"{first} has no momentum buffer yet, and a first step cannot be captured in a CUDA graph: call "
                    "step() once before the capture (a warm-up iteration, not one that GradScaler skips)"
                )
            device.make_ready()

    def _run(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> list[tuple[int, Tensor]]:
        self._has_stepped = any(self._words)
        devices = self._devices.values() if self._has_stepped else ()
        for device in devices:  # all of them: none has written anything if this fails
            device.bring(self._words, self._hyperparameters)
        for device in devices:
            amp = [_here(word, device.device) for word in (grad_scale, found_inf)]
            device.step.launch(*(0 if word is None else word.data_ptr() for word in amp))
        torch._C._increment_version(self._written)
        return self._made()

    def _made(self) -> list[tuple[int, Tensor]]:
        """Ends a step: the momentum buffers that it made."""
        made = []
        for r in self._fresh:
            row = self._rows[r]
            assert row.buffer is not None
            row.is_fresh = False
            made.append((r, row.buffer))
        if made:
            self._written_memory.add([extent_of(buffer) for _, buffer in made])
            self._forget_past()
        self._forget()
        return made

    def _forget(self) -> None:
        """All that was kept for the step alone."""
        self._left = []
        self._fresh = []
        self._gradients = []
        self._written = []
        if self._must_forget:
            self._hyperparameters = {}
            self._must_forget = False


def _why_left(row: _PlanRow, gradient: Tensor) -> str | None:
    """Why a plan cannot read this gradient; raises where nobody can use it."""
    if gradient.shape != row.seen.shape:
        raise RuntimeError(
            f"{row}: its gradient has shape {list(gradient.shape)}, the parameter has shape {list(row.seen.shape)}; "
            "set the gradient to None or make a new one by backward()"
        )
    if gradient.device != row.seen.device:
        raise RuntimeError(
            f"{row}: its gradient is on {gradient.device}, the parameter on {row.seen.device}; move the gradient with "
            "the parameter"
        )
    if not torch.can_cast(gradient.dtype, row.seen.dtype):
        raise RuntimeError(
            f"{row}: its gradient has dtype {_name_of(gradient.dtype)}, which cannot be used for a parameter of dtype "
            f"{_name_of(row.seen.dtype)}"
        )
    if gradient.layout != torch.strided or gradient.is_nested:
        return f"its gradient has layout {gradient.layout}"
    if torch._C._dispatch_keys(gradient).has(torch._C.DispatchKey.Python):
        return "its gradient is a tensor subclass with its own dispatch"
    if (missing := _missing_memory(gradient)) is not None:
        raise RuntimeError(f"{row}: its gradient {missing}")
    if gradient.dtype != row.seen.dtype and not (row.takes_any_gradient and gradient.dtype in launcher.STORAGES):
        return f"its gradient has dtype {_name_of(gradient.dtype)}, the parameter {_name_of(row.seen.dtype)}"
    if gradient.is_neg() or gradient._is_zerotensor():
        return None  # a copy will do
    if _keys(gradient) != _plain_keys(DEVICE_TYPE):
        return "its gradient carries a function transform"
    if _is_misaligned(gradient):
        return "its gradient's address is no multiple of its element size"
    return None


def _here(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The tensor on this device; a copy that nobody waits for, if it is on another."""
    return tensor if tensor is None or tensor.device == device else tensor.to(device, non_blocking=True)


class _OnDevice:
    """The rows of one device, as a plan tells its DeviceStep of them."""

    def __init__(self, device: torch.device, places: list[int], rows: list[_PlanRow], step: DeviceStep) -> None:
        self.device = device
        self.step = step
        self.is_changed = True  # the rows are not what the step was made ready for
        self.is_moved = True  # the words are not those that it was brought
        self._places = places  # of the rows in the plan
        self._rows = rows
        # Where each group's words begin, once for each opmath that the group's rows need.
        self._group_words: dict[tuple[int, bool], int] = {}
        self.words = len(rows)
        for row in rows:
            if self._group_of(row) not in self._group_words:
                self._group_words[self._group_of(row)] = self.words
                self.words += row.words_of_group

    @staticmethod
    def _group_of(row: _PlanRow) -> tuple[int, bool]:
        return row.group, row.seen.dtype == torch.float64

    def make_ready(self) -> None:
        if not self.is_changed:
            return
        self.step.make_ready([row.table_row(self._group_words[self._group_of(row)]) for row in self._rows])
        self.is_changed = False

    def bring(self, words: list[int], groups: dict[int, _Group]) -> None:
        if not self.is_moved:
            return self.step.bring(None)
        wanted = array("q", words if len(words) == len(self._places) else [words[r] for r in self._places])
        for g, in_double in self._group_words:
            wanted.extend(groups[g].in_double if in_double else groups[g].in_float)
        self.step.bring(wanted.tobytes())
        self.is_moved = False
