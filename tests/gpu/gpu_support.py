"""What the tests of this folder share: the device, random tensors in odd places, comparison bit by bit, and launches.

Imported by name: pytest puts this folder on the path. Needs torch and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from wd_fused import FusedSGD, backends, reference

DEVICE = torch.device("cuda")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FULL = DTYPES[:2]
HALVES = DTYPES[2:]
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
SGD_ARGUMENTS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")

SIMULATED = "SIMULATED_GPU_LIBRARY" in os.environ  # tests/simulated_gpu


def affordable(on_a_gpu: int, simulated: int) -> int:
    """How much of something: a simulated GPU takes about a microsecond for an element, more for a strided one."""
    return simulated if SIMULATED else on_a_gpu


# Around vectors of 2 to 8 elements, warps' tiles of 1,024, and blocks' tiles of 4,096 to 16,384.
SIZES = (0, 1, 3, 7, 8, 9, 31, 33, 257, 1_023, 1_024, 1_025, 4_095, 4_097, 8_193, 16_383, 16_385, 40_001)
if SIMULATED:
    SIZES = (0, 1, 3, 8, 9, 33, 257, 1_025, 4_097, 16_385)


def why_skipped() -> str | None:
    return None if torch.cuda.is_available() else "no GPU that torch can use"


@functools.cache
def why_not_usable(backend: str) -> str | None:
    return backends.FUSED[backend].unavailable()


def synchronize() -> None:
    torch.cuda.synchronize()


def empty_cache() -> None:
    torch.cuda.empty_cache()


def needs_free(gib: float) -> None:
    gc.collect()
    empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB of GPU memory are free; {gib} are needed")


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Within it whatever makes torch wait for the GPU is an error."""
    synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- tensors -----------------------------------------------------------------------------------------------------


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(shape: int | Sequence[int], dtype: torch.dtype, generator: torch.Generator, special: float = 0) -> Tensor:
    """Normally distributed, a share `special` of them zeros, infinities, NaN, subnormals and the ends of the range."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    made = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    if special:
        info = torch.finfo(dtype)
        values = [0.0, float("inf"), float("nan"), info.smallest_normal, info.max, 1.0, 1 + info.eps]
        table = torch.tensor(values + [-value for value in values], dtype=torch.float64).to(dtype)
        table = torch.cat([table, table[[3]] / 3, table[[3]] * info.eps])  # subnormals
        chosen = table[torch.randint(len(table), shape, generator=generator)]
        made = torch.where(torch.rand(shape, generator=generator) < special, chosen, made)
    return made.to(DEVICE)


LAYOUTS = ("contiguous", "odd offset", "channels_last", "reversed", "column gaps", "row gaps")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in memory of another layout."""
    shape = values.shape
    options: dict[str, Any] = {"dtype": values.dtype, "device": values.device}
    if layout == "odd offset":
        made = torch.zeros(values.numel() + 6, **options)[3 : 3 + values.numel()].view(shape)
    elif layout == "channels_last" and values.dim() == 4:
        made = torch.empty(shape, **options).to(memory_format=torch.channels_last)
    elif layout == "reversed" and values.dim() > 1:
        made = torch.empty(shape[::-1], **options).permute(*range(values.dim())[::-1])
    elif layout == "column gaps" and values.dim():
        made = torch.zeros((*shape[:-1], 2 * shape[-1] + 1), **options)[..., 1::2]
    elif layout == "row gaps" and values.dim():
        made = torch.zeros((3 * shape[0], *shape[1:]), **options)[2::3]
    else:
        made = torch.empty(shape, **options)
    return made.copy_(values)


def parameters(
    dtype: torch.dtype, seed: int = 0, sizes: Iterable[int] | None = None, special: float = 0
) -> list[Tensor]:
    generator = source(seed)
    sizes = SIZES if sizes is None else sizes
    return [numbers(size, dtype, generator, special).requires_grad_() for size in sizes]


