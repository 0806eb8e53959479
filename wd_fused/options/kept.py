"""What the options keep in an optimizer's state: made, checked, converted, loaded. Used by the step.

Entries of a parameter, beside "momentum_buffer": "master" (float32), "remainder" (int16 or int8), "compensation" (the
parameter's dtype), "momentum_scale" (float32, one for each 128 elements), "ema". All are made before a plan is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wd_fused import reference
from wd_fused.options import checks, spec
from wd_fused.options.spec import Options, RowOptions
from wd_fused.step import sharded
from wd_fused.step.extents import extent, has_memory, meet

EXTRA = {
    "full": ("master", torch.float32),
    "split": ("remainder", torch.int16),
    "split24": ("remainder", torch.int8),
    "kahan": ("compensation", None),  # the parameter's dtype
}
EXTRAS = ("master", "remainder", "compensation")
_BESIDE = frozenset(checks.DTYPES)
OF_BUFFERS = "ema_buffers."  # and a number: averages of buffers, see averages.py


@contextmanager
def outside_inference() -> Iterator[None]:
    """Tensors that are made here can be written in later steps, wherever the first was."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@outside_inference()
def make(
    param: Tensor, states: dict[Tensor, Any], options: Options, has_momentum: bool, *, steps: bool | None = None
) -> None:
    """Puts into a parameter's state what a step with these options needs; converts what others have left there.

    A parameter that has had no gradient has nothing there but its average. steps: whether it has; None: it has now.
    """
    steps = param.grad is not None if steps is None else steps
    own, dtype = EXTRA.get(options.weights, (None, None))[0], spec.momentum_dtype(param, options)
    is_needed = (steps and (own is not None or dtype == torch.int8)) or options.ema_decay is not None
    state = states.setdefault(param, {}) if is_needed else states.get(param)
    if state is None:
        return
    for name in checks.ENTRIES:
        if isinstance(entry := state.get(name), Tensor) and entry.is_inference():
            state[name] = entry.clone()
        elif entry is None and name != "momentum_buffer":
            state.pop(name, None)
    had = [name for name in EXTRAS if name in state]
    if own is not None and had and not is_of(options.weights, param, state):
        state[own] = converted_extra(param, exact_weights(param, state), options.weights)
    for name in had:
        if name != own:
            del state[name]
    if options.ema_decay is None:
        state.pop("ema", None)
    buffer = state.get("momentum_buffer")
    if isinstance(buffer, Tensor) and (buffer.dtype != dtype or dtype == torch.int8) and _is_readable(param, state):
        convert_momentum(param, state, dtype)
    if dtype != torch.int8:
        state.pop("momentum_scale", None)
    elif steps and has_momentum and "momentum_scale" not in state:
        state["momentum_scale"] = _scales_of(param)
    if steps and own is not None and own not in state:
        state[own] = extra_of(param, options.weights)
    if options.ema_decay is not None:
        make_average(param, state, options)


def is_of(weights: str, param: Tensor, state: Mapping[Any, Any]) -> bool:
    """Whether what a state keeps beside its parameter is of this form."""
    name, dtype = EXTRA[weights]
    return [each for each in EXTRAS if each in state] == [name] and state[name].dtype == (dtype or param.dtype)


def is_left_behind(state: Mapping[Any, Any] | None) -> bool:
    """Whether options that were on have left something that a plain step does not know."""
    return state is not None and not _BESIDE.isdisjoint(state)


@outside_inference()
def make_average(param: Tensor, state: dict[Any, Any], options: Options) -> None:
    dtype = spec.average_dtype(param, options.ema_dtype)
    average = state.get("ema")
    if average is None:
        weights = param.detach() if options.weights == "kahan" else exact_weights(param, state)
        state["ema"] = like(param, dtype).copy_(weights)
    elif isinstance(average, Tensor) and average.dtype != dtype:
        state["ema"] = average.to(dtype)


