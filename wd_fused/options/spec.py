"""The options: what they are called, which values they take, and what a plan is told of them.

Read from the parameter groups by reader.py; what they keep in the state is in kept.py, the arithmetic in reference.py.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wd_fused.options.hyperparameters import number_fault, spelled


class RowOptions(NamedTuple):
    """What the options make of a parameter, fixed while a plan lives."""

    weights: str = "parameter"  # where its value is kept: also "full", "split", "split24", "kahan"
    stochastic: bool = False  # rounding="stochastic"
    momentum_dtype: torch.dtype | None = None  # of the momentum buffer
    extra: Tensor | None = None  # the state's master, remainder or compensation, as it is now
    momentum_scale: Tensor | None = None  # float32, a scale for each block of an int8 momentum buffer
    ema: Tensor | None = None
    averages: bool = False
    clips: bool = False
    zeroes: bool = False
    place: tuple[int, ...] | None = None  # of a DTensor, for random numbers: what sharded.place_of() says


class GroupStep(NamedTuple):
    """The numbers of one step for a parameter group."""

    max_norm: float  # nan: the group does not clip
    l1: float
    decoupled: float  # c in p·(1 − lr·c); 0: none
    l2: bool  # False: weight_decay makes no L2 term
    average_weight: float  # of the new value in the average, 1 − decay
    random_key: int  # 64 bits
    average_varies: bool = False  # average_weight will be another one in a later step


class StepOptions(NamedTuple):
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
        """As RowOptions has it."""
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


# The largest that each takes, and what to use instead of others.
_NUMBERS = {
    "max_grad_norm": (math.inf, "a number >= 0, or None for no clipping"),
    "l1_penalty": (sys.float_info.max, "a number >= 0, 0 for no penalty"),
    "decoupled_weight_decay": (
        sys.float_info.max,
        "True (weight_decay is decoupled), a number >= 0 (beside weight_decay), or False",
    ),
    "ema_decay": (
        math.nextafter(1, 0),
        "a number in [0, 1), such as 0.999, or None for no average of the parameters",
    ),
}


def plain(name: str, value: Any) -> Any:
    """An option's value as it stands in a group: a number of Python or a word, which every kind of checkpoint can hold.

    A torch.dtype is called by its name, NumPy's numbers and the like are floats; what is neither stays as it is.
    """
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if name not in _NUMBERS or value is None or type(value) in (bool, int, float) or isinstance(value, Tensor | str):
        return value
    try:
        return value if _is_numpys_bool(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _is_numpys_bool(value: Any) -> bool:
    return isinstance(getattr(value, "item", lambda: 0)(), bool)


def _is(value: Any, off: Any) -> bool:
    return value is off or (isinstance(value, bool | int | float | str) and value == off)


def of_group(group: Mapping[str, Any]) -> Options | None:
    """The options of a group, checked, but for its parameters; None where none stands in it.

    Raises ValueError for a value that cannot be used, with the remedy.
    """
    if NAMES.isdisjoint(group):
        return None
    options = Options.of(group)
    for name in _NUMBERS:
        _check_number(name, getattr(options, name))
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
            raise ValueError(
                f"{objection}; {name_of(group, i)} is one: put it into a parameter group without that option"
            )


def name_of(group: Mapping[str, Any], i: int) -> str:
    return f"parameter {i}" + (f" ({group['param_names'][i]})" if "param_names" in group else "")


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


def _check_number(name: str, value: Any) -> None:
    largest, remedy = _NUMBERS[name]
    off = getattr(Options(), name)
    if value is None or isinstance(value, bool):
        if value is off or (off is False and value is True):
            return
        if isinstance(value, bool):  # 0 and 1 elsewhere, but nobody means that
            raise ValueError(f"Invalid {name}={value}: use a number, or {off} for none")
    elif type(value) is not float:
        is_number = not isinstance(value, Tensor) and number_fault(value) is None
        if not is_number or _is_numpys_bool(value):
            raise ValueError(f"Invalid {name}={spelled(value)}: use a Python number")
    if value is None or not 0 <= float(value) <= largest:
        raise ValueError(f"Invalid {name}={value}: use {remedy}")


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


def momentum_dtype(param: Tensor, options: Options) -> torch.dtype:
    if options.momentum_dtype is not None:
        return MOMENTUM_DTYPES[options.momentum_dtype]
    return param.dtype if options.master_weights is None else torch.float32


def average_dtype(averaged: Tensor, ema_dtype: torch.dtype | str | None) -> torch.dtype:
    """Of a parameter or buffer: in float16 or bfloat16 an average with a decay of 0.999 would stand still."""
    is_own = plain("ema_dtype", averaged.dtype) == plain("ema_dtype", ema_dtype)
    return torch.float32 if averaged.dtype in HALVES and not is_own else averaged.dtype