def many(sizes: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Parameters of float32 that lie one behind the other: thousands are made at once."""
    return [part.requires_grad_() for part in numbers(sum(sizes), torch.float32, source(seed)).split(list(sizes))]


def give_gradients(params: Iterable[Tensor], seed: int, special: float = 0) -> None:
    generator = source(seed)
    for param in params:
        param.grad = numbers(param.shape, param.dtype, generator, special)


def twin(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies with the same values, in memory of their own, contiguous."""
    return [param.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for param in params]


def copy_gradients(params: Iterable[Tensor], twins: Iterable[Tensor]) -> None:
    for param, copied in zip(params, twins, strict=True):
        copied.grad = None if param.grad is None else param.grad.clone(memory_format=torch.contiguous_format)


# --- comparison --------------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, every NaN as the same one."""
    tensor = tensor.detach().contiguous()
    nan = torch.full((), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return torch.where(tensor.isnan(), nan, tensor).view(INTEGER[tensor.element_size()])


def difference(ours: Tensor, expected: Tensor) -> str | None:
    """None if the bits are the same; else how many are not, and the first."""
    assert ours.dtype == expected.dtype and ours.shape == expected.shape, (ours.dtype, expected.dtype, ours.shape)
    differing = (bits(ours) != bits(expected)).flatten()
    count = int(differing.sum())
    if count == 0:
        return None
    first = int(differing.nonzero()[0])
    values = ours.detach().flatten()[first].item(), expected.detach().flatten()[first].item()
    return f"{count} of {ours.numel()} elements differ, first {first}: {values[0]!r}, expected {values[1]!r}"


def assert_same_bits(ours: Iterable[Tensor], expected: Iterable[Tensor], what: str = "") -> None:
    found = [
        f"tensor {i} ({str(a.dtype).removeprefix('torch.')} {list(a.shape)}): {text}"
        for i, (a, b) in enumerate(zip(ours, expected, strict=True))
        if (text := difference(a, b)) is not None
    ]
    assert not found, "\n".join([f"{what}: {len(found)} tensors differ", *found[:6]])


def buffers_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The momentum buffers, in the order of the parameters; none where there is none."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    found = [
        optimizer.state.get(param, {}).get("momentum_buffer") for param in params
    ]  # [param] would put an entry there
    return [buffer for buffer in found if buffer is not None]


class Reference:
    """Parameters of their own that wd_fused.reference steps with the gradients that an optimizer's parameters have."""

    def __init__(self, optimizer: torch.optim.Optimizer, numerics: str = "torch") -> None:
        self._optimizer = optimizer
        self._numerics = numerics
        self.groups = [twin(group["params"]) for group in optimizer.param_groups]
        self.buffers: list[list[Tensor | None]] = [[None] * len(group) for group in self.groups]

    @property
    def params(self) -> list[Tensor]:
        return [param for group in self.groups for param in group]

    def step(self, gradients: Iterable[Tensor | None] | None = None) -> None:
        """With the optimizer's gradients, or with these, one a parameter."""
        given = None if gradients is None else iter(gradients)
        for group, values, buffers in zip(self._optimizer.param_groups, self.groups, self.buffers, strict=True):
            grads = [param.grad if given is None else next(given) for param in group["params"]]
            chosen = [i for i, grad in enumerate(grads) if grad is not None]
            own = [buffers[i] for i in chosen]
            options = {name: _number(group[name]) for name in OPTIONS}
            copies = [grads[i].detach().clone() for i in chosen]  # type: ignore[union-attr]
            reference.sgd([values[i] for i in chosen], copies, own, **options, numerics=self._numerics)
            for i, buffer in zip(chosen, own, strict=True):
                buffers[i] = buffer

    def assert_agrees(self, what: str = "") -> None:
        ours = [param for group in self._optimizer.param_groups for param in group["params"]]
        assert_same_bits(ours, self.params, f"{what} parameters")
        kept = [buffer for group in self.buffers for buffer in group if buffer is not None]
        assert_same_bits(buffers_of(self._optimizer), kept, f"{what} momentum buffers")


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


# --- the plan ----------------------------------------------------------------------------------------------------


def backend_in_use() -> str:
    """The backend under test, which the fixture gpu_backend has made the only one for the GPU."""
    (name,) = backends.PREFERENCE[DEVICE.type]
    return name


def fused(params: Any, **arguments: Any) -> FusedSGD:
    """FusedSGD that steps on the GPU, by the backend under test, or raises."""
    return FusedSGD(params, **{**SGD_ARGUMENTS, **arguments}, backend=backend_in_use())


def launches(optimizer: FusedSGD) -> list[dict[str, Any]]:
    """What the last step launched on GPUs."""
    plans = optimizer._plans
    assert plans is not None
    return [launch for part in plans.parts if part.backend == backend_in_use() for launch in part.plan.launches()]


def fewest_launches(params: Iterable[Tensor]) -> int:
    """How many launches a step of tensors on one GPU takes: one a dtype."""
    return len({param.dtype for param in params})


def triton_module(name: str) -> Any:
    """A module of the Triton backend."""
    backends.triton_kernels()
    return importlib.import_module(f"wd_fused.triton_kernels.{name}")


def forget() -> None:
    """Collects what is not referred to any more, and gives its memory back to the GPU."""
    gc.collect()
    empty_cache()
