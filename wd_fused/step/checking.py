"""What torch's code or the reference would fail on in the middle of a step: told before anything is written."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from wd_fused import reference
from wd_fused.build import extension
from wd_fused.options import kept, spec
from wd_fused.options.hyperparameters import check_float32, check_group
from wd_fused.options.spec import Options, StepOptions
from wd_fused.step import sharded
from wd_fused.step.base import Base, ParameterBackend
from wd_fused.step.extents import is_expanded, missing_memory
from wd_fused.step.sharded import is_dtensor
from wd_fused.warn import warn_user

SEEN_BY_MODES = "a TorchDispatchMode is active, which sees what goes through torch's dispatcher"


def group_refusal(group: dict[str, Any]) -> str | None:
    """Why only torch's code steps this group, or None."""
    if group["differentiable"]:
        return "differentiable=True"
    for name in ("lr", "weight_decay"):
        if isinstance(group[name], Tensor) and group[name].requires_grad:
            return f"{name} is a Tensor that requires grad"
    return None


def why_not_in_shards(param: Any, options: Options) -> str | None:
    """Why the options cannot be used for a DTensor, with the remedy, or None."""
    if not is_dtensor(param):
        return None
    it = f"it is a DTensor of shape {list(param.shape)}, placed as {param.placements}"
    if options.momentum_dtype == "int8" and not sharded.has_whole_blocks(param, reference.BLOCK):
        return (
            f"{it}, whose shards would cut the blocks of momentum_dtype='int8', {reference.BLOCK} elements with one "
            "scale; use momentum_dtype='bfloat16', or shards along the first dimension, all of as many rows, that make "
            "whole blocks"
        )
    if options.rounding == "stochastic" and sharded.place_of(param) is None:
        return (
            f"{it}, of which rounding='stochastic' cannot tell where its local tensor of shape "
            f"{list(sharded.local(param).shape)} lies in the whole; redistribute it by Shard and Replicate, evenly "
            "where a dimension is sharded along several of a mesh, or use rounding='kahan'"
        )
    return None


def check_norm_is_whole(optimizer: Base, step: StepOptions | None) -> None:
    if step is None or not step.clips:
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if optimizer._ranks is not None:
        if (reason := sharded.why_counted_twice(optimizer._ranks, params)) is not None:
            raise RuntimeError(f"process_group would count gradients more than once: {reason}")
    elif (reason := sharded.why_not_whole(optimizer, params)) is not None:
        raise RuntimeError(f"max_grad_norm would clip by a norm of this process alone: {reason}")


def check(optimizer: Base, parameters: Iterable[ParameterBackend], step: StepOptions | None) -> None:
    """Raises for what the step of these would fail on half-way, where no plan does it; warns once of each reason."""
    for g in {parameter.group for parameter in parameters}:
        _check_numbers(g, optimizer.param_groups[g], None if step is None else step.groups[g])
    for parameter in parameters:
        _check_parameter(optimizer, parameter)


def _check_numbers(g: int, group: dict[str, Any], step: spec.GroupStep | None) -> None:
    has_float32 = any(param.dtype not in (torch.float64, torch.complex128) for param in group["params"])
    try:
        check_group(group, has_float32)
        if step is not None and has_float32:
            check_float32("l1_penalty", step.l1, step.l1)
            keep = 1 - float(group["lr"]) * step.decoupled
            check_float32("1 - lr * weight_decay", keep, keep)
    except (TypeError, RuntimeError) as error:
        raise type(error)(f"group {g}: {error}") from None


def _check_parameter(optimizer: Base, parameter: ParameterBackend) -> None:
    g, i, _, reason = parameter
    group, options, backend = optimizer.param_groups[g], optimizer._reader.options[g], optimizer._backend
    param: Tensor = group["params"][i]
    if param.grad is None and options is None:
        return
    buffer, objection = optimizer._buffer(param) if group["momentum"] != 0 else None, None
    if backend not in ("auto", "torch") and reason != SEEN_BY_MODES:
        in_shards = None if options is None else why_not_in_shards(param, options)  # nobody takes it then
        objection = in_shards or f'backend="{backend}" does not take it: {reason}; backend="auto" leaves it to torch'
    elif options is not None:
        objection = _objection_of_reference(param, buffer, optimizer.state.get(param), group, options)
    elif param.grad is not None:
        objection = objection_of_torch(param, param.grad, buffer, group["weight_decay"])
    if objection is None and (backend == "torch" or reason == SEEN_BY_MODES or reason in optimizer._warned):
        return
    name = f"group {g}, {spec.name_of(group, i)}"
    if objection is not None:
        raise RuntimeError(f"{name}: {objection}")
    if name in optimizer._warned:
        return
    optimizer._warned |= {name, reason}
    if not (param.is_cpu and reason == extension.status().reason):  # of which extension.load() has warned
        who = "torch's own code steps" if options is None else "plain torch operations step"
        warn_user(f"FusedSGD: {who} {name}, slower and with the same result: {reason}")


