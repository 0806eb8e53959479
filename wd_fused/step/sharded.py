"""DTensors, of FSDP2 and tensor parallelism: what is stepped of one is the tensor that lies in this process. SGD is
elementwise, so that nothing has to be communicated. Used by the step.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wd_fused import reference
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


def placed_alike(one: Any, other: Any) -> bool:
    """Both plain tensors, or both DTensors of the same mesh and placements."""
    if not (is_dtensor(one) and is_dtensor(other)):
        return is_dtensor(one) == is_dtensor(other)
    return bool(one.device_mesh == other.device_mesh and one.placements == other.placements)


def local_row(row: RowOptions) -> RowOptions:
    """With the local tensors of what a parameter's state keeps."""
    extra, scale, ema = (None if entry is None else local(entry) for entry in (row.extra, row.momentum_scale, row.ema))
    return row._replace(extra=extra, momentum_scale=scale, ema=ema)


def place_all_alike(groups: Iterable[dict[str, Any]], state: dict[Tensor, Any]) -> None:
    """Gives DTensors' gradients and the tensors of their state the parameter's placements, where they are on its mesh
    in others: autograd and checkpoints may bring such."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    for param in (param for group in groups for param in group["params"] if is_dtensor(param)):
        if (placed := _placed_as(param, param.grad)) is not param.grad:
            param.grad = placed
        entries = state.get(param) or {}
        entries.update({name: _placed_as(param, entry) for name, entry in entries.items() if is_dtensor(entry)})


@torch.no_grad()
def _placed_as(param: Any, tensor: Any) -> Any:
    if not is_dtensor(tensor) or tensor.device_mesh != param.device_mesh or placed_alike(param, tensor):
        return tensor
    return tensor.redistribute(param.device_mesh, param.placements)


def place_of(param: Any) -> tuple[int, ...] | None:
    """Where the local tensor of a DTensor lies in the whole, in elements of the whole in the order of its memory: the
    first one, then how far apart neighbours along each dimension are. None where that cannot be told.

    Placements cut from left to right, as torch.chunk() does. A _StridedShard, FSDP2's beside tensor parallelism, cuts
    what those behind it have cut; unevenly, torch's own operators and FSDP2 do not agree on the pieces.
    """
    from torch.distributed.tensor import Shard

    mesh, placements, shape = param.device_mesh, param.placements, param.shape
    coordinate, own = mesh.get_coordinate(), local(param)
    if coordinate is None:  # a rank that is not of the mesh, and has nothing
        return (0,) * (1 + own.dim())
    cuts = [m for m, placement in enumerate(placements) if not placement.is_replicate()]
    strided = [m for m in cuts if hasattr(placements[m], "split_factor")]
    if any(type(placements[m]) is not Shard for m in cuts if m not in strided):
        return None
    for m in strided:
        along = {k: mesh.size(k) for k in cuts if placements[k].dim == placements[m].dim}
        behind = math.prod(size for k, size in along.items() if k > m)
        if placements[m].split_factor != behind or shape[placements[m].dim] % math.prod(along.values()) != 0:
            return None
    begins, sizes = [0] * len(shape), list(shape)
    for m in [m for m in cuts if m not in strided] + strided[::-1]:
        d = placements[m].dim
        length = -(-sizes[d] // mesh.size(m))
        begin = min(length * coordinate[m], sizes[d])
        begins[d], sizes[d] = begins[d] + begin, min(length, sizes[d] - begin)
    if own.shape != torch.Size(sizes):
        return None
    apart = [0] * len(shape)
    reach = 1
    for d in reversed(reference.by_stride(shape, param.stride())):
        apart[d], reach = reach, reach * shape[d]
    first: int = sum(begin * step for begin, step in zip(begins, apart, strict=True))
    return (first, *apart)


def has_whole_blocks(param: Any, block: int) -> bool:
    """Whether the part of each rank is whole blocks of so many elements that follow one another in the whole: then each
    rank has the scales of its own. The same answer on all ranks."""
    from torch.distributed.tensor import Shard

    cuts = [
        (size, p) for size, p in zip(param.device_mesh.shape, param.placements, strict=True) if not p.is_replicate()
    ]
    parts = math.prod(size for size, _ in cuts)
    is_flat = param.is_contiguous() and param._local_tensor.is_contiguous()
    by_rows = is_flat and all(type(placement) is Shard and placement.dim == 0 for _, placement in cuts)
    return parts == 1 or bool(by_rows and param.shape[0] % parts == 0 and param.numel() // parts % block == 0)


class Ranks(NamedTuple):
    """Those that hold the parts of a DTensor: along some dimensions of a mesh."""

    mesh: Any
    dims: tuple[int, ...]


NOT_YET = Ranks(None, ())  # of tensors that are summed over a process group, but not one by one


class OwnGroup:
    """FusedSGD's process_group, asked for as a mesh is: Ranks(OwnGroup(group), (0,)). A copy is the same group."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def get_group(self, _: int) -> Any:
        return self.group

    def __deepcopy__(self, _: Any) -> "OwnGroup":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "FusedSGD with process_group cannot be pickled, as a process group cannot: save its state_dict(), and load "
            "that into an optimizer made with process_group"
        )


