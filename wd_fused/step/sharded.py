"""DTensors, of FSDP2 and tensor parallelism: what is stepped of one is the tensor that lies in this process. SGD is
elementwise, so that nothing has to be communicated. Used by the step.
"""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wd_fused.options.spec import RowOptions


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


def local_row(row: RowOptions) -> RowOptions:
    """With the local tensors of what a parameter's state keeps."""
    extra, ema = (None if entry is None else local(entry) for entry in (row.extra, row.ema))
    return row._replace(extra=extra, ema=ema)


def place_all_alike(groups: Iterable[dict[str, Any]], state: dict[Tensor, Any]) -> None:
    """place_alike() of every parameter, where there may be DTensors at all."""
    if "torch.distributed.tensor" in sys.modules:
        for group in groups:
            for param in filter(is_dtensor, group["params"]):
                place_alike(param, state.get(param))


def place_alike(param: Tensor, state: dict[str, Any] | None) -> None:
    """Gives a DTensor's gradient and the tensors of its state the parameter's placements, where they are on its mesh in
    others: autograd and checkpoints may bring such."""
    if param.grad is not None and not placed_alike(param, param.grad):
        param.grad = _placed_as(param, param.grad)
    for name, entry in (state or {}).items():
        if is_dtensor(entry) and not placed_alike(param, entry):
            assert state is not None, "it has entries"
            state[name] = _placed_as(param, entry)


def _placed_as(param: Tensor, tensor: Tensor) -> Tensor:
    own: Any = param
    other: Any = tensor
    if not is_dtensor(tensor) or other.device_mesh != own.device_mesh:
        return tensor
    with torch.no_grad():
        placed: Tensor = other.redistribute(own.device_mesh, own.placements)
    return placed


class Ranks(NamedTuple):
    """Those that hold the parts of a DTensor: along some dimensions of a mesh."""

    mesh: Any
    dims: tuple[int, ...]


def ranks_of(tensor: Tensor) -> Ranks | None:
    """Who has to be asked for a sum over all of a tensor's elements; None if this process has them all."""
    if not is_dtensor(tensor):
        return None
    of: Any = tensor
    dims = tuple(dim for dim, placement in enumerate(of.placements) if not placement.is_replicate())
    return Ranks(of.device_mesh, dims) if dims else None


def summed_over(ranks: Ranks | None, own: Tensor) -> Tensor:
    """The sum of every rank's tensor; all must call this in the same order."""
    if ranks is not None:
        for dim in ranks.dims:
            torch.distributed.all_reduce(own, group=ranks.mesh.get_group(dim))
    return own


def why_not_whole(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> str | None:
    """Why a sum over these parameters' gradients lacks what other processes hold, and the remedy: where that can be
    seen of plain tensors."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        return (
            "FullyShardedDataParallel gives it a part of the gradients on each rank. Clip by "
            "model.clip_grad_norm_(...) before step(), or shard by fully_shard (FSDP2)"
        )
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = None if module is None else sys._getframe()
    while module is not None and frame is not None:
        caller = frame.f_locals.get("self")
        if issubclass(type(caller), module.ZeroRedundancyOptimizer) and getattr(caller, "optim", None) is optimizer:
            return (
                "ZeroRedundancyOptimizer gives it a part of the parameters on each rank. Clip by "
                "torch.nn.utils.clip_grad_norm_(model.parameters(), ...) before step(): each rank has all gradients"
            )
        frame = frame.f_back
    return None


def like(param: Tensor, local_tensor: Tensor) -> Tensor:
    """A DTensor of the parameter's shape and placement of which ``local_tensor`` is the part in this process."""
    from torch.distributed.tensor import DTensor

    of: Any = param
    with torch.no_grad():
        made: Tensor = DTensor.from_local(
            local_tensor, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
        )
    return made
