"""What cannot be stepped inside backward(), and why. Used by in_backward.py."""

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wd_fused.options import spec
from wd_fused.step.base import Base
from wd_fused.step.extents import extent, has_memory, meet
from wd_fused.step.sharded import is_dtensor

_REFUSED = frozenset(("max_grad_norm", "ema_decay", "rounding"))


def objection(group: dict[str, Any]) -> str | None:
    if group["differentiable"]:
        return "differentiable=True: autograd cannot run through a step inside backward()"
    if group.get("report_numerics"):
        return "report_numerics: it looks at whole steps; leave it out"
    if _REFUSED.isdisjoint(group):
        return None
    if (norm := group.get("max_grad_norm")) is not None:
        return (
            f"max_grad_norm={norm}: the norm needs all gradients at once, and each is freed here before the next; "
            "leave it out, and clip by the norm of the step before, step_in_backward(..., max_lagged_grad_norm=1.0), "
            "or each gradient by its own, max_param_grad_norm=1.0"
        )
    if (decay := group.get("ema_decay")) is not None:
        return f"ema_decay={decay}: an average is taken once a step; use torch.optim.swa_utils.AveragedModel beside it"
    if group.get("rounding") == "stochastic":
        return "rounding='stochastic': its random numbers are those of whole steps; use 'kahan' or 'nearest'"
    return None


def checked_norm(name: str, max_norm: float | None) -> float | None:
    value: float | None = spec.plain("max_grad_norm", max_norm)
    try:
        spec.of_group({"max_grad_norm": value})
    except ValueError as error:
        raise ValueError(str(error).replace("max_grad_norm", name)) from None
    return value


NO_SCALER = (
    "torch.amp.GradScaler cannot be used with step_in_backward(): whether gradients overflow is known after the last "
    "of them only; train in bfloat16, which needs no scaling"
)


def check_no_scaler(optimizer: Base, stepped: Iterable[tuple[int, int]] = ()) -> None:
    if getattr(optimizer, "grad_scale", None) is None and getattr(optimizer, "found_inf", None) is None:
        return
    names = [f"group {g}, parameter {i}" for g, i in sorted(stepped)]
    already = f". {len(names)} parameters have been stepped with scaled gradients: {'; '.join(names)}" if names else ""
    raise RuntimeError(f"{NO_SCALER}, or remove() the handle{already}")


def enabled_scalers() -> "list[weakref.ref[torch.amp.GradScaler]]":
    """Of this process. The class keeps no list of them; the garbage collector does."""
    return [
        weakref.ref(found)
        for found in gc.get_objects()
        if issubclass(type(found), torch.amp.GradScaler) and found.is_enabled()
    ]


def check_model(model: nn.Module) -> None:
    for module in model.modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        if found := names & {"DistributedDataParallel", "FullyShardedDataParallel"}:
            raise ValueError(
                f"step_in_backward(): {found.pop()} averages gradients when the parameters would have been stepped"
            )


def check_parameters(params: list[Tensor]) -> None:
    if any(is_dtensor(param) for param in params):
        raise ValueError("step_in_backward() does not take DTensors (FSDP2, tensor parallelism)")
    extents = {id(param): extent(param) for param in params if has_memory(param)}
    if meet(*([own] for own in extents.values())):
        raise ValueError(
            "step_in_backward(): two parameters share memory: one would be stepped while the other is still needed; "
            "tie weights by using one parameter twice"
        )
