"""Random optimizer steps as data: what a case holds, how tensors of a case are made, and how two results are compared
bit by bit. Used by test_bits.py and test_events.py.

A case says which tensors, groups and options there are; its numbers come from `seed`, so that a printed case is whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by the bytes of an element

# Vector widths are 4 to 32 elements, a tile 16,384, a chunk of strided work 256, and threads start at 65,536 elements.
SHAPES = (
    *(
        (),
        (0,),
        (1,),
        (3,),
        (7,),
        (8,),
        (15,),
        (16,),
        (17,),
        (31,),
        (33,),
        (63,),
        (65,),
        (127,),
        (255,),
        (256,),
        (257,),
    ),
    *((1, 1), (5, 1), (1, 9), (4, 3), (3, 0, 2), (17, 5), (16, 16), (1, 33, 1), (4, 3, 5), (2, 3, 1, 5), (2, 3, 5, 7)),
    *((257,), (8, 3, 3, 3), (2, 1, 3, 2, 4)),
)
LARGE_SHAPES = ((16_383,), (16_385,), (129, 257), (70_001,), (300, 257), (2, 5, 83, 101))


# --- numbers -----------------------------------------------------------------------------------------------------


def special_values(dtype: torch.dtype) -> Tensor:
    """Zeros, infinities, NaN, subnormals and the ends of the range, with both signs."""
    info = torch.finfo(dtype)
    subnormal = 0.0 if dtype == torch.float64 else info.smallest_normal * info.eps
    subnormal = subnormal or math.ulp(0.0)
    largest_subnormal = info.smallest_normal * (1 - info.eps)
    values = [0.0, math.inf, math.nan, subnormal, 3 * subnormal, largest_subnormal, info.smallest_normal, info.max]
    values += [1.0, 1 + info.eps, 1 - info.eps / 2, info.max / 3]
    return torch.tensor(values + [-value for value in values], dtype=torch.float64).to(dtype)


DEVICE = torch.device("cpu")  # of the tensors that a test steps: the fixture fused_backend's


def numbers(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
    special: float = 0.0,
    device: torch.device | None = None,
) -> Tensor:
    """Normally distributed, a share `special` of them replaced by special values; the same ones on every device."""
    made = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    if special:
        table = special_values(dtype)
        chosen = table[torch.randint(len(table), shape, generator=generator)]
        made = torch.where(torch.rand(shape, generator=generator) < special, chosen, made)
    return made.to(DEVICE if device is None else device)


# --- layouts -----------------------------------------------------------------------------------------------------

LAYOUTS = (
    "contiguous",
    "channels_last",
    "reversed",
    "rotated",
    "odd offset",
    "column gaps",
    "row gaps",
    "reversed gaps",
    "odd size-1 strides",
)
GRADIENT_LAYOUTS = (*LAYOUTS, "expanded", "expanded last", "overlapping windows")
FILL = 7.0  # in the gaps: nobody may write there


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another layout; what lies between them is FILL."""
    shape, dims = values.shape, values.dim()
    options: dict[str, Any] = {"dtype": values.dtype, "device": values.device}

    def permuted_dense(order: list[int]) -> Tensor:
        inverse = sorted(range(dims), key=order.__getitem__)
        return torch.empty_strided([shape[d] for d in order], _contiguous_strides([shape[d] for d in order]),
                                   **options).permute(inverse)  # fmt: skip

    if layout == "channels_last" and dims == 4:
        made = permuted_dense([0, 2, 3, 1])
    elif layout in ("reversed", "channels_last"):
        made = permuted_dense(list(range(dims))[::-1])
    elif layout == "rotated" and dims > 1:
        made = permuted_dense([*range(1, dims), 0])
    elif layout in ("odd offset", "rotated"):
        made = torch.full((values.numel() + 6,), FILL, **options)[3 : 3 + values.numel()].view(shape)
    elif layout == "column gaps" and dims:
        made = torch.full((*shape[:-1], shape[-1] * 2 + 1), FILL, **options)[..., 1::2]
    elif layout == "row gaps" and dims:
        made = torch.full((shape[0] * 3, *shape[1:]), FILL, **options)[2::3]
    elif layout == "reversed gaps" and dims:
        made = torch.full((*shape[::-1][:-1], shape[0] * 2), FILL, **options)[..., ::2]
        made = made.permute(list(range(dims))[::-1])
    elif layout == "odd size-1 strides":
        strides = [stride if size != 1 else 5 for size, stride in zip(shape, _contiguous_strides(shape), strict=True)]
        made = torch.empty_strided(shape, strides, **options)
    elif layout == "expanded" and dims:
        return values[:1].clone().expand(shape) if values.numel() else values.clone()
    elif layout == "expanded last" and dims:
        return values[..., :1].clone().expand(shape) if values.numel() else values.clone()
    elif layout == "overlapping windows" and dims > 1 and values.numel():
        reach = sum(size - 1 for size in shape) + 1
        return values.flatten()[:reach].clone().as_strided(shape, [1] * dims)
    else:
        made = torch.empty(shape, **options)
    return made.copy_(values)


