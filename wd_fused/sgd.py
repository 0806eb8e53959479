"""FusedSGD: torch.optim.SGD with the whole step in one fused pass.

The step reads: prepare every plan (checks, no writes), launch every plan, and torch's own code for the rest. A plan is
built at the first step and again whenever it no longer holds; what a backend does inside is its own affair.
"""

import functools
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.sgd import sgd as torch_sgd

from wd_fused import backends, extension
from wd_fused.backends import Plan, Row

_P = ParamSpec("_P")
_R = TypeVar("_R")


class ParameterBackend(NamedTuple):
    """Which backend steps a parameter, and why: an entry of :meth:`FusedSGD.backends`."""

    group: int
    position: int
    backend: str
    reason: str


class _Part(NamedTuple):
    """The rows of one backend, which its plan points to, and the plan."""

    backend: str
    rows: list[Row]
    plan: Plan


class _Plans(NamedTuple):
    """What is fixed between steps."""

    parts: list[_Part]
    with_torch: list[ParameterBackend]  # parameters that torch's code steps
    may_return: list[ParameterBackend]  # those of them that a fused backend may take when they change
    torch_extents: list[tuple[int, int]]  # the memory that torch's code writes
    groups: list[list[Tensor]]  # keeps alive what the plans compare with


class FusedSGD(torch.optim.SGD):
    r"""Stochastic gradient descent with momentum and weight decay, in one fused pass over memory.

    A drop-in for :class:`torch.optim.SGD`: same arguments, same ``state_dict``, same bits in the parameters as its
    default implementation (``foreach=False`` or ``True``). For each parameter p with gradient g and momentum buffer b

    .. math::
        g &\leftarrow g + \text{weight\_decay} \cdot p \\
        b &\leftarrow \text{momentum} \cdot b + (1 - \text{dampening}) \cdot g \quad (b \leftarrow g
            \text{ on the first step}) \\
        p &\leftarrow p - \text{lr} \cdot b \quad (\text{nesterov: } p - \text{lr} \cdot (g + \text{momentum} \cdot b))

    as torch.optim.SGD defines it. ``weight_decay`` is the L2 penalty's derivative: adding λ·Σp² to the loss equals
    ``weight_decay = 2λ``.

    Args:
        params: iterable of parameters, of (name, parameter) pairs, or of dicts that define parameter groups. Floating
            point tensors of any shape and layout.
        lr: learning rate, a float or a Tensor of one element. Default: 1e-3.
        momentum: momentum factor. Default: 0.
        dampening: dampening for momentum; from the second step on. Default: 0.
        weight_decay: L2 penalty, a float or a Tensor of one element. Default: 0.
        nesterov: Nesterov momentum; needs momentum and zero dampening. Default: False.
        maximize: maximize the objective instead. Default: False.
        foreach, fused: choose torch's implementation for the parameters that torch's code steps. With ``fused=True``,
            torch.amp.GradScaler leaves unscaling the gradients and skipping a step to step(), as it does with torch's
            own: on a GPU nothing then waits, and the gradients keep their scale. Default: None.
        differentiable: let autograd run through step(); torch's code then does it. Default: False.
        backend: "auto" gives each parameter the best backend of this machine (see :meth:`backends`); "cpu", "cuda" and
            "triton" insist on one; "torch" leaves everything to torch's code. The environment variable
            ``WD_FUSED_BACKEND`` overrides "auto".
        numerics: "torch" rounds every intermediate to the parameter's dtype, as torch.optim.SGD's operators do;
            "opmath" rounds once, at the store. They differ for float16 and bfloat16 only.

    Raises:
        ValueError, RuntimeError: torch.optim.SGD's own, in its words, for its arguments; ValueError for an unknown
            ``backend`` or ``numerics``; RuntimeError for a ``backend`` that this machine lacks.

    A parameter that no fused backend takes (complex, sparse gradient, tensor subclass, …) is stepped by torch's code,
    with one warning that names the reason; with an explicit ``backend`` that is a RuntimeError instead.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        numerics: str = "torch",
    ) -> None:
        self._backend = backends.wanted(backend)
        self._numerics = backends.checked_numerics(numerics, self._backend)
        self._plans: _Plans | None = None
        self._warned: set[str] = set()
        self._stepping: dict[str, int] = {}
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    @staticmethod
    def profile_hook_step(func: Callable[_P, _R]) -> Callable[_P, _R]:
        """Torch's wrapper of step(), entered only where somebody would notice: a hook, a profiler, a compiler.

        It opens a record_function at every step, which takes as long as the step of a small model.
        """
        with_hooks = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return (with_hooks if _is_watched(cast(FusedSGD, args[0])) else func)(*args, **kwargs)

        return step

    def __getstate__(self) -> dict[str, Any]:
        own = ("_backend", "_numerics", "_step_supports_amp_scaling")  # torch sets the last with fused=True
        return super().__getstate__() | {name: getattr(self, name) for name in own if hasattr(self, name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle or deepcopy, and of load_state_dict(), which brings only groups and state."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._plans = None
        self._warned = set()
        self._stepping = {}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a single optimization step; returns what ``closure`` returns.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled, before anything
                is written.

        Raises:
            RuntimeError: a gradient cannot be used (shape, device, dtype), naming group and parameter; an explicit
                ``backend`` does not take a parameter. No parameter has been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():  # a compiler makes its own fused code of torch's
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                for group in self.param_groups:
                    self._step_group_with_torch(group)
            return loss
        grad_scale, found_inf = self._word_of_grad_scaler("grad_scale"), self._word_of_grad_scaler("found_inf")
        if self._stepping.setdefault("thread", get_ident()) != get_ident():  # in one go, whichever thread comes first
            raise RuntimeError("step() of this optimizer is already running in another thread")
        try:
            if not self._step_alone(grad_scale, found_inf):
                self._step_together(grad_scale, found_inf)
        finally:
            self._stepping.clear()
        return loss

    def _word_of_grad_scaler(self, name: str) -> Tensor | None:
        word = getattr(self, name, None)
        if word is not None and not isinstance(word, Tensor):
            raise TypeError(f"{name} must be a Tensor, as torch.amp.GradScaler sets it, not {word!r}")
        return word

    def _step_alone(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """The usual step: one plan, made before, that holds and takes every gradient. False: nothing is done."""
        plans = self._plans
        if plans is None or plans.with_torch or len(plans.parts) != 1:
            return False
        part = plans.parts[0]
        made = part.plan.step(self.param_groups, self.state, grad_scale, found_inf)
        if made is None:
            return False
        if made:
            self._keep(part, made)
            part.plan.read_state(self.state)
        return True

    def _step_together(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Any step: everything is checked before anything is written."""
        if found_inf is not None and _value_of(found_inf) != 0:
            return
        try:
            plans, with_torch = self._prepared()
            if grad_scale is not None:
                self._unscale(grad_scale)
                plans, with_torch = self._prepared()  # a plan may have read a copy of a gradient
            if with_torch:  # first: if that raises after all, the plans have not written either
                self._step_with_torch(with_torch)
            for part in plans.parts:
                self._keep(part, part.plan.launch())
        finally:
            for part in self._plans.parts if self._plans is not None else ():
                part.plan.abandon()
        for part in plans.parts:
            part.plan.read_state(self.state)

    def _keep(self, part: _Part, made: list[tuple[int, Tensor]]) -> None:
        for row, buffer in made:
            self.state[part.rows[row].param]["momentum_buffer"] = buffer

    def backends(self) -> list[ParameterBackend]:
        """The backend that steps each parameter, in the order of the groups, and why.

        A gradient may still send its parameter to torch's code for a step: sparse, or of another dtype.
        """
        plans = self._planned()
        taken = [
            ParameterBackend(row.group, row.position, part.backend, backends.choose(row.param, self._backend)[1])
            for part in plans.parts
            for row in part.rows
        ]
        return sorted(taken + plans.with_torch)

    def _prepared(self) -> tuple[_Plans, list[ParameterBackend]]:
        """Plans that hold and have checked everything, and what torch's code must step this time."""
        plans = self._plans if self._plans is not None and self._still_right(self._plans) else None
        left = None if plans is None else _prepare(plans, self.param_groups, self.state)
        if plans is None or left is None:
            plans = self._planned()
            left = _prepare(plans, self.param_groups, self.state)
            if left is None:  # groups or state are not of the types that plans read
                plans, left = self._planned(_UNREADABLE), []
            self._plans = plans
        with_torch = plans.with_torch + left
        for parameter in with_torch:
            self._check_for_torch(parameter)
        return plans, with_torch

    def _planned(self, why_nothing_fused: str | None = None) -> _Plans:
        groups = [list(group["params"]) for group in self.param_groups]
        occurrences = Counter(id(param) for params in groups for param in params)
        rows: dict[str, list[Row]] = {}
        with_torch = []
        for g, group in enumerate(self.param_groups):
            group_reason = _group_refusal(group)
            for i, param in enumerate(groups[g]):
                backend, reason = self._choice(param, group_reason)
                if occurrences[id(param)] > 1:
                    backend, reason = "torch", _REPEATED
                if why_nothing_fused is not None:
                    backend, reason = "torch", why_nothing_fused
                if backend == "torch":
                    with_torch.append(ParameterBackend(g, i, backend, reason))
                else:
                    rows.setdefault(backend, []).append(Row(param, self._buffer(param), g, i))
        torch_extents = self._torch_extents(with_torch) if rows else []
        own = [tensor for part in rows.values() for row in part for tensor in (row.param, row.momentum_buffer)]
        if torch_extents and _meet(torch_extents, [_extent(tensor) for tensor in own if tensor is not None]):
            return self._planned(_ENTANGLED)
        parts = [
            _Part(name, own, backends.FUSED[name].plan(own, groups, self.state, self._numerics))
            for name, own in rows.items()
        ]
        may_return = [
            parameter
            for parameter in with_torch
            if parameter.reason not in (_REPEATED, _UNREADABLE, _ENTANGLED)
            and backends.any_usable(groups[parameter.group][parameter.position].device, self._backend)
        ]
        return _Plans(parts, with_torch, may_return, torch_extents, groups)

    def _torch_extents(self, with_torch: list[ParameterBackend]) -> list[tuple[int, int]]:
        params = [self.param_groups[g]["params"][i] for g, i, _, _ in with_torch]
        buffers = [buffer for param in params if isinstance(buffer := self._buffer(param), Tensor)]
        return [_extent(tensor) for tensor in (*params, *buffers) if _has_memory(tensor)]

    def _choice(self, param: Tensor, group_reason: str | None) -> tuple[str, str]:
        """The backend for a parameter and why, by itself, its group and its momentum buffer."""
        backend, reason = backends.choose(param, self._backend)
        if backend == "torch":
            return backend, reason
        refusal = group_reason or self._buffer_refusal(param, backend)
        return (backend, reason) if refusal is None else ("torch", refusal)

    def _buffer(self, param: Tensor) -> Any:
        state = self.state.get(param)  # not [param]: that would put an entry there
        return state.get("momentum_buffer") if state else None

    def _buffer_refusal(self, param: Tensor, backend: str) -> str | None:
        buffer = self._buffer(param)
        if buffer is None:
            return None
        if not isinstance(buffer, Tensor):
            return f"its momentum buffer is a {type(buffer).__name__}, not a Tensor"
        if (buffer.dtype, buffer.device, buffer.shape) != (param.dtype, param.device, param.shape):
            return f"its momentum buffer is {backends.described(buffer)}, the parameter {backends.described(param)}"
        if (reason := backends.FUSED[backend].refusal(buffer)) is not None:
            return f"its momentum buffer cannot be taken: {reason}"
        return "its momentum buffer shares memory with it" if _meet([_extent(param)], [_extent(buffer)]) else None

    def _still_right(self, plans: _Plans) -> bool:
        """Whether torch's code must still step what it stepped last time. The plans check their own rows."""
        if plans.parts and not plans.with_torch:
            return True
        if len(plans.groups) != len(self.param_groups):
            return False
        for params, group in zip(plans.groups, self.param_groups, strict=True):
            if len(params) != len(group["params"]) or not all(map(operator.is_, params, group["params"])):
                return False
        if plans.parts and self._torch_extents(plans.with_torch) != plans.torch_extents:
            return False
        group_reasons = [_group_refusal(group) for group in self.param_groups] if plans.may_return else []
        return all(self._choice(plans.groups[g][i], group_reasons[g])[0] == "torch" for g, i, _, _ in plans.may_return)

    def _check_for_torch(self, parameter: ParameterBackend) -> None:
        """Raises for what torch's code would fail on half-way; warns once of what made it slow."""
        g, i, _, reason = parameter
        group = self.param_groups[g]
        param: Tensor = group["params"][i]
        grad = param.grad
        if grad is None:
            return
        name = f"group {g}, parameter {i}" + (f" ({group['param_names'][i]})" if "param_names" in group else "")
        if self._backend not in ("auto", "torch"):
            raise RuntimeError(
                f'{name}: backend="{self._backend}" does not take it: {reason}; backend="auto" leaves it to torch'
            )
        buffer = self._buffer(param) if group["momentum"] != 0 else None
        if (objection := backends.objection_of_torch(param, grad, buffer, group["weight_decay"])) is not None:
            raise RuntimeError(f"{name}: {objection}")
        if self._backend == "torch" or self._warned & {name, reason}:
            return
        self._warned |= {name, reason}
        if not (param.is_cpu and reason == extension.status().reason):  # of which extension.load() has warned
            warnings.warn(
                f"FusedSGD: torch's own code steps {name}, slower and with the same result: {reason}", stacklevel=6
            )

    def _step_with_torch(self, parameters: Iterable[ParameterBackend]) -> None:
        indices: dict[int, list[int]] = {}
        for parameter in sorted(parameters):
            indices.setdefault(parameter.group, []).append(parameter.position)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for g, own in indices.items():
                group = self.param_groups[g]
                self._step_group_with_torch(group | {"params": [group["params"][i] for i in own]})

    def _step_group_with_torch(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        momentum_buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, momentum_buffers)  # type: ignore[no-untyped-call]
        torch_sgd(
            params,
            grads,
            momentum_buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            has_sparse_grad=has_sparse_grad,
            foreach=group["foreach"],
            fused=group["fused"],
        )
        for param, buffer in zip(params, momentum_buffers, strict=False):  # none without momentum
            self.state[param]["momentum_buffer"] = buffer

    def _unscale(self, grad_scale: Tensor) -> None:
        """Divides the gradients by what torch.amp.GradScaler has multiplied them with, as its unscale_() does."""
        # Its value, not a tensor: on a GPU that would be rounded to a half-precision gradient's dtype first.
        inverse = grad_scale.double().reciprocal().float().item()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.mul_(inverse)


