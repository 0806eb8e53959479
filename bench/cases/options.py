"""The options that are timed: FusedSGD's options in one pass, and the torch calls in sequence that do the same.

Used by test_options_cpu.py and extra_memory.py and, for names, order, goals, by report/options.py. No torch at import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import cases
from bench.cases import OPTIONS
from bench.cases.implementations import OURS

if TYPE_CHECKING:
    from torch import Tensor

TORCH = "torch"
IMPLEMENTATIONS = (OURS, TORCH)

# Clips in the first step. torch writes the clipped gradients back, so that from the second step on the norm is this one
# and the coefficient 1: neither implementation asks for it before it multiplies, and nothing shrinks over the rounds.
MAX_GRAD_NORM = 1.0
EMA_DECAY = 0.999
# torch unscales the gradients in place too. With a scale of 1 they need not be restored between two steps, which could
# not be done untimed between the steps of a block; torch then leaves out the product of an element and one.
GRAD_SCALE = 1.0


@dataclass(frozen=True)
class OptionSet:
    """What a training loop does between backward() and the next forward().

    Attributes:
        name: short, for the names of tests.
        title: as the report prints it.
        options: of FusedSGD.
        unscales: whether the gradients come with a loss scale.
        dtype: of the parameters and gradients.
        goals: by a case's name, how many times as long torch's calls are to take.
    """

    name: str
    title: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    unscales: bool = False
    dtype: str = "float32"
    goals: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def clips(self) -> bool:
        return "max_grad_norm" in self.options

    @property
    def masters(self) -> bool:
        return "master_weights" in self.options

    def bytes_an_element(self, implementation: str) -> int:
        """What a step reads and writes of each parameter's element, its gradient and its states where none of them
        stays in a cache: every operand of every pass once."""
        element, state = (2 if self.dtype == "bfloat16" else 4), 4
        norm = element if self.clips else 0
        average = 2 * state if "ema_decay" in self.options else 0
        if implementation == OURS:
            master = {"full": 2 * state, "split": 2 * 2}.get(self.options.get("master_weights"), 0)
            return norm + element + 2 * (element + state) + master + average
        unscaling, scaling = (2 * element if passes else 0 for passes in (self.unscales, self.clips))
        copies = 2 * (element + state) if self.masters else 0  # of the gradient to float32, of the master back
        reading = state if average else 0  # of the parameter, once more
        return unscaling + norm + scaling + copies + 5 * state + average + reading

    @property
    def state_names(self) -> list[str]:
        """Those that both implementations can use: with split masters wd_fused has no whole ones."""
        names = {"ema": "ema_decay" in self.options, "master": self.options.get("master_weights") == "full"}
        return ["momentum_buffer", *(name for name, kept in names.items() if kept)]


def _goals(large: float, small: float) -> dict[str, float]:
    return {"resnet50": large, "161x8": small}


_CLIP = {"max_grad_norm": MAX_GRAD_NORM}
_CLIP_EMA = _CLIP | {"ema_decay": EMA_DECAY}
PLAIN = OptionSet("plain", "SGD alone")
OPTION_SETS = (
    PLAIN,
    OptionSet("clip", "clip, SGD", _CLIP, goals=_goals(1.5, 25)),
    OptionSet("clip-ema", "clip, SGD, average", _CLIP_EMA, goals=_goals(1.8, 30)),
    OptionSet("unscale-clip-ema", "unscale, clip, SGD, average", _CLIP_EMA, unscales=True, goals=_goals(2.0, 30)),
    *(
        OptionSet(
            f"master-{how}", f'bfloat16, masters "{how}"', {"master_weights": how}, False, "bfloat16", _goals(2, 2)
        )
        for how in ("full", "split")
    ),
)
BY_NAME = {chosen.name: chosen for chosen in OPTION_SETS}

STEP = tuple(case for case in cases.STEP if case.name in ("161x8", "resnet50"))
MEMORY = tuple(case for case in STEP if case.name == "resnet50")


class Stepper(NamedTuple):
    """An implementation of a set of options over some parameters.

    Attributes:
        step: does it once.
        states: what the step keeps between steps and names: momentum buffers, masters or remainders, averages.
    """

    step: Callable[[], object]
    states: Callable[[], list[Tensor]]


# By a state's name, a tensor for each parameter.
Shared = dict[str, "list[Tensor]"]


def stepper(chosen: OptionSet, implementation: str, params: list[Tensor], shared: Shared | None = None) -> Stepper:
    """``implementation`` of ``chosen`` over parameters that have gradients.

    Args:
        shared: momentum buffers, masters and averages for all implementations to use, so that none is luckier than
            another with its pages; made where they are missing. None: each makes its own when it first steps.
    """
    return (_wd_fused if implementation == OURS else _torch)(chosen, params, shared)


def _wd_fused(chosen: OptionSet, params: list[Tensor], shared: Shared | None) -> Stepper:
    import torch

    from wd_fused import FusedSGD

    optimizer = FusedSGD(params, **OPTIONS, **chosen.options, backend="cpu")
    if chosen.unscales:
        optimizer.grad_scale = torch.tensor(GRAD_SCALE)  # without found_inf: the norm finds what is not finite
    if shared is not None:
        for name in chosen.state_names:
            for param, tensor in zip(params, _state(name, params, shared), strict=True):
                optimizer.state[param][name] = tensor
    return Stepper(optimizer.step, lambda: [tensor for state in optimizer.state.values() for tensor in state.values()])


def _torch(chosen: OptionSet, params: list[Tensor], shared: Shared | None) -> Stepper:
    """torch's own function for each part in its fastest form, over lists that are made once. Waits for no GPU."""
    import torch

    grads = [_gradient(param) for param in params]
    masters = [value.detach().requires_grad_() for value in _state("master", params, shared)] if chosen.masters else []
    master_grads = [torch.empty_like(master) for master in masters]
    for master, grad in zip(masters, master_grads, strict=True):
        master.grad = grad
    averages = _state("ema", params, shared) if "ema" in chosen.state_names else []
    optimizer = torch.optim.SGD(masters or params, **OPTIONS, fused=True)
    if shared is not None:
        for param, buffer in zip(masters or params, _state("momentum_buffer", params, shared), strict=True):
            optimizer.state[param]["momentum_buffer"] = buffer
    device = params[0].device
    inverse_scale, found_inf = torch.full((), 1 / GRAD_SCALE, device=device), torch.zeros((), device=device)
    on_device = device.type != "cpu"
    if chosen.unscales and on_device:
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]

    @torch.no_grad()
    def step() -> None:
        if chosen.unscales:
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf.zero_(), inverse_scale)
            if not on_device and found_inf.item():
                return
        if chosen.clips:
            torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM, foreach=True)
        if masters:
            torch._foreach_copy_(master_grads, grads)
        optimizer.step()
        if masters:
            torch._foreach_copy_(params, masters)
        if averages:
            torch._foreach_lerp_(averages, params, 1 - EMA_DECAY)

    def states() -> list[Tensor]:
        return [*masters, *averages, *(state["momentum_buffer"] for state in optimizer.state.values())]

    return Stepper(step, states)


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _state(name: str, params: list[Tensor], shared: Shared | None) -> list[Tensor]:
    """The tensors of a state that starts as float32 zeros, or as a float32 copy of the parameters."""
    import torch

    if shared is not None and name in shared:
        return shared[name]
    values = [param.detach().to(torch.float32, copy=True) for param in params]
    made = [torch.zeros_like(value) for value in values] if name == "momentum_buffer" else values
    if shared is not None:
        shared[name] = made
    return made
