"""A group's step by operators that a compiler or a mode sees: ours, or torch's code."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd as torch_sgd

from wd_fused import backends, operators
from wd_fused.options import spec
from wd_fused.options.hyperparameters import NUMBERS, dampening, number
from wd_fused.step.base import Base


def is_beyond(optimizer: Any) -> bool:
    for group in optimizer.param_groups:
        if any(name in group for name in spec.NAMES) or len(set(group["params"])) < len(group["params"]):
            return True
    if optimizer._swapped or "report_numerics" in optimizer._settings:
        return True
    return getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None


def operands_of(optimizer: Any, group: dict[str, Any]) -> list[Tensor] | None:
    """The group's parameters that have gradients, if torch.ops.wd_fused.sgd_ takes them all, or None. Is traced."""
    params = [param for param in group["params"] if param.grad is not None]
    if group["differentiable"]:
        return None
    for value in (group["lr"], group["weight_decay"]):
        if isinstance(value, Tensor) and (value.device.type != "cpu" or value.requires_grad):
            return None  # reading it would wait for the GPU, or lose its gradient
    if isinstance(group["momentum"], Tensor) or isinstance(group["dampening"], Tensor):
        return None  # nor is 1 - dampening a float's
    for param in params:
        grad, state = param.grad, optimizer.state.get(param)
        buffer = state.get("momentum_buffer") if state and group["momentum"] != 0 else None
        tensors = [param, grad] if buffer is None else [param, grad, buffer]
        for tensor in tensors:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
                return None
            if (tensor.dtype, tensor.shape, tensor.device) != (param.dtype, param.shape, params[0].device):
                return None
        if param.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            return None
        if not (param.is_contiguous() or (param.dim() == 4 and param.is_contiguous(memory_format=torch.channels_last))):
            return None  # its elements might share memory
    if params and not _has_operator(params[0].device.type, optimizer._backend):
        return None
    return params


def _has_operator(device_type: str, backend: str) -> bool:
    names = backends.PREFERENCE.get(device_type, ())[:1] if backend == "auto" else (backend,)
    if names != (device_type,) or backends.FUSED[device_type].unavailable() is not None:
        return False
    operators.define()
    return True


_has_operator._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


def step_groups(optimizer: Base, groups: list[dict[str, Any]], operands: list[list[Tensor] | None]) -> None:
    """By our operator where it takes all (operands_of()), else by torch's code. Is traced."""
    for group, params in zip(groups, operands, strict=True):
        if params is None:
            with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
                _step_with_torch(optimizer, group)
        elif params:
            with torch.no_grad():
                _step_with_operator(optimizer, group, params)


def _step_with_operator(optimizer: Base, group: dict[str, Any], params: list[Tensor]) -> None:
    state, has_momentum = optimizer.state, group["momentum"] != 0
    before = [state[param].get("momentum_buffer") for param in params] if has_momentum else []
    first_steps = [buffer is None for buffer in before]
    buffers = [torch.empty_like(p) if buffer is None else buffer for p, buffer in zip(params, before, strict=False)]
    lists = (params, [param.grad for param in params], buffers, first_steps)
    flags = {"nesterov": group["nesterov"], "maximize": group["maximize"], "opmath": optimizer._numerics == "opmath"}
    numbers = {name: group[name] for name in NUMBERS}
    if torch.compiler.is_compiling() or any(isinstance(value, Tensor) for value in numbers.values()):
        torch.ops.wd_fused.sgd_with_tensors_(*lists, *map(operators.in_tensor, numbers.values()), **flags)
    else:
        known = {name: number(value) for name, value in numbers.items()}
        torch.ops.wd_fused.sgd_(*lists, **known | {"dampening": dampening(numbers["dampening"])}, **flags)
    for param, buffer in zip(params, buffers, strict=False):  # none without momentum
        state[param]["momentum_buffer"] = buffer


def _step_with_torch(optimizer: Base, group: dict[str, Any]) -> None:
    params: list[Tensor] = []
    grads: list[Tensor] = []
    buffers: list[Tensor | None] = []
    has_sparse_grad = optimizer._init_group(group, params, grads, buffers)  # type: ignore[no-untyped-call]
    torch_sgd(
        params,
        grads,
        buffers,
        weight_decay=number(group["weight_decay"]),
        momentum=number(group["momentum"]),
        lr=number(group["lr"]),
        dampening=dampening(group["dampening"]),
        has_sparse_grad=has_sparse_grad,
        **{name: group[name] for name in ("nesterov", "maximize", "foreach", "fused")},
    )
    for param, buffer in zip(params, buffers, strict=False):  # none without momentum
        optimizer.state[param]["momentum_buffer"] = buffer
