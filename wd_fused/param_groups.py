"""Sorts the parameters of a model into a group with weight decay and a group without.

Called by training scripts, whose optimizer (FusedSGD, or any other) takes the two groups as its ``params``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import Parameter, is_lazy

# _NormBase is the base of BatchNorm, SyncBatchNorm and InstanceNorm, their lazy forms included.
NORM_MODULES: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Whose weights are matrices, also where they have one row, as nn.Linear(C, 1) has.
_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, _ConvNd)
_LAYERS += (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)

# torch.nn.utils.parametrize keeps what was `NAME` as `parametrizations.NAME.original`, `...original0` and so on.
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original\d*$")


def weight_decay_param_groups(
    model: nn.Module,
    weight_decay: float | Tensor,
    *,
    no_decay: str | Iterable[str] = (),
    named: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Two parameter groups: weight decay for the weights, none for biases, norm parameters and other vectors.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> decayed, others = weight_decay_param_groups(model, 5e-4)
        >>> len(decayed["params"]), len(others["params"])  # a weight; a bias, a scale and a shift
        (1, 3)
        >>> optimizer = torch.optim.SGD([decayed, others], lr=0.1)

    A parameter gets no weight decay if any of these holds, under any of its names:

    - it has fewer than two dimensions (biases, scales, gates), or has more but at most one that is not of size 1 (a
      scale of shape (C, 1, 1), a token of shape (1, 1, C)), if it is not a weight of a linear, bilinear, convolutional,
      recurrent, embedding or attention layer of ``torch.nn`` or of a class derived from one;
    - it belongs to a norm module of ``torch.nn`` or of a class derived from one (BatchNorm, SyncBatchNorm,
      InstanceNorm, LayerNorm, GroupNorm, RMSNorm), whatever its dimension;
    - it is a bias by name, whatever its dimension: ``bias``, ``bias_*`` or ``*_bias``, as ``bias_k`` of
      ``nn.MultiheadAttention``;
    - its qualified name matches a pattern of ``no_decay``;
    - the model, or a module in it, has a method ``no_weight_decay()`` that returns its name relative to that module
      (as timm's models have), or the parameter has a true attribute ``_no_weight_decay`` (as state-space models have).

    Every trainable parameter is in exactly one group, in the order of ``model.named_parameters()``. A tied parameter
    is there once, frozen ones (``requires_grad=False``) are left out. Nothing in the model is changed.

    Args:
        model: the model whose parameters are sorted. Build the groups after it has its final parameters: after
            lazy modules have seen a batch, after layers were replaced, frozen or cast.
        weight_decay: the weight decay of the first group, a number or a Tensor of one element, not negative.
            The second group has ``0.0``.
        no_decay: a pattern or several, in the manner of a shell (``fnmatch``), matched with regard to case against
            the whole qualified name: ``"*.embedding.weight"``, ``"head.*"``. ``*`` matches dots as well. Where a
            parametrization holds the tensor, its plain name (``conv.weight``) matches too.
        named: add the parameters' names to each group as ``param_names``, where torch's optimizers keep them for
            ``state_dict``. Off by default, as torch refuses to mix groups with names and groups without.
        **options: further keys for both groups, such as ``lr=0.1`` or ``momentum=0.9``.

    Returns:
        Two dicts: ``{"params": [...], "weight_decay": weight_decay, **options}`` and the same with ``0.0``. Always
        both, in this order, even if one is empty, so that a scheduler's list with a value for each group and a
        checkpoint fit whatever is frozen. torch's optimizers accept an empty group; for a library that removes
        them (DeepSpeed does, and schedulers then fail), filter: ``[group for group in groups if group["params"]]``.

    Raises:
        TypeError: ``model`` is not a module, or ``weight_decay`` not a number.
        ValueError: ``weight_decay`` is negative or NaN, a pattern matches no parameter, the model has no trainable
            parameter or one whose shape is not known yet, or an option has a name that the groups need themselves.
    """
    _check_arguments(model, weight_decay, options)
    names = _names_by_parameter(model)
    trainable = [parameter for parameter in names if parameter.requires_grad]
    _check_parameters(model, names, trainable)

    exempt = _exempt_by_pattern(names, no_decay) | _exempt_by_declaration(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    without_decay = {
        p for p in trainable if p in exempt or any(_is_bias_or_norm(p, name, modules) for name in names[p])
    }
    with_decay = [p for p in trainable if p not in without_decay]

    groups: list[dict[str, Any]] = []
    for parameters, value in ((with_decay, weight_decay), ([p for p in trainable if p in without_decay], 0.0)):
        group: dict[str, Any] = {"params": parameters, "weight_decay": value, **options}
        if named:
            # Not (name, tensor) pairs: torch takes an empty list of pairs for a group without names.
            group["param_names"] = [names[p][0] for p in parameters]
        groups.append(group)
    return groups


def _check_arguments(model: nn.Module, weight_decay: float | Tensor, options: dict[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, but got {type(model).__name__}; "
            "pass the model itself, not model.parameters()"
        )
    try:
        acceptable = bool(weight_decay >= 0.0)  # False for NaN as well
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"weight_decay must be a number or a Tensor of one element, but got {weight_decay!r}; "
            "a value read from a file or the command line may need float()"
        ) from None
    if not acceptable:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; use a number >= 0, 0 for no weight decay")
    for key in ("params", "param_names"):
        if key in options:
            raise ValueError(f"option {key!r} is set by weight_decay_param_groups itself; leave it out")


def _check_parameters(model: nn.Module, names: dict[Parameter, list[str]], trainable: list[Parameter]) -> None:
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter ({len(names)} in all, each with requires_grad=False); "
            "unfreeze some with requires_grad_(True) before the groups are built"
            if names
            else f"{type(model).__name__} has no parameters, so there is nothing to put into groups"
        )
    for parameter in trainable:
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {names[parameter][0]!r} has no shape yet; "
                "run one batch through the model before the groups are built"
            )