def _contiguous_strides(shape: Any) -> list[int]:
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return strides[::-1]


# --- comparison --------------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, every NaN as the same one."""
    tensor = tensor.detach().cpu().contiguous()
    return torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor).view(INTEGER[tensor.dtype.itemsize])


def memory(tensor: Tensor) -> Tensor:
    """All of the tensor's storage, gaps included."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def assert_same_bits(ours: Tensor, expected: Tensor, what: str) -> None:
    assert ours.dtype == expected.dtype and ours.shape == expected.shape, (
        f"{what}: {ours.dtype} {list(ours.shape)}, expected {expected.dtype} {list(expected.shape)}"
    )
    differing = bits(ours) != bits(expected)
    if differing.any():
        first = tuple(int(i) for i in differing.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(differing.sum())} of {ours.numel()} elements differ, first at {first}: "
            f"{ours[first].item()!r}, expected {expected[first].item()!r}"
        )


# --- steps on a GPU ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def side_streams(devices: Iterable[torch.device]) -> Iterator[None]:
    """A stream of its own on each of the GPUs: after what is queued there, and before what comes."""
    with contextlib.ExitStack() as stack:
        for device in devices:
            side, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            side.wait_stream(here)
            stack.callback(here.wait_stream, side)
            stack.enter_context(torch.cuda.stream(side))
        yield


def replayed(step: Callable[[], object], times: int = 1) -> None:
    """Captures the step in a graph and replays that."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin()
        try:
            step()
        finally:
            graph.capture_end()
        for _ in range(times):
            graph.replay()
    side.synchronize()


# --- cases -------------------------------------------------------------------------------------------------------

NO_BUFFER = "none"


@dataclass(frozen=True)
class TensorSpec:
    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    buffer_layout: str = NO_BUFFER  # of a momentum buffer that is there before the first step
    has_gradient: tuple[bool, ...] = (True, True, True)  # one a step
    special: float = 0.0


@dataclass(frozen=True)
class GroupSpec:
    tensors: tuple[TensorSpec, ...]
    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    tensor_scalars: torch.dtype | None = None  # lr and weight_decay as Tensors of this dtype
    scalar_shape: tuple[int, ...] = ()  # of the lr

    def options(self) -> dict[str, Any]:
        """As reference.sgd takes them: numbers."""
        return {
            "lr": self._number(self.lr),
            "momentum": self.momentum,
            "dampening": self.dampening,
            "weight_decay": self._number(self.weight_decay),
            "nesterov": self.nesterov,
            "maximize": self.maximize,
        }

    def arguments(self) -> dict[str, Any]:
        """As an optimizer takes them."""
        options = self.options()
        if self.tensor_scalars is not None:
            options["lr"] = torch.full(self.scalar_shape, options["lr"], dtype=self.tensor_scalars)
            # torch takes only a weight_decay without dimensions.
            options["weight_decay"] = torch.tensor(options["weight_decay"], dtype=self.tensor_scalars)
        return options

    def _number(self, value: float) -> float:
        return value if self.tensor_scalars is None else torch.tensor(value, dtype=self.tensor_scalars).item()


@dataclass(frozen=True)
class Case:
    groups: tuple[GroupSpec, ...]
    seed: int
    steps: int = 3
    # Parameters that are interleaved views of one tensor, in a group of their own with the first group's options.
    interleaved: int = 0
    interleaved_length: int = 5

    def all_groups(self) -> tuple[GroupSpec, ...]:
        if not self.interleaved:
            return self.groups
        spec = TensorSpec(torch.float32, (self.interleaved_length,))
        first = self.groups[0]
        return (*self.groups, GroupSpec(**{**vars(first), "tensors": (spec,) * self.interleaved}))


