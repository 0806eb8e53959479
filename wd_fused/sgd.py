"""FusedSGD: torch.optim.SGD with the whole step in one fused pass.

The step reads: prepare every plan (checks, no writes), launch every plan, and torch's own code for the rest. A plan is
built at the first step and again whenever it no longer holds; what a backend does inside is its own affair.
"""

import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.sgd import sgd as torch_sgd
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from wd_fused import (
    backends,
    checks,
    extension,
    hyperparameters,
    operators,
    reference,
    settings,
    sharded,
    tail,
    tail_state,
)
from wd_fused.averages import AveragedBuffers, Exchange, removed_averages, saved_averages
from wd_fused.backends import Plan, Row
from wd_fused.claims import is_taken
from wd_fused.extents import extent, has_memory, is_expanded, meet
from wd_fused.hyperparameters import check_float32, check_group
from wd_fused.sharded import is_dtensor
from wd_fused.tail import Options, RowTail, TailStep
from wd_fused.warn import warn_user

_P = ParamSpec("_P")
_R = TypeVar("_R")


class ParameterBackend(NamedTuple):
    """Which backend steps a parameter, and why: an entry of ``FusedSGD.backends``."""

    group: int
    position: int
    backend: str
    reason: str


class _Part(NamedTuple):
    """The rows of one backend, which its plan points to, and the plan."""

    backend: str
    rows: list[Row]
    plan: Plan
    has_tail: bool  # a row of it has
    ranks: sharded.Ranks | None  # whose gradients count in a norm, where those of this process are not all


class _Plans(NamedTuple):
    """What is fixed between steps."""

    parts: list[_Part]
    with_torch: list[ParameterBackend]  # parameters that torch's code steps
    may_return: list[ParameterBackend]  # those of them that a fused backend may take when they change
    torch_extents: list[tuple[int, int]]  # the memory that torch's code writes
    by_reference: list[tuple[Any, ...]]  # what the parameters with options that no plan has were
    groups: list[list[Tensor]]  # keeps alive what the plans compare with
    structure: tuple[Any, ...]  # of the options, as tail.Reader has it


