"""The plans of a step: built, prepared, and whether they still hold."""

import itertools
import operator
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from wd_fused import backends
from wd_fused.backends import Row
from wd_fused.options import kept, spec
from wd_fused.options.spec import Options, StepOptions
from wd_fused.step import checking, sharded, states
from wd_fused.step.base import Base, ParameterBackend, Part, Plans
from wd_fused.step.extents import extent, has_memory, meet

_REPEATED = "it appears more than once in the parameter groups"
_ENTANGLED = "parameters of which torch's code must step some share memory: only torch's order gives torch's result"
_UNREADABLE = "param_groups must be a list of dicts, each with a list of parameters, and state a dict of dicts"


class Prepared(NamedTuple):
    """A step of which everything has been checked."""

    plans: Plans
    with_torch: list[ParameterBackend]  # what torch's code steps this time
    by_reference: list[ParameterBackend]  # and what the reference does, for its options
    step: StepOptions | None


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
        count = part.plan.prepare(groups, state, step if part.has_options else None)
        if count < 0:
            return None
        if count:
            rows = [(part.rows[r], reason) for r, reason in part.plan.left()]
            left += [ParameterBackend(row.group, row.position, "torch", reason) for row, reason in rows]
    return left


def prepared(optimizer: Base, step: StepOptions | None) -> Prepared:
    """By plans that hold, made anew where those from before do not."""
    groups, state = optimizer.param_groups, optimizer.state
    is_seen_by_modes = torch._C._len_torch_dispatch_stack() != 0 and _have_a_say(groups)
    plans = None if is_seen_by_modes else optimizer._plans
    left = _prepare(plans, groups, state, step) if plans is not None and _still_right(optimizer, plans) else None
    if plans is None or left is None:
        optimizer._norm = optimizer.grad_norm  # not the plan that has it, and all that the plan points to
        step = optimizer._reader.refresh(groups)
        checking.check_norm_is_whole(optimizer, step)
        states.drop_unwritten(optimizer)
        states.make(optimizer)
        plans = planned(optimizer, checking.SEEN_BY_MODES if is_seen_by_modes else None)
        left = _prepare(plans, groups, state, step)
        if left is None:  # groups or state are not of the types that plans read
            plans, left = planned(optimizer, _UNREADABLE), []
        optimizer._plans = None if is_seen_by_modes else plans
    others = plans.with_torch + left
    checking.check(optimizer, others, step)
    options = optimizer._reader.options
    with_torch = [parameter for parameter in others if options[parameter.group] is None]
    return Prepared(plans, with_torch, [p for p in others if options[p.group] is not None], step)


def planned(optimizer: Base, why_nothing_fused: str | None = None) -> Plans:
    reader, state, wanted = optimizer._reader, optimizer.state, optimizer._backend
    groups = [list(group["params"]) for group in optimizer.param_groups]
    occurrences = Counter(map(id, itertools.chain(*groups)))
    all_differ = len(occurrences) == sum(map(len, groups))
    rows: dict[tuple[str, sharded.Ranks | None], list[Row]] = {}
    with_torch = []
    for g, (params, group, options) in enumerate(zip(groups, optimizer.param_groups, reader.options, strict=True)):
        group_reason = checking.group_refusal(group)
        usual: str = "torch"
        buffers: list[Any] = [False] * len(params)
        if (group_reason, options, why_nothing_fused) == (None, None, None) and all_differ:
            usual, buffers = backends.surely_taken(params, state, wanted)
        of_usual = rows.setdefault((usual, None), []) if any(buffer is not False for buffer in buffers) else []
        for i, (param, buffer) in enumerate(zip(params, buffers, strict=True)):
            if buffer is not False:
                of_usual.append(Row(param, buffer, g, i))
                continue
            backend, reason = _choice(optimizer, param, group_reason, options)
            if why_nothing_fused is not None or occurrences[id(param)] > 1:
                backend, reason = "torch", why_nothing_fused or _REPEATED
            if backend == "torch":
                with_torch.append(ParameterBackend(g, i, backend, reason))
                continue
            row_options = None if options is None else kept.row_options(param, state.get(param), options)
            ranks = sharded.ranks_of(param) if row_options is not None and row_options.clips else None
            rows.setdefault((backend, ranks), []).append(Row(param, optimizer._buffer(param), g, i, row_options))
    parts = []
    of_plain = None if optimizer._ranks is None else sharded.NOT_YET
    for (name, ranks), own in rows.items():
        plan = backends.FUSED[name].plan(own, groups, state, optimizer._numerics)
        parts.append(Part(name, own, plan, any(row.options is not None for row in own), ranks or of_plain))
    torch_extents = _torch_extents(optimizer, with_torch) if rows else []
    if torch_extents and any([part.plan.keep_off(torch_extents) for part in parts]):
        return planned(optimizer, _ENTANGLED)
    may_return = [
        parameter
        for parameter in with_torch
        if parameter.reason not in (_REPEATED, _UNREADABLE, _ENTANGLED)
        and backends.any_usable(groups[parameter.group][parameter.position].device, wanted)
    ]
    by_reference = _kinds_by_reference(optimizer, with_torch)
    return Plans(parts, with_torch, may_return, torch_extents, by_reference, groups, reader.structure)


