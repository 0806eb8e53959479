"""The plans of a step: built, prepared, and whether they still hold."""

import itertools
import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from wd_fused import backends
from wd_fused.backends import Row
from wd_fused.options import kept, spec
from wd_fused.options.spec import Options, StepOptions
from wd_fused.step import objections, sharded
from wd_fused.step.base import ENTANGLED, REPEATED, SEEN_BY_MODES, UNREADABLE, ParameterBackend, Part, Plans
from wd_fused.step.checking import Checking, depends_on_place, group_refusal
from wd_fused.step.extents import extent, has_memory, meet
from wd_fused.step.sharded import is_dtensor


def _have_a_say(groups: list[dict[str, Any]]) -> bool:
    """Whether an active TorchDispatchMode must see a step: all but one of fake tensors that lets real ones through."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    if any(isinstance(param, FakeTensor) for group in groups for param in group["params"]):
        return True
    return not all(
        isinstance(mode, FakeTensorMode) and mode.allow_non_fake_inputs for mode in _get_current_dispatch_mode_stack()
    )


def _prepare(
    plans: Plans, groups: list[dict[str, Any]], state: dict[Tensor, Any], step: StepOptions | None
) -> list[ParameterBackend] | None:
    """Prepares every plan: what they leave to torch's code, or None if one no longer holds."""
    left: list[ParameterBackend] = []
    for part in plans.parts:
        count = part.plan.prepare(groups, state, step) if part.has_options else part.plan.prepare(groups, state)
        if count < 0:
            return None
        if count:
            left += (
                ParameterBackend(part.rows[r].group, part.rows[r].position, "torch", reason)
                for r, reason in part.plan.left()
            )
    return left


def _kind(param: Tensor) -> tuple[Any, ...]:
    strides = param.stride() if param.layout == torch.strided else ()
    return type(param), param.dtype, param.device, param.layout, param.shape, strides


