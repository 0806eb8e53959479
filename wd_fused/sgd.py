"""FusedSGD: its arguments, and what people call. What a step does is in step/, what the options are in options/."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from wd_fused import backends
from wd_fused.build import extension
from wd_fused.options import settings, spec
from wd_fused.options.averages import AveragedBuffers
from wd_fused.options.spec import Options
from wd_fused.step import sharded, states
from wd_fused.step.base import ParameterBackend
from wd_fused.step.checkpoint import Checkpointed
from wd_fused.step.of_options import OfOptions
from wd_fused.step.plans import planned
from wd_fused.step.step import run, run_in_graph

_P = ParamSpec("_P")
_R = TypeVar("_R")


class FusedSGD(Checkpointed, OfOptions):
    """Stochastic gradient descent with momentum and weight decay, in one fused pass over memory.

    A drop-in for ``torch.optim.SGD``: same arguments, same ``state_dict``, same bits in the parameters as its
    default implementation (``foreach=False`` or ``True``). For a parameter p with gradient g and momentum buffer b:

        g ← g + weight_decay · p
        b ← momentum · b + (1 − dampening) · g      b ← g in the first step
        p ← p − lr · b                              nesterov: p ← p − lr · (g + momentum · b)

    ``weight_decay`` is the derivative of the L2 penalty: adding λ·Σp² to the loss equals ``weight_decay = 2λ``.

    The options, from ``max_grad_norm`` on, do in the same pass what else stands between backward() and the next
    forward(). Each is off by default. Those marked † may differ by parameter group, and are read from it at every step.
    In this order, with w the weight (the parameter, or its exact value where more digits of it are kept):

        g ← g / scale                               of torch.amp.GradScaler
        g ← g · min(1, max_grad_norm / (‖g‖₂ + 10⁻⁶))
        g ← −g                                      maximize
        g ← g + weight_decay · w + l1_penalty · sign(w)
        w ← w · (1 − lr · c)                        c: decoupled weight decay
        b, then w, as b and p above
        ema ← ema + (1 − ema_decay) · (w − ema)

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=1.0)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> bool(optimizer.grad_norm > 0)
        True

    Args:
        params: iterable of parameters, of (name, parameter) pairs, or of dicts that define parameter groups. Floating
            point tensors of any shape and layout.
        lr: learning rate, a float or a Tensor of one element. Default: 1e-3.
        momentum: momentum factor. Default: 0.
        dampening: dampening for momentum; from the second step on. Default: 0.
        weight_decay: L2 penalty, a float or a Tensor of one element. Default: 0.
        nesterov: Nesterov momentum; needs momentum and zero dampening. Default: False.
        maximize: maximize the objective instead. Default: False.
        foreach: chooses torch's implementation for the parameters that torch's code steps. Default: None.
        fused: the same; and with True, torch.amp.GradScaler leaves unscaling the gradients and skipping a step to
            step(), as it does with torch's own: on a GPU nothing then waits, and the gradients keep their scale.
            Default: None.
        differentiable: let autograd run through step(); torch's code then does it. Default: False.
        backend: "auto" gives each parameter the best backend of this machine (see ``backends``); "cpu", "cuda" and
            "triton" insist on one; "torch" leaves everything to torch's code. The environment variable
            ``WD_FUSED_BACKEND`` overrides "auto".
        numerics: "torch" rounds every intermediate to the parameter's dtype, as torch.optim.SGD's operators do;
            "opmath" rounds once, at the store. They differ for float16 and bfloat16 only; with master weights, with
            stochastic or compensated rounding, and where gradient or momentum are of another dtype than the parameter,
            nothing but the stores is ever rounded.
        max_grad_norm: † clips the gradients by their 2-norm over all groups that have it and all devices, as
            torch.nn.utils.clip_grad_norm_ defines it, each group to its own maximum; the gradients themselves are not
            rewritten. inf only measures. See ``grad_norm``. Default: None.
        norm_per_group: each group is clipped by a norm of its own. Default: False.
        error_if_nonfinite: a norm that is infinite or NaN is a RuntimeError, before anything is written; a GPU is
            waited for. Default: False, as torch: such a norm spoils the parameters; but under torch.amp.GradScaler
            with ``fused=True`` the step is skipped.
        process_group: the norm is that of the gradients of all its ranks: of a torch.distributed.ProcessGroup of which
            each rank has a part of its own of the gradients, in plain tensors (ZeroRedundancyOptimizer, FSDP1, pipeline
            stages). Each rank has to have the same groups and options, and to call each step(). DTensors say by
            themselves who has their other parts. See docs/options.md. Default: None, no other ranks.
        l1_penalty: † adds l1_penalty · sign(p) to the gradient, the derivative of l1_penalty · Σ|p|. Default: 0.
        decoupled_weight_decay: † True: ``weight_decay`` is not added to the gradient, but p ← p · (1 − lr ·
            weight_decay) before the step, as in SGDW (Loshchilov and Hutter, arXiv:1711.05101). A float: the same with
            that coefficient, beside the L2 ``weight_decay``. Default: False.
        decouple_lr: † the decay does not grow with the learning rate: p ← p · (1 − weight_decay · lr / initial lr),
            where the initial lr is ``group["initial_lr"]``: the lr when the option comes on, or what a scheduler has
            put there. A negative factor is a ValueError. Default: False.
        ema_decay: † keeps an exponential moving average of the parameters, of those without gradients, too, that of
            torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn(ema_decay). See ``ema_parameters`` and
            ``swap_ema``. Default: None.
        ema_dtype: † of the averages of float16 and bfloat16 parameters and ``ema_buffers``: torch.float32, or their own
            (which a small change of the average is too small for), as AveragedModel keeps them. Other averages are of
            what they average. Default: None, torch.float32.
        ema_warmup: † uses min(ema_decay, (1 + n) / (10 + n)) in the n-th average. Default: False.
        ema_buffers: a module, or tensors, whose buffers are averaged after each step: those of floating point; others
            are copied. With the ema_decay of the first group that has one. Default: None.
        master_weights: † float16 and bfloat16 parameters are stepped in float32. "full" keeps a float32 copy in the
            state; "split" (bfloat16) the 16 bits that a parameter lacks of it, exactly, "split24" 8 of them, after
            rounding to nearest. Momentum buffers and averages are float32 then. See ``master_parameters``.
            Default: None.
        momentum_dtype: † of the momentum buffers: torch.float32, bfloat16, or int8 with a float32 scale for each 128
            elements; or its name, "int8", which is what stands in the groups. Default: None, the parameter's own.
        rounding: † how a step's result becomes a float16 or bfloat16 parameter. "stochastic" (bfloat16): up or down, up
            as likely as it is near; "kahan": to nearest, and what that took away is kept in the state, of the
            parameter's dtype, and given back in the next step. Default: "nearest".
        rounding_seed: of the random numbers of "stochastic", which depend on it, the number of the step, the group, the
            place in it and the element's in the whole parameter, and on nothing else: not on how many ranks share a
            DTensor. Default: 0.
        report_numerics: counts in each step, or in each n-th where it is a number n, the updates that rounding loses
            and the int8 values at their scale's end; see ``last_step``. Such a step takes several times as long, and a
            copy of the weights: give 100, say. Default: False.
        zero_grads: † fills the gradients with zeros after use, where they are: zero_grad(set_to_none=False) without a
            pass of its own. Default: False.

    Raises:
        ValueError, RuntimeError: torch.optim.SGD's own, in its words, for its arguments; ValueError for an unknown
            ``backend`` or ``numerics``, and for options that are out of range, contradict each other, or cannot be used
            for a parameter's dtype; RuntimeError for a ``backend`` that this machine lacks.

    A parameter that no fused backend takes (complex, sparse gradient, tensor subclass, …) is stepped by torch's code,
    with one warning that names the reason; with an explicit ``backend`` that is a RuntimeError instead. Where options
    are on, plain torch operations do it (``wd_fused.reference``), and a sparse gradient is an error.
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
        max_grad_norm: float | None = None,
        norm_per_group: bool = False,
        error_if_nonfinite: bool = False,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        l1_penalty: float = 0.0,
        decoupled_weight_decay: bool | float = False,
        decouple_lr: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        ema_dtype: torch.dtype | Literal["float32", "float16", "bfloat16"] | None = None,
        ema_buffers: nn.Module | Iterable[Tensor] | None = None,
        master_weights: Literal["full", "split", "split24"] | None = None,
        momentum_dtype: torch.dtype | Literal["float32", "bfloat16", "int8"] | None = None,
        rounding: Literal["nearest", "stochastic", "kahan"] = "nearest",
        rounding_seed: int = 0,
        report_numerics: bool | int = False,
        zero_grads: bool = False,
    ) -> None:
        arguments = locals()
        whole, params = settings.taken_up({name: arguments[name] for name in settings.OFF}, params)
        self._reader_settings = (whole["norm_per_group"], whole["error_if_nonfinite"], whole["rounding_seed"])
        self._backend = backends.wanted(whole["backend"])
        self._numerics = backends.checked_numerics(whole["numerics"], self._backend)
        self._settings = settings.on(whole)
        self._ranks = sharded.ranks_in(process_group)
        self._option_defaults = Options.of(arguments).on()
        spec.of_group(self._option_defaults | {"differentiable": differentiable})
        self._forget_plans()
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
        self.defaults.update(self._option_defaults | self._settings)
        settings.check_use(whole | {"process_group": process_group}, self.param_groups)
        self._averaged_buffers = None if ema_buffers is None else AveragedBuffers(ema_buffers, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as torch.optim.Optimizer does; options that it does not name are the constructor's.

        Examples:
            >>> body, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
            >>> optimizer = FusedSGD(body.parameters(), lr=0.1, ema_decay=0.999)
            >>> optimizer.add_param_group({"params": head.parameters(), "lr": 1.0, "ema_decay": 0.99})
            >>> [group["ema_decay"] for group in optimizer.param_groups]
            [0.999, 0.99]
        """
        if isinstance(param_group, dict):
            settings.put_into(param_group, self._settings)
            for name, value in self._option_defaults.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        g, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            spec.take_up(group)
            if group.get("decouple_lr"):
                self._reader.take_up_initial_lr(g, group)
        except (ValueError, TypeError, RuntimeError):
            del self.param_groups[-1]
            raise

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

        Examples:
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = FusedSGD([weight], lr=0.5, weight_decay=0.5)
            >>> weight.grad = torch.tensor([1.0, -1.0])
            >>> optimizer.step()  # 1 - 0.5 · (±1 + 0.5 · 1)
            >>> weight.tolist()
            [0.25, 1.25]
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            run_in_graph(self)
        else:
            run(self)
        return loss

    def backends(self) -> list[ParameterBackend]:
        """The backend that steps each parameter, in the order of the groups, and why.

        A gradient may still send its parameter to torch's code for a step: sparse, or of another dtype. What options
        keep in the state is made, as in a step.

        Examples:
            >>> optimizer = FusedSGD(torch.nn.Linear(4, 2).parameters(), backend="torch")
            >>> for group, position, backend, reason in optimizer.backends():
            ...     print(group, position, backend, reason)
            0 0 torch it was asked for
            0 1 torch it was asked for
        """
        self._reader.refresh(self.param_groups)
        states.make_beforehand(self)
        states.make(self)
        plans = planned(self)
        taken = [
            ParameterBackend(
                row.group, row.position, part.backend, backends.choose(sharded.local(row.param), self._backend)[1]
            )
            for part in plans.parts
            for row in part.rows
        ]
        return sorted(taken + plans.with_torch)


def _is_watched(optimizer: FusedSGD) -> bool:
    if torch.compiler.is_compiling():
        return True
    module = extension.module_if_loaded()
    if module is None or module.is_observed():
        return True
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)