def _objection_of_reference(
    param: Tensor, buffer: Tensor | None, state: dict[str, Any] | None, group: dict[str, Any], options: Options
) -> str | None:
    """What the reference would fail on, with the remedy, or None."""
    grad = param.grad
    if (refusal := group_refusal(group)) is not None:
        return f"{refusal}, which {options.spelled()} cannot take part in"
    if (objection := why_not_in_shards(param, options)) is not None:
        return objection
    depends_on_place = options.momentum_dtype == "int8" or options.rounding == "stochastic"
    if depends_on_place and not reference.is_plain(sharded.local(param)):
        return f"it is a {type(param).__name__}, a tensor subclass, which {options.spelled()} cannot be used for"
    if (objection := kept.objection(param, state)) is not None or grad is None:  # the former of the buffer, too
        return objection
    if is_dtensor(param) and not sharded.placed_alike(param, grad):
        return (
            f"its gradient is not a DTensor of its mesh and placements, which {options.spelled()} cannot take; "
            "redistribute the gradient"
        )
    if grad.layout != torch.strided:
        return (
            f"its gradient is {grad.layout}, which the options {options.spelled()} cannot take; put it into a "
            "parameter group without them"
        )
    if is_expanded(param):
        return "several of its elements share memory"
    if (grad.shape, grad.device) != (param.shape, param.device):
        return f"its gradient is {described(grad)}, the parameter {described(param)}"
    if param.is_complex() != grad.is_complex() or not (grad.is_floating_point() or grad.is_complex()):
        return f"its gradient is {described(grad)}, which cannot be used for {described(param)}"
    if grad.is_meta and options.max_grad_norm is not None:
        return f"its gradient is on meta, and has no numbers for max_grad_norm={options.max_grad_norm}"
    return _why_not_written(param, grad, buffer)


def objection_of_torch(param: Tensor, grad: Tensor, buffer: Any, weight_decay: float | Tensor) -> str | None:
    """What torch's code would fail on, with the remedy, or None."""
    if grad.shape != param.shape:
        return f"its gradient has shape {list(grad.shape)}, the parameter {list(param.shape)}"
    if grad.device != param.device:
        return f"its gradient is on {grad.device}, the parameter on {param.device}"
    if buffer is not None and not isinstance(buffer, Tensor):
        return f"its momentum buffer is a {type(buffer).__name__}, not a Tensor"
    if (reason := _why_not_written(param, grad, buffer)) is not None:
        return reason
    if grad.is_sparse and weight_decay != 0:
        return (
            f"its gradient is sparse, which torch cannot add weight_decay={weight_decay} to; put it into a parameter "
            "group with weight_decay=0"
        )
    update = torch.promote_types(grad.dtype, param.dtype) if weight_decay != 0 else grad.dtype
    if isinstance(buffer, Tensor):
        fits = (buffer.shape, buffer.device) == (param.shape, param.device) and buffer.is_sparse <= grad.is_sparse
        if not (fits and torch.can_cast(update, buffer.dtype)):
            return (
                f"its momentum buffer is {described(buffer)}, its gradient {described(grad)}, the parameter "
                f"{described(param)}; del optimizer.state[parameter] starts the buffer afresh"
            )
        update = buffer.dtype
    if not torch.can_cast(update, param.dtype):
        return f"its gradient is {described(grad)}, which cannot be used for {described(param)}"
    return None


def _why_not_written(param: Tensor, grad: Tensor, buffer: Tensor | None) -> str | None:
    """Why torch's operators would fail, or worse, on the memory of these."""
    for name, tensor in (("it", param), ("its gradient", grad), ("its momentum buffer", buffer)):
        if tensor is None:
            continue
        if (missing := missing_memory(tensor)) is not None:
            return f"{name} {missing}"
        if tensor is not grad and tensor.is_inference() and not torch.is_inference_mode_enabled():
            return f"{name} was made in inference mode, and cannot be written outside of it: put a clone() in its place"
    return None


def described(tensor: Tensor, with_shape: bool = True) -> str:
    sparse, shape = "sparse " if tensor.is_sparse else "", f" {list(tensor.shape)}" if with_shape else ""
    return f"{sparse}{str(tensor.dtype).removeprefix('torch.')}{shape} on {tensor.device}"
