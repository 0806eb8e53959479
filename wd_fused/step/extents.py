"""Where tensors lie in memory, and whether some meet. Used by the step, checks.py and kept.py."""

from contextlib import nullcontext

import torch
from torch import Tensor


def has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


def extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses [begin, end) between which a strided tensor's elements lie."""
    if tensor.numel() == 0:
        return 0, 0
    # data_ptr() gives a lazy copy its own memory: on the tensor's GPU, not on the current one.
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        begin = tensor.data_ptr()
    return begin, begin + (_last(tensor) + 1) * tensor.element_size()


def _last(tensor: Tensor) -> int:
    """How many elements behind the first one the last one lies, in memory."""
    if tensor.is_contiguous():
        return tensor.numel() - 1
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def meet(*lists: list[tuple[int, int]]) -> bool:
    """Whether an extent of one list meets one of another."""
    reach, whose = 0, -1
    for begin, end, its in sorted((*own, its) for its, extents in enumerate(lists) for own in extents):
        if begin < min(end, reach) and its != whose:
            return True
        if end > reach:
            reach, whose = end, its
    return False


def is_expanded(tensor: Tensor) -> bool:
    """Whether several of its elements are one in memory, as torch's in-place operations ask before they write."""
    if not has_memory(tensor) or 0 not in tensor.stride():
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def missing_memory(tensor: Tensor) -> str | None:
    """Why a strided tensor cannot be read to its end, as when somebody has resized its storage; None if it can."""
    if not has_memory(tensor) or tensor.numel() == 0:
        return None
    needed = (tensor.storage_offset() + _last(tensor) + 1) * tensor.element_size()
    there = tensor.untyped_storage().nbytes()
    return f"has a storage of {there} bytes, and its shape and strides need {needed}" if there < needed else None
