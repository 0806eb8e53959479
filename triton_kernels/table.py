"""The work of a step as the kernel reads it: rows cut into tiles, how strided rows lie, and which memory rows share.

The twin of csrc/tensor_table and csrc/cuda_table. Tiles are made for device_step.py, the rest is for plan.py. All of it
is on the CPU: launcher.py brings it to the device.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launcher, sgd_kernel
from .launcher import AnyKernel, NormKernel, TailKernel

WORDS_OF_TILE: int = sgd_kernel.WORDS_OF_TILE.value
DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in sgd_kernel.SCALAR_DTYPES)


# --- layouts -----------------------------------------------------------------------------------------------------


# A dimension of a row: its size, and how far apart its elements are in each operand: parameter, gradient, momentum
# buffer and, where it has a tail, what lies beside the parameter and the average.
Dim = tuple[int, ...]


def strided_layout(sizes: Sequence[int], *strides: Sequence[int]) -> list[Dim] | None:
    """How the operands lie, the innermost dimension first; None: flat, in one order.

    Dimensions of one element are dropped, the rest ordered by the parameter's strides, and those that follow one
    another in every operand joined.
    """
    dims: list[Dim] = [dim for dim in zip(sizes, *strides, strict=True) if dim[0] != 1]
    dims.sort(key=lambda dim: dim[1])
    joined: list[Dim] = []
    for dim in dims:
        inner = joined[-1] if joined else None
        if inner is not None and dim[1:] == tuple(inner[0] * stride for stride in inner[1:]):
            joined[-1] = (inner[0] * dim[0], *inner[1:])
        else:
            joined.append(dim)
    if not joined or (len(joined) == 1 and set(joined[0][1:]) == {1}):
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


class TailOperands(NamedTuple):
    """What a row with a tail has beyond TableRow. Addresses of the first element; 0: it is not there."""

    extra: int  # master, remainder or compensation
    average: int
    momentum_scale: int
    group: int
    position: int  # in its group
    kernel: TailKernel  # for a flat row
    clips: bool  # its gradient counts in a norm


class TableRow(NamedTuple):
    """A tensor to step, as its tiles know it. Addresses of the first element; 0: there is no momentum buffer yet."""

    param: int
    momentum_buffer: int
    numel: int
    storage: int  # the place of its dtype in SCALAR_DTYPES
    group_word: int  # where its group's words begin
    layout: Sequence[Sequence[int]] | None  # Dim of each
    is_serial: bool  # may share memory with another row: they run in order, each in a launch of its own
    tail: TailOperands | None = None


class PlannedLaunch(NamedTuple):
    kernel: AnyKernel
    rows: list[int]
    at: int  # the place of its first tile in the table's words
    tiles: int


class Norm(NamedTuple):
    """What forms the norm: its launches, all of which are needed, and where the ranges of the groups' sums lie."""

    launches: list[PlannedLaunch]
    ranges_at: int

    @property
    def programs(self) -> int:
        return sum(launch.tiles for launch in self.launches)


class Table(NamedTuple):
    """A device's rows: words, int64, that the device reads, first all tiles, then all layouts; and the launches."""

    words: Tensor
    layouts_at: int
    launches: list[PlannedLaunch]


def table(rows: Sequence[TableRow], numerics: str) -> Table:
    """One launch for all rows that one kernel steps, and one for each row that may share memory with another."""
    layouts, layout_of = layouts_of(rows)
    together: dict[Any, list[int]] = {}
    for r, row in enumerate(rows):
        if row.numel and not row.is_serial:
            together.setdefault(row.storage if row.tail is None else row.tail.kernel, []).append(r)
    alone = [[r] for r, row in enumerate(rows) if row.numel and row.is_serial]

    tiles = []
    launches: list[PlannedLaunch] = []
    at = 0
    for own in [*together.values(), *alone]:
        is_strided = any(rows[r].layout is not None for r in own)
        dtype, tail = DTYPES[rows[own[0]].storage], rows[own[0]].tail
        kernel: AnyKernel = launcher.kernel_for(dtype, numerics, is_strided)
        make_tiles = _tiles
        if tail is not None:
            kernel = tail.kernel._replace(strided=is_strided)
            make_tiles = _tail_tiles
        made = make_tiles([rows[r] for r in own], own, [layout_of[r] for r in own], dtype)
        launches.append(PlannedLaunch(kernel, own, at, len(made)))
        tiles.append(made)
        at += made.numel()
    words = torch.cat([*(made.flatten() for made in tiles), int64(layouts)])
    return Table(words, at, launches)


def layouts_of(rows: Sequence[TableRow]) -> tuple[list[int], list[int]]:
    """The words of all layouts, and where each row's begin, -1 for flat ones."""
    words: list[int] = []
    layout_of = []
    for row in rows:
        layout_of.append(-1 if row.layout is None else len(words))
        if row.layout is not None:
            words.append(len(row.layout))
            for dim in row.layout:
                words.extend(dim)
    return words, layout_of