def _kinds_by_reference(optimizer: Base, with_torch: list[ParameterBackend]) -> list[tuple[Any, ...]]:
    """All that the options were checked against, and what they keep was made for, of the reference's parameters."""
    own = [(g, i) for g, i, _, _ in with_torch if optimizer._reader.options[g] is not None]
    params = [optimizer.param_groups[g]["params"][i] for g, i in own]
    return [
        (type(p), p.dtype, p.device, p.layout, p.shape, p.stride() if p.layout == torch.strided else ()) for p in params
    ]


def _torch_extents(optimizer: Base, with_torch: list[ParameterBackend]) -> list[tuple[int, int]]:
    params = [optimizer.param_groups[g]["params"][i] for g, i, _, _ in with_torch]
    buffers = [buffer for param in params if isinstance(buffer := optimizer._buffer(param), Tensor)]
    return [extent(tensor) for tensor in (*params, *buffers) if has_memory(tensor)]


def _choice(optimizer: Base, param: Tensor, group_reason: str | None, options: Options | None) -> tuple[str, str]:
    """The backend for a parameter and why, by itself, its group, the options and its state."""
    backend, reason = backends.choose(sharded.local(param), optimizer._backend)
    if backend == "torch":
        return backend, reason
    if options is not None and (objection := checking.why_not_in_shards(param, options)) is not None:
        return "torch", objection
    refusal = group_reason or _buffer_refusal(param, optimizer._buffer(param), backend, options)
    if options is not None and refusal is None:
        refusal = kept.objection(param, optimizer.state.get(param))
        clips_in_double = options.max_grad_norm is not None and optimizer._reader.norm_dtype == torch.float64
        if refusal is None and clips_in_double and param.dim() == 0 and param.dtype != torch.float64:
            # Of torch's product of a gradient and a coefficient, two without dimensions, the wider dtype counts.
            refusal = (
                "it has no dimensions, so that torch clips it in float64, as parameters of that dtype are clipped too"
            )
    return (backend, reason) if refusal is None else ("torch", refusal)


def _buffer_refusal(param: Tensor, buffer: Any, backend: str, options: Options | None) -> str | None:
    if buffer is None:
        return None
    if not isinstance(buffer, Tensor):
        return f"its momentum buffer is a {type(buffer).__name__}, not a Tensor"
    dtype = param.dtype if options is None else spec.momentum_dtype(param, options)
    if (buffer.dtype, buffer.device, buffer.shape) != (dtype, param.device, param.shape):
        # Without shapes one reason for all parameters of a model that was cast.
        kinds = [checking.described(tensor, buffer.shape != param.shape) for tensor in (buffer, param)]
        return f"its momentum buffer is {kinds[0]}, the parameter {kinds[1]}"
    if not sharded.placed_alike(param, buffer):
        return "its momentum buffer is not placed as it is on the same device mesh"
    if dtype == torch.int8:
        return None  # kept.convert_momentum() has looked at it
    param, buffer = sharded.local(param), sharded.local(buffer)
    if (reason := backends.FUSED[backend].refusal(buffer)) is not None:
        return f"its momentum buffer cannot be taken: {reason}"
    return "its momentum buffer shares memory with it" if meet([extent(param)], [extent(buffer)]) else None


def _still_right(optimizer: Base, plans: Plans) -> bool:
    """Whether torch's code must still step what it stepped last time. The plans check their own rows."""
    if plans.parts and not plans.with_torch:
        return True
    groups = optimizer.param_groups
    if len(groups) != len(plans.groups):
        return False
    for params, group in zip(plans.groups, groups, strict=True):
        if len(params) != len(group["params"]) or not all(map(operator.is_, params, group["params"])):
            return False
    if plans.parts and _torch_extents(optimizer, plans.with_torch) != plans.torch_extents:
        return False
    if _kinds_by_reference(optimizer, plans.with_torch) != plans.by_reference:
        return False
    return all(
        _choice(optimizer, plans.groups[g][i], checking.group_refusal(groups[g]), optimizer._reader.options[g])[0]
        == "torch"
        for g, i, _, _ in plans.may_return
    )
