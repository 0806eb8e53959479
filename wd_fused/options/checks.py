"""What is wrong with a parameter's state, whoever has put it there, or with a saved one. Asked at loading and before a
step, by kept.py and step/: nothing has been written then.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wd_fused import backends, reference
from wd_fused.build import extension
from wd_fused.options import spec
from wd_fused.options.hyperparameters import NUMBERS, number_fault, spelled
from wd_fused.step import sharded
from wd_fused.step.extents import is_expanded, missing_memory

# What a parameter's state may hold beside its momentum buffer and its average, with the dtypes of each.
DTYPES = {
    "master": (torch.float32,),
    "remainder": (torch.int16, torch.int8),
    "compensation": spec.HALVES,
    "momentum_scale": (torch.float32,),
}
OF_OPTIONS = (*DTYPES, "ema")
ENTRIES = (*OF_OPTIONS, "momentum_buffer")
_FLAGS = ("nesterov", "maximize", "differentiable", "foreach", "fused")


def counter_fault(value: Any) -> str | None:
    try:
        if not isinstance(value, bool) and operator.index(value) >= 0:
            return None
    except TypeError:
        pass
    return f"it is {value!r}, and a whole number >= 0 is needed"


# A parameter's state


def entry_fault(param: Tensor, name: str, entry: Any, takes_sparse: bool = False) -> str | None:
    """What makes an entry of its state one that no step can use, but for its device."""
    if not isinstance(entry, Tensor):
        return f"is a {type(entry).__name__}, not a Tensor"
    shape = (reference.blocks(param.numel()),) if name == "momentum_scale" else param.shape
    if entry.shape != shape:
        return (
            f"has shape {list(entry.shape)}, and {list(shape)} is needed for a parameter of shape {list(param.shape)}"
        )
    if not _is_of_its_kind(param, name, entry.dtype):
        return f"is {entry.dtype}, which a parameter of {param.dtype} cannot have there"
    if entry.layout != torch.strided:
        return None if takes_sparse else f"is {entry.layout}"
    if is_expanded(entry):
        return "is expanded, several elements in one place"
    if (missing := missing_memory(sharded.local(entry))) is not None:
        return missing
    return None


def _usual(params: list[Tensor], states: list[Any]) -> list[bool]:
    """Of which a plan would surely take the saved momentum buffer, the only entry: the rest need not be asked, which
    would take many times as long. False before the extension is loaded."""
    if not params or extension.module_if_loaded() is None:
        return [False] * len(params)
    _, buffers = backends.surely_taken(params, dict(zip(params, states, strict=True)), "auto")
    return [isinstance(buffer, Tensor) and len(entries) == 1 for buffer, entries in zip(buffers, states, strict=True)]


def _is_of_its_kind(param: Tensor, name: str, dtype: torch.dtype) -> bool:
    if name in DTYPES:
        return dtype in DTYPES[name]
    if name == "momentum_buffer" and dtype == torch.int8:
        return True
    return dtype.is_complex if param.is_complex() else dtype.is_floating_point


# A saved state


def check_is_an_optimizers(saved: Mapping[str, Any]) -> None:
    """Raises ValueError for a model's state_dict, or a whole checkpoint that an optimizer's is one entry of."""
    needed = {"param_groups", "state"}
    if needed <= saved.keys():
        return
    inside = [key for key, value in saved.items() if isinstance(value, Mapping) and needed <= value.keys()]
    keys = ", ".join(map(repr, list(saved)[:5])) + ", …" * (len(saved) > 5) if saved else "nothing"
    remedy = f"the entry {inside[0]!r} has them: load that" if inside else "load what an optimizer's state_dict() gave"
    raise ValueError(f"no optimizer's state: it needs 'param_groups' and 'state', and has {keys}; {remedy}")


def check_saved(saved: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for a state_dict that groups cannot be stepped with, naming the value; changes nothing.

    What torch's load_state_dict() refuses in its own words, as another number of groups, is left to it.
    """
    saved_groups, state = saved["param_groups"], saved["state"]
    if not isinstance(state, Mapping) or len(saved_groups) != len(groups):
        return
    for g, (saved_group, group) in enumerate(zip(saved_groups, groups, strict=True)):
        _check_saved_group(saved_group, g)
        takes_sparse, names = spec.NAMES.isdisjoint(group), group.get("param_names", ())
        params, states = group["params"], [state.get(key, {}) for key in saved_group["params"]]
        if len(states) != len(params):
            continue
        for i, (param, entries, is_usual) in enumerate(zip(params, states, _usual(params, states), strict=True)):
            if is_usual:
                continue
            where = f"group {g}, parameter {i}" + (f" ({names[i]})" if i < len(names) else "")
            if not isinstance(entries, Mapping):
                raise ValueError(f"{where}: its saved state is a {type(entries).__name__}, not a dict")
            for name in ENTRIES:
                if entries.get(name) is not None:
                    _check_saved_entry(where, param, name, entries[name], takes_sparse)


def _check_saved_group(group: Mapping[str, Any], g: int) -> None:
    if missing := [name for name in NUMBERS if name not in group]:
        others = ", ".join(str(name) for name in group if name not in ("params", "param_names"))
        raise ValueError(
            f"group {g} of the saved state has no {', '.join(missing)}, but {others or 'nothing'}: it was not saved by "
            "an SGD"
        )
    for name in (*NUMBERS, "initial_lr"):
        if name in group and (fault := number_fault(group[name])) is not None:
            raise ValueError(f"group {g}: the saved {name}={spelled(group[name])}: {fault}")
    for name in _FLAGS:
        if not any(group.get(name) is flag for flag in (None, False, True)) and group[name] not in (0, 1):
            raise ValueError(f"group {g}: the saved {name}={group[name]!r}: use True or False")
    for name in spec.COUNTERS:
        if name in group and (fault := counter_fault(group[name])) is not None:
            raise ValueError(f"group {g}: the saved {name}: {fault}")


def _check_saved_entry(where: str, param: Tensor, name: str, entry: Any, takes_sparse: bool) -> None:
    if (fault := entry_fault(param, name, entry, takes_sparse)) is not None:
        raise ValueError(f'{where}: the saved "{name}" {fault}: was it saved for another model, or in another order?')
    if entry.is_meta and not param.is_meta:
        raise ValueError(f'{where}: the saved "{name}" is on meta, without numbers')
    if sharded.is_dtensor(entry) != sharded.is_dtensor(param):
        kinds = ["a DTensor" if sharded.is_dtensor(tensor) else "a plain tensor" for tensor in (entry, param)]
        raise ValueError(
            f'{where}: the saved "{name}" is {kinds[0]}, its parameter {kinds[1]}: '
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict() loads one into the other"
        )
