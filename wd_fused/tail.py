"""The options of the fused tail: what they are called, which values they take, and what a plan is told of them.

sgd.py reads them from the parameter groups through a Reader; backends and reference.py get the tuples. The arithmetic
stands in reference.py, what the options keep in the state in tail_state.py.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wd_fused.hyperparameters import check_number, number_fault, spelled


class RowTail(NamedTuple):
    """What the options make of a parameter, fixed while a plan lives."""

    weights: str  # where its value is kept: "parameter", "full", "split", "split24", "kahan"
    stochastic: bool  # rounding="stochastic"
    momentum_dtype: torch.dtype  # of the momentum buffer
    extra: Tensor | None  # the state's master, remainder or compensation, as it is now
    momentum_scale: Tensor | None  # float32, a scale for each block of an int8 momentum buffer
    ema: Tensor | None
    averages: bool
    clips: bool
    zeroes: bool


class GroupStep(NamedTuple):
    """The numbers of one step for a parameter group."""

    max_norm: float  # nan: the group does not clip
    l1: float
    decoupled: float  # c in p·(1 − lr·c); 0: none
    l2: bool  # False: weight_decay makes no L2 term
    average_weight: float  # of the new value in the average, 1 − decay
    random_key: int  # 64 bits
    average_varies: bool = False  # average_weight will be another one in a later step


class TailStep(NamedTuple):
    """The numbers of one step."""

    groups: tuple[GroupStep | None, ...]  # None: no option is on
    norm_per_group: bool
    error_if_nonfinite: bool
    norm_dtype: torch.dtype
    clips: bool  # some group does


class Options(NamedTuple):
    """The options that may stand in a parameter group, as plain() has them, with the values that turn them off."""

    max_grad_norm: float | None = None
    l1_penalty: float = 0.0
    decoupled_weight_decay: bool | float = False
    decouple_lr: bool = False
    ema_decay: float | None = None
    ema_warmup: bool = False
    ema_dtype: str | None = None
    zero_grads: bool = False
    master_weights: str | None = None
    momentum_dtype: str | None = None
    rounding: str = "nearest"

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Options":
        """Those of a group, not checked."""
        return cls(**{name: plain(name, group[name]) for name in cls._fields if name in group})

    @property
    def weights(self) -> str:
        """As RowTail has it."""
        return self.master_weights or ("kahan" if self.rounding == "kahan" else "parameter")

    def on(self) -> dict[str, Any]:
        """Those that are on."""
        off = Options()._asdict()
        return {name: value for name, value in self._asdict().items() if not _is(value, off[name])}

    def spelled(self) -> str:
        """Those that are on, as somebody would write them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.on().items())


NAMES = frozenset(Options._fields)
COUNTERS = ("ema_updates", "rounding_steps")  # in the groups where averages are kept, or roundings random
MASTER_WEIGHTS = ("full", "split", "split24")
EMA_DTYPES = ("float32", "float16", "bfloat16")
MOMENTUM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
ROUNDINGS = ("nearest", "stochastic", "kahan")
HALVES = (torch.float16, torch.bfloat16)


_NUMBERS = ("max_grad_norm", "l1_penalty", "decoupled_weight_decay", "ema_decay")


