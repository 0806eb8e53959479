"""Reads a step's numbers from the parameter groups, each time. Used by the step."""

import math
from typing import Any

import torch
from torch import Tensor

from wd_fused.options.hyperparameters import check_number, on_host
from wd_fused.options.spec import NAMES, GroupStep, Options, StepOptions, check_parameters, of_group


class Reader:
    """Reads a step's numbers from the parameter groups; what has not changed since the last step is not made again."""

    def __init__(self, norm_per_group: bool, error_if_nonfinite: bool, seed: int, is_part: bool = False) -> None:
        self.norm_per_group = norm_per_group
        self.error_if_nonfinite = error_if_nonfinite
        self.seed = seed
        self.is_part = is_part  # other ranks have parameters in groups that are empty here
        self.options: list[Options | None] = []  # a group
        self.structure: tuple[Any, ...] = ()  # what plans were told of them; another object if that has changed
        self.counters: list[tuple[int, str]] = []  # group and key, of those that a step counts in
        self.averaging: int | None = None  # the first group that averages
        self.turned_off: set[int] = set()  # groups that had options in an earlier step
        self.zeroing: list[int] = []  # groups that leave zeros in their gradients
        self.is_plain = False  # no group had an option when they were last read
        self._keys: list[Any] = []
        self._initial_lrs: dict[int, Any] = {}  # of groups that had none before decouple_lr came on
        self._decoupling: list[int] = []  # groups whose decay depends on the quotient of two learning rates
        self._varying: list[int] = []  # groups with other numbers at every step
        self.norm_dtype = torch.float32
        self._step: StepOptions | None = None

    def read(self, groups: list[dict[str, Any]]) -> StepOptions | None:
        """The numbers of the step to come; None where no group has an option.

        Raises ValueError for an option that has been edited to what cannot be used.
        """
        if self.is_plain and len(self.options) == len(groups) and all(map(NAMES.isdisjoint, groups)):
            return None
        if self._keys != [*map(_key, groups)]:
            self._parse(groups)
        self._check_counters(groups)
        if self._varying:
            assert self._step is not None, "groups that vary have options"
            steps = list(self._step.groups)
            for g in self._varying:
                steps[g] = self._group_step(g, groups[g])
            self._step = self._step._replace(groups=tuple(steps))
        for g in self._decoupling:
            self._check_quotient(g, groups[g])
        return self._step

    def refresh(self, groups: list[dict[str, Any]]) -> StepOptions | None:
        """read() when parameters may have changed as well: they are checked against the options."""
        self._parse(groups, has_new_parameters=True)
        return self.read(groups)

    def _parse(self, groups: list[dict[str, Any]], has_new_parameters: bool = False) -> None:
        options = []
        for g, group in enumerate(groups):
            try:
                options.append(own := of_group(group))
                if has_new_parameters and own is not None:
                    check_parameters(group, own)
            except ValueError as error:
                raise ValueError(f"group {g}: {error}") from None
        structure = tuple(None if own is None else _structure(own) for own in options)
        if structure != self.structure or has_new_parameters:
            doubles = any(
                own is not None and own.max_grad_norm is not None and param.dtype in (torch.float64, torch.complex128)
                for own, group in zip(options, groups, strict=True)
                for param in group["params"]
            )
            self.norm_dtype = torch.float64 if doubles else torch.float32
        if structure != self.structure:
            self.structure = structure
        for g, (own, group) in enumerate(zip(options, groups, strict=True)):
            had = self.options[g] if g < len(self.options) else None
            if own is None and had is not None:
                self.turned_off.add(g)
            if own is not None and own.decouple_lr:
                comes_on = g < len(self.options) and (had is None or not had.decouple_lr)
                if comes_on and group.get("initial_lr", self) is self._initial_lrs.get(g):
                    del group["initial_lr"]  # of the last time that it was on
                self.take_up_initial_lr(g, group)
            if had is not None and had.ema_decay is not None and (own is None or own.ema_decay is None):
                group.pop("ema_updates", None)  # an average that begins again starts afresh
        self.options, self._keys = options, []  # until all of it is read
        averaging = [g for g, own in enumerate(options) if own is not None and own.ema_decay is not None]
        random = [g for g, own in enumerate(options) if own is not None and own.rounding == "stochastic"]
        self.averaging = averaging[0] if averaging else None
        self.counters = [(g, "ema_updates") for g in averaging] + [(g, "rounding_steps") for g in random]
        self._check_counters(groups)
        self._varying = sorted({*random, *(g for g in averaging if groups[g].get("ema_warmup"))})
        self.zeroing = [g for g, own in enumerate(options) if own is not None and own.zero_grads]
        self._decoupling = [g for g, own in enumerate(options) if own is not None and own.decouple_lr]
        self.is_plain = all(own is None for own in options)
        if self.is_plain:
            self._step, self._keys = None, [*map(_key, groups)]
            return
        steps = tuple(None if own is None else self._group_step(g, groups[g]) for g, own in enumerate(options))
        clips = any(step is not None and not math.isnan(step.max_norm) for step in steps)
        self._step = StepOptions(steps, self.norm_per_group, self.error_if_nonfinite, self.norm_dtype, clips)
        self._keys = [*map(_key, groups)]

    def take_up_initial_lr(self, g: int, group: dict[str, Any]) -> None:
        """Puts the initial learning rate, which decouple_lr divides by, into a group that has none. Raises ValueError
        for one that cannot be divided by."""
        for name in ("lr", "initial_lr"):
            check_number(f"group {g}: {name}", group.get(name, 0.0))
        lr = group["lr"]
        initial_lr = float(group.get("initial_lr", lr))
        if not initial_lr > 0:
            raise ValueError(
                f"decouple_lr=True divides by the initial learning rate, which is {initial_lr}: set "
                "group['initial_lr'] to the schedule's highest"
            )
        if "initial_lr" not in group:
            group["initial_lr"] = self._initial_lrs[g] = lr.clone() if isinstance(lr, Tensor) else lr

    def _check_counters(self, groups: list[dict[str, Any]]) -> None:
        for g, name in self.counters:
            value = groups[g].get(name, 0)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"group {g}: {name}={value!r}: use a whole number, or delete it to begin with 0")

    def _check_quotient(self, g: int, group: dict[str, Any]) -> None:
        """The factor of a decay is not negative: it is where a scheduler starts far below its highest rate."""
        lr, step = group["lr"], self._step and self._step.groups[g]
        if not isinstance(lr, float):
            check_number(f"group {g}: lr", lr)
        if step and (not isinstance(lr, Tensor) or lr.is_cpu) and lr * step.decoupled > 1:  # a GPU is not waited for
            initial_lr = float(group["initial_lr"])
            raise ValueError(
                f"group {g}: decouple_lr=True with lr={float(lr)}, initial_lr={initial_lr} and a weight decay of "
                f"{step.decoupled * initial_lr} would multiply the weights with {1 - float(lr) * step.decoupled}; set "
                "group['initial_lr'] to the schedule's highest"
            )

    def _group_step(self, g: int, group: dict[str, Any]) -> GroupStep:
        options = self.options[g]
        assert options is not None, "asked for of groups with options"
        all_decoupled = options.decoupled_weight_decay is True
        if all_decoupled:
            check_number(f"group {g}: weight_decay", group["weight_decay"])
        decoupled = on_host("weight_decay", group["weight_decay"] if all_decoupled else options.decoupled_weight_decay)
        if options.decouple_lr and decoupled != 0:
            decoupled /= on_host("initial_lr", group["initial_lr"])
        average_weight, varies = 0.0, False
        if options.ema_decay is not None:
            average_weight = 1 - _decay(options.ema_decay, options.ema_warmup, group.get("ema_updates", 0))
            varies = average_weight != 1 - options.ema_decay
        key = random_key(self.seed, group.get("rounding_steps", 0), g) if options.rounding == "stochastic" else 0
        clips = options.max_grad_norm is not None and (self.is_part or group["params"])
        max_norm = float(options.max_grad_norm or 0) if clips else math.nan
        numbers = (max_norm, float(options.l1_penalty), decoupled, not all_decoupled, average_weight, key)
        return GroupStep(*numbers, varies)


