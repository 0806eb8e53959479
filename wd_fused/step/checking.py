"""What torch's code or the reference would fail on half-way: told before anything is written."""

from typing import Any

import torch
from torch import Tensor

from wd_fused import reference
from wd_fused.build import extension
from wd_fused.options import kept, spec
from wd_fused.options.hyperparameters import check_float32, check_group
from wd_fused.options.spec import Options, StepOptions
from wd_fused.step import sharded
from wd_fused.step.base import SEEN_BY_MODES, ParameterBackend
from wd_fused.step.extents import is_expanded
from wd_fused.step.objections import described, objection_of_torch, why_not_written
from wd_fused.step.sharded import is_dtensor
from wd_fused.step.states import States
from wd_fused.warn import warn_user


def group_refusal(group: dict[str, Any]) -> str | None:
    """Why only torch's code steps this group, or None."""
    if group["differentiable"]:
        return "differentiable=True"
    for name in ("lr", "weight_decay"):
        if isinstance(group[name], Tensor) and group[name].requires_grad:
            return f"{name} is a Tensor that requires grad"
    return None


def depends_on_place(options: Options) -> bool:
    """Whether an element's step depends on where in the whole parameter it is, of which a rank has a part."""
    return options.momentum_dtype == "int8" or options.rounding == "stochastic"


class Checking(States):
    def _check_norm_is_whole(self, step: StepOptions | None) -> None:
        if step is None or not step.clips:
            return
        params = [param for group in self.param_groups for param in group["params"]]
        if (reason := sharded.why_not_whole(self, params)) is not None:
            raise RuntimeError(f"max_grad_norm would clip by a norm of this process alone: {reason}")

    def _check_numbers(self, g: int, step: spec.GroupStep | None) -> None:
        """Raises for a group's numbers that its step would fail on, where no plan reads them."""
        group = self.param_groups[g]
        has_float32 = any(param.dtype not in (torch.float64, torch.complex128) for param in group["params"])
        try:
            check_group(group, has_float32)
            if step is not None and has_float32:
                check_float32("l1_penalty", step.l1, step.l1)
                keep = 1 - float(group["lr"]) * step.decoupled
                check_float32("1 - lr * weight_decay", keep, keep)
        except (TypeError, RuntimeError) as error:
            raise type(error)(f"group {g}: {error}") from None

    def _check_for_torch(self, parameter: ParameterBackend) -> None:
        """Raises for what torch's code would fail on half-way; warns once of what made it slow."""
        g, i, _, reason = parameter
        group = self.param_groups[g]
        param: Tensor = group["params"][i]
        grad = param.grad
        options = self._reader.options[g]
        if grad is None and options is None:
            return
        name = f"group {g}, parameter {i}" + (f" ({group['param_names'][i]})" if "param_names" in group else "")
        if self._backend not in ("auto", "torch") and reason != SEEN_BY_MODES:
            raise RuntimeError(
                f'{name}: backend="{self._backend}" does not take it: {reason}; backend="auto" leaves it to torch'
            )
        if options is not None:
            objection = self._objection_of_reference(param, group, options)
        elif grad is not None:
            buffer = self._buffer(param) if group["momentum"] != 0 else None
            objection = objection_of_torch(param, grad, buffer, group["weight_decay"])
        if objection is not None:
            raise RuntimeError(f"{name}: {objection}")
        if self._backend == "torch" or reason == SEEN_BY_MODES or self._warned & {name, reason}:
            return
        self._warned |= {name, reason}
        if not (param.is_cpu and reason == extension.status().reason):  # of which extension.load() has warned
            who = "torch's own code steps" if options is None else "plain torch operations step"
            warn_user(f"FusedSGD: {who} {name}, slower and with the same result: {reason}")

    def _objection_of_reference(self, param: Tensor, group: dict[str, Any], options: Options) -> str | None:
        """What the reference would fail on in the middle of a step, with the remedy, or None."""
        state, grad = self.state.get(param), param.grad
        if (refusal := group_refusal(group)) is not None:
            return f"{refusal}, which {options.spelled()} cannot take part in"
        if not reference.is_plain(param) and depends_on_place(options):
            return f"it is a {type(param).__name__}, a tensor subclass, which {options.spelled()} cannot be used for"
        if (objection := kept.objection(param, state)) is not None or grad is None:
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
        buffer = self._buffer(param) if group["momentum"] != 0 else None
        if buffer is not None and not isinstance(buffer, Tensor):
            return f"its momentum buffer is a {type(buffer).__name__}, not a Tensor"
        if is_expanded(param):
            return "several of its elements share memory"
        for what, tensor in (("gradient", grad), ("momentum buffer", buffer)):
            if tensor is not None and (tensor.shape, tensor.device) != (param.shape, param.device):
                return f"its {what} is {described(tensor)}, the parameter {described(param)}"
        if param.is_complex() != grad.is_complex() or not (grad.is_floating_point() or grad.is_complex()):
            return f"its gradient is {described(grad)}, which cannot be used for {described(param)}"
        if grad.is_meta and options.max_grad_norm is not None:
            return f"its gradient is on meta, and has no numbers for max_grad_norm={options.max_grad_norm}"
        return why_not_written(param, grad, buffer)
