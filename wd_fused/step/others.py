"""What no plan steps: torch's code, or our operator where modes are to see it; the reference."""

from collections.abc import Iterable

import torch
from torch import Tensor

from wd_fused import reference
from wd_fused.options import hyperparameters, kept
from wd_fused.options.spec import StepOptions
from wd_fused.step import sharded
from wd_fused.step.base import Base, ParameterBackend
from wd_fused.step.checking import SEEN_BY_MODES
from wd_fused.step.extents import extent, meet
from wd_fused.step.graph import operands_of, step_groups
from wd_fused.step.plans import Prepared
from wd_fused.step.sharded import is_dtensor


def _by_group(parameters: Iterable[ParameterBackend]) -> dict[int, list[int]]:
    """The positions in each group, in order."""
    positions: dict[int, list[int]] = {}
    for g, i, _, _ in sorted(parameters):
        positions.setdefault(g, []).append(i)
    return positions


def step_with_torch(optimizer: Base, parameters: list[ParameterBackend]) -> None:
    groups = [
        optimizer.param_groups[g] | {"params": [optimizer.param_groups[g]["params"][i] for i in own]}
        for g, own in _by_group(parameters).items()
    ]
    # Seen by modes, and with the bits of any other step: which torch's code has not in half precision.
    by_operator = {parameter.reason for parameter in parameters} == {SEEN_BY_MODES}
    operands = [operands_of(optimizer, group) if by_operator else None for group in groups]
    if any(own and _are_entangled(optimizer, own) for own in operands):
        operands = [None] * len(groups)
    step_groups(optimizer, groups, operands)


def _are_entangled(optimizer: Base, params: list[Tensor]) -> bool:
    """Whether one is stepped twice, or a gradient shares memory with what the step writes: only torch's order gives
    torch's result."""
    written = [tensor for p in params for tensor in (p, optimizer._buffer(p)) if tensor is not None]
    grads = [param.grad for param in params if param.grad is not None]
    return len(set(params)) < len(params) or meet([*map(extent, grads)], [*map(extent, written)])


def step_with_reference(
    optimizer: Base,
    parameters: list[ParameterBackend],
    step: StepOptions,
    coefficients: list[float] | None,
    inverse_scale: float | None,
) -> None:
    state = optimizer.state
    for g, positions in _by_group(parameters).items():
        group, group_step, options = optimizer.param_groups[g], step.groups[g], optimizer._reader.options[g]
        assert group_step is not None and options is not None, "only such groups come here"
        params = [group["params"][i] for i in positions]
        for param in params:  # those that have had no gradient before
            kept.make(param, state, options, group["momentum"] != 0)
        before = [optimizer._buffer(param) for param in params]
        buffers = [None if buffer is None else sharded.local(buffer) for buffer in before]
        reference.sgd_with_options(
            [*map(sharded.local, params)],
            [None if param.grad is None else sharded.local(param.grad) for param in params],
            buffers,
            [sharded.local_row(kept.row_options(param, state.get(param), options)) for param in params],
            positions,
            reference.Hyperparameters(
                group_step,
                lr=float(group["lr"]),
                momentum=float(group["momentum"]),
                dampening=hyperparameters.dampening(group["dampening"]),
                weight_decay=float(group["weight_decay"]),
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                numerics=optimizer._numerics,
                coefficient=1.0 if coefficients is None else coefficients[g],
                inverse_scale=inverse_scale,
            ),
        )
        for param, old, buffer in zip(params, before, buffers, strict=True):
            if old is None and buffer is not None:
                made = sharded.like(param, buffer) if is_dtensor(param) else buffer
                state.setdefault(param, {})["momentum_buffer"] = made


def unscale(optimizer: Base, inverse_scale: float, ready: Prepared) -> bool:
    """Unscales the gradients in place, as torch.amp.GradScaler's unscale_() does, but those of options,
    whose plans and reference unscale what they read; and all of a GPU's plan that has such. False: no others."""
    params = [optimizer.param_groups[g]["params"][i] for g, i, _, _ in ready.with_torch]
    params += [
        row.param
        for part in ready.plans.parts
        for row in part.rows
        if not part.has_options or (part.backend == "cpu" and row.options is None)
    ]
    with torch.no_grad():
        for param in dict.fromkeys(params):
            if param.grad is not None:
                with reference.where_writable(param.grad):
                    param.grad.mul_(inverse_scale)
    return bool(params)