def _names_by_parameter(model: nn.Module) -> dict[Parameter, list[str]]:
    """Every parameter, in the model's order, with all of its qualified names: a tied one has several."""
    names: dict[Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _plain_name(name: str) -> str:
    """The name as it is without parametrization: ``conv.parametrizations.weight.original0`` is ``conv.weight``."""
    return _PARAMETRIZED.sub(r"\1\2", name)


def _is_bias_or_norm(parameter: Parameter, name: str, modules: dict[str, nn.Module]) -> bool:
    module_name, _, own_name = _plain_name(name).rpartition(".")
    module = modules[module_name]
    is_weight = parameter.ndim > 1 and isinstance(module, _LAYERS) and "weight" in own_name
    return (
        (sum(size != 1 for size in parameter.shape) < 2 and not is_weight)
        or own_name == "bias"
        or own_name.startswith("bias_")
        or own_name.endswith("_bias")
        or isinstance(module, NORM_MODULES)
    )


def _exempt_by_pattern(names: dict[Parameter, list[str]], no_decay: str | Iterable[str]) -> set[Parameter]:
    exempt: set[Parameter] = set()
    for pattern in [no_decay] if isinstance(no_decay, str) else no_decay:
        matched = {p for p, its_names in names.items() if _matches(pattern, its_names)}
        if not matched:
            raise ValueError(_no_match_message(pattern, [name for its_names in names.values() for name in its_names]))
        exempt |= matched
    return exempt


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(_plain_name(name), pattern) for name in names)


def _no_match_message(pattern: str, names: list[str]) -> str:
    """Frozen parameters count as matches, so this is a typo, a wrapper's prefix, or a substring meant as a pattern."""
    containing = [name for name in names if pattern and pattern in name]
    if containing:
        hint = f"it is matched against the whole name; did you mean '*{pattern}*', which matches {containing[0]!r}?"
    else:
        close = difflib.get_close_matches(pattern, names, n=1) or names[:1]
        hint = f"the names are those of model.named_parameters(), such as {close[0]!r}"
    return f"no_decay pattern {pattern!r} matches no parameter; {hint}"


def _exempt_by_declaration(model: nn.Module) -> set[Parameter]:
    """What the model's author exempted. A name that does not exist is no error: models declare optional parameters."""
    exempt = {p for p in model.parameters() if getattr(p, "_no_weight_decay", False)}
    for module in model.modules():
        declare = getattr(module, "no_weight_decay", None)
        if callable(declare):
            own_names = dict(module.named_parameters(remove_duplicate=False))
            exempt |= {own_names[name] for name in declare() if name in own_names}
    return exempt