def _value_of(found_inf: Tensor) -> float:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step under torch.amp.GradScaler can be captured in a CUDA graph only where one backend on the GPU takes "
            "all parameters, and has stepped them before: call step() once before the capture, as a warm-up"
        )
    return found_inf.item()


def _is_watched(optimizer: FusedSGD) -> bool:
    if torch.compiler.is_compiling():
        return True
    module = extension.module_if_loaded()
    if module is None or module.is_observed():
        return True
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


_REPEATED = "it appears more than once in the parameter groups"
_ENTANGLED = "parameters of which torch's code must step some share memory: only torch's order gives torch's result"
_UNREADABLE = "param_groups must be a list of dicts, each with a list of parameters, and state a dict of dicts"


def _prepare(plans: _Plans, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> list[ParameterBackend] | None:
    """Prepares every plan: what they leave to torch's code, or None if one no longer holds."""
    left: list[ParameterBackend] = []
    for part in plans.parts:
        count = part.plan.prepare(groups, state)
        if count < 0:
            return None
        if count:
            left += (
                ParameterBackend(part.rows[r].group, part.rows[r].position, "torch", reason)
                for r, reason in part.plan.left()
            )
    return left


def _group_refusal(group: dict[str, Any]) -> str | None:
    """Why only torch's code steps this group, or None."""
    if group["differentiable"]:
        return "differentiable=True"
    for name in ("lr", "weight_decay"):
        if isinstance(group[name], Tensor) and group[name].requires_grad:
            return f"{name} is a Tensor that requires grad"
    return None


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses [begin, end) between which a strided tensor's elements lie."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _meet(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    """Whether one of ``some`` extents meets one of ``others``."""
    reach, reach_is_other = 0, False
    for begin, end, is_other in sorted([(*e, False) for e in some] + [(*e, True) for e in others]):
        if begin < min(end, reach) and is_other != reach_is_other:
            return True
        if end > reach:
            reach, reach_is_other = end, is_other
    return False
