"""What happened in the last step: skipped or not, norm and coefficients; on request, what was lost to rounding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wd_fused.options import clipping, kept
from wd_fused.step import sharded
from wd_fused.step.base import Base


class Numerics(NamedTuple):
    """What became of a step's updates: a Tensor of [groups] each, on the parameters' device.

    Of DTensors and the like: of the part in this process. All 0 where a GPU has skipped the step; where the host has,
    the next step is looked at instead.
    """

    updates: Tensor  # int64: elements with a momentum that is not 0; without momentum, with such a gradient
    lost: Tensor  # int64: those of them whose weight is what it was, in all the digits that are kept of it
    int8_at_end: Tensor  # int64: elements of int8 momentum buffers that are -127 or 127, the ends of their scale
    largest_update: Tensor  # float64: the largest magnitude by which a weight has changed


class LastStep(NamedTuple):
    """What happened in the last step: ``FusedSGD.last_step``."""

    skipped: bool | Tensor  # as ``FusedSGD.last_step_skipped``; False without a gradient scale
    grad_norm: Tensor | None  # as ``FusedSGD.grad_norm``; None where no group has clipped in it
    clip_coefficients: Tensor | None  # [groups]: what gradients were multiplied with, 1 in groups that do not clip
    numerics: Numerics | None  # of the last step that was looked at


def last_step(optimizer: Base) -> LastStep:
    step, skipped = optimizer._last_step, optimizer.last_step_skipped if optimizer._was_scaled else False
    if step is None or (norm := optimizer.grad_norm) is None:
        return LastStep(skipped, None, None, optimizer._numerics_report)
    return LastStep(skipped, norm, clipping.coefficients(norm, step), optimizer._numerics_report)


def run_and_report(optimizer: Base, run: Callable[[Base, bool], None]) -> None:
    """A step; every n-th of them is looked at, the first included. Nothing waits for a GPU."""
    optimizer._steps_unreported += 1
    every = optimizer._settings["report_numerics"]
    if optimizer._steps_unreported < every and optimizer._numerics_report is not None:
        return run(optimizer, True)
    sharded.place_all_alike(optimizer.param_groups, optimizer.state)
    before = [
        [_before(group, param, optimizer.state.get(param)) for param in group["params"] if param.grad is not None]
        for group in optimizer.param_groups
    ]
    run(optimizer, True)
    skipped = last_step(optimizer).skipped
    if skipped is not True:
        found = [[_after(optimizer.state.get(each[0]), *each) for each in group] for group in before]
        devices = [param.device for group in optimizer.param_groups for param in group["params"]]
        optimizer._numerics_report, optimizer._steps_unreported = _added_up(found, devices, skipped), 0


def _before(group: dict[str, Any], param: Tensor, state: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    moves = None if group["momentum"] != 0 else _local(param.grad) != 0  # noted before: a step may zero it
    return param, sharded.local(kept.exact_weights(param, state)), moves


def _local(tensor: Any) -> Tensor:
    own = sharded.local(tensor)
    return own if own.layout == torch.strided else own.to_dense()


@torch.no_grad()
def _after(state: Any, param: Tensor, before: Tensor, moves: Tensor | None) -> tuple[Tensor, ...]:
    buffer = _local(state["momentum_buffer"]) if state and "momentum_buffer" in state else None
    if moves is None:
        moves = torch.zeros_like(before, dtype=torch.bool) if buffer is None else buffer != 0
    is_whole = not state or state.keys().isdisjoint(kept.EXTRAS)  # the parameter is all of the weight
    change = before.sub_(sharded.local(param if is_whole else kept.exact_weights(param, state)).detach()).abs()
    at_end = buffer.abs() == 127 if buffer is not None and buffer.dtype == torch.int8 else moves.new_zeros(1)
    largest = change.amax().double() if change.numel() else change.new_zeros((), dtype=torch.float64)
    counts = (torch.count_nonzero(each) for each in (moves, moves & (change == 0), at_end))
    return *counts, largest


def _added_up(found: list[list[tuple[Tensor, ...]]], devices: list[torch.device], skipped: bool | Tensor) -> Numerics:
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    counts = torch.zeros(len(found), 3, dtype=torch.int64, device=device)
    largest = torch.zeros(len(found), dtype=torch.float64, device=device)
    for g, group in enumerate(found):
        for *own, change in group:
            counts[g] += torch.stack(own).to(device)
            largest[g] = torch.maximum(largest[g], change.to(device))
    if isinstance(skipped, Tensor):  # only the GPU knows
        counts, largest = (each.masked_fill(skipped.to(device), 0) for each in (counts, largest))
    updates, lost, at_end = counts.unbind(1)
    return Numerics(updates, lost, at_end, largest)
