"""The update in plain torch operations: the definition that every backend is compared with.

One loop over tensors, no regard for speed. With ``numerics="torch"`` it is what torch.optim.SGD computes, operator by
operator, each result rounded to the storage dtype; with ``numerics="opmath"`` only the stores are rounded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

OPMATH = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@torch.no_grad()
def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    numerics: str = "torch",
) -> None:
    """Steps ``params`` in place; a ``None`` in ``momentum_buffers`` (a first step with momentum) is replaced.

    Args:
        params: tensors of any shape, float32, float64, float16 or bfloat16.
        grads: a gradient for each parameter, of its shape and dtype.
        momentum_buffers: one for each parameter, or ``None``; not looked at where ``momentum`` is 0.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        numerics: "torch" rounds every intermediate to the storage dtype, "opmath" none.

    Formula: the docstring of torch.optim.SGD; its multiply-adds are those of ``torch.add(y, x, alpha=a)``, which has
    one rounding wherever ATen runs on a processor with fused multiply-add.
    """
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        storage = param.dtype
        opmath = OPMATH.get(storage, storage)

        def rounded(x: Tensor, storage: torch.dtype = storage, opmath: torch.dtype = opmath) -> Tensor:
            return x.to(storage).to(opmath) if numerics == "torch" else x

        # Contiguous, because ATen's loop over an expanded tensor (stride 0) rounds its last elements by another rule.
        p, g = param.to(opmath).contiguous(), grad.to(opmath).contiguous()
        if maximize:
            g = -g
        if weight_decay != 0:
            g = rounded(torch.add(g, p, alpha=weight_decay))
        if momentum != 0:
            buffer = momentum_buffers[i]
            if buffer is None:
                buffer = momentum_buffers[i] = torch.empty_like(param)
                b = g
            else:
                b = rounded(torch.mul(buffer.to(opmath).contiguous(), momentum))
                b = rounded(torch.add(b, g, alpha=1 - dampening))
            buffer.copy_(b)
            g = rounded(torch.add(g, b, alpha=momentum)) if nesterov else b
        param.copy_(torch.add(p, g, alpha=-lr))
