"""The fused step on lists of tensors, without an optimizer: for those who keep parameters and state themselves.

Goes through the operator ``torch.ops.wd_fused.sgd_``, or Triton's kernels. FusedSGD keeps a plan instead, which costs
far less per step: on a GPU this function makes and uploads a table at every call, and reads lr and weight_decay on the
host.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from wd_fused import backends
from wd_fused.options import hyperparameters
from wd_fused.step import checking


@torch.no_grad()
def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    backend: str = "auto",
    numerics: str = "torch",
) -> None:
    """Steps ``params`` in place, as torch.optim.SGD defines it.

    Args:
        params: tensors of any shape and layout; float32, float64, float16 or bfloat16 are fused.
        grads: a gradient for each parameter, of its shape, dtype and device.
        momentum_buffers: one for each parameter, of its shape and dtype, or ``None`` for a first step: then the buffer
            is made and put into this list. Not looked at where ``momentum`` is 0.
        lr: a float, or a Tensor of one element.
        momentum: as in ``wd_fused.FusedSGD``, like all that follow.
        dampening: for momentum.
        weight_decay: a float, or a Tensor of one element.
        nesterov: Nesterov momentum.
        maximize: maximize the objective instead.
        backend: "auto", "cpu", "cuda", "triton" or "torch".
        numerics: "torch" or "opmath".

    Raises:
        ValueError: lists of different lengths, a gradient or momentum buffer of another shape, an unknown ``backend``
            or ``numerics``.
        RuntimeError: a ``backend`` that this machine lacks, or that does not take one of the tensors; a gradient that
            cannot be used. Nothing has been written then. One exception: with tensors on several kinds of device, what
            the operator itself refuses on one of them (a gradient that shares memory with a parameter, a learning rate
            beyond float32) may come after the step on another.

    Formula: that of ``wd_fused.FusedSGD``; written out in ``wd_fused.reference``.

    Examples:
        >>> weight, buffers = torch.ones(2), [None]
        >>> sgd([weight], [torch.tensor([1.0, -1.0])], buffers, lr=0.5, momentum=0.9)
        >>> weight, buffers
        (tensor([0.5000, 1.5000]), [tensor([ 1., -1.])])
    """
    has_momentum = momentum != 0
    _check_shapes(params, grads, momentum_buffers, has_momentum)
    backend = backends.wanted(backend)
    checked = backends.checked_numerics(numerics, backend)
    numbers: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    hyperparameters.check_group(numbers, any(p.dtype not in (torch.float64, torch.complex128) for p in params))
    numbers = {name: float(value) for name, value in numbers.items()}
    numbers |= {"dampening": hyperparameters.dampening(dampening), "nesterov": nesterov, "maximize": maximize}

    of_backends: dict[str, list[int]] = {}  # the operator takes tensors of one kind of device
    buffers = momentum_buffers if has_momentum else [None] * len(params)
    for i, (param, grad, buffer) in enumerate(zip(params, grads, buffers, strict=True)):
        name, reason = _choice(param, grad, buffer, backend)
        if name == "torch" and backend not in ("auto", "torch"):
            raise RuntimeError(f'tensor {i}: backend="{backend}" does not take it: {reason}')
        if name == "torch":
            objection = checking.objection_of_torch(param, grad, buffer, numbers["weight_decay"])
            if objection is not None:
                raise RuntimeError(f"tensor {i}: {objection}")
        of_backends.setdefault(name, []).append(i)

    for name, own in sorted(of_backends.items(), key=lambda item: item[0] == "torch"):  # torch's code last
        own_params, own_grads = [params[i] for i in own], [grads[i] for i in own]
        made = [buffers[i] for i in own]
        if name == "torch":
            torch_sgd(own_params, own_grads, made, has_sparse_grad=any(g.is_sparse for g in own_grads), **numbers)
        else:
            made = backends.FUSED[name].sgd(own_params, own_grads, made, numbers, checked)
        for i, buffer in zip(own, made, strict=True) if has_momentum else ():
            momentum_buffers[i] = buffer


def _check_shapes(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: list[Tensor | None], has_momentum: bool
) -> None:
    if not len(params) == len(grads) == len(momentum_buffers):
        raise ValueError(
            f"{len(params)} params, {len(grads)} grads and {len(momentum_buffers)} momentum_buffers: give one of each "
            "for every tensor (None for a momentum buffer that does not exist yet)"
        )
    checked = {"gradient": grads, "momentum buffer": momentum_buffers if has_momentum else ()}
    for what, tensors in checked.items():
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=False)):
            if tensor is not None and tensor.shape != param.shape:
                raise ValueError(
                    f"tensor {i}: its {what} has shape {list(tensor.shape)}, the parameter {list(param.shape)}"
                )


def _choice(param: Tensor, grad: Tensor, buffer: Tensor | None, backend: str) -> tuple[str, str]:
    """The backend that takes all of a parameter, its gradient and its momentum buffer, or torch and the reason."""
    name, reason = backends.choose(param, backend)
    if name == "torch":
        return name, reason
    if name == "triton" and torch._C._len_torch_dispatch_stack() != 0:
        return "torch", "a TorchDispatchMode is active, which would not see its kernels"
    for what, tensor in (("gradient", grad), ("momentum buffer", buffer)):
        if tensor is None:
            continue
        if (tensor.dtype, tensor.device, tensor.layout) != (param.dtype, param.device, param.layout):
            return "torch", f"its {what} is {tensor.dtype}, {tensor.layout}, on {tensor.device}"
        if what == "momentum buffer" and (refusal := backends.FUSED[name].refusal(tensor)) is not None:
            return "torch", f"its {what} cannot be taken: {refusal}"
    return name, reason
