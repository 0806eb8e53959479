"""Gradient release: each parameter is stepped inside backward(), as soon as its gradient is there. For users.

A parameter has an optimizer of its own, whose plan has one row; groups and state stay those of the user's optimizer.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wd_fused.sgd import FusedSGD
from wd_fused.step import refusals
from wd_fused.step.lagged_norm import LaggedNorm
from wd_fused.step.step import run


def step_in_backward(
    model_or_parameters: nn.Module | Iterable[Tensor],
    optimizer: FusedSGD,
    *,
    gradient_accumulation_steps: int = 1,
    max_param_grad_norm: float | None = None,
    max_lagged_grad_norm: float | None = None,
    beside_grad_scaler: bool = False,
) -> "StepInBackward":
    """From now on backward() steps each parameter as soon as its gradient is complete, and frees the gradient.

        handle = wd_fused.step_in_backward(model, optimizer)
        for images, labels in batches:
            cross_entropy(model(images), labels).backward()  # the parameters are stepped in here
            optimizer.step()  # steps what is left, if anything; runs hooks, keeps schedulers content
            scheduler.step()

    No more than the gradients of a layer or so are in memory at once, instead of those of the whole model. Parameters
    and momentum buffers have the bits that step() after backward() gives; each backward() is a step, or every n-th.
    Learning rate and other hyperparameters are read from the optimizer's groups at that moment, and its ``state`` has
    what it always has: checkpoints are the same.

    Args:
        model_or_parameters: a module, of which those parameters are stepped that the optimizer has, also such as are
            thawed or added to the optimizer later; or parameters of the optimizer.
        optimizer: a FusedSGD. Its other parameters, and any without the hook yet (thawed or added since the last
            step()), keep their gradients for optimizer.step(), as always.
        gradient_accumulation_steps: n: gradients accumulate, and every n-th backward() that reaches one of the
            parameters steps and frees them; until then all are in memory. optimizer.step() steps what has a gradient,
            and the next backward() is the first of n again: so call it after every n-th only, for the parameters that
            the n-th has not reached, and after the last, incomplete round. The handle's attribute of that name can be
            set at any time. Default: 1.
        max_param_grad_norm: clips each gradient by its own 2-norm, when its parameter is stepped, as
            torch.nn.utils.clip_grad_norm_([param], max_param_grad_norm) does: g ← g · min(1, max_param_grad_norm /
            (‖g‖₂ + 10⁻⁶)). That is not clipping by the norm of all gradients. Holds for the parameters that are stepped
            here, in optimizer.step() as well. Default: None.
        max_lagged_grad_norm: clips all gradients by the 2-norm that they had in the step before, as this step's is not
            known until its last gradient: g ← g · min(1, max_lagged_grad_norm / (‖g of the step before‖₂ + 10⁻⁶)),
            and then each by its own norm, against a sudden spike. A gradient that is not finite is not stepped. The
            handle's ``grad_norm`` is the norm of the last whole step before clipping. docs/use-with.md tells how far
            that is from clipping by the norm itself. Default: None.
        beside_grad_scaler: this program has a torch.amp.GradScaler, which scales other losses than those whose
            backward() steps here. Default: False; then one that has scaled a loss is an error.

    Returns:
        A handle; ``handle.remove()``, or leaving it as a context manager, gives back plain behaviour. It need not be
        kept.

    Raises:
        TypeError: another optimizer.
        ValueError: the optimizer has none of the parameters, or an option that needs all gradients at once
            (``max_grad_norm``) or counts whole steps (``ema_decay``, ``rounding="stochastic"``), or
            ``differentiable=True``; parameters that share memory without being one, or that are DTensors; a model in
            DistributedDataParallel or FullyShardedDataParallel, which average gradients after this has used them
            (a list of its parameters does not show that); a ``gradient_accumulation_steps`` below 1, a
            ``max_param_grad_norm`` or ``max_lagged_grad_norm`` below 0, or both.
        RuntimeError: one of the parameters is stepped in backward already. Later, from backward(): such an option has
            been turned on; ``create_graph=True``; what step() raises. From step(): a closure. From both:
            torch.amp.GradScaler, which has to see all gradients before the first parameter is stepped; bfloat16 needs
            no scaling. Those of the process are looked for once, before the first parameter is stepped; one that is
            made later is noticed by its step(), after a backward() with scaled gradients.

    Where backward() fails half-way, the parameters whose gradients were complete have been stepped. A tied parameter,
    one that is used several times, is stepped once, after all its uses; but torch.utils.checkpoint with
    use_reentrant=True makes each segment a backward() of its own, and so a step of what it uses: give it False (such a
    backward() inside another is an error when they are counted, as with max_lagged_grad_norm).

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> with step_in_backward(model, optimizer):
        ...     model(torch.ones(8, 4)).square().mean().backward()  # steps, and frees each gradient
        >>> model.weight.grad is None
        True
    """
    return StepInBackward(
        model_or_parameters,
        optimizer,
        beside_grad_scaler,
        gradient_accumulation_steps,
        max_param_grad_norm,
        max_lagged_grad_norm,
    )


class StepInBackward:
    """What step_in_backward() returns: ``remove()`` ends it. A context manager."""

    def __init__(
        self,
        model_or_parameters: nn.Module | Iterable[Tensor],
        optimizer: FusedSGD,
        beside_grad_scaler: bool = False,
        gradient_accumulation_steps: int = 1,
        max_param_grad_norm: float | None = None,
        max_lagged_grad_norm: float | None = None,
    ) -> None:
        if not isinstance(optimizer, FusedSGD):
            raise TypeError(f"step_in_backward() needs a FusedSGD, not a {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.gradient_accumulation_steps = gradient_accumulation_steps
        own_norm = refusals.checked_norm("max_param_grad_norm", max_param_grad_norm)
        lagged = refusals.checked_norm("max_lagged_grad_norm", max_lagged_grad_norm)
        if own_norm is not None and lagged is not None:
            raise ValueError("max_param_grad_norm and max_lagged_grad_norm are two rules of clipping: give one of them")
        self._lagged = None if lagged is None else LaggedNorm(lagged)
        self._max_norm = own_norm if lagged is None else lagged  # of each gradient by itself, by either rule
        self._lock = threading.Lock()  # of the three that follow: backward() has a thread for each device
        self._backward = -1  # the last that was counted
        self._round = 0  # of how many backward()s the accumulated gradients are
        self._is_last = False  # of its round
        self._model = model_or_parameters if isinstance(model_or_parameters, nn.Module) else None
        if self._model is not None:
            refusals.check_model(self._model)
        self._listed = [] if isinstance(model_or_parameters, nn.Module) else list(model_or_parameters)
        wanted = self._wanted()
        if not wanted:
            raise ValueError("step_in_backward(): the optimizer has none of these parameters")
        strangers = len({id(param) for param in self._listed} - {id(param) for param, _, _ in wanted})
        if strangers:
            raise ValueError(f"step_in_backward(): {strangers} of these parameters are not in the optimizer")
        for g in dict.fromkeys(g for _, g, _ in wanted):
            if (objection := refusals.objection(optimizer.param_groups[g])) is not None:
                raise ValueError(f"step_in_backward(): group {g} has {objection}")
        self._steppers: dict[int, _Stepper] = {}  # by the parameter's id
        self._frozen: list[Tensor] = []
        self._size = 0  # of the optimizer, in parameters
        self._scalers: list[weakref.ref[torch.amp.GradScaler]] | None = [] if beside_grad_scaler else None
        self._stepped: set[tuple[int, int]] = set()  # group and position of each parameter, since the last step()
        self._hook_up(wanted)
        self._before_step = optimizer.register_step_pre_hook(self._check_step)
        # Or GradScaler would unscale what gradients there still are, and call step() without a word, or not at all.
        optimizer._step_supports_amp_scaling = True

    @property
    def grad_norm(self) -> Tensor | None:
        """With ``max_lagged_grad_norm`` the 2-norm of all gradients of the last whole step, before clipping: float64,
        [], on a gradient's device. Known after optimizer.step(), or when the next backward() begins."""
        return None if self._lagged is None else self._lagged.norm

    @property
    def gradient_accumulation_steps(self) -> int:
        """Every how many-th backward() steps. Where as many have accumulated when it is set, the next one does."""
        return self._accumulation_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, steps: int) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(
                f"Invalid gradient_accumulation_steps={steps!r}: use a whole number >= 1, 1 for no accumulation"
            )
        self._accumulation_steps = steps

    def _steps_now(self) -> bool:
        """From a hook: whether this backward() is the last of its round."""
        if self._accumulation_steps == 1 and self._lagged is None:
            self._round = 0
            return True
        backward = torch._C._current_graph_task_id()  # they count up
        with self._lock:
            if backward < self._backward:
                raise RuntimeError(
                    "backward() inside or beside another backward() under step_in_backward() with "
                    "gradient_accumulation_steps or max_lagged_grad_norm: they cannot be counted; give "
                    "torch.utils.checkpoint use_reentrant=False"
                )
            if backward != self._backward:
                self._backward = backward
                self._round = 1 if self._is_last else self._round + 1
                self._is_last = self._round >= self._accumulation_steps
                if self._round == 1 and self._lagged is not None:
                    self._lagged.end_round()
            return self._is_last

    def _wanted(self) -> list[tuple[Tensor, int, int]]:
        """Those of the parameters that the optimizer has, with group and position."""
        of_user = self._listed if self._model is None else self._model.parameters()
        ids = {id(param) for param in of_user}
        return [place for place in _places(self.optimizer) if id(place[0]) in ids]

    def _hook_up(self, wanted: list[tuple[Tensor, int, int]]) -> None:
        """A frozen parameter takes no hook: it gets its own when it has been thawed."""
        refusals.check_parameters([param for param, _, _ in wanted])
        new = {id(param): (param, g, i) for param, g, i in wanted if id(param) not in self._steppers}
        thawed = [place for place in new.values() if place[0].requires_grad]
        for param, g, i in thawed:
            if getattr(param, _ATTRIBUTE, None) is not None:
                raise RuntimeError(
                    f"step_in_backward(): group {g}, parameter {i} is stepped in backward already; remove() the handle "
                    "of that first"
                )
        for param, g, i in thawed:
            self._steppers[id(param)] = _Stepper(self, param, g, i)
        self._frozen = [param for param, _, _ in new.values() if not param.requires_grad]
        self._size = _size(self.optimizer)

    def _check_step(self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before optimizer.step()."""
        stepped, self._stepped = self._stepped, set()
        optimizer = self.optimizer
        try:
            refusals.check_no_scaler(optimizer, stepped)
        except RuntimeError:
            if getattr(optimizer, "found_inf", None) is not None:  # GradScaler's, which takes both away after step()
                for name in {"grad_scale", "found_inf"} & vars(optimizer).keys():
                    delattr(optimizer, name)
            raise
        if any(argument is not None and argument is not optimizer for argument in (*args, *kwargs.values())):
            raise RuntimeError("step() takes no closure while step_in_backward() is on: backward() is the step")
        if self._size != _size(optimizer) or any(param.requires_grad for param in self._frozen):
            self._hook_up(self._wanted())
        self._round, self._is_last = 0, False
        if self._max_norm is not None:  # step() would not clip
            with torch.no_grad():
                for stepper in self._steppers.values():
                    stepper.step(is_last=True)
            self._stepped.clear()
        if self._lagged is not None:
            self._lagged.end_round()

    def remove(self) -> None:
        """From now on backward() leaves the gradients to optimizer.step() again. A second call does nothing."""
        for stepper in self._steppers.values():
            stepper.remove()
        self._steppers.clear()
        self._before_step.remove()
        hooks = self.optimizer._optimizer_step_pre_hooks.values()
        is_last = not any(getattr(hook, "__func__", None) is StepInBackward._check_step for hook in hooks)
        if is_last and not self.optimizer.defaults["fused"]:
            vars(self.optimizer).pop("_step_supports_amp_scaling", None)

    def _check_no_scaled_loss(self) -> None:
        """Before a parameter is stepped. No gradient shows whether its loss was scaled; a scaler shows that it has
        scaled one."""
        if self._scalers is None:
            self._scalers = refusals.enabled_scalers()
        for scaler in self._scalers:
            if getattr(scaler(), "_scale", None) is not None:
                raise RuntimeError(
                    f"{refusals.NO_SCALER}, or remove() the handle. If this scaler scales the losses of other models "
                    "only: step_in_backward(..., beside_grad_scaler=True)"
                )

    def __enter__(self) -> "StepInBackward":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()  # a model with such parameters can be pickled


class _Stepper:
    """Steps one parameter from its hook."""

    def __init__(self, handle: StepInBackward, param: Tensor, group: int, position: int) -> None:
        self.handle = handle
        self.param = param
        self.place = (group, position)
        self._own: FusedSGD | None = None  # made at the first step
        self._group: dict[str, Any] = {}
        self._params = [param]
        # The garbage collector does not see what a hook of C++ refers to. It sees the parameter's attribute, which
        # keeps this, and the optimizer, for as long as the parameter lives.
        setattr(param, _ATTRIBUTE, self)
        own = weakref.WeakMethod(self.step)

        def hook(_: Tensor) -> None:
            if (step := own()) is not None:
                step()

        self._hook: RemovableHandle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        self._hook.remove()
        delattr(self.param, _ATTRIBUTE)

    def step(self, is_last: bool = False) -> None:
        param, optimizer = self.param, self.handle.optimizer
        grad = param.grad
        if grad is None or (group := self._group_of_user()) is None:
            return
        if (objection := refusals.objection(group)) is not None:
            raise RuntimeError(f"backward() under step_in_backward(): group {self.place[0]} has {objection}")
        if grad.requires_grad:
            raise RuntimeError(
                "backward(create_graph=True) under step_in_backward(): the parameters change while the graph of the "
                "gradients still needs them; remove() the handle first"
            )
        if self.handle._max_norm is not None and grad.layout != torch.strided:
            raise RuntimeError(
                f"step_in_backward() clips, which it cannot do to the {grad.layout} gradient of group {self.place[0]}, "
                f"parameter {self.place[1]}: give it the other parameters only, or have the layer give dense gradients"
            )
        refusals.check_no_scaler(optimizer)
        self.handle._check_no_scaled_loss()
        if not is_last and not self.handle._steps_now():
            return
        own = self._own
        if own is None:
            own = self._own = FusedSGD([param], backend=optimizer._backend, numerics=optimizer._numerics)
            own.param_groups = [self._group]
            own._warned = optimizer._warned  # a reason is told once, not once a parameter
        self._group.clear()
        self._group.update(group)
        self._group["params"] = self._params
        if self.handle._max_norm is not None:
            self._group["max_grad_norm"] = self.handle._max_norm
        lagged = self.handle._lagged
        if lagged is not None:
            own.grad_scale = lagged.scale(param.device)
        if "param_names" in group:
            self._group["param_names"] = [group["param_names"][self.place[1]]]
        state = optimizer.state.get(param)
        if own.state.get(param) is not state:
            own.state.clear()
            if state is not None:
                own.state[param] = state
        try:
            run(own)
        except RuntimeError as error:
            name = "group {}, parameter {}".format(*self.place)
            raise RuntimeError(str(error).replace("group 0, parameter 0", name, 1)) from error
        if lagged is not None and own.grad_norm is not None:
            lagged.note(own.grad_norm)
        if state is None and param in own.state:
            optimizer.state[param] = own.state[param]
        if "initial_lr" in self._group:
            group.setdefault("initial_lr", self._group["initial_lr"])  # decouple_lr has been turned on just now
        param.grad = None
        self.handle._stepped.add(self.place)

    def _group_of_user(self) -> dict[str, Any] | None:
        """The parameter's group as it is now; None if the optimizer has it no more."""
        groups, (g, i) = self.handle.optimizer.param_groups, self.place
        if g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is self.param:
            return groups[g]
        for param, g, i in _places(self.handle.optimizer):
            if param is self.param:
                self.place = (g, i)
                return groups[g]
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


_ATTRIBUTE = "_wd_fused_step_in_backward"


def _places(optimizer: FusedSGD) -> Iterator[tuple[Tensor, int, int]]:
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            yield param, g, i


def _size(optimizer: FusedSGD) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _nothing() -> None:
    return None
