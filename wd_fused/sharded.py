"""DTensors, of FSDP2 and tensor parallelism: what is stepped of one is the tensor that lies in this process. SGD is
elementwise, so that nothing has to be communicated. Used by sgd.py.
"""

import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    """Does not import torch.distributed.tensor, which takes long: where nobody has, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    dtensor = getattr(module, "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies in this process, its own tensor and no view; any other tensor as it is."""
    own: Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return own


def placed_alike(one: Tensor, other: Tensor) -> bool:
    """Both plain tensors, or both DTensors of the same mesh and placements."""
    if not (is_dtensor(one) and is_dtensor(other)):
        return is_dtensor(one) == is_dtensor(other)
    some: Any = one
    others: Any = other
    return bool(some.device_mesh == others.device_mesh and some.placements == others.placements)


def like(param: Tensor, local_tensor: Tensor) -> Tensor:
    """A DTensor of the parameter's shape and placement of which ``local_tensor`` is the part in this process."""
    from torch.distributed.tensor import DTensor

    of: Any = param
    with torch.no_grad():
        made: Tensor = DTensor.from_local(
            local_tensor, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
        )
    return made