@dataclass
class Tensors:
    """What a case's optimizer steps: parameters and first momentum buffers, a list a group."""

    case: Case
    dtypes: tuple[torch.dtype, ...]
    device: torch.device = field(default_factory=lambda: DEVICE)
    params: list[list[Tensor]] = field(default_factory=list)
    buffers: list[list[Tensor | None]] = field(default_factory=list)
    specs: list[list[TensorSpec]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for g, group in enumerate(self.case.all_groups()):
            chosen = [(i, spec) for i, spec in enumerate(group.tensors) if spec.dtype in self.dtypes]
            self.specs.append([spec for _, spec in chosen])
            self.params.append([])
            self.buffers.append([])
            base = None
            if g == len(self.case.groups):
                length = len(group.tensors) * self.case.interleaved_length
                base = self._numbers((length,), torch.float32, (g, 0, 0))
            for i, spec in chosen:
                if base is not None:
                    data = base[i :: len(group.tensors)]
                else:
                    data = laid_out(self._numbers(spec.shape, spec.dtype, (g, i, 0), spec.special), spec.layout)
                self.params[-1].append(torch.nn.Parameter(data))
                buffer = None
                if spec.buffer_layout != NO_BUFFER and group.momentum != 0:
                    values = self._numbers(spec.shape, spec.dtype, (g, i, 1), spec.special)
                    buffer = laid_out(values, spec.buffer_layout)
                self.buffers[-1].append(buffer)

    def gradients(self, step: int) -> list[list[Tensor | None]]:
        return [
            [
                laid_out(self._numbers(spec.shape, spec.dtype, (g, i, 2 + step), spec.special), spec.gradient_layout)
                if spec.has_gradient[step]
                else None
                for i, spec in enumerate(specs)
            ]
            for g, specs in enumerate(self.specs)
        ]

    def _numbers(self, shape: Any, dtype: torch.dtype, place: tuple[int, int, int], special: float = 0.0) -> Tensor:
        """``place``: group, index, and what it is for."""
        seed = self.case.seed * 1_000_003 + place[0] * 10_007 + place[1] * 101 + place[2]
        return numbers(shape, dtype, torch.Generator().manual_seed(seed), special, self.device)


NICE = (0.0, 1e-3, 5e-4, 0.1, 1 / 3, 0.9, 1.0)
# The ends: below float32's least subnormal (0 as a float, not as a double), subnormal, and large.
EXTREME = (1e-50, 1e-45, 1e-39, 3e4, 1e30)


def _number() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from(NICE), st.sampled_from(NICE), st.floats(0, 2), st.sampled_from(EXTREME))


def is_simulated() -> bool:
    """A simulated kernel takes a millisecond for 1,024 elements: cases are small there."""
    return DEVICE.type != "cpu"


@st.composite
def tensor_specs(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], steps: int) -> TensorSpec:
    large = draw(st.integers(0, 19)) == 0 and not is_simulated()
    return TensorSpec(
        dtype=draw(st.sampled_from(dtypes)),
        shape=draw(st.sampled_from(LARGE_SHAPES if large else SHAPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        gradient_layout=draw(st.one_of(st.just("contiguous"), st.sampled_from(GRADIENT_LAYOUTS))),
        buffer_layout=draw(st.sampled_from((NO_BUFFER, *LAYOUTS))),
        has_gradient=draw(st.tuples(*[st.sampled_from((True, True, True, False))] * steps)),
        special=draw(st.sampled_from((0.0, 0.0, 0.3, 0.9))),
    )


@st.composite
def group_specs(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], steps: int) -> GroupSpec:
    momentum = draw(st.one_of(st.just(0.0), st.just(0.9), _number()))
    nesterov = momentum > 0 and draw(st.booleans())
    return GroupSpec(
        tensors=tuple(draw(st.lists(tensor_specs(dtypes, steps), max_size=2 if is_simulated() else 4))),
        lr=draw(_number()),
        momentum=momentum,
        dampening=0.0 if nesterov else draw(st.one_of(st.just(0.0), st.floats(-1, 2))),
        weight_decay=draw(st.one_of(st.just(0.0), _number())),
        nesterov=nesterov,
        maximize=draw(st.booleans()),
        tensor_scalars=draw(st.sampled_from((None, None, torch.float32, torch.float64))),
        scalar_shape=draw(st.sampled_from(((), (), (1,)))),
    )


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS + HALVES, steps: int = 3) -> Case:
    groups = draw(st.lists(group_specs(dtypes, steps), min_size=1, max_size=3 if is_simulated() else 4))
    return Case(
        groups=tuple(groups),
        seed=draw(st.integers(0, 2**31)),
        steps=steps,
        interleaved=draw(st.sampled_from((0, 0, 0, 2, 3))) if torch.float32 in dtypes else 0,
        interleaved_length=draw(st.sampled_from((1, 5, 33, 300))),
    )
