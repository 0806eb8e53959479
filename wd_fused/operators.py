"""torch.ops.wd_fused: the operator of csrc/ops.cpp, sgd_, which is there as soon as somebody asks for it; and
sgd_with_tensors_, the same with learning rate and weight decay in Tensors, read when it runs. A compiled step calls
that, so that a new learning rate takes no new graph. Used by sgd.py.
"""

import functools
from typing import NoReturn

import torch
from torch import Tensor

from wd_fused import extension


def load_when_asked_for() -> None:
    """Lets ``torch.ops.wd_fused`` load the extension, or build it, when an operator is first looked for in it.

    To do so when wd_fused is imported would make every import wait. The namespace is a module: what its __getattr__
    does not find, torch looks for next (PEP 562).
    """
    namespace = vars(torch.ops.wd_fused)

    def find(name: str) -> NoReturn:
        if not name.startswith("_"):  # asked for by those who inspect modules
            extension.load()
            namespace.pop("__getattr__", None)
        raise AttributeError(name)

    namespace["__getattr__"] = find


_NAME = "wd_fused::sgd_with_tensors_"


@functools.cache
def define() -> None:
    """Makes the operator known to torch, once. Needs the C++ extension."""
    torch.library.define(
        _NAME,
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, bool[] first_steps, Tensor lr, "
        "Tensor weight_decay, *, float momentum, float dampening, bool nesterov, bool maximize, bool opmath=False) "
        "-> ()",
    )
    torch.library.impl(_NAME, ("cpu", "cuda"), _sgd_with_tensors)
    torch.library.register_fake(_NAME, _without_values)


def _sgd_with_tensors(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    first_steps: list[bool],
    lr: Tensor,
    weight_decay: Tensor,
    *,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    opmath: bool = False,
) -> None:
    torch.ops.wd_fused.sgd_(
        params,
        grads,
        momentum_buffers,
        first_steps,
        lr=lr.item(),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay.item(),
        nesterov=nesterov,
        maximize=maximize,
        opmath=opmath,
    )


def _without_values(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    first_steps: list[bool],
    lr: Tensor,
    weight_decay: Tensor,
    *,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    opmath: bool = False,
) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value.numel() != 1:
            raise ValueError(f"sgd_with_tensors_: {name} must have one element, not shape {list(value.shape)}")
    torch.ops.wd_fused.sgd_(
        params,
        grads,
        momentum_buffers,
        first_steps,
        lr=0.0,
        momentum=momentum,
        dampening=dampening,
        weight_decay=0.0,
        nesterov=nesterov,
        maximize=maximize,
        opmath=opmath,
    )
