"""The step as torch.compile traces it: what can be an operator's call."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from wd_fused import backends, operators
from wd_fused.options import spec


@_disable_dynamo  # torch.compiler.disable imports the compiler and Triton: seconds of every import of ours
def outside_compiler(optimizer: Any) -> None:
    optimizer._step()


def is_beyond_graph(optimizer: Any) -> bool:
    for group in optimizer.param_groups:
        if any(name in group for name in spec.NAMES) or len(set(group["params"])) < len(group["params"]):
            return True
    if optimizer._swapped:
        return True
    return getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None


def operands_in_graph(optimizer: Any, group: dict[str, Any]) -> list[Tensor] | None:
    """The group's parameters that have gradients, if torch.ops.wd_fused.sgd_ takes them all, or None. Is traced."""
    params = [param for param in group["params"] if param.grad is not None]
    if group["differentiable"]:
        return None
    for number in (group["lr"], group["weight_decay"]):
        if isinstance(number, Tensor) and (number.device.type != "cpu" or number.requires_grad):
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