class _Cut(NamedTuple):
    """Rows cut into tiles: of each tile its row, where it begins there, and its elements."""

    row_of: Tensor
    begin: Tensor
    counts: Tensor


def _cut(rows: Sequence[TableRow], elements: int) -> _Cut:
    numels = int64([row.numel for row in rows])
    tiles = (numels + (elements - 1)) // elements
    row_of = torch.repeat_interleave(torch.arange(len(rows), device="cpu"), tiles)
    first = torch.cumsum(tiles, 0) - tiles
    begin = (torch.arange(len(row_of), device="cpu") - first[row_of]) * elements
    return _Cut(row_of, begin, torch.clamp(numels[row_of] - begin, max=elements))


def _tiles(rows: Sequence[TableRow], row_words: Sequence[int], layout_of: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tiles of rows of one dtype, a line each: see WORDS_OF_TILE."""
    cut = _cut(rows, launcher.tile_elements(dtype))
    lines = int64(
        [
            (row.param, row.momentum_buffer, 0, 0, word, row.group_word, layout)
            for row, word, layout in zip(rows, row_words, layout_of, strict=True)
        ]
    )[cut.row_of]
    _add_offsets(lines, cut, layout_at=6, itemsizes=(dtype.itemsize, dtype.itemsize))
    lines[:, 2] = cut.begin
    lines[:, 3] = cut.counts
    return lines


def _tail_tiles(
    rows: Sequence[TableRow], row_words: Sequence[int], layout_of: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The tiles of rows with a tail, of one kernel, a line each: see WORDS_OF_TAIL_TILE."""
    tails = [row.tail for row in rows if row.tail is not None]
    kernel = tails[0].kernel
    cut = _cut(rows, kernel.elements)
    lines = int64(
        [
            (row.param, row.momentum_buffer, tail.extra, tail.average, tail.momentum_scale, 0, 0, word, row.group_word,
             layout, tail.position)
            for row, tail, word, layout in zip(rows, tails, row_words, layout_of, strict=True)
        ]
    )[cut.row_of]  # fmt: skip
    dtypes = (dtype, kernel.momentum, kernel.extra, kernel.average)
    _add_offsets(lines, cut, layout_at=9, itemsizes=[stored.itemsize for stored in dtypes])
    lines[:, 5] = cut.begin
    lines[:, 6] = cut.counts
    return lines


def _add_offsets(lines: Tensor, cut: _Cut, layout_at: int, itemsizes: Sequence[int]) -> None:
    """Takes the addresses that lines begin with to the tiles' first elements; a strided row's are its own."""
    for place, itemsize in enumerate(itemsizes):
        is_flat_and_there = (lines[:, layout_at] < 0) & (lines[:, place] != 0)
        lines[:, place] += cut.begin * itemsize * is_flat_and_there


# --- the norm ----------------------------------------------------------------------------------------------------


def with_norm(made: Table, rows: Sequence[TableRow], groups: int, in_double: bool) -> tuple[Table, Norm]:
    """The table with what forms the norm behind the rest of its words.

    One launch for all rows that one kernel reads; where no row counts in a norm, one of a tile without elements.
    in_double: the norm is float64.
    """
    _, layout_of = layouts_of(rows)
    together: dict[NormKernel, list[int]] = {}
    for r, row in enumerate(rows):
        if row.tail is not None and row.tail.clips and row.numel:
            kernel = row.tail.kernel
            in_opmath = kernel.dtype == torch.float64
            together.setdefault(
                NormKernel(kernel.gradient, in_opmath, kernel.rounds_each, False, in_double), []
            ).append(r)
    tiles = []
    launches: list[PlannedLaunch] = []
    at = len(made.words)
    for norm_kernel, own in together.items():
        cut = _cut([rows[r] for r in own], norm_kernel.tile_elements)
        own_words = int64([(r, layout_of[r]) for r in own])[cut.row_of]
        group = int64([_group_of(rows[r]) for r in own])[cut.row_of]
        tiles.append(torch.column_stack([cut.begin, cut.counts, own_words, group]))
        is_strided = any(rows[r].layout is not None for r in own)
        launches.append(PlannedLaunch(norm_kernel._replace(strided=is_strided), own, at, len(group)))
        at += tiles[-1].numel()
    if not launches:
        tiles = [int64([(0, 0, 0, -1, 0)])]
        nothing = NormKernel(torch.float32, False, False, False, in_double)
        launches = [PlannedLaunch(nothing, [], at, 1)]
    every = torch.cat(tiles)
    # A group's sums lie together, in the order of its tiles.
    group = every[:, 4].clone()
    every[torch.argsort(group, stable=True), 4] = torch.arange(len(group), device="cpu")
    numbers = torch.bincount(group, minlength=groups)
    ranges = torch.column_stack([torch.cumsum(numbers, 0) - numbers, numbers])
    words = torch.cat([made.words, every.flatten(), ranges.flatten()])
    return made._replace(words=words), Norm(launches, len(made.words) + every.numel())


def _group_of(row: TableRow) -> int:
    assert row.tail is not None
    return row.tail.group
