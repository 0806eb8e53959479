"""What no plan steps: torch's code, the operator in a compiler's graph, the reference."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from wd_fused import backends, operators, reference
from wd_fused.options import hyperparameters, kept
from wd_fused.options.spec import StepOptions
from wd_fused.step import sharded
from wd_fused.step.base import SEEN_BY_MODES, ParameterBackend, Plans
from wd_fused.step.extents import extent, meet
from wd_fused.step.graph import is_beyond_graph, operands_in_graph, outside_compiler
from wd_fused.step.plans import Planning
from wd_fused.step.sharded import is_dtensor


class Others(Planning):
    def _step_in_graph(self) -> None:
        """The step as torch.compile traces it: an operator's call for each group, with the bits of any other step.

        Groups that the operator does not take are torch's code, which the compiler fuses. Where that would not do what
        was asked for, the step is left as it is: a break in the compiler's graph.
        """
        operands = [operands_in_graph(self, group) for group in self.param_groups]
        insists = self._backend in backends.FUSED or self._numerics == "opmath"
        if (insists and None in operands) or is_beyond_graph(self):
            outside_compiler(self)
            return
        for group, own in zip(self.param_groups, operands, strict=True):
            if own is None:
                with torch.set_grad_enabled(self.defaults["differentiable"]):
                    self._step_group_with_torch(group)
            else:
                with torch.no_grad():
                    self._step_group_in_graph(group, own)

    def _step_group_in_graph(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        grads = [param.grad for param in params]
        momentum_buffers: list[Tensor] = []
        first_steps: list[bool] = []
        if group["momentum"] != 0:
            for param in params:
                buffer = self.state[param].get("momentum_buffer")
                first_steps.append(buffer is None)
                momentum_buffers.append(torch.empty_like(param) if buffer is None else buffer)
        lists = (params, grads, momentum_buffers, first_steps)
        flags = {
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
            "opmath": self._numerics == "opmath",
        }
        numbers = {name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay")}
        if torch.compiler.is_compiling() or any(isinstance(number, Tensor) for number in numbers.values()):
            torch.ops.wd_fused.sgd_with_tensors_(*lists, *map(operators.in_tensor, numbers.values()), **flags)
        else:
            known = {name: hyperparameters.number(number) for name, number in numbers.items()}
            known["dampening"] = hyperparameters.dampening(numbers["dampening"])
            torch.ops.wd_fused.sgd_(*lists, **known, **flags)
        for param, buffer in zip(params, momentum_buffers, strict=False):  # none without momentum
            self.state[param]["momentum_buffer"] = buffer

    def _step_with_torch(self, parameters: Iterable[ParameterBackend]) -> None:
        indices: dict[int, list[int]] = {}
        reasons: set[str] = set()
        for parameter in sorted(parameters):
            indices.setdefault(parameter.group, []).append(parameter.position)
            reasons.add(parameter.reason)
        groups = [
            self.param_groups[g] | {"params": [self.param_groups[g]["params"][i] for i in own]}
            for g, own in indices.items()
        ]
        # Seen by modes, and with the bits of any other step: which torch's code has not in half precision.
        operands = [operands_in_graph(self, group) if reasons == {SEEN_BY_MODES} else None for group in groups]
        if any(own and self._are_entangled(own) for own in operands):
            operands = [None] * len(groups)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group, own in zip(groups, operands, strict=True):
                if own is None:
                    self._step_group_with_torch(group)
                    continue
                with torch.no_grad():
                    self._step_group_in_graph(group, own)

    def _are_entangled(self, params: list[Tensor]) -> bool:
        """Whether one is stepped twice, or a gradient shares memory with what the step writes: only torch's order gives
        torch's result."""
        if len(set(params)) < len(params):
            return True
        written = [tensor for param in params for tensor in (param, self._buffer(param)) if tensor is not None]
        grads = [param.grad for param in params if param.grad is not None]
        return meet([*map(extent, grads)], [*map(extent, written)])

    def _step_group_with_torch(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        momentum_buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, momentum_buffers)  # type: ignore[no-untyped-call]
        torch_sgd(
            params,
            grads,
            momentum_buffers,
            weight_decay=hyperparameters.number(group["weight_decay"]),
            momentum=hyperparameters.number(group["momentum"]),
            lr=hyperparameters.number(group["lr"]),
            dampening=hyperparameters.dampening(group["dampening"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            has_sparse_grad=has_sparse_grad,
            foreach=group["foreach"],
            fused=group["fused"],
        )
        for param, buffer in zip(params, momentum_buffers, strict=False):  # none without momentum
            self.state[param]["momentum_buffer"] = buffer

    def _step_with_reference(
        self,
        parameters: list[ParameterBackend],
        step: StepOptions,
        coefficients: list[float] | None,
        inverse_scale: float | None,
    ) -> None:
        indices: dict[int, list[int]] = {}
        for parameter in sorted(parameters):
            indices.setdefault(parameter.group, []).append(parameter.position)
        for g, positions in indices.items():
            group, group_step, options = self.param_groups[g], step.groups[g], self._reader.options[g]
            assert group_step is not None and options is not None, "only such groups come here"
            params = [group["params"][i] for i in positions]
            for param in params:  # those that have had no gradient before
                kept.make(param, self.state, options, group["momentum"] != 0)
            before = [self._buffer(param) for param in params]
            buffers = [None if buffer is None else sharded.local(buffer) for buffer in before]
            reference.sgd_with_options(
                [*map(sharded.local, params)],
                [None if param.grad is None else sharded.local(param.grad) for param in params],
                buffers,
                [sharded.local_row(self._row_options(param, g)) for param in params],
                positions,
                group_step,
                lr=float(group["lr"]),
                momentum=float(group["momentum"]),
                dampening=hyperparameters.dampening(group["dampening"]),
                weight_decay=float(group["weight_decay"]),
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                numerics=self._numerics,
                coefficient=1.0 if coefficients is None else coefficients[g],
                inverse_scale=inverse_scale,
            )
            for param, buffer, old in zip(params, buffers, before, strict=True):
                if buffer is None or group["momentum"] == 0:
                    continue
                if is_dtensor(param):
                    buffer = old if old is not None else sharded.like(param, buffer)
                self.state[param]["momentum_buffer"] = buffer

    def _zero_skipped_gradients(self) -> None:
        """Of a step that was skipped: else what made it skip would be in the next gradients, too."""
        for g in self._reader.zeroing:
            for param in self.param_groups[g]["params"]:
                if param.grad is not None:
                    reference.zero(param.grad)

    def _zero_gradients(self, parameters: list[ParameterBackend]) -> None:
        """After all else: another parameter's gradient may share the memory."""
        for g, i, _, _ in parameters:
            group = self.param_groups[g]
            if group.get("zero_grads") and (grad := group["params"][i].grad) is not None:
                reference.zero(grad)

    def _unscale(self, inverse_scale: float, plans: Plans, with_torch: list[ParameterBackend]) -> bool:
        """Unscales the gradients in place, as torch.amp.GradScaler's unscale_() does, but those of options,
        whose plans and reference unscale what they read; and all of a GPU's plan that has such. False: no others."""
        plain = {
            row.param: None
            for part in plans.parts
            for row in part.rows
            if not part.has_options or (part.backend == "cpu" and row.options is None)
        }
        plain |= {
            self.param_groups[g]["params"][i]: None for g, i, _, _ in with_torch if self._reader.options[g] is None
        }
        with torch.no_grad():
            for param in plain:
                if param.grad is not None:
                    with reference.where_writable(param.grad):
                        param.grad.mul_(inverse_scale)
        return bool(plain)
