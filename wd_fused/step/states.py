"""What the options keep in the state: when it is made."""

import torch
from torch import Tensor

from wd_fused.options import kept, spec
from wd_fused.options.averages import removed_averages
from wd_fused.options.spec import Options
from wd_fused.step import sharded
from wd_fused.step.base import Base


def _is_zero(lr: float | Tensor) -> bool:
    return bool(lr == 0) if not isinstance(lr, Tensor) or lr.is_cpu else False


def asks_for_state(optimizer: Base) -> bool:
    """Whether a step with options, while the state is empty, has lr 0 and gradients of zeros: such a one
    torch.distributed.checkpoint takes before it saves or loads, to have the state made. Nothing else is done then:
    no average is formed, no random number used up. Without options it does what it does with torch.optim.SGD."""
    groups = optimizer.param_groups
    if optimizer._ranks is not None:  # whose zeros and states may be others: each takes part in the norm
        return False
    if all(map(spec.NAMES.isdisjoint, groups)) or not all(_is_zero(group["lr"]) for group in groups):
        return False
    params = [param for group in groups for param in group["params"]]
    grads = [sharded.local(param.grad) for param in params if param.grad is not None]
    if not grads:
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    found = any(grad.layout != torch.strided or grad.is_meta or bool(grad.any()) for grad in grads)
    for ranks in dict.fromkeys(map(sharded.ranks_of, params)):  # all must do the same
        found = bool(sharded.summed_over(ranks, torch.tensor(float(found), device=grads[0].device)))
    return not found


def make_first(optimizer: Base) -> None:
    """All that the state will have after a first step, so that a checkpoint may be loaded into it: whatever makes
    some of it makes all. Momentum buffers go again before that step, which is their first."""
    every = [spec.of_group(group) for group in optimizer.param_groups]  # not by Reader: for this step lr may be 0
    for group, options in zip(optimizer.param_groups, every, strict=True):
        if options is not None:
            spec.check_parameters(group, options)
    for group, options in zip(optimizer.param_groups, every, strict=True):
        own, has_momentum = options or Options(), group["momentum"] != 0
        for param in group["params"]:
            kept.make(param, optimizer.state, own, has_momentum, steps=param.requires_grad)
            if has_momentum and param.requires_grad:
                buffer = kept.like(param, spec.momentum_dtype(param, own)).zero_()
                optimizer.state.setdefault(param, {})["momentum_buffer"] = buffer
                optimizer._unwritten.append((param, buffer, sharded.local(buffer)._version))
    if optimizer._averaged_buffers is not None:
        optimizer._averaged_buffers.pairs(optimizer.state, optimizer.param_groups)
    optimizer._plans = None


def drop_unwritten(optimizer: Base) -> None:
    for param, buffer, version in optimizer._unwritten:
        state = optimizer.state.get(param, {})
        if state.get("momentum_buffer") is buffer and sharded.local(buffer)._version == version:
            del state["momentum_buffer"]
    optimizer._unwritten.clear()


def make(optimizer: Base) -> None:
    """What the options keep: averages for all parameters, the rest for those that have a gradient. What those keep
    that have been turned off is converted to what a plain step uses, or dropped."""
    left_behind = any(map(kept.is_left_behind, optimizer.state.values()))
    for g, (group, options) in enumerate(zip(optimizer.param_groups, optimizer._reader.options, strict=True)):
        if options is None:
            was_on = g in optimizer._reader.turned_off
            for param in group["params"] if was_on or left_behind else ():
                if was_on or kept.is_left_behind(optimizer.state.get(param)):
                    kept.make(param, optimizer.state, Options(), group["momentum"] != 0)
            optimizer._reader.turned_off.discard(g)
            continue
        for param in group["params"]:
            if kept.objection(param, optimizer.state.get(param)) is None:  # else an error, when it is stepped
                kept.make(param, optimizer.state, options, group["momentum"] != 0)

    if optimizer._averaged_buffers is not None and optimizer._reader.averaging is None:
        removed_averages(optimizer.state)


def make_beforehand(optimizer: Base) -> None:
    """Where averages are asked for before the first step."""
    if optimizer._reader.averaging is not None and not optimizer.state:
        make_first(optimizer)