@outside_inference()
def like(param: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(param.detach(), dtype=dtype)


@outside_inference()
def extra_of(param: Tensor, weights: str) -> Tensor:
    """A new master, remainder or compensation, for a parameter that is exactly its weight."""
    dtype = EXTRA[weights][1] or param.dtype
    made = like(param, dtype)
    return made.copy_(param.detach()) if weights == "full" else made.zero_()


@outside_inference()
def converted_extra(param: Tensor, values: Tensor, weights: str) -> Tensor:
    """What is kept beside a parameter, as it is now, for these weights, of which it shows a nearest.

    Of half-way numbers other forms round to another neighbour than "full", for which the parameter would count then:
    its master is the next float32.
    """
    made, order = extra_of(param, weights), reference.memory_order(param)
    flat = reference.flat(values, order)
    if weights == "full":
        p = reference.flat(param, order)
        is_shown = flat.to(p.dtype).view(torch.int16) == p.view(torch.int16)
        flat = torch.where(is_shown, flat, torch.nextafter(flat, p.to(flat.dtype)))
    reference.store_beside(param.detach(), made, flat, weights, order)
    return made


def row_options(param: Tensor, state: Mapping[Any, Any] | None, options: Options) -> RowOptions:
    state = state or {}
    kept = EXTRA.get(options.weights)
    return RowOptions(
        weights=options.weights,
        stochastic=options.rounding == "stochastic",
        momentum_dtype=spec.momentum_dtype(param, options),
        extra=None if kept is None else state.get(kept[0]),
        momentum_scale=state.get("momentum_scale"),
        ema=state.get("ema") if options.ema_decay is not None else None,
        averages=options.ema_decay is not None,
        clips=options.max_grad_norm is not None,
        zeroes=bool(options.zero_grads),
        place=sharded.place_of(param) if options.rounding == "stochastic" and sharded.is_dtensor(param) else None,
    )


def objection(param: Tensor, state: Mapping[Any, Any] | None) -> str | None:
    """What is wrong with the entries of the options, as when somebody has moved a parameter to another device."""
    state = state or {}
    for name in checks.ENTRIES:
        entry = state.get(name)
        if entry is None:
            continue
        fault = checks.entry_fault(param, name, entry)
        if fault is None and entry.device != param.device:
            fault = f"is on {entry.device}, the parameter on {param.device}"
        if fault is None and not sharded.placed_alike(param, entry):
            fault = "is not placed as it is"
        if fault is not None:
            return f'its state\'s "{name}" {fault}; del optimizer.state[parameter] starts it afresh'
    if not _is_readable(param, state):
        return (
            'its state\'s "momentum_buffer" is int8, without a "momentum_scale"; del optimizer.state[parameter] starts '
            "it afresh"
        )
    return _shared_memory(param, state)


def _shared_memory(param: Tensor, state: Mapping[Any, Any]) -> str | None:
    there = [("the parameter", param)]
    for name in ("momentum_buffer", *checks.OF_OPTIONS):
        entry = state.get(name)
        if not isinstance(entry, Tensor) or not has_memory(entry) or not has_memory(param):
            continue
        for other, tensor in there:
            if meet([extent(tensor)], [extent(entry)]):
                return (
                    f'its state\'s "{name}" shares memory with {other}; del optimizer.state[parameter] starts it afresh'
                )
        there.append((f'its "{name}"', entry))
    return None


# Weights: float32 numbers, or float64 ones of a float64 parameter, of which a parameter may show the nearest only.


def exact_weights(param: Tensor, state: Mapping[Any, Any] | None) -> Tensor:
    """A parameter's weight as the state's entries have it, in a new tensor like it."""
    own = sharded.local(param)
    for weights, (name, dtype) in EXTRA.items():
        entry = (state or {}).get(name)
        if isinstance(entry, Tensor) and entry.dtype == (dtype or param.dtype):
            order = reference.memory_order(own)
            values = reference.load_weights(own, sharded.local(entry), weights, order)
            made = like(param, torch.float32)
            reference.put(sharded.local(made), values, order)
            return made
    dtype = torch.float32 if param.dtype in spec.HALVES else param.dtype
    return like(param, dtype).copy_(param.detach())


def set_weights(param: Tensor, state: dict[Any, Any], weights: str, values: Tensor) -> None:
    """Makes ``values`` the parameter's weights, as exactly as it and the state's entry can hold them."""
    name = EXTRA[weights][0] if weights in EXTRA else None
    for other in EXTRAS:
        if other != name:
            state.pop(other, None)
    if name is None:
        param.detach().copy_(values)
        return
    if not is_of(weights, param, state):
        state[name] = extra_of(param, weights)
    own, values = sharded.local(param), sharded.local(values)
    order = reference.memory_order(own)
    flat = reference.flat(values.to(own.device, torch.float32), order)
    reference.store_weights(own.detach(), sharded.local(state[name]), flat, weights, order)


# Momentum: in any float dtype, or int8 with scales.


def _is_readable(param: Tensor, state: Mapping[Any, Any]) -> bool:
    """Whether a momentum buffer has its scales, if it needs them."""
    buffer, scale = state.get("momentum_buffer"), state.get("momentum_scale")
    is_int8 = isinstance(buffer, Tensor) and buffer.dtype == torch.int8
    return not is_int8 or checks.entry_fault(param, "momentum_scale", scale) is None


@outside_inference()
def convert_momentum(param: Tensor, state: dict[Any, Any], dtype: torch.dtype) -> None:
    """The same momentum in another dtype, and, of int8, in blocks of the parameter's memory order."""
    buffer: Tensor = state["momentum_buffer"]
    order = reference.memory_order(sharded.local(param))
    if buffer.dtype == torch.int8:
        own, scale = sharded.local(buffer), sharded.local(state["momentum_scale"])
        own_order = reference.memory_order(own)
        if dtype == torch.int8 and own_order == order:
            return
        values = like(buffer, torch.float32)
        reference.put(sharded.local(values), reference.dequantized(reference.flat(own, own_order), scale), own_order)
    else:
        values = buffer
    if dtype != torch.int8:
        state["momentum_buffer"] = values.to(dtype)
        return
    made = like(param, torch.int8)
    quantized, scale = reference.quantized(reference.flat(sharded.local(values).float(), order))
    reference.put(sharded.local(made), quantized, order)
    # In one go: neither is anything without the other.
    state.update(momentum_buffer=made, momentum_scale=_scales_of(param, scale))


def _scales_of(param: Tensor, scale: Tensor | None = None) -> Tensor:
    """The scales of an int8 momentum buffer as the state has them: those of a DTensor's parts, placed as it is."""
    own = sharded.local(param)
    if scale is None:
        scale = torch.zeros(reference.blocks(own.numel()), dtype=torch.float32, device=own.device)
    return sharded.like(param, scale, reference.blocks(param.numel())) if sharded.is_dtensor(param) else scale
