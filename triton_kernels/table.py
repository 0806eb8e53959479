"""The work of a step as the kernel reads it: rows cut into tiles, how strided rows lie, and which memory rows share.

The twin of csrc/tensor_table and csrc/cuda_table. Tiles are made for device_step.py, the rest is for plan.py. All of it
is on the CPU: launcher.py brings it to the device.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import launcher, sgd_kernel
from .launcher import Kernel

WORDS_OF_TILE: int = sgd_kernel.WORDS_OF_TILE.value
DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in sgd_kernel.SCALAR_DTYPES)


# --- layouts -----------------------------------------------------------------------------------------------------


class Dim(NamedTuple):
    """A dimension of a row: its size, and how far apart its elements are in each operand."""

    size: int
    param: int
    gradient: int
    momentum_buffer: int


def strided_layout(sizes: Sequence[int], *strides: Sequence[int]) -> list[Dim] | None:
    """How parameter, gradient and momentum buffer lie, the innermost dimension first; None: flat, in one order.

    Dimensions of one element are dropped, the rest ordered by the parameter's strides, and those that follow one
    another in every operand joined.
    """
    dims = [Dim(*dim) for dim in zip(sizes, *strides, strict=True) if dim[0] != 1]
    dims.sort(key=lambda dim: dim.param)
    joined: list[Dim] = []
    for dim in dims:
        inner = joined[-1] if joined else None
        if inner is not None and dim[1:] == tuple(inner.size * stride for stride in inner[1:]):
            joined[-1] = inner._replace(size=inner.size * dim.size)
        else:
            joined.append(dim)
    if not joined or (len(joined) == 1 and joined[0][1:] == (1, 1, 1)):
        return None
    return joined


def surely_distinct(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether no two indices meet in one element, told from the strides alone; False also where it cannot tell."""
    if 0 in sizes:
        return True
    reach = 0  # the largest offset that the dimensions so far arrive at
    for stride, size in sorted((stride, size) for size, stride in zip(sizes, strides, strict=True) if size != 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


# --- memory ------------------------------------------------------------------------------------------------------

Extent = tuple[int, int]  # half-open: from the address of the first byte to that behind the last


def extent_bytes(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def extent_of(tensor: Tensor) -> Extent:
    begin = tensor.data_ptr()
    return begin, begin + extent_bytes(tensor)


class ExtentSet:
    """Answers whether an extent meets any of a set."""

    def __init__(self) -> None:
        self._begins: list[int] = []  # sorted and disjoint, none empty
        self._ends: list[int] = []

    def add(self, extents: Sequence[Extent]) -> None:
        pieces = sorted([*zip(self._begins, self._ends, strict=True), *extents])
        self._begins, self._ends = [], []
        for begin, end in pieces:
            if begin == end:
                continue
            if self._ends and begin <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._begins.append(begin)
                self._ends.append(end)

    def meets(self, extent: Extent) -> bool:
        # The first piece that ends behind the extent's begin: if that does not begin before its end, none meets it.
        begin, end = extent
        piece = bisect.bisect_right(self._ends, begin)
        return begin != end and piece < len(self._ends) and self._begins[piece] < end


def int64(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def rows_that_meet(extents: Sequence[tuple[int, int, int]], rows: int) -> list[bool]:
    """For each of so many rows, whether one of its extents (begin, end, row) meets an extent of another row."""
    meets = [False] * rows
    cluster: set[int] = set()  # the rows of a run of extents that hang together
    reach = 0
    for begin, end, row in sorted(extent for extent in extents if extent[0] != extent[1]):
        if begin >= reach:
            cluster = set()
        cluster.add(row)
        reach = max(reach, end)
        if len(cluster) > 1:
            for other in cluster:
                meets[other] = True
    return meets


# --- tiles -------------------------------------------------------------------------------------------------------


class TableRow(NamedTuple):
    """A tensor to step, as its tiles know it. Addresses of the first element; 0: there is no momentum buffer yet."""

    param: int
    momentum_buffer: int
    numel: int
    storage: int  # the place of its dtype in SCALAR_DTYPES
    group_word: int  # where its group's words begin
    layout: Sequence[Sequence[int]] | None  # Dim's fields of each
    is_serial: bool  # may share memory with another row: they run in order, each in a launch of its own


class PlannedLaunch(NamedTuple):
    kernel: Kernel
    rows: list[int]
    first_tile: int
    tiles: int


class Table(NamedTuple):
    """A device's rows: words, int64, that the device reads, first all tiles, then all layouts; and the launches."""

    words: Tensor
    layouts_at: int
    launches: list[PlannedLaunch]


def table(rows: Sequence[TableRow], numerics: str) -> Table:
    """One launch for all rows of a dtype, and one for each row that may share memory with another."""
    layouts: list[int] = []
    layout_of = []
    for row in rows:
        layout_of.append(-1 if row.layout is None else len(layouts))
        if row.layout is not None:
            layouts.append(len(row.layout))
            for dim in row.layout:
                layouts.extend(dim)

    together: dict[int, list[int]] = {}
    for r, row in enumerate(rows):
        if row.numel and not row.is_serial:
            together.setdefault(row.storage, []).append(r)
    alone = [[r] for r, row in enumerate(rows) if row.numel and row.is_serial]

    tiles = []
    launches: list[PlannedLaunch] = []
    first_tile = 0
    for own in [*together.values(), *alone]:
        dtype = DTYPES[rows[own[0]].storage]
        kernel = launcher.kernel_for(dtype, numerics, strided=any(rows[r].layout is not None for r in own))
        made = _tiles([rows[r] for r in own], own, [layout_of[r] for r in own], dtype)
        launches.append(PlannedLaunch(kernel, own, first_tile, len(made)))
        tiles.append(made)
        first_tile += len(made)
    words = torch.cat([*(made.flatten() for made in tiles), int64(layouts)])
    return Table(words, first_tile * WORDS_OF_TILE, launches)


def _tiles(rows: Sequence[TableRow], row_words: Sequence[int], layout_of: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tiles of rows of one dtype, a line each: see WORDS_OF_TILE."""
    elements = launcher.tile_elements(dtype)
    numels = int64([row.numel for row in rows])
    counts = (numels + (elements - 1)) // elements
    row_of = torch.repeat_interleave(torch.arange(len(rows), device="cpu"), counts)
    first = torch.cumsum(counts, 0) - counts
    begin = (torch.arange(len(row_of), device="cpu") - first[row_of]) * elements
    lines = int64(
        [
            (row.param, row.momentum_buffer, 0, 0, word, row.group_word, layout)
            for row, word, layout in zip(rows, row_words, layout_of, strict=True)
        ]
    )[row_of]
    offset = begin * dtype.itemsize * (lines[:, 6] < 0)  # a strided row's addresses are its own
    lines[:, 0] += offset
    lines[:, 1] += offset * (lines[:, 1] != 0)
    lines[:, 2] = begin
    lines[:, 3] = torch.clamp(numels[row_of] - begin, max=elements)
    return lines
