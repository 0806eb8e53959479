"""torch.ops.wd_fused: the operator of csrc/python/ops.cpp, sgd_, which is there as soon as somebody asks for it; and
sgd_with_tensors_, the same with its numbers in Tensors, read when it runs. A compiled step calls that, so that a number
that changes takes no new graph. Used by sgd.py.
"""

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor

from wd_fused.build import extension
from wd_fused.options.hyperparameters import NUMBERS


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
        "Tensor momentum, Tensor dampening, Tensor weight_decay, *, bool nesterov, bool maximize, bool opmath=False) "
        "-> ()",
    )
    torch.library.impl(_NAME, ("cpu", "cuda"), _sgd_with_tensors)
    torch.library.register_fake(_NAME, _without_values)


def _sgd_with_tensors(*operands: Any, **flags: bool) -> None:
    lists, numbers = operands[:4], operands[4:]
    torch.ops.wd_fused.sgd_(*lists, **dict(zip(NUMBERS, map(Tensor.item, numbers), strict=True)), **flags)


def _without_values(*operands: Any, **flags: bool) -> None:
    lists, numbers = operands[:4], operands[4:]
    for name, value in zip(NUMBERS, numbers, strict=True):
        if value.numel() != 1:
            raise ValueError(f"sgd_with_tensors_: {name} must have one element, not shape {list(value.shape)}")
    has_momentum = bool(lists[2])
    torch.ops.wd_fused.sgd_(*lists, **dict.fromkeys(NUMBERS, 0.0) | {"momentum": float(has_momentum)}, **flags)


def in_tensor(number: float | Tensor) -> Tensor:
    """For sgd_with_tensors_. A product, in which the compiler reads a float anew; of most it makes a constant."""
    if isinstance(number, Tensor):
        return number
    return torch.ones((), dtype=torch.float64, device="cpu") * number