def _key(group: dict[str, Any]) -> Any:
    """All that a group's numbers are made of, but for counters. Written out: in a loop it takes twice as long."""
    get, decays = group.get, None
    if decoupled := get("decoupled_weight_decay"):  # True is not 1 here
        numbers = [(name, get(name)) for name in ("weight_decay", "initial_lr")]
        decays = decoupled is True, *(on_host(*n) if isinstance(n[1], Tensor) else n[1] for n in numbers)
    return (
        get("max_grad_norm"),
        get("l1_penalty"),
        decoupled,
        get("decouple_lr"),
        decays,
        get("ema_decay"),
        get("ema_warmup"),
        get("ema_dtype"),
        not get("ema_updates"),
        get("zero_grads"),
        get("master_weights"),
        get("momentum_dtype"),
        get("rounding"),
    )


def _structure(options: Options) -> tuple[Any, ...]:
    """What is fixed while a plan lives."""
    return (
        options.weights,
        options.rounding == "stochastic",
        options.momentum_dtype,
        options.ema_decay is not None,
        options.ema_dtype,
        options.max_grad_norm is not None,
        bool(options.zero_grads),
    )


def _decay(decay: float, warmup: bool, updates: int) -> float:
    if updates == 0:
        return 0.0
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


def random_key(seed: int, step: int, group: int) -> int:
    """64 bits for each step of each group: splitmix64's output function over a chain of the three."""
    state = seed & _WORD
    for word in (step, group):
        state = _splitmix(state + _GOLDEN) ^ (word & _WORD)
    return _splitmix(state + _GOLDEN)


_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _splitmix(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
