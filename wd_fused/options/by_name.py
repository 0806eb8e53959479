"""load_state_dict(by_name=True): a saved state in the order of this optimizer. Used by step/checkpoint.py."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wd_fused.options import kept
from wd_fused.warn import warn_user

_ABSENT = object()


class LoadedNames(NamedTuple):
    """The names of parameters, by what load_state_dict(by_name=True) has done for them."""

    matched: list[str]  # loaded
    missing: list[str]  # of this optimizer, not in the saved state: they keep what they have
    unexpected: list[str]  # of the saved state, not of this optimizer: left out


def rearranged(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any], strict: bool
) -> tuple[dict[str, Any], LoadedNames]:
    """saved with the groups of this optimizer, in their order: what torch's load_state_dict() then loads by position.

    groups, state: this optimizer's. Neither they nor saved are changed.

    Raises ValueError for groups without names, and for what does not match.
    """
    own = _places(groups, "this optimizer", "construct it with model.named_parameters()")
    theirs = _places(saved["param_groups"], "the saved state", "it can be loaded without by_name, in its order")
    names = LoadedNames(
        [name for name in own if name in theirs],
        [name for name in own if name not in theirs],
        [name for name in theirs if name not in own],
    )
    _check(names, strict)
    made: list[dict[str, Any]] = []
    entries: dict[int, Any] = {}
    for g, group in enumerate(groups):
        own_names = group.get("param_names", ())
        sources = {theirs[name][0] for name in own_names if name in theirs}
        hyperparameters = _hyperparameters(g, group, [saved["param_groups"][i] for i in sorted(sources)], strict)
        keys = [len(entries) + i for i in range(len(own_names))]
        made.append({**hyperparameters, "params": keys, "param_names": list(own_names)})
        for key, name, param in zip(keys, own_names, group["params"], strict=True):
            entries[key] = saved["state"].get(theirs[name][1]) if name in theirs else state.get(param)
    entries = {key: entry for key, entry in entries.items() if entry is not None}
    return {**saved, "state": _with_averaged_buffers(entries, saved["state"]), "param_groups": made}, names


def _places(groups: Sequence[Mapping[str, Any]], whose: str, remedy: str) -> dict[str, tuple[int, Any]]:
    """Of each name its group, and what stands for the parameter there."""
    places: dict[str, tuple[int, Any]] = {}
    for g, group in enumerate(groups):
        names = group.get("param_names", () if not group["params"] else None)
        if names is None or len(names) != len(group["params"]):
            raise ValueError(f"by_name=True, but group {g} of {whose} has no names for its parameters: {remedy}")
        for name, param in zip(names, group["params"], strict=True):
            if name in places:
                raise ValueError(f"by_name=True, but {name!r} names two parameters of {whose}")
            places[name] = g, param
    return places


def _check(names: LoadedNames, strict: bool) -> None:
    lacks = f"the saved state has no {_listed(names.missing)}" if names.missing else ""
    knows_not = f"this optimizer has no {_listed(names.unexpected)}" if names.unexpected else ""
    what = "; ".join(filter(None, (lacks, knows_not)))
    if not names.matched:
        raise ValueError(
            f"by_name=True: no name of the saved state is one of this optimizer's: {what or 'both are empty'}"
        )
    if strict and what:
        raise ValueError(f"by_name=True: {what}; strict=False loads what matches")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more


def _hyperparameters(
    g: int, group: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], strict: bool
) -> Mapping[str, Any]:
    """Those of the saved groups that the group's parameters were in; its own where there are none, or these differ."""
    if not sources:
        return group
    names = dict.fromkeys(name for source in sources for name in source if name not in ("params", "param_names"))
    differing = [name for name in names if not all(_is_same(sources[0], source, name) for source in sources)]
    if not differing:
        return sources[0]
    what = f"group {g} has parameters of {len(sources)} saved groups, which differ in {', '.join(map(str, differing))}"
    if strict:
        raise ValueError(
            f"by_name=True: {what}: make them the same there, or let the group keep its own by strict=False"
        )
    warn_user(f"FusedSGD.load_state_dict: {what}: the group keeps its own")
    agreeing = {name: value for name, value in sources[0].items() if name not in differing}
    return agreeing | {name: group[name] for name in differing if name in group}


def _is_same(group: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    one, two = group.get(name, _ABSENT), other.get(name, _ABSENT)
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one.cpu(), two.cpu())
    return type(one) is type(two) and bool(one == two)


def _with_averaged_buffers(entries: dict[int, Any], saved: Mapping[Any, Any]) -> dict[int, Any]:
    """The saved averages of ema_buffers, which lie in the state of some parameter, are put into that of the first."""

    def is_one(name: Any) -> bool:
        return str(name).startswith(kept.OF_BUFFERS)

    of_parameters = [each for each in saved.values() if isinstance(each, Mapping)]
    averages = {name: each[name] for each in of_parameters for name in each if is_one(name)}
    if not averages:
        return entries
    result = {
        key: {name: each[name] for name in each if not is_one(name)} if isinstance(each, Mapping) else each
        for key, each in entries.items()
    }
    first = result.setdefault(next(iter(result), 0), {})
    if isinstance(first, dict):
        first.update(averages)
    return result
