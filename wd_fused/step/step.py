"""A step, top to bottom: every plan prepares, then everything is written."""

import math
from typing import Any

import torch
from torch import Tensor

from wd_fused import reference
from wd_fused.options import clipping
from wd_fused.options.spec import StepOptions
from wd_fused.step import objections, sharded
from wd_fused.step.base import ParameterBackend, Part, Plans
from wd_fused.step.claims import is_taken
from wd_fused.step.others import Others
from wd_fused.step.sharded import is_dtensor


def _check_word_of_grad_scaler(name: str, word: Any) -> None:
    if word is not None and not isinstance(word, Tensor):
        raise TypeError(f"{name} must be a Tensor, as torch.amp.GradScaler sets it, not {word!r}")


def _check_float_of_grad_scaler(name: str, word: Tensor | None) -> None:
    """Of a step with options, which reads the word as it is."""
    if word is None:
        return
    if word.dtype != torch.float32 or word.numel() != 1:
        raise TypeError(
            f"{name} must be a float32 Tensor of one element, as torch.amp.GradScaler sets it, not "
            f"{objections.described(word)}"
        )


def _inverse_of(grad_scale: Tensor) -> float:
    # Its value, not a tensor: on a GPU that would be rounded to a half-precision gradient's dtype first.
    return grad_scale.double().reciprocal().float().item()


def _value_of(found_inf: Tensor) -> float:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step under torch.amp.GradScaler can be captured in a CUDA graph only where one backend on the GPU takes "
            "all parameters, and has stepped them before: call step() once before the capture, as a warm-up"
        )
    return found_inf.item()


