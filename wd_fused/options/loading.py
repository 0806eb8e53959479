"""load_state_dict(): what was saved with other options, brought to those of this optimizer. For step/checkpoint.py."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wd_fused.options import checks, kept, settings, spec
from wd_fused.options.spec import Options


class Report:
    """What a load_state_dict() could not take over as it was, in the words of its one warning."""

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self.afresh: list[str] = []
        self.converted: list[str] = []
        self.unused: list[str] = []

    def __str__(self) -> str:
        parts = (
            ("dropped", self.dropped),
            ("started afresh", self.afresh),
            ("converted", self.converted),
            ("of no use to SGD", self.unused),
        )
        return "; ".join(f"{what}: {', '.join(dict.fromkeys(items))}" for what, items in parts if items)


SCALARS = ("max_grad_norm", "l1_penalty", "decoupled_weight_decay", "decouple_lr", "ema_decay", "ema_warmup")


def adopt(
    groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    before: list[dict[str, Any]],
    saved: Mapping[str, Any],
    report: Report,
) -> None:
    """Brings what torch's load_state_dict() has loaded into groups and state to the options of this optimizer.

    groups, state: as torch has left them: options, counters and dtypes of the saved optimizer, entries cast.
    before: this optimizer's groups as they were.
    """
    for g, (group, own, saved_group) in enumerate(zip(groups, before, saved["param_groups"], strict=True)):
        where = f" (group {g})" if len(groups) > 1 else ""
        try:
            options, was = _merge(group, own, saved_group, report, where)
        except ValueError as error:
            raise ValueError(f"group {g} of the saved state: {error}") from None
        for key, param in zip(saved_group["params"], group["params"], strict=True):
            if key not in saved["state"]:
                continue
            names = saved["state"][key]
            if group["momentum"] != 0 and "momentum_buffer" not in names:  # another optimizer may call it otherwise
                own_names = (name for name in names if not str(name).startswith(kept.OF_BUFFERS))
                report.unused += [f'"{name}"{where}' for name in own_names if name not in checks.ENTRIES]
            if options is not None or was is not None:
                _adopt_entries(param, state[param], saved["state"][key], options, report, where)
        if options is None and was is None:
            continue
        if options is not None and options.ema_decay is not None and (was is None or was.ema_decay is None):
            group["ema_updates"] = 0
            report.afresh.append(f"the average of ema_decay={options.ema_decay}{where}")
        if options is not None and options.weights in kept.EXTRA and (was is None or was.weights not in kept.EXTRA):
            report.afresh.append(f"{_what(options)}, from the parameters{where}")


def _merge(
    group: dict[str, Any], own: dict[str, Any], saved: Mapping[str, Any], report: Report, where: str
) -> tuple[Options | None, Options | None]:
    """The group's options: this optimizer's, with the saved values of numbers that both have, as of lr."""
    was, mine = Options.of(saved), Options.of(own)
    was_on, mine_on = was.on(), mine.on()
    for name in (*Options._fields, *spec.COUNTERS, *settings.OFF):
        group.pop(name, None)
    group.update({name: own[name] for name in settings.OFF if name in own})
    for name, value in mine_on.items():
        group[name] = was_on[name] if name in SCALARS and name in was_on else value
    report.dropped += [
        f"{name}={was_on[name]!r}{where}"
        for name in was_on
        if name not in mine_on or (name == "rounding" and was_on[name] != mine_on[name])
    ]
    for name, counter in (("ema_decay", "ema_updates"), ("rounding", "rounding_steps")):
        if name in mine_on and (name != "rounding" or mine.rounding == "stochastic"):
            group[counter] = operator.index(saved.get(counter, 0))
    if mine.decouple_lr and "initial_lr" not in group:
        group["initial_lr"] = own.get("initial_lr", own["lr"])
    return spec.of_group(group), was if was_on else None


def _adopt_entries(
    param: Tensor,
    loaded: dict[str, Any],
    saved: Mapping[str, Any],
    options: Options | None,
    report: Report,
    where: str,
) -> None:
    """Of one parameter: loaded is what torch has made of saved, which must not be changed and has been checked.

    What is kept beside a parameter in another form than these options' is converted in the next step, with the
    parameter as it is then: torch.distributed.checkpoint loads the model after the optimizer.
    """
    exact = {name: value.to(param.device) for name in checks.ENTRIES if isinstance(value := saved.get(name), Tensor)}
    for name in checks.OF_OPTIONS:
        loaded.pop(name, None)
    _adopt_momentum(param, loaded, exact, options, report, where)
    if options is None:
        return
    had = [name for name in kept.EXTRAS if name in exact]
    if options.weights in kept.EXTRA and had:
        loaded.update({name: exact[name] for name in had})
        if not kept.is_of(options.weights, param, loaded):
            report.converted.append(f'"{had[0]}" to {_what(options)}{where}')
    if "ema" in exact and options.ema_decay is not None:
        loaded["ema"] = exact["ema"].to(spec.average_dtype(param, options.ema_dtype))


def _adopt_momentum(
    param: Tensor, loaded: dict[str, Any], exact: dict[str, Tensor], options: Options | None, report: Report, where: str
) -> None:
    if "momentum_buffer" not in exact:
        return
    loaded["momentum_buffer"] = exact["momentum_buffer"]
    if "momentum_scale" in exact:
        loaded["momentum_scale"] = exact["momentum_scale"]
    dtype = param.dtype if options is None else spec.momentum_dtype(param, options)
    was = exact["momentum_buffer"].dtype
    if was == torch.int8 and "momentum_scale" not in exact:
        del loaded["momentum_buffer"]
        report.dropped.append(f"int8 momentum without its scales{where}")
    elif was != dtype:
        kept.convert_momentum(param, loaded, dtype)
        names = [str(each).removeprefix("torch.") for each in (was, dtype)]
        report.converted.append(f"momentum from {names[0]} to {names[1]}{where}")
    if dtype != torch.int8:
        loaded.pop("momentum_scale", None)


def _what(options: Options) -> str:
    name = "rounding" if options.master_weights is None else "master_weights"
    return f"{name}={getattr(options, name)!r}"
