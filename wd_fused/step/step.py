"""A step, top to bottom: every plan prepares, then everything is written."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from wd_fused import backends, reference
from wd_fused.options import clipping, kept
from wd_fused.options.spec import StepOptions
from wd_fused.step import graph, others, sharded, states
from wd_fused.step.base import Base, Part
from wd_fused.step.checking import described
from wd_fused.step.claims import is_taken
from wd_fused.step.last_step import run_and_report
from wd_fused.step.plans import Prepared, prepared
from wd_fused.step.sharded import is_dtensor


def run(optimizer: Base, is_looked_at: bool = False) -> None:
    """is_looked_at: as report_numerics asks for, already."""
    if not is_looked_at and "report_numerics" in optimizer._settings:
        return run_and_report(optimizer, run)
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    optimizer._was_scaled = grad_scale is not None or found_inf is not None
    if optimizer._was_scaled:
        _check_words_of_grad_scaler(grad_scale, found_inf)
        optimizer._skipped = False if found_inf is None else found_inf
    elif isinstance(optimizer._skipped, StepOptions):  # this step's norm takes the place of the one that tells
        optimizer._skipped = optimizer.last_step_skipped
    claims, claim = optimizer._claims, object()
    claims[claim] = None
    try:
        if len(claims) > 1 and is_taken(claims, claim):
            raise RuntimeError("step() of this optimizer is already running, in another thread or around this one")
        if optimizer._swapped:
            optimizer._refuse_while_swapped("step()")
        reader = optimizer._reader
        # A plan without options holds only as long as no group gets an option.
        if reader.is_plain and _step_alone(optimizer, grad_scale, found_inf, None):
            return
        optimizer._last_step = None  # until this one has a norm
        if not optimizer.state and states.asks_for_state(optimizer):
            states.make_first(optimizer)
            return
        step = reader.read(optimizer.param_groups)
        if step is not None and (grad_scale is not None or found_inf is not None):
            _check_words_of_grad_scaler(grad_scale, found_inf, are_read=True)
        if optimizer._plans is not None and optimizer._plans.structure is not reader.structure:
            optimizer._plans = None
        if reader.is_plain or not _step_alone(optimizer, grad_scale, found_inf, step):
            _step_together(optimizer, grad_scale, found_inf, step)
    finally:
        del claims[claim]


def run_in_graph(optimizer: Base) -> None:
    """The step as torch.compile traces it: an operator's call for each group, with the bits of any other step.

    Groups that the operator does not take are torch's code, which the compiler fuses. Where that would not do what
    was asked for, the step is left as it is: a break in the compiler's graph.
    """
    operands = [graph.operands_of(optimizer, group) for group in optimizer.param_groups]
    insists = optimizer._backend in backends.FUSED or optimizer._numerics == "opmath"
    if (insists and None in operands) or graph.is_beyond(optimizer):
        _outside_compiler(optimizer)
    else:
        graph.step_groups(optimizer, optimizer.param_groups, operands)


@_disable_dynamo  # torch.compiler.disable imports the compiler and Triton: seconds of every import of ours
def _outside_compiler(optimizer: Any) -> None:
    run(optimizer)


def _check_words_of_grad_scaler(grad_scale: Any, found_inf: Any, are_read: bool = False) -> None:
    """are_read: as they are, by a step with options."""
    for name, word in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if word is None:
            continue
        if not isinstance(word, Tensor):
            raise TypeError(f"{name} must be a Tensor, as torch.amp.GradScaler sets it, not {word!r}")
        if are_read and (word.dtype != torch.float32 or word.numel() != 1):
            raise TypeError(
                f"{name} must be a float32 Tensor of one element, as torch.amp.GradScaler sets it, not "
                f"{described(word)}"
            )


def _step_alone(optimizer: Base, grad_scale: Tensor | None, found_inf: Tensor | None, step: StepOptions | None) -> bool:
    """The usual step: one plan, made before, that holds and takes every gradient. False: nothing is done."""
    plans = optimizer._plans
    if plans is None or plans.with_torch or len(plans.parts) != 1:
        return False
    part = plans.parts[0]
    has_options = step is not None and part.has_options
    if step is not None and step.clips and part.ranks is not None:
        return False
    if has_options and found_inf is not None and found_inf.is_cpu and found_inf.item() != 0:
        return False
    made = part.plan.step(optimizer.param_groups, optimizer.state, grad_scale, found_inf, step if has_options else None)
    if made is None:
        return False
    if made:
        _keep(optimizer, part, made)
        part.plan.read_state(optimizer.state)
    if step is not None:
        if step.clips and part.has_options:
            optimizer._norm, optimizer._last_step = part.plan, step
            if grad_scale is not None and found_inf is None:
                optimizer._skipped = step
            if grad_scale is not None and part.plan.was_skipped():
                _zero_skipped_gradients(optimizer)
                return True
        _count(optimizer, step)
    return True


def _step_together(
    optimizer: Base, grad_scale: Tensor | None, found_inf: Tensor | None, step: StepOptions | None
) -> None:
    """Any step: everything is checked before anything is written."""
    is_skipped = found_inf is not None and _value_of(found_inf) != 0
    if is_skipped and (step is None or not step.clips):
        _zero_skipped_gradients(optimizer)
        return
    sharded.place_all_alike(optimizer.param_groups, optimizer.state)
    try:
        ready = prepared(optimizer, step)
        # A value, not a tensor: on a GPU that would be rounded to a half-precision gradient's dtype first.
        inverse_scale = None if grad_scale is None else grad_scale.double().reciprocal().float().item()
        coefficients, step = None, ready.step
        if step is not None and step.clips:
            norm, is_skipped = _measured(optimizer, ready, step, grad_scale, inverse_scale, is_skipped)
            is_finite = not bool(clipping.is_nonfinite(norm, step))
            if not is_finite and grad_scale is not None and found_inf is None:
                is_skipped = optimizer._skipped = True  # as torch.amp.GradScaler would have it
            if not is_finite and not is_skipped and step.error_if_nonfinite:
                raise RuntimeError(clipping.NONFINITE)
            coefficients = [each.item() for each in clipping.coefficients(norm, step)]
        if is_skipped:
            _zero_skipped_gradients(optimizer)
            return
        if inverse_scale is not None and others.unscale(optimizer, inverse_scale, ready):
            ready = prepared(optimizer, step)  # a plan may have read a copy of a gradient
        # First: if that raises after all, the plans have not written either.
        others.step_with_torch(optimizer, ready.with_torch)
        if step is not None:
            others.step_with_reference(optimizer, ready.by_reference, step, coefficients, inverse_scale)
        for part in ready.plans.parts:
            made = part.plan.launch(coefficients, grad_scale) if part.has_options else part.plan.launch()
            _keep(optimizer, part, made)
    finally:
        for part in optimizer._plans.parts if optimizer._plans is not None else ():
            part.plan.abandon()
    for part in ready.plans.parts:
        part.plan.read_state(optimizer.state)
    if step is not None:
        zeroing, groups = optimizer._reader.zeroing, optimizer.param_groups
        # After all else: another parameter's gradient may share the memory.
        _zero_gradients(groups[g]["params"][i] for g, i, _, _ in ready.by_reference if g in zeroing)
        _count(optimizer, step)


def _value_of(found_inf: Tensor) -> float:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step under torch.amp.GradScaler can be captured in a CUDA graph only where one backend on the GPU takes "
            "all parameters, and has stepped them before: call step() once before the capture, as a warm-up"
        )
    return found_inf.item()


def _measured(
    optimizer: Base,
    ready: Prepared,
    step: StepOptions,
    grad_scale: Tensor | None,
    inverse_scale: float | None,
    is_skipped: bool,
) -> tuple[Tensor, bool]:
    """The norm of the gradients, on the CPU; and whether the step is skipped, on any rank of process_group."""
    sums = [
        sharded.summed_over(part.ranks, own)
        for part in ready.plans.parts
        if part.has_options
        for own in part.plan.sums(grad_scale)
    ]
    for g, i, _, _ in ready.by_reference:
        param, group_step, options = (
            optimizer.param_groups[g]["params"][i],
            step.groups[g],
            optimizer._reader.options[g],
        )
        assert group_step is not None and options is not None, "only such parameters are there"
        if param.grad is not None and not math.isnan(group_step.max_norm):
            row, grad = kept.row_options(param, optimizer.state.get(param), options), sharded.local(param.grad)
            squares = reference.sum_of_squares(sharded.local(param), grad, row, optimizer._numerics, inverse_scale)
            own = torch.zeros(len(step.groups), dtype=torch.float64, device=squares.device)
            own[g] = squares
            sums.append(sharded.summed_over(sharded.ranks_of(param), own))
    total = torch.zeros(len(step.groups), dtype=torch.float64, device="cpu")
    for own in sums:
        total += own.cpu()
    if optimizer._ranks is not None:
        own = total if step.norm_per_group else total.sum().reshape(1)  # other ranks may have other groups then
        device = sums[0].device if sums else own.device
        total = sharded.on_all_ranks(optimizer._ranks, torch.cat([own, own.new_tensor([is_skipped])]), device)
        if not is_skipped and total[-1].item() != 0:
            is_skipped = optimizer._skipped = True
        total = total[:-1]
    norm = clipping.norms(total, step)
    optimizer._norm, optimizer._last_step = norm.to(sums[0].device) if sums else norm, step
    return norm, is_skipped


def _keep(optimizer: Base, part: Part, made: list[tuple[int, Tensor]]) -> None:
    for row, buffer in made:
        param = part.rows[row].param
        entry = optimizer.state.setdefault(param, {})  # one look-up: to hash a tensor takes a call of Python's
        entry["momentum_buffer"] = sharded.like(param, buffer) if is_dtensor(param) else buffer


def _count(optimizer: Base, step: StepOptions) -> None:
    """What a step that was done leaves beside parameters and state."""
    reader, groups = optimizer._reader, optimizer.param_groups
    for g, counter in reader.counters:
        groups[g][counter] = groups[g].get(counter, 0) + 1
    if optimizer._averaged_buffers is not None and reader.averaging is not None:
        group = step.groups[reader.averaging]
        assert group is not None, "it averages"
        optimizer._averaged_buffers.update(optimizer.state, groups, group.average_weight)


def _zero_skipped_gradients(optimizer: Base) -> None:
    """Else what made the step skip would be in the next gradients, too."""
    _zero_gradients(param for g in optimizer._reader.zeroing for param in optimizer.param_groups[g]["params"])


def _zero_gradients(params: Iterable[Tensor]) -> None:
    for param in params:
        if param.grad is not None:
            reference.zero(param.grad)