def ranks_in(group: Any) -> Ranks | None:
    """Those of FusedSGD's process_group. Raises TypeError, ValueError for one that this process cannot sum over."""
    distributed = torch.distributed
    if group is None:
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(f"process_group={group!r}: call torch.distributed.init_process_group() before")
    if group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"process_group: rank {distributed.get_rank()} is not a member of it; give each rank the group that has "
            "the other parts of its gradients"
        )
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group={group!r} is not a process group: give torch.distributed.group.WORLD, or what "
            "torch.distributed.new_group() or DeviceMesh.get_group() returns"
        )
    return Ranks(OwnGroup(group), (0,))


def ranks_of(tensor: Any) -> Ranks | None:
    """Who has to be asked for a sum over all of a tensor's elements; None if this process has them all."""
    if not is_dtensor(tensor):
        return None
    dims = tuple(dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return Ranks(tensor.device_mesh, dims) if dims else None


def summed_over(ranks: Ranks | None, own: Tensor) -> Tensor:
    """The sum of every rank's tensor; all must call this in the same order."""
    if ranks is not None:
        for dim in ranks.dims:
            torch.distributed.all_reduce(own, group=ranks.mesh.get_group(dim))
    return own


def on_all_ranks(ranks: Ranks, sums: Tensor, device: torch.device) -> Tensor:
    """summed_over() of what is on the CPU; where the process group is of GPUs alone, by way of ``device``."""
    backends = torch.distributed.get_backend_config(ranks.mesh.get_group(0))  # "cpu:gloo,cuda:nccl"
    kind = "cpu" if "cpu:" in backends else backends.partition(":")[0]
    return summed_over(ranks, sums.to(device if device.type == kind else kind)).cpu()


def why_counted_twice(ranks: Ranks, params: Iterable[Tensor]) -> str | None:
    """Why a sum over FusedSGD's process_group counts DTensors more than once, and the remedy."""
    meshes = {param.device_mesh for param in params if is_dtensor(param)}  # type: ignore[attr-defined]
    members = set(torch.distributed.get_process_group_ranks(ranks.mesh.get_group(0))) if meshes else set()
    for mesh in meshes:
        if len(members.intersection(mesh.mesh.flatten().tolist())) > 1:
            return (
                f"its parameters are DTensors on {mesh}, which has other ranks of the group, too. Their norm is that "
                "of all ranks without process_group, which may be a group across meshes: that of pipeline stages"
            )
    return None


def why_not_whole(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> str | None:
    """Why a sum over these parameters' gradients lacks what other processes hold, and the remedy: where that can be
    seen of plain tensors."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        return (
            "FullyShardedDataParallel gives it a part of the gradients on each rank. Give process_group, that of the "
            "ranks that share them, or clip by model.clip_grad_norm_(...) before step()"
        )
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = None if module is None else sys._getframe()
    while module is not None and frame is not None:
        caller = frame.f_locals.get("self")
        if issubclass(type(caller), module.ZeroRedundancyOptimizer) and getattr(caller, "optim", None) is optimizer:
            return (
                "ZeroRedundancyOptimizer gives it a part of the parameters on each rank, and keeps an argument "
                "process_group to itself. Give it optimizer_class=functools.partial(FusedSGD, process_group=group), or "
                "clip by torch.nn.utils.clip_grad_norm_(model.parameters(), ...) before step()"
            )
        frame = frame.f_back
    return None


@torch.no_grad()
def like(param: Any, local_tensor: Tensor, blocks: int | None = None) -> Tensor:
    """A DTensor of the parameter's shape and placement of which ``local_tensor`` is the part in this process; blocks:
    of one with so many elements."""
    from torch.distributed.tensor import DTensor

    layout: dict[str, Any] = {"shape": param.shape, "stride": param.stride()}
    if blocks is not None:
        layout = {"shape": torch.Size((blocks,)), "stride": (1,)}
    made: Tensor = DTensor.from_local(local_tensor, param.device_mesh, param.placements, run_check=False, **layout)
    return made
