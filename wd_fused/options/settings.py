"""What holds for an optimizer as a whole. Used by sgd.py and kept.py.

Where it is not the default it stands in ``defaults`` and in every parameter group, so that an optimizer made anew from
either, as libraries do, is the same; it is read when the optimizer is made.
"""

from collections.abc import Iterator
from typing import Any

OFF: dict[str, Any] = {
    "backend": "auto",
    "numerics": "torch",
    "norm_per_group": False,
    "error_if_nonfinite": False,
    "rounding_seed": 0,
    "report_numerics": False,
}
_FOR_NORM = ("norm_per_group", "error_if_nonfinite")


def taken_up(given: dict[str, Any], params: Any) -> tuple[dict[str, Any], Any]:
    """The settings, by the arguments or else by the groups among ``params``; and ``params``, whose groups agree.

    Raises ValueError if the groups do not agree with each other, and for a value that cannot be used.
    """
    if isinstance(params, Iterator):
        params = list(params)
    groups = [group for group in params if isinstance(group, dict)] if isinstance(params, list | tuple) else []
    settings = dict(given)
    for name, off in OFF.items():
        said = [group.get(name, off) for group in groups]
        if given[name] == off and said:
            settings[name] = said[0]
            for g, value in enumerate(said):
                if value != said[0]:
                    raise ValueError(
                        f"{name}={said[0]!r} in group 0 and {value!r} in group {g}: it holds for the whole optimizer; "
                        f"give it as an argument, {name}={said[0] if value == off else value!r}"
                    )
        elif any(value != given[name] for value in said):
            params = [{**group, name: given[name]} if isinstance(group, dict) else group for group in params]
    for name in _FOR_NORM:
        if not isinstance(settings[name], bool):
            raise ValueError(f"Invalid {name}={settings[name]!r}: use True or False")
    if not isinstance(seed := settings["rounding_seed"], int) or isinstance(seed, bool):
        raise ValueError(f"Invalid rounding_seed={seed!r}: use a whole number")
    every = settings["report_numerics"]
    if not isinstance(every, int) or every < 0:
        raise ValueError(
            f"Invalid report_numerics={every!r}: use True for each step, a whole number n for each n-th, or False"
        )
    return settings, params


def check_use(settings: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raises ValueError for what no group makes use of."""
    for name in (*_FOR_NORM, "process_group"):
        if settings[name] and not any("max_grad_norm" in group for group in groups):
            raise ValueError(
                f"{name}={settings[name]!r} is for a norm: give max_grad_norm as well; max_grad_norm=math.inf only "
                "measures"
            )


def on(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that are not the default."""
    return {name: value for name, value in settings.items() if value != OFF[name]}


def put_into(group: dict[str, Any], settings: dict[str, Any]) -> None:
    """Into a new group. Raises ValueError if it has others."""
    for name, off in OFF.items():
        own = settings.get(name, off)
        if group.get(name, own) != own:
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group: it holds for the whole optimizer, which has {own!r}"
            )
        group.pop(name, None)
    group.update(settings)