class FusedSGD(torch.optim.SGD):
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
        >>> optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, max_grad_norm=1.0)
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
        rounding_seed: of the random numbers of "stochastic", which depend on it, the number of the step, the group and
            the place in it, and on nothing else. Default: 0.
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
        zero_grads: bool = False,
    ) -> None:
        whole: dict[str, Any] = {
            "backend": backend,
            "numerics": numerics,
            "norm_per_group": norm_per_group,
            "error_if_nonfinite": error_if_nonfinite,
            "rounding_seed": rounding_seed,
        }
        whole, params = settings.taken_up(whole, params)
        self._reader_settings = (whole["norm_per_group"], whole["error_if_nonfinite"], whole["rounding_seed"])
        tail.check_optimizer(*self._reader_settings)
        self._backend = backends.wanted(whole["backend"])
        self._numerics = backends.checked_numerics(whole["numerics"], self._backend)
        self._settings = settings.on(whole)
        options = {
            "max_grad_norm": max_grad_norm,
            "l1_penalty": l1_penalty,
            "decoupled_weight_decay": decoupled_weight_decay,
            "decouple_lr": decouple_lr,
            "ema_decay": ema_decay,
            "ema_warmup": ema_warmup,
            "ema_dtype": ema_dtype,
            "zero_grads": zero_grads,
            "master_weights": master_weights,
            "momentum_dtype": momentum_dtype,
            "rounding": rounding,
        }
        self._tail_defaults = Options.of(options).on()
        tail.of_group(self._tail_defaults | {"differentiable": differentiable})
        self._averaged_buffers: AveragedBuffers | None = None
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
        self.defaults.update(self._tail_defaults | self._settings)
        for_norm = [name for name in ("norm_per_group", "error_if_nonfinite") if whole[name]]
        if for_norm and not any("max_grad_norm" in group for group in self.param_groups):
            name = for_norm[0]
            raise ValueError(
                f"{name}=True is for a norm: give max_grad_norm as well; max_grad_norm=math.inf only measures"
            )
        if ema_buffers is not None:
            if not any("ema_decay" in group for group in self.param_groups):
                raise ValueError("ema_buffers are averaged with ema_decay: give it as well, such as ema_decay=0.999")
            self._averaged_buffers = AveragedBuffers(ema_buffers)

    def _forget_plans(self) -> None:
        self._plans: _Plans | None = None
        self._reader = tail.Reader(*self._reader_settings)
        self._norm: Plan | Tensor | None = None  # who has the last norm
        # Not 0: so was the last step under a gradient scale. A TailStep: the norm tells, once it is asked.
        self._skipped: bool | Tensor | TailStep = False
        self._warned: set[str] = set()
        self._claims: dict[object, None] = {}  # of steps under way
        # Momentum buffers that no step has written yet, and the versions of their memory: see _make_first_state().
        self._unwritten: list[tuple[Tensor, Tensor, int]] = []
        self._swapped: dict[str, Exchange] = {}  # the one of swap_ema(), inside it
        self._loading: tuple[list[dict[str, Any]], list[dict[str, Any]], tail_state.Report] | None = None

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
            for name, value in self._tail_defaults.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        g, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            tail.take_up(group)
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

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_swapped("a copy of the optimizer")
        own = ["_backend", "_numerics", "_settings", "_tail_defaults", "_reader_settings", "_averaged_buffers"]
        if self.defaults["fused"]:  # else step_in_backward() has set it, which stays behind
            own.append("_step_supports_amp_scaling")
        return super().__getstate__() | {name: getattr(self, name) for name in own if hasattr(self, name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle or deepcopy, and of load_state_dict(), which brings only groups and state."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_reader_settings" not in self.__dict__:  # a pickle from before there were options of the tail
            self._reader_settings, self._tail_defaults, self._averaged_buffers = (False, False, 0), {}, None
        self.__dict__.setdefault("_settings", {})  # a pickle from before they stood in the groups
        loading = self.__dict__.get("_loading")
        if loading is not None:
            before, saved, report = loading
            tail_state.adopt(self.param_groups, self.state, before, saved[-1], report)
            self._load_buffers(saved[-1], report)
        plans, reader = (self._plans, self._reader) if loading is not None else (None, None)
        self._forget_plans()
        if reader is not None and reader.is_plain and all(map(tail.NAMES.isdisjoint, self.param_groups)):
            self._plans, self._reader = plans, reader  # they look themselves whether they still hold

    def state_dict(self) -> dict[str, Any]:
        """As torch's. The averages of ``ema_buffers`` are in the state of a parameter, "ema_buffers.0" and so on.

        Examples:
            >>> optimizer = FusedSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
            >>> torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]).load_state_dict(optimizer.state_dict())
        """
        self._refuse_while_swapped("state_dict()")
        result = super().state_dict()
        for group in result["param_groups"]:
            group.update({name: tail.plain(name, group[name]) for name in tail.NAMES & group.keys()})
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the optimizer state, as torch's; what the options keep is loaded in every bit.

        The options that are on, and their dtypes, stay those of this optimizer; numbers, as the learning rate and
        ``ema_decay``, become the saved ones. Where the saved optimizer had other options, one warning names what was
        dropped, converted, or started afresh. The model may be loaded before the optimizer or after it. A CUDA graph
        that has captured a step goes on with the tensors from before: capture it anew.

        Raises:
            ValueError: a state that is not of SGD, or that a step could not use. Nothing has changed then.

        Examples:
            >>> torch_sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.3)
            >>> optimizer = FusedSGD([torch.nn.Parameter(torch.ones(2))])
            >>> optimizer.load_state_dict(torch_sgd.state_dict())
            >>> optimizer.param_groups[0]["lr"]
            0.3
        """
        self._refuse_while_swapped("load_state_dict()")
        report, saved = tail_state.Report(), [state_dict]

        def check(_: Any, given: dict[str, Any]) -> None:
            checks.check_saved(given, self.param_groups)
            saved.append(given)

        handle = self.register_load_state_dict_pre_hook(check)  # after all others
        before = self.__dict__.copy()  # of which nothing is written: groups, state and plans are replaced
        try:
            self._loading = ([dict(group) for group in self.param_groups], saved, report)
            super().load_state_dict(state_dict)
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            handle.remove()
            self._loading = None
        if str(report):
            warn_user(f"FusedSGD.load_state_dict: the options differ from the saved ones. {report}")

    def _load_buffers(self, saved: dict[str, Any], report: tail_state.Report) -> None:
        averages, buffers = saved_averages(saved), self._averaged_buffers
        removed_averages(self.state)  # torch has cast them
        if buffers is None:
            report.dropped += ["ema_buffers"] * bool(averages)
        elif saved["state"] and not buffers.load(self.state, self.param_groups, averages):
            report.afresh.append("the averages of ema_buffers")

    def _refuse_while_swapped(self, what: str) -> None:
        if getattr(self, "_swapped", None):
            raise RuntimeError(f"{what} inside swap_ema(): parameters and averages have traded places; leave it first")

    # What the options keep

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of the gradients of the last step with ``max_grad_norm``, before clipping, on their device.

        A new tensor, [], float32, or float64 if a clipped parameter is; with ``norm_per_group`` [groups], NaN for
        groups that do not clip or are empty, 0 for those that have no gradient. None before the first such step. Of a
        step that was skipped for torch.amp.GradScaler as well: then it is infinite or NaN as a rule.

        Examples:
            >>> weight = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = FusedSGD([weight], lr=1.0, max_grad_norm=1.0)
            >>> weight.grad = torch.tensor([3.0, 4.0])
            >>> optimizer.step()
            >>> optimizer.grad_norm
            tensor(5.)
        """
        norm = self._norm if self._norm is None or isinstance(self._norm, Tensor) else self._norm.grad_norm()
        return None if norm is None else norm.clone()

    @property
    def last_step_skipped(self) -> bool | Tensor:
        """Whether the last step under a gradient scale wrote nothing, for a gradient that is infinite or NaN.

        With ``fused=True`` torch.amp.GradScaler has step() skip; else it does not call step(), and this stays what it
        was, as it does in steps without a scale. A bool, or, where only a GPU knows, a Tensor of one, []: ``if`` waits.

        Examples:
            >>> weight = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = FusedSGD([weight], lr=1.0, fused=True)
            >>> scaler = torch.amp.GradScaler("cpu")
            >>> scaler.scale(weight.sum() * torch.inf).backward()
            >>> scaler.step(optimizer)
            >>> optimizer.last_step_skipped
            True
        """
        skipped = self._skipped
        if isinstance(skipped, TailStep):
            skipped = tail.is_nonfinite(cast(Tensor, self.grad_norm), skipped)
        if isinstance(skipped, bool):
            return skipped
        word = (skipped != 0).any()
        return bool(word) if word.is_cpu else word

    def ema_parameters(self) -> Iterator[Tensor]:
        """The average of each parameter, in the order of the groups; the parameter itself where none is kept.

        The state's own tensors, of the parameter's dtype, of half-precision ones float32 unless ``ema_dtype`` says
        otherwise.

        Raises:
            RuntimeError: no group has ``ema_decay``, or swap_ema() is active.

        Examples:
            >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> optimizer = FusedSGD([weight], lr=1.0, ema_decay=0.5)
            >>> for _ in range(2):
            ...     weight.grad = torch.ones(2)
            ...     optimizer.step()
            >>> list(optimizer.ema_parameters())  # of [0, 1] and [-1, 0]
            [tensor([-0.5000,  0.5000])]
        """
        self._refuse_while_swapped("ema_parameters()")
        return iter([param.detach() if average is None else average for param, average in self._averages()])

    def _averages(self) -> list[tuple[Tensor, Tensor | None]]:
        self._reader.refresh(self.param_groups)
        if self._reader.averaging is None:
            raise RuntimeError("no parameter group has ema_decay, so there are no averages; give ema_decay=0.999, say")
        self._make_states_beforehand()
        pairs: list[tuple[Tensor, Tensor | None]] = []
        for group, options in zip(self.param_groups, self._reader.options, strict=True):
            for param in group["params"]:
                if options is None or options.ema_decay is None:
                    pairs.append((param, None))
                    continue
                state = self.state.setdefault(param, {})
                tail_state.make_average(param, state, options)
                pairs.append((param, state["ema"]))
        return pairs

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Inside, the parameters (and ``ema_buffers``) hold their averages; afterwards what they held before.

        Their data is exchanged in place, one tensor after the other, so that the model, the gradients and the plan
        stay as they are. A float32 average of a half-precision parameter is rounded into it, which takes a copy of the
        parameter until the end; master weights are not touched. step() and state_dict() are refused inside.

        Examples:
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = FusedSGD(model.parameters(), lr=0.1, ema_decay=0.999)
            >>> with optimizer.swap_ema():
            ...     prediction = model(torch.ones(1, 4))  # of the average
        """
        self._refuse_while_swapped("swap_ema()")
        averages = {param: (param, average) for param, average in self._averages() if average is not None}
        pairs, buffers = list(averages.values()), self._averaged_buffers
        if buffers is not None:
            pairs += buffers.pairs(self.state, self.param_groups)
        exchange = Exchange(pairs, buffers)
        try:
            try:
                # First: a step that begins now sees that, or is seen.
                if self._swapped.setdefault("by", exchange) is not exchange:
                    self._refuse_while_swapped("swap_ema()")
                if is_taken(self._claims):
                    raise RuntimeError("swap_ema() of this optimizer while step() is running in another thread")
                exchange.enter()
                yield
            finally:
                self._swap_back(exchange)
        finally:  # where an interrupt has cut that short
            self._swap_back(exchange)

    def _swap_back(self, exchange: Exchange) -> None:
        if self._swapped.get("by") is exchange:
            failure = exchange.leave()
            self._swapped.clear()
            if failure is not None:
                raise failure

    def master_parameters(self) -> list[Tensor]:
        """A copy of each parameter's exact weight, in the order of the groups: float32, or wider where it is.

        With ``master_weights`` or ``rounding="kahan"`` that is more than the parameter shows.

        Examples:
            >>> model = torch.nn.Linear(4, 2).bfloat16()
            >>> optimizer = FusedSGD(model.parameters(), master_weights="split")
            >>> [weight.dtype for weight in optimizer.master_parameters()]
            [torch.float32, torch.float32]
        """
        self._refuse_while_swapped("master_parameters()")
        with torch.no_grad():
            return [
                tail_state.exact_weights(param, self.state.get(param))
                for group in self.param_groups
                for param in group["params"]
            ]

    @torch.no_grad()
    def load_master_parameters(self, weights: Iterable[Tensor]) -> None:
        """Sets each parameter's weight, in the order of the groups, and what the state keeps beside it.

        Args:
            weights: a tensor for each parameter, of its shape, of any floating-point dtype, such as those of
                ``master_parameters`` or of a float32 checkpoint. "split24" rounds them to 24 bits.

        Raises:
            ValueError: too many, too few, of another shape or placement; no such tensor, or one without memory. Nothing
                has been written then.

        Examples:
            >>> weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
            >>> optimizer = FusedSGD([weight], master_weights="split")
            >>> optimizer.load_master_parameters([torch.tensor([0.1])])
            >>> weight.item(), optimizer.master_parameters()[0]  # 8 significant bits, and all 24
            (0.10009765625, tensor([0.1000]))
        """
        self._refuse_while_swapped("load_master_parameters()")
        self._reader.refresh(self.param_groups)
        params = [
            (param, options)
            for group, options in zip(self.param_groups, self._reader.options, strict=True)
            for param in group["params"]
        ]
        given = list(weights)
        if len(given) != len(params):
            raise ValueError(f"{len(given)} weights for {len(params)} parameters: give one for each, in their order")
        for i, ((param, _), values) in enumerate(zip(params, given, strict=True)):
            if not isinstance(values, Tensor):
                raise ValueError(f"weight {i} is a {type(values).__name__}, not a Tensor")
            if values.shape != param.shape:
                raise ValueError(f"weight {i} has shape {list(values.shape)}, the parameter {list(param.shape)}")
            is_number = values.is_complex() if param.is_complex() else values.is_floating_point()
            if not is_number or values.layout != torch.strided or values.is_meta:
                raise ValueError(
                    f"weight {i} is {values.layout} {backends.described(values)}, which cannot be used for "
                    f"{backends.described(param)}"
                )
            if not sharded.placed_alike(param, values):
                raise ValueError(
                    f"weight {i} is not placed as its parameter: where that is a DTensor, give distribute_tensor("
                    "weight, parameter.device_mesh, parameter.placements), and a plain tensor for a plain parameter"
                )
        if not self.state and any(options is not None and options.weights != "parameter" for _, options in params):
            self._make_first_state()
        for (param, options), values in zip(params, given, strict=True):
            kind = "parameter" if options is None else options.weights
            state = self.state.get(param)
            if state is None:
                state = {} if kind == "parameter" else self.state.setdefault(param, {})
            tail_state.set_weights(param, state, kind, values)

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
            self._step_in_graph()
            return loss
        self._step()
        return loss

    def _step_in_graph(self) -> None:
        """The step as torch.compile traces it: an operator's call for each group, with the bits of any other step.

        Groups that the operator does not take are torch's code, which the compiler fuses. Where that would not do what
        was asked for, the step is left as it is: a break in the compiler's graph.
        """
        operands = [_operands_in_graph(self, group) for group in self.param_groups]
        insists = self._backend in backends.FUSED or self._numerics == "opmath"
        if (insists and None in operands) or _is_beyond_graph(self):
            _outside_compiler(self)
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

    def _step(self) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None or found_inf is not None:
            _check_word_of_grad_scaler("grad_scale", grad_scale)
            _check_word_of_grad_scaler("found_inf", found_inf)
            self._skipped = False if found_inf is None else found_inf
        elif isinstance(self._skipped, TailStep):  # this step's norm takes the place of the one that tells
            self._skipped = self.last_step_skipped
        claims, claim = self._claims, object()
        claims[claim] = None
        try:
            if len(claims) > 1 and is_taken(claims, claim):
                raise RuntimeError("step() of this optimizer is already running, in another thread or around this one")
            if self._swapped:
                self._refuse_while_swapped("step()")
            # A plan without a tail holds only as long as no group gets an option.
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

    def _asks_for_state(self) -> bool:
        """Whether a step with options, while the state is empty, has lr 0 and gradients of zeros: such a one
        torch.distributed.checkpoint takes before it saves or loads, to have the state made. Nothing else is done then:
        no average is formed, no random number used up. Without options it does what it does with torch.optim.SGD."""
        groups = self.param_groups
        if all(map(tail.NAMES.isdisjoint, groups)) or not all(_is_zero(group["lr"]) for group in groups):
            return False
        params = [param for group in groups for param in group["params"]]
        grads = [sharded.local(param.grad) for param in params if param.grad is not None]
        if not grads:
            return False
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        found = any(grad.layout != torch.strided or grad.is_meta or bool(grad.any()) for grad in grads)
        for ranks in dict.fromkeys(map(sharded.ranks_of, params)):  # all must do the same
            found = bool(sharded.summed_over(ranks, torch.tensor(float(found), device=grads[0].device)))
        return not found

    def _make_first_state(self) -> None:
        """All that the state will have after a first step, so that a checkpoint may be loaded into it: whatever makes
        some of it makes all. Momentum buffers go again before that step, which is their first."""
        every = [tail.of_group(group) for group in self.param_groups]
        for group, options in zip(self.param_groups, every, strict=True):
            if options is not None:
                tail.check_parameters(group, options)
        for group, options in zip(self.param_groups, every, strict=True):
            has_momentum = group["momentum"] != 0
            for param in group["params"]:
                tail_state.make(param, self.state, options or Options(), has_momentum, steps=param.requires_grad)
                if has_momentum and param.requires_grad:
                    buffer = tail_state.like(param, tail.momentum_dtype(param, options or Options())).zero_()
                    self.state.setdefault(param, {})["momentum_buffer"] = buffer
                    self._unwritten.append((param, buffer, sharded.local(buffer)._version))
        if self._averaged_buffers is not None:
            self._averaged_buffers.pairs(self.state, self.param_groups)
        self._plans = None

    def _drop_unwritten(self) -> None:
        for param, buffer, version in self._unwritten:
            state = self.state.get(param, {})
            if state.get("momentum_buffer") is buffer and sharded.local(buffer)._version == version:
                del state["momentum_buffer"]
        self._unwritten.clear()

    def _step_alone(self, grad_scale: Tensor | None, found_inf: Tensor | None, step: TailStep | None) -> bool:
        """The usual step: one plan, made before, that holds and takes every gradient. False: nothing is done."""
        plans = self._plans
        if plans is None or plans.with_torch or len(plans.parts) != 1:
            return False
        part = plans.parts[0]
        if step is not None and step.clips and part.ranks is not None:
            return False
        if step is None or not part.has_tail:
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
            if step.clips and part.has_tail:
                self._norm = part.plan
                if grad_scale is not None and found_inf is None:
                    self._skipped = step
                if grad_scale is not None and part.plan.was_skipped():
                    self._zero_skipped_gradients()
                    return True
            self._count(step)
        return True

    def _count(self, step: TailStep) -> None:
        """What a step that was done leaves beside parameters and state."""
        for g, counter in self._reader.counters:
            group_of_counter = self.param_groups[g]
            group_of_counter[counter] = group_of_counter.get(counter, 0) + 1
        if self._averaged_buffers is not None and self._reader.averaging is not None:
            group = step.groups[self._reader.averaging]
            assert group is not None, "it averages"
            self._averaged_buffers.update(self.state, self.param_groups, group.average_weight)

    def _step_together(self, grad_scale: Tensor | None, found_inf: Tensor | None, step: TailStep | None) -> None:
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
                is_finite = not bool(tail.is_nonfinite(norm, step))
                if not is_finite and grad_scale is not None and found_inf is None:
                    is_skipped = self._skipped = True  # as torch.amp.GradScaler would have it
                if not is_finite and not is_skipped and step.error_if_nonfinite:
                    raise RuntimeError(tail.NONFINITE)
                coefficients = tail.coefficients(norm, step)
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
                if part.has_tail:
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
        plans: _Plans,
        by_reference: list[ParameterBackend],
        step: TailStep,
        grad_scale: Tensor | None,
        inverse_scale: float | None,
    ) -> Tensor:
        """The norm of the gradients, on the CPU."""
        sums = [
            sharded.summed_over(part.ranks, own)
            for part in plans.parts
            if part.has_tail
            for own in part.plan.sums(grad_scale)
        ]
        for g, i, _, _ in by_reference:
            param, group_step = self.param_groups[g]["params"][i], step.groups[g]
            assert group_step is not None, "it has options"
            if param.grad is not None and not math.isnan(group_step.max_norm):
                squares = reference.sum_of_squares(
                    sharded.local(param),
                    sharded.local(param.grad),
                    self._row_tail(param, g),
                    self._numerics,
                    inverse_scale,
                )
                own = torch.zeros(len(step.groups), dtype=torch.float64, device=squares.device)
                own[g] = squares
                sums.append(sharded.summed_over(sharded.ranks_of(param), own))
        total = torch.zeros(len(step.groups), dtype=torch.float64, device="cpu")
        for own in sums:
            total += own.cpu()
        norm = tail.norms(total, step)
        self._norm = norm.to(sums[0].device) if sums else norm
        return norm

    def _keep(self, part: _Part, made: list[tuple[int, Tensor]]) -> None:
        for row, buffer in made:
            param = part.rows[row].param
            entry = self.state.setdefault(param, {})  # one look-up: to hash a tensor takes a call of Python's
            entry["momentum_buffer"] = sharded.like(param, buffer) if is_dtensor(param) else buffer

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
        self._make_states_beforehand()
        self._make_states()
        plans = self._planned()
        taken = [
            ParameterBackend(
                row.group, row.position, part.backend, backends.choose(sharded.local(row.param), self._backend)[1]
            )
            for part in plans.parts
            for row in part.rows
        ]
        return sorted(taken + plans.with_torch)

    def _prepared(self, step: TailStep | None) -> tuple[_Plans, list[ParameterBackend], TailStep | None]:
        """Plans that hold and have checked everything, what torch must step this time, and the options' numbers."""
        is_seen_by_modes = torch._C._len_torch_dispatch_stack() != 0 and _have_a_say(self.param_groups)
        plans = None if is_seen_by_modes else self._plans
        if plans is not None and not self._still_right(plans):
            plans = None
        left = None if plans is None else _prepare(plans, self.param_groups, self.state, step)
        if plans is None or left is None:
            self._norm = self.grad_norm  # not the plan that has it, and all that the plan points to
            step = self._reader.refresh(self.param_groups)
            self._check_norm_is_whole(step)
            self._drop_unwritten()
            self._make_states()
            plans = self._planned(_SEEN_BY_MODES if is_seen_by_modes else None)
            left = _prepare(plans, self.param_groups, self.state, step)
            if left is None:  # groups or state are not of the types that plans read
                plans, left = self._planned(_UNREADABLE), []
            self._plans = None if is_seen_by_modes else plans
        with_torch = plans.with_torch + left
        for g in {parameter.group for parameter in with_torch}:
            self._check_numbers(g, None if step is None else step.groups[g])
        for parameter in with_torch:
            self._check_for_torch(parameter)
        return plans, with_torch, step

    def _check_norm_is_whole(self, step: TailStep | None) -> None:
        if step is None or not step.clips:
            return
        params = [param for group in self.param_groups for param in group["params"]]
        if (reason := sharded.why_not_whole(self, params)) is not None:
            raise RuntimeError(f"max_grad_norm would clip by a norm of this process alone: {reason}")

    def _make_states(self) -> None:
        """What the options keep: averages for all parameters, the rest for those that have a gradient. What those keep
        that have been turned off is converted to what a plain step uses, or dropped."""
        left_behind = any(map(tail_state.is_left_behind, self.state.values()))
        for g, (group, options) in enumerate(zip(self.param_groups, self._reader.options, strict=True)):
            if options is None:
                was_on = g in self._reader.turned_off
                for param in group["params"] if was_on or left_behind else ():
                    if was_on or tail_state.is_left_behind(self.state.get(param)):
                        tail_state.make(param, self.state, Options(), group["momentum"] != 0)
                self._reader.turned_off.discard(g)
                continue
            for param in group["params"]:
                if tail_state.objection(param, self.state.get(param)) is None:  # else an error, when it is stepped
                    tail_state.make(param, self.state, options, group["momentum"] != 0)

        if self._averaged_buffers is not None and self._reader.averaging is None:
            removed_averages(self.state)

    def _make_states_beforehand(self) -> None:
        """Where averages are asked for before the first step."""
        if self._reader.averaging is not None and not self.state:
            self._make_first_state()

    def _row_tail(self, param: Tensor, group: int) -> RowTail:
        options = self._reader.options[group]
        assert options is not None, "asked for of groups with options"
        return tail_state.row_tail(param, self.state.get(param), options)

    def _planned(self, why_nothing_fused: str | None = None) -> _Plans:
        self._reader.read(self.param_groups)
        groups = [list(group["params"]) for group in self.param_groups]
        occurrences = Counter(map(id, itertools.chain(*groups)))
        all_differ = len(occurrences) == sum(map(len, groups))
        rows: dict[tuple[str, sharded.Ranks | None], list[Row]] = {}
        with_torch = []
        for g, group in enumerate(self.param_groups):
            group_reason, options = _group_refusal(group), self._reader.options[g]
            usual: str = "torch"
            buffers: list[Any] = [False] * len(groups[g])
            if (group_reason, options, why_nothing_fused) == (None, None, None) and all_differ:
                usual, buffers = backends.surely_taken(groups[g], self.state, self._backend)
            of_usual = rows.setdefault((usual, None), []) if any(buffer is not False for buffer in buffers) else []
            for i, (param, buffer) in enumerate(zip(groups[g], buffers, strict=True)):
                if buffer is not False:
                    of_usual.append(Row(param, buffer, g, i))
                    continue
                backend, reason = self._choice(param, group_reason, options)
                if occurrences[id(param)] > 1:
                    backend, reason = "torch", _REPEATED
                if why_nothing_fused is not None:
                    backend, reason = "torch", why_nothing_fused
                if backend == "torch":
                    with_torch.append(ParameterBackend(g, i, backend, reason))
                else:
                    row_tail = None if options is None else self._row_tail(param, g)
                    ranks = sharded.ranks_of(param) if row_tail is not None and row_tail.clips else None
                    rows.setdefault((backend, ranks), []).append(Row(param, self._buffer(param), g, i, row_tail))
        parts = [
            _Part(
                name,
                own,
                backends.FUSED[name].plan(own, groups, self.state, self._numerics),
                any(row.tail is not None for row in own),
                ranks,
            )
            for (name, ranks), own in rows.items()
        ]
        torch_extents = self._torch_extents(with_torch) if rows else []
        if torch_extents and any([part.plan.keep_off(torch_extents) for part in parts]):
            return self._planned(_ENTANGLED)
        may_return = [
            parameter
            for parameter in with_torch
            if parameter.reason not in (_REPEATED, _UNREADABLE, _ENTANGLED)
            and backends.any_usable(groups[parameter.group][parameter.position].device, self._backend)
        ]
        by_reference = self._kinds_by_reference(with_torch)
        return _Plans(parts, with_torch, may_return, torch_extents, by_reference, groups, self._reader.structure)

    def _kinds_by_reference(self, with_torch: list[ParameterBackend]) -> list[tuple[Any, ...]]:
        """All that the options were checked against, and what they keep was made for, of the reference's parameters."""
        own = [(g, i) for g, i, _, _ in with_torch if self._reader.options[g] is not None]
        return [_kind(self.param_groups[g]["params"][i]) for g, i in own]

    def _torch_extents(self, with_torch: list[ParameterBackend]) -> list[tuple[int, int]]:
        params = [self.param_groups[g]["params"][i] for g, i, _, _ in with_torch]
        buffers = [buffer for param in params if isinstance(buffer := self._buffer(param), Tensor)]
        return [extent(tensor) for tensor in (*params, *buffers) if has_memory(tensor)]

    def _choice(self, param: Tensor, group_reason: str | None, options: Options | None) -> tuple[str, str]:
        """The backend for a parameter and why, by itself, its group, the options and its state."""
        backend, reason = backends.choose(sharded.local(param), self._backend)
        if backend == "torch":
            return backend, reason
        if is_dtensor(param) and options is not None and _depends_on_place(options):
            return "torch", f"it is a DTensor, for which there is no fused code with {options.spelled()}"
        refusal = group_reason or self._buffer_refusal(param, backend, options)
        if options is not None and not backends.FUSED[backend].takes_tail:
            refusal = f'backend "{backend}" has no kernel for the options {options.spelled()}'
        if options is not None and refusal is None:
            refusal = tail_state.objection(param, self.state.get(param)) or self._clipping_refusal(param, options)
        return (backend, reason) if refusal is None else ("torch", refusal)

    def _buffer(self, param: Tensor) -> Any:
        state = self.state.get(param)  # not [param]: that would put an entry there
        return state.get("momentum_buffer") if state else None

    def _buffer_refusal(self, param: Tensor, backend: str, options: Options | None) -> str | None:
        buffer = self._buffer(param)
        if buffer is None:
            return None
        if not isinstance(buffer, Tensor):
            return f"its momentum buffer is a {type(buffer).__name__}, not a Tensor"
        dtype = param.dtype if options is None else tail.momentum_dtype(param, options)
        if (buffer.dtype, buffer.device, buffer.shape) != (dtype, param.device, param.shape):
            if buffer.shape == param.shape:  # one reason for all parameters of a model that was cast
                kinds = [f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}" for tensor in (buffer, param)]
            else:
                kinds = [backends.described(tensor) for tensor in (buffer, param)]
            return f"its momentum buffer is {kinds[0]}, the parameter {kinds[1]}"
        if not sharded.placed_alike(param, buffer):
            return "its momentum buffer is not placed as it is on the same device mesh"
        param, buffer = sharded.local(param), sharded.local(buffer)
        if dtype == torch.int8:
            return None  # tail_state.convert_momentum() has looked at it
        if (reason := backends.FUSED[backend].refusal(buffer)) is not None:
            return f"its momentum buffer cannot be taken: {reason}"
        return "its momentum buffer shares memory with it" if meet([extent(param)], [extent(buffer)]) else None

    def _clipping_refusal(self, param: Tensor, options: Options) -> str | None:
        """Of torch's product of a gradient and a coefficient: of two without dimensions the wider dtype counts."""
        clips_in_double = options.max_grad_norm is not None and self._reader.norm_dtype == torch.float64
        if not clips_in_double or param.dim() != 0 or param.dtype == torch.float64:
            return None
        return "it has no dimensions, so that torch clips it in float64, as parameters of that dtype are clipped too"

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
        if self._kinds_by_reference(plans.with_torch) != plans.by_reference:
            return False
        group_reasons = [_group_refusal(group) for group in self.param_groups] if plans.may_return else []
        return all(
            self._choice(plans.groups[g][i], group_reasons[g], self._reader.options[g])[0] == "torch"
            for g, i, _, _ in plans.may_return
        )

    def _check_numbers(self, g: int, step: tail.GroupStep | None) -> None:
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
        if self._backend not in ("auto", "torch") and reason != _SEEN_BY_MODES:
            raise RuntimeError(
                f'{name}: backend="{self._backend}" does not take it: {reason}; backend="auto" leaves it to torch'
            )
        if options is not None:
            objection = self._objection_of_reference(param, group, options)
        elif grad is not None:
            buffer = self._buffer(param) if group["momentum"] != 0 else None
            objection = backends.objection_of_torch(param, grad, buffer, group["weight_decay"])
        if objection is not None:
            raise RuntimeError(f"{name}: {objection}")
        if self._backend == "torch" or reason == _SEEN_BY_MODES or self._warned & {name, reason}:
            return
        self._warned |= {name, reason}
        if not (param.is_cpu and reason == extension.status().reason):  # of which extension.load() has warned
            who = "torch's own code steps" if options is None else "plain torch operations step"
            warn_user(f"FusedSGD: {who} {name}, slower and with the same result: {reason}")

    def _objection_of_reference(self, param: Tensor, group: dict[str, Any], options: Options) -> str | None:
        """What the reference would fail on in the middle of a step, with the remedy, or None."""
        state, grad = self.state.get(param), param.grad
        if (refusal := _group_refusal(group)) is not None:
            return f"{refusal}, which {options.spelled()} cannot take part in"
        if not reference.is_plain(param) and _depends_on_place(options):
            return f"it is a {type(param).__name__}, a tensor subclass, which {options.spelled()} cannot be used for"
        if (objection := tail_state.objection(param, state)) is not None or grad is None:
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
                return f"its {what} is {backends.described(tensor)}, the parameter {backends.described(param)}"
        if param.is_complex() != grad.is_complex() or not (grad.is_floating_point() or grad.is_complex()):
            return f"its gradient is {backends.described(grad)}, which cannot be used for {backends.described(param)}"
        if grad.is_meta and options.max_grad_norm is not None:
            return f"its gradient is on meta, and has no numbers for max_grad_norm={options.max_grad_norm}"
        return backends.why_not_written(param, grad, buffer)

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
        operands = [_operands_in_graph(self, group) if reasons == {_SEEN_BY_MODES} else None for group in groups]
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

    def _step_with_reference(
        self,
        parameters: list[ParameterBackend],
        step: TailStep,
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
                tail_state.make(param, self.state, options, group["momentum"] != 0)
            before = [self._buffer(param) for param in params]
            buffers = [None if buffer is None else sharded.local(buffer) for buffer in before]
            reference.tail_sgd(
                [*map(sharded.local, params)],
                [None if param.grad is None else sharded.local(param.grad) for param in params],
                buffers,
                [sharded.local_row(self._row_tail(param, g)) for param in params],
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

    def _unscale(self, inverse_scale: float, plans: _Plans, with_torch: list[ParameterBackend]) -> bool:
        """Unscales the gradients in place, as torch.amp.GradScaler's unscale_() does, but those of options of the tail,
        whose plans and reference unscale what they read; and all of a GPU's plan that has such. False: no others."""
        plain = {
            row.param: None
            for part in plans.parts
            for row in part.rows
            if not part.has_tail or (part.backend == "cpu" and row.tail is None)
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
            f"{backends.described(word)}"
        )


@_disable_dynamo  # torch.compiler.disable imports the compiler and Triton: seconds of every import of ours
def _outside_compiler(optimizer: FusedSGD) -> None:
    optimizer._step()


def _is_beyond_graph(optimizer: FusedSGD) -> bool:
    for group in optimizer.param_groups:
        if any(name in group for name in tail.NAMES) or len(set(group["params"])) < len(group["params"]):
            return True
    if optimizer._swapped:
        return True
    return getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None


def _operands_in_graph(optimizer: FusedSGD, group: dict[str, Any]) -> list[Tensor] | None:
    """The group's parameters that have gradients, if torch.ops.wd_fused.sgd_ takes them all, or None. Is traced."""
    params = [param for param in group["params"] if param.grad is not None]
    if group["differentiable"]:
        return None
    for number in (group["lr"], group["weight_decay"]):
        if isinstance(number, Tensor) and (number.device.type != "cpu" or number.requires_grad):
            return None  # reading it would wait for the GPU, or lose its gradient
    if isinstance(group["momentum"], Tensor) or isinstance(group["dampening"], Tensor):
        return None  # nor is 1 - dampening a float's
    for param in params:
        grad, state = param.grad, optimizer.state.get(param)
        buffer = state.get("momentum_buffer") if state and group["momentum"] != 0 else None
        tensors = [param, grad] if buffer is None else [param, grad, buffer]
        for tensor in tensors:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
                return None
            if (tensor.dtype, tensor.shape, tensor.device) != (param.dtype, param.shape, params[0].device):
                return None
        if param.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            return None
        if not (param.is_contiguous() or (param.dim() == 4 and param.is_contiguous(memory_format=torch.channels_last))):
            return None  # its elements might share memory
    if params and not _has_operator(params[0].device.type, optimizer._backend):
        return None
    return params


def _has_operator(device_type: str, backend: str) -> bool:
    names = backends.PREFERENCE.get(device_type, ())[:1] if backend == "auto" else (backend,)
    if names != (device_type,) or backends.FUSED[device_type].unavailable() is not None:
        return False
    operators.define()
    return True


_has_operator._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


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


def _is_watched(optimizer: FusedSGD) -> bool:
    if torch.compiler.is_compiling():
        return True
    module = extension.module_if_loaded()
    if module is None or module.is_observed():
        return True
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def _is_zero(lr: float | Tensor) -> bool:
    return bool(lr == 0) if not isinstance(lr, Tensor) or lr.is_cpu else False


def _depends_on_place(options: Options) -> bool:
    """Whether an element's step depends on where in the whole parameter it is, of which a rank has a part."""
    return options.momentum_dtype == "int8" or options.rounding == "stochastic"


_REPEATED = "it appears more than once in the parameter groups"
_ENTANGLED = "parameters of which torch's code must step some share memory: only torch's order gives torch's result"


def _have_a_say(groups: list[dict[str, Any]]) -> bool:
    """Whether an active TorchDispatchMode must see a step: all but one of fake tensors that lets real ones through."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    if any(isinstance(param, FakeTensor) for group in groups for param in group["params"]):
        return True
    return not all(
        isinstance(mode, FakeTensorMode) and mode.allow_non_fake_inputs for mode in _get_current_dispatch_mode_stack()
    )


_SEEN_BY_MODES = "a TorchDispatchMode is active, which sees what goes through torch's dispatcher"
_UNREADABLE = "param_groups must be a list of dicts, each with a list of parameters, and state a dict of dicts"


def _prepare(
    plans: _Plans, groups: list[dict[str, Any]], state: dict[Tensor, Any], step: TailStep | None
) -> list[ParameterBackend] | None:
    """Prepares every plan: what they leave to torch's code, or None if one no longer holds."""
    left: list[ParameterBackend] = []
    for part in plans.parts:
        count = part.plan.prepare(groups, state, step) if part.has_tail else part.plan.prepare(groups, state)
        if count < 0:
            return None
        if count:
            left += (
                ParameterBackend(part.rows[r].group, part.rows[r].position, "torch", reason)
                for r, reason in part.plan.left()
            )
    return left


def _kind(param: Tensor) -> tuple[Any, ...]:
    strides = param.stride() if param.layout == torch.strided else ()
    return type(param), param.dtype, param.device, param.layout, param.shape, strides


def _group_refusal(group: dict[str, Any]) -> str | None:
    """Why only torch's code steps this group, or None."""
    if group["differentiable"]:
        return "differentiable=True"
    for name in ("lr", "weight_decay"):
        if isinstance(group[name], Tensor) and group[name].requires_grad:
            return f"{name} is a Tensor that requires grad"
    return None
