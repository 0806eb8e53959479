"""What torch's code would fail on in the middle of a step: found before anything is written."""

from typing import Any

import torch
from torch import Tensor

from wd_fused.step.extents import missing_memory


def objection_of_torch(param: Tensor, grad: Tensor, buffer: Any, weight_decay: float | Tensor) -> str | None:
    """What torch's code would fail on in the middle of a step, with the remedy, or None."""
    if grad.shape != param.shape:
        return f"its gradient has shape {list(grad.shape)}, the parameter {list(param.shape)}"
    if grad.device != param.device:
        return f"its gradient is on {grad.device}, the parameter on {param.device}"
    if buffer is not None and not isinstance(buffer, Tensor):
        return f"its momentum buffer is a {type(buffer).__name__}, not a Tensor"
    if (reason := why_not_written(param, grad, buffer)) is not None:
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


def why_not_written(param: Tensor, grad: Tensor, buffer: Tensor | None) -> str | None:
    """Why torch's operators would fail, or worse, on the memory of these."""
    for name, tensor in (("it", param), ("its gradient", grad), ("its momentum buffer", buffer)):
        if tensor is None:
            continue
        if (missing := missing_memory(tensor)) is not None:
            return f"{name} {missing}"
        if tensor is not grad and tensor.is_inference() and not torch.is_inference_mode_enabled():
            return f"{name} was made in inference mode, and cannot be written outside of it: put a clone() in its place"
    return None


def described(tensor: Tensor) -> str:
    sparse = "sparse " if tensor.is_sparse else ""
    return f"{sparse}{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