def plain(name: str, value: Any) -> Any:
    """An option's value as it stands in a group: a number of Python or a word, which every kind of checkpoint can hold.

    A torch.dtype is called by its name, NumPy's numbers and the like are floats; what is neither stays as it is.
    """
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if name not in _NUMBERS or value is None or type(value) in (bool, int, float) or isinstance(value, Tensor | str):
        return value
    try:
        return value if isinstance(getattr(value, "item", lambda: 0)(), bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _is(value: Any, off: Any) -> bool:
    return value is off or (isinstance(value, bool | int | float | str) and value == off)


def of_group(group: Mapping[str, Any]) -> Options | None:
    """The options of a group, checked, but for its parameters; None where none stands in it.

    Raises ValueError for a value that cannot be used, with the remedy.
    """
    if NAMES.isdisjoint(group):
        return None
    options = Options.of(group)
    _check_numbers(options)
    _check_choices(options)
    if options.decouple_lr and "decoupled_weight_decay" not in group:
        raise ValueError(
            "decouple_lr=True changes decoupled weight decay only: give decoupled_weight_decay=True as well"
        )
    for name in ("ema_warmup", "ema_dtype"):
        if name in options.on() and "ema_decay" not in group:
            raise ValueError(
                f"{name}={getattr(options, name)!r} is for an average: give ema_decay as well, such as ema_decay=0.999"
            )
    if options.on() and group.get("differentiable"):
        raise ValueError(f"differentiable=True cannot be used with {options.spelled()}: leave one of them out")
    return options


def take_up(group: dict[str, Any]) -> None:
    """Checks a new group's options, takes those that are off out of it, and adds what others need to stand there.

    Raises ValueError, naming the value.
    """
    options = of_group(group)
    if options is None:
        return
    check_parameters(group, options)
    on = options.on()
    for name in NAMES:
        if name in group and name not in on:
            del group[name]
    group.update(on)
    if "ema_decay" in on:
        group.setdefault("ema_updates", 0)
    if options.rounding == "stochastic":
        group.setdefault("rounding_steps", 0)


def check_parameters(group: Mapping[str, Any], options: Options) -> None:
    """Raises ValueError for a parameter that the group's options cannot be used for."""
    for i, param in enumerate(group["params"]):
        if (objection := objection_to(param, options)) is not None:
            name = f"parameter {i}" + (f" ({group['param_names'][i]})" if "param_names" in group else "")
            raise ValueError(f"{objection}; {name} is one: put it into a parameter group without that option")


def objection_to(param: Tensor, options: Options) -> str | None:
    """Why the options cannot be used for a parameter of this dtype, or None."""
    dtype = str(param.dtype).removeprefix("torch.")
    if options.master_weights is not None:
        takes = HALVES if options.master_weights == "full" else (torch.bfloat16,)
        if param.dtype not in takes:
            remedy = ' (master_weights="full" is for those, too)' if param.dtype == torch.float16 else ""
            names = " and ".join(str(t).removeprefix("torch.") for t in takes)
            return f"master_weights={options.master_weights!r} is for {names} parameters{remedy}, not for {dtype}"
    if options.rounding == "stochastic" and param.dtype != torch.bfloat16:
        return f"rounding='stochastic' is for bfloat16 parameters, not for {dtype}"
    if options.rounding == "kahan" and param.dtype not in HALVES:
        return f"rounding='kahan' is for float16 and bfloat16 parameters, not for {dtype}"
    if options.momentum_dtype is not None and param.dtype not in (torch.float32, *HALVES):
        given = f"momentum_dtype={options.momentum_dtype!r}"
        return f"{given} is for float32, float16 and bfloat16 parameters, not for {dtype}"
    if param.dtype in HALVES and options.ema_dtype not in (None, "float32", dtype):
        return f"ema_dtype={options.ema_dtype!r} is for parameters of that dtype, not for {dtype}"
    if options.l1_penalty != 0 and param.is_complex():
        return f"l1_penalty={options.l1_penalty} needs the sign of a parameter, which {dtype} has not"
    return None


def _check_numbers(options: Options) -> None:
    norm, l1, decoupled, decay = (_number(name, getattr(options, name)) for name in _NUMBERS)
    for name, value in (("max_grad_norm", norm), ("l1_penalty", l1), ("ema_decay", decay)):
        if isinstance(value, bool):  # 0 and 1 elsewhere, but nobody means that
            raise ValueError(f"Invalid {name}={value}: use a number, or {getattr(Options(), name)} for none")
    if norm is not None and not norm >= 0:
        raise ValueError(f"Invalid max_grad_norm={norm}: use a number >= 0, or None for no clipping")
    if l1 is None or not 0 <= l1 < math.inf:
        raise ValueError(f"Invalid l1_penalty={l1}: use a number >= 0, 0 for no penalty")
    if decoupled is None or not 0 <= decoupled < math.inf:
        raise ValueError(
            f"Invalid decoupled_weight_decay={decoupled}: use True (weight_decay is decoupled), a number >= 0 "
            "(beside weight_decay), or False"
        )
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(
            f"Invalid ema_decay={decay}: use a number in [0, 1), such as 0.999, or None for no average of the "
            "parameters"
        )


def _number(name: str, value: Any) -> float | None:
    if value is None or isinstance(value, bool | float):
        return value
    is_number = not isinstance(value, Tensor) and number_fault(value) is None
    if not is_number or isinstance(getattr(value, "item", lambda: 0)(), bool):  # NumPy's
        raise ValueError(f"Invalid {name}={spelled(value)}: use a Python number")
    return value if isinstance(value, int) else float(value)


def _check_choices(options: Options) -> None:
    for name, choices in (
        ("master_weights", (None, *MASTER_WEIGHTS)),
        ("momentum_dtype", (None, *MOMENTUM_DTYPES)),
        ("ema_dtype", (None, *EMA_DTYPES)),
        ("rounding", ROUNDINGS),
    ):
        value = getattr(options, name)
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            raise ValueError(f"Invalid {name}={value!r}: choose one of {', '.join(map(repr, choices))}")
    for name in ("decouple_lr", "ema_warmup", "zero_grads"):
        if not isinstance(value := getattr(options, name), bool):
            raise ValueError(f"Invalid {name}={value!r}: use True or False")
    if options.master_weights is not None and options.rounding != "nearest":
        raise ValueError(
            f"rounding={options.rounding!r} cannot be used with master_weights={options.master_weights!r}, which keep "
            "what rounding takes away: leave one of them out"
        )


def check_optimizer(norm_per_group: Any, error_if_nonfinite: Any, rounding_seed: Any) -> None:
    for name, value in (("norm_per_group", norm_per_group), ("error_if_nonfinite", error_if_nonfinite)):
        if not isinstance(value, bool):
            raise ValueError(f"Invalid {name}={value!r}: use True or False")
    if not isinstance(rounding_seed, int) or isinstance(rounding_seed, bool):
        raise ValueError(f"Invalid rounding_seed={rounding_seed!r}: use a whole number")


def momentum_dtype(param: Tensor, options: Options) -> torch.dtype:
    if options.momentum_dtype is not None:
        return MOMENTUM_DTYPES[options.momentum_dtype]
    return param.dtype if options.master_weights is None else torch.float32


def average_dtype(averaged: Tensor, ema_dtype: torch.dtype | str | None) -> torch.dtype:
    """Of a parameter or buffer: in float16 or bfloat16 an average with a decay of 0.999 would stand still."""
    is_own = plain("ema_dtype", averaged.dtype) == plain("ema_dtype", ema_dtype)
    return torch.float32 if averaged.dtype in HALVES and not is_own else averaged.dtype


class Reader:
    """Reads a step's numbers from the parameter groups; what has not changed since the last step is not made again."""

    def __init__(self, norm_per_group: bool, error_if_nonfinite: bool, seed: int) -> None:
        self.norm_per_group = norm_per_group
        self.error_if_nonfinite = error_if_nonfinite
        self.seed = seed
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
        self._knows_norm_dtype = False
        self._step: TailStep | None = None

    def read(self, groups: list[dict[str, Any]]) -> TailStep | None:
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

    def refresh(self, groups: list[dict[str, Any]]) -> TailStep | None:
        """read() when parameters may have changed as well: they are checked against the options."""
        for g, group in enumerate(groups):
            options = of_group(group)
            try:
                if options is not None:
                    check_parameters(group, options)
            except ValueError as error:
                raise ValueError(f"group {g}: {error}") from None
        self.is_plain, self._keys, self._knows_norm_dtype = False, [], False
        return self.read(groups)

    def _parse(self, groups: list[dict[str, Any]]) -> None:
        options = []
        for g, group in enumerate(groups):
            try:
                options.append(of_group(group))
            except ValueError as error:
                raise ValueError(f"group {g}: {error}") from None
        structure = tuple(None if own is None else _structure(own) for own in options)
        if structure != self.structure:
            self.structure, self._knows_norm_dtype = structure, False
        if not self._knows_norm_dtype:
            doubles = any(
                own is not None and own.max_grad_norm is not None and _is_double(group["params"])
                for own, group in zip(options, groups, strict=True)
            )
            self.norm_dtype, self._knows_norm_dtype = torch.float64 if doubles else torch.float32, True
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
        self._step = TailStep(steps, self.norm_per_group, self.error_if_nonfinite, self.norm_dtype, clips)
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
        decoupled = float(group["weight_decay"] if all_decoupled else options.decoupled_weight_decay)
        if options.decouple_lr and decoupled != 0:
            decoupled /= float(group["initial_lr"])
        average_weight, varies = 0.0, False
        if options.ema_decay is not None:
            average_weight = 1 - _decay(options.ema_decay, options.ema_warmup, group.get("ema_updates", 0))
            varies = average_weight != 1 - options.ema_decay
        key = random_key(self.seed, group.get("rounding_steps", 0), g) if options.rounding == "stochastic" else 0
        clips = options.max_grad_norm is not None and group["params"]
        max_norm = float(options.max_grad_norm or 0) if clips else math.nan
        numbers = (max_norm, float(options.l1_penalty), decoupled, not all_decoupled, average_weight, key)
        return GroupStep(*numbers, varies)


def _key(group: dict[str, Any]) -> Any:
    """All that a group's numbers are made of, but for counters."""
    get = group.get
    decoupled = get("decoupled_weight_decay")
    decays = None
    if decoupled:
        decays = (decoupled is True, get("weight_decay"), get("initial_lr"))
        if isinstance(decays[1], Tensor) or isinstance(decays[2], Tensor):
            decays = (decoupled is True, float(decays[1] or 0), float(decays[2] or 0))
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


def _is_double(params: Iterable[Tensor]) -> bool:
    return any(param.dtype in (torch.float64, torch.complex128) for param in params)


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


# A step's norms and coefficients: of sums of squares, a group each, float64 on the CPU.


def norms(sums: Tensor, step: TailStep) -> Tensor:
    """The 2-norm of all gradients, [], or of each group's, [groups]: NaN for groups that do not clip or are empty, 0
    for those that clip and have no gradient."""
    squares = [each.item() for each in sums]  # a mode that traces sees item(), and not tolist()
    if step.norm_per_group:
        own = [_root(each) if clips else math.nan for each, clips in zip(squares, _clips(step), strict=True)]
        return torch.tensor(own, dtype=torch.float64, device="cpu").to(step.norm_dtype)
    total = 0.0
    for each in squares:  # in this order, as the plans do
        total += each
    return torch.tensor(_root(total), dtype=torch.float64, device="cpu").to(step.norm_dtype)


def _root(square: float) -> float:
    """Correctly rounded, which torch's on the CPU is not."""
    return square if square != square else math.sqrt(square)


def _clips(step: TailStep) -> list[bool]:
    return [group is not None and not math.isnan(group.max_norm) for group in step.groups]


NONFINITE = (
    "The total norm of order 2 for gradients is non-finite, so they cannot be clipped. To scale the gradients by it "
    "anyway, set error_if_nonfinite=False"
)


def is_nonfinite(norm: Tensor, step: TailStep) -> Tensor:
    """Whether one of norms() of the groups that clip is infinite or NaN: bool, [], where the norms are."""
    if not step.norm_per_group:
        return norm.isfinite().logical_not()
    own = torch.stack([norm[g] for g, clips in enumerate(_clips(step)) if clips])
    return own.isfinite().all().logical_not()


def coefficients(norm: Tensor, step: TailStep) -> list[float]:
    """What each group's gradients are multiplied with: torch.nn.utils.clip_grads_with_norm_'s, 1.0 without clipping."""
    result = []
    for g, group in enumerate(step.groups):
        if group is None or math.isnan(group.max_norm):
            result.append(1.0)
            continue
        own = norm[g] if step.norm_per_group else norm
        result.append(((own + 1e-6).reciprocal() * group.max_norm).clamp(max=1.0).item())
    return result