class Step(Others):
    def _step(self) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None or found_inf is not None:
            _check_word_of_grad_scaler("grad_scale", grad_scale)
            _check_word_of_grad_scaler("found_inf", found_inf)
            self._skipped = False if found_inf is None else found_inf
        elif isinstance(self._skipped, StepOptions):  # this step's norm takes the place of the one that tells
            self._skipped = self._was_skipped()
        claims, claim = self._claims, object()
        claims[claim] = None
        try:
            if len(claims) > 1 and is_taken(claims, claim):
                raise RuntimeError("step() of this optimizer is already running, in another thread or around this one")
            if self._swapped:
                self._refuse_while_swapped("step()")
            # A plan without options holds only as long as no group gets an option.
            if self._reader.is_plain and self._step_alone(grad_scale, found_inf, None):
                return
            if not self.state and self._asks_for_state():
                self._make_first_state()
                return
            step = self._reader.read(self.param_groups)
            if step is not None and (grad_scale is not None or found_inf is not None):
                _check_float_of_grad_scaler("grad_scale", grad_scale)
                _check_float_of_grad_scaler("found_inf", found_inf)
            if self._plans is not None and self._plans.structure is not self._reader.structure:
                self._plans = None
            if self._reader.is_plain or not self._step_alone(grad_scale, found_inf, step):
                self._step_together(grad_scale, found_inf, step)
        finally:
            del claims[claim]

    def _step_alone(self, grad_scale: Tensor | None, found_inf: Tensor | None, step: StepOptions | None) -> bool:
        """The usual step: one plan, made before, that holds and takes every gradient. False: nothing is done."""
        plans = self._plans
        if plans is None or plans.with_torch or len(plans.parts) != 1:
            return False
        part = plans.parts[0]
        if step is not None and step.clips and part.ranks is not None:
            return False
        if step is None or not part.has_options:
            made = part.plan.step(self.param_groups, self.state, grad_scale, found_inf)
        else:
            if found_inf is not None and found_inf.is_cpu and found_inf.item() != 0:
                return False
            made = part.plan.step(self.param_groups, self.state, grad_scale, found_inf, step)
        if made is None:
            return False
        if made:
            self._keep(part, made)
            part.plan.read_state(self.state)
        if step is not None:
            if step.clips and part.has_options:
                self._norm = part.plan
                if grad_scale is not None and found_inf is None:
                    self._skipped = step
                if grad_scale is not None and part.plan.was_skipped():
                    self._zero_skipped_gradients()
                    return True
            self._count(step)
        return True

    def _count(self, step: StepOptions) -> None:
        """What a step that was done leaves beside parameters and state."""
        for g, counter in self._reader.counters:
            group_of_counter = self.param_groups[g]
            group_of_counter[counter] = group_of_counter.get(counter, 0) + 1
        if self._averaged_buffers is not None and self._reader.averaging is not None:
            group = step.groups[self._reader.averaging]
            assert group is not None, "it averages"
            self._averaged_buffers.update(self.state, self.param_groups, group.average_weight)

    def _step_together(self, grad_scale: Tensor | None, found_inf: Tensor | None, step: StepOptions | None) -> None:
        """Any step: everything is checked before anything is written."""
        is_skipped = found_inf is not None and _value_of(found_inf) != 0
        if is_skipped and (step is None or not step.clips):
            self._zero_skipped_gradients()
            return
        sharded.place_all_alike(self.param_groups, self.state)
        try:
            plans, with_torch, step = self._prepared(step)
            inverse_scale = None if grad_scale is None else _inverse_of(grad_scale)
            by_reference = [p for p in with_torch if step is not None and step.groups[p.group] is not None]
            coefficients = None
            if step is not None and step.clips:
                norm = self._measured(plans, by_reference, step, grad_scale, inverse_scale)
                is_finite = not bool(clipping.is_nonfinite(norm, step))
                if not is_finite and grad_scale is not None and found_inf is None:
                    is_skipped = self._skipped = True  # as torch.amp.GradScaler would have it
                if not is_finite and not is_skipped and step.error_if_nonfinite:
                    raise RuntimeError(clipping.NONFINITE)
                coefficients = clipping.coefficients(norm, step)
            if is_skipped:
                self._zero_skipped_gradients()
                return
            if inverse_scale is not None and self._unscale(inverse_scale, plans, with_torch):
                plans, with_torch, step = self._prepared(step)  # a plan may have read a copy of a gradient
                by_reference = [p for p in with_torch if step is not None and step.groups[p.group] is not None]
            # First: if that raises after all, the plans have not written either.
            self._step_with_torch(p for p in with_torch if step is None or step.groups[p.group] is None)
            if step is not None:
                self._step_with_reference(by_reference, step, coefficients, inverse_scale)
            for part in plans.parts:
                if part.has_options:
                    self._keep(part, part.plan.launch(coefficients, grad_scale))
                else:
                    self._keep(part, part.plan.launch())
        finally:
            for part in self._plans.parts if self._plans is not None else ():
                part.plan.abandon()
        for part in plans.parts:
            part.plan.read_state(self.state)
        if step is not None:
            self._zero_gradients(by_reference)
            self._count(step)

    def _measured(
        self,
        plans: Plans,
        by_reference: list[ParameterBackend],
        step: StepOptions,
        grad_scale: Tensor | None,
        inverse_scale: float | None,
    ) -> Tensor:
        """The norm of the gradients, on the CPU."""
        sums = [
            sharded.summed_over(part.ranks, own)
            for part in plans.parts
            if part.has_options
            for own in part.plan.sums(grad_scale)
        ]
        for g, i, _, _ in by_reference:
            param, group_step = self.param_groups[g]["params"][i], step.groups[g]
            assert group_step is not None, "it has options"
            if param.grad is not None and not math.isnan(group_step.max_norm):
                squares = reference.sum_of_squares(
                    sharded.local(param),
                    sharded.local(param.grad),
                    self._row_options(param, g),
                    self._numerics,
                    inverse_scale,
                )
                own = torch.zeros(len(step.groups), dtype=torch.float64, device=squares.device)
                own[g] = squares
                sums.append(sharded.summed_over(sharded.ranks_of(param), own))
        total = torch.zeros(len(step.groups), dtype=torch.float64, device="cpu")
        for own in sums:
            total += own.cpu()
        norm = clipping.norms(total, step)
        self._norm = norm.to(sums[0].device) if sums else norm
        return norm

    def _keep(self, part: Part, made: list[tuple[int, Tensor]]) -> None:
        for row, buffer in made:
            param = part.rows[row].param
            entry = self.state.setdefault(param, {})  # one look-up: to hash a tensor takes a call of Python's
            entry["momentum_buffer"] = sharded.like(param, buffer) if is_dtensor(param) else buffer