class Planning(Checking):
    def _prepared(self, step: StepOptions | None) -> tuple[Plans, list[ParameterBackend], StepOptions | None]:
        """Plans that hold and have checked everything, what torch must step this time, and the options' numbers."""
        is_seen_by_modes = torch._C._len_torch_dispatch_stack() != 0 and _have_a_say(self.param_groups)
        plans = None if is_seen_by_modes else self._plans
        if plans is not None and not self._still_right(plans):
            plans = None
        left = None if plans is None else _prepare(plans, self.param_groups, self.state, step)
        if plans is None or left is None:
            self._norm = self._last_norm()  # not the plan that has it, and all that the plan points to
            step = self._reader.refresh(self.param_groups)
            self._check_norm_is_whole(step)
            self._drop_unwritten()
            self._make_states()
            plans = self._planned(SEEN_BY_MODES if is_seen_by_modes else None)
            left = _prepare(plans, self.param_groups, self.state, step)
            if left is None:  # groups or state are not of the types that plans read
                plans, left = self._planned(UNREADABLE), []
            self._plans = None if is_seen_by_modes else plans
        with_torch = plans.with_torch + left
        for g in {parameter.group for parameter in with_torch}:
            self._check_numbers(g, None if step is None else step.groups[g])
        for parameter in with_torch:
            self._check_for_torch(parameter)
        return plans, with_torch, step

    def _planned(self, why_nothing_fused: str | None = None) -> Plans:
        self._reader.read(self.param_groups)
        groups = [list(group["params"]) for group in self.param_groups]
        occurrences = Counter(map(id, itertools.chain(*groups)))
        all_differ = len(occurrences) == sum(map(len, groups))
        rows: dict[tuple[str, sharded.Ranks | None], list[Row]] = {}
        with_torch = []
        for g, group in enumerate(self.param_groups):
            group_reason, options = group_refusal(group), self._reader.options[g]
            usual: str = "torch"
            buffers: list[Any] = [False] * len(groups[g])
            if (group_reason, options, why_nothing_fused) == (None, None, None) and all_differ:
                usual, buffers = backends.surely_taken(groups[g], self.state, self._backend)
            of_usual = rows.setdefault((usual, None), []) if any(buffer is not False for buffer in buffers) else []
            for i, (param, buffer) in enumerate(zip(groups[g], buffers, strict=True)):
                if buffer is not False:
                    of_usual.append(Row(param, buffer, g, i))
                    continue
                backend, reason = self._choice(param, group_reason, options)
                if occurrences[id(param)] > 1:
                    backend, reason = "torch", REPEATED
                if why_nothing_fused is not None:
                    backend, reason = "torch", why_nothing_fused
                if backend == "torch":
                    with_torch.append(ParameterBackend(g, i, backend, reason))
                else:
                    row_options = None if options is None else self._row_options(param, g)
                    ranks = sharded.ranks_of(param) if row_options is not None and row_options.clips else None
                    rows.setdefault((backend, ranks), []).append(Row(param, self._buffer(param), g, i, row_options))
        parts = [
            Part(
                name,
                own,
                backends.FUSED[name].plan(own, groups, self.state, self._numerics),
                any(row.options is not None for row in own),
                ranks,
            )
            for (name, ranks), own in rows.items()
        ]
        torch_extents = self._torch_extents(with_torch) if rows else []
        if torch_extents and any([part.plan.keep_off(torch_extents) for part in parts]):
            return self._planned(ENTANGLED)
        may_return = [
            parameter
            for parameter in with_torch
            if parameter.reason not in (REPEATED, UNREADABLE, ENTANGLED)
            and backends.any_usable(groups[parameter.group][parameter.position].device, self._backend)
        ]
        by_reference = self._kinds_by_reference(with_torch)
        return Plans(parts, with_torch, may_return, torch_extents, by_reference, groups, self._reader.structure)

    def _kinds_by_reference(self, with_torch: list[ParameterBackend]) -> list[tuple[Any, ...]]:
        """All that the options were checked against, and what they keep was made for, of the reference's parameters."""
        own = [(g, i) for g, i, _, _ in with_torch if self._reader.options[g] is not None]
        return [_kind(self.param_groups[g]["params"][i]) for g, i in own]

    def _torch_extents(self, with_torch: list[ParameterBackend]) -> list[tuple[int, int]]:
        params = [self.param_groups[g]["params"][i] for g, i, _, _ in with_torch]
        buffers = [buffer for param in params if isinstance(buffer := self._buffer(param), Tensor)]
        return [extent(tensor) for tensor in (*params, *buffers) if has_memory(tensor)]

    def _choice(self, param: Tensor, group_reason: str | None, options: Options | None) -> tuple[str, str]:
        """The backend for a parameter and why, by itself, its group, the options and its state."""
        backend, reason = backends.choose(sharded.local(param), self._backend)
        if backend == "torch":
            return backend, reason
        if is_dtensor(param) and options is not None and depends_on_place(options):
            return "torch", f"it is a DTensor, for which there is no fused code with {options.spelled()}"
        refusal = group_reason or self._buffer_refusal(param, backend, options)
        if options is not None and refusal is None:
            refusal = kept.objection(param, self.state.get(param)) or self._clipping_refusal(param, options)
        return (backend, reason) if refusal is None else ("torch", refusal)

    def _buffer_refusal(self, param: Tensor, backend: str, options: Options | None) -> str | None:
        buffer = self._buffer(param)
        if buffer is None:
            return None
        if not isinstance(buffer, Tensor):
            return f"its momentum buffer is a {type(buffer).__name__}, not a Tensor"
        dtype = param.dtype if options is None else spec.momentum_dtype(param, options)
        if (buffer.dtype, buffer.device, buffer.shape) != (dtype, param.device, param.shape):
            if buffer.shape == param.shape:  # one reason for all parameters of a model that was cast
                kinds = [f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}" for tensor in (buffer, param)]
            else:
                kinds = [objections.described(tensor) for tensor in (buffer, param)]
            return f"its momentum buffer is {kinds[0]}, the parameter {kinds[1]}"
        if not sharded.placed_alike(param, buffer):
            return "its momentum buffer is not placed as it is on the same device mesh"
        param, buffer = sharded.local(param), sharded.local(buffer)
        if dtype == torch.int8:
            return None  # kept.convert_momentum() has looked at it
        if (reason := backends.FUSED[backend].refusal(buffer)) is not None:
            return f"its momentum buffer cannot be taken: {reason}"
        return "its momentum buffer shares memory with it" if meet([extent(param)], [extent(buffer)]) else None

    def _clipping_refusal(self, param: Tensor, options: Options) -> str | None:
        """Of torch's product of a gradient and a coefficient: of two without dimensions the wider dtype counts."""
        clips_in_double = options.max_grad_norm is not None and self._reader.norm_dtype == torch.float64
        if not clips_in_double or param.dim() != 0 or param.dtype == torch.float64:
            return None
        return "it has no dimensions, so that torch clips it in float64, as parameters of that dtype are clipped too"

    def _still_right(self, plans: Plans) -> bool:
        """Whether torch's code must still step what it stepped last time. The plans check their own rows."""
        if plans.parts and not plans.with_torch:
            return True
        if len(plans.groups) != len(self.param_groups):
            return False
        for params, group in zip(plans.groups, self.param_groups, strict=True):
            if len(params) != len(group["params"]) or not all(map(operator.is_, params, group["params"])):
                return False
        if plans.parts and self._torch_extents(plans.with_torch) != plans.torch_extents:
            return False
        if self._kinds_by_reference(plans.with_torch) != plans.by_reference:
            return False
        group_reasons = [group_refusal(group) for group in self.param_groups] if plans.may_return else []
        return all(
            self._choice(plans.groups[g][i], group_reasons[g], self._reader.options[g])[0] == "torch"
            for g, i, _, _ in plans.may_return
        )
