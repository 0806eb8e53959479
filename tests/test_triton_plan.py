"""The host's side of the Triton backend, its kernel interpreted: what is launched, what lies in device memory, what is
brought there and when, what streams and graphs may count on, what a step keeps. Run by pytest; needs no GPU.

A step is read by one of two readers, csrc's plan or triton_kernels/plan.py, and both are held to the same here.
"""

from __future__ import annotations

import contextlib
import gc
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import triton_support
from plan_support import OPTIONS, launches, move_gradients, parameters, plan_of, twins
from strategies import assert_same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton_support import (
    CPU,
    DTYPES,
    Gpu,
    assert_equal,
    assert_same,
    both,
    buffers,
    kernels,
    launcher,
    refill_gradients,
    replay,
    set_scaler,
    warm,
)

from wd_fused import FusedSGD, functional, reference

pytestmark = pytest.mark.usefixtures("interpreted")
# Fixtures.
quickly_interpreted = triton_support.quickly_interpreted
interpreted = triton_support.interpreted
reader = triton_support.reader
in_python = triton_support.in_python
gpu = triton_support.gpu
preferred = triton_support.preferred

plan, table, sgd_kernel = kernels("plan"), kernels("table"), kernels("sgd_kernel")
FIRST, RUNNING = plan.FIRST, plan.RUNNING
FLAGS: int = 0xFFFF | plan.DECAYS | plan.NESTEROV | plan.MAXIMIZE
ADDRESS: int = sgd_kernel.ADDRESS.value
WORDS_OF_TILE, WORDS_OF_GROUP = table.WORDS_OF_TILE, sgd_kernel.WORDS_OF_GROUP


# --- what is launched --------------------------------------------------------------------------------------------


def test_a_step_is_one_launch_a_dtype_whatever_the_number_of_groups(reader: str, gpu: Gpu) -> None:
    floats, doubles = parameters(5, 5000, (3, 4)), parameters(9, dtype=torch.float64)
    halves, bfloats = parameters(17, dtype=torch.float16), parameters(33, 4097, dtype=torch.bfloat16)
    groups = [
        {"params": [floats[0], halves[0], bfloats[0]]},
        {"params": floats[1:] + doubles, "lr": 0.2},
        {"params": [bfloats[1]], "weight_decay": 0.0, "nesterov": True},
    ]
    optimizer = FusedSGD(groups, **OPTIONS, backend="triton")
    expected = [("float32", 3, 5), ("float16, torch", 1, 1), ("bfloat16, torch", 2, 3), ("float64", 1, 1)]
    for _ in range(3):
        gpu.launched.clear()
        optimizer.step()
        assert launches(optimizer) == [
            {"kernel": f"sgd_kernel<{name}>", "tensors": tensors, "tiles": tiles, "blocks": tiles}
            for name, tensors, tiles in expected
        ]
        assert gpu.launched == [(f"sgd_kernel<{name}>", tiles) for name, _, tiles in expected]
        move_gradients(floats + doubles + halves + bfloats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_that_of_dtype_numerics_and_layouts(reader: str, gpu: Gpu, dtype: torch.dtype) -> None:
    """Nothing lies between storage and opmath in float32 and float64; half precision has a kernel for each numerics."""
    name = str(dtype).removeprefix("torch.")
    for numerics in ("torch", "opmath"):
        for strided in (False, True):
            params = parameters(5, (4, 6), dtype=dtype)
            if strided:
                params[1].grad = torch.randn(6, 4, dtype=dtype).T
            optimizer = FusedSGD(params, **OPTIONS, backend="triton", numerics=numerics)
            optimizer.step()
            parts = [name, *([numerics] if dtype.itemsize == 2 else []), *(["strided"] if strided else [])]
            assert [launch["kernel"] for launch in launches(optimizer)] == [f"sgd_kernel<{', '.join(parts)}>"]


def test_neighbours_in_memory_and_dimensions_of_one_element_are_no_reason_for_more(reader: str, gpu: Gpu) -> None:
    """Views of one flat memory, one behind the other, in one launch; whatever the stride of a dimension of one."""
    memory, gradients = torch.randn(100), torch.randn(100)
    params = [nn.Parameter(memory[:40].view(8, 5)), nn.Parameter(memory[40:64].as_strided((4, 1, 6), (6, 5, 1)))]
    params.append(nn.Parameter(memory[64:]))
    params[0].grad, params[1].grad = gradients[:40].view(8, 5), gradients[40:64].as_strided((4, 1, 6), (6, 1, 1))
    params[2].grad = gradients[64:]
    ours, theirs, _ = both(params)
    for _ in range(3):
        ours.step()
        theirs.step()
        assert [launch["tensors"] for launch in launches(ours)] == [3]
        assert launches(ours)[0]["kernel"] == "sgd_kernel<float32>"
    assert_same(ours, theirs)


def test_parameters_that_share_memory_are_stepped_one_launch_after_another(reader: str, gpu: Gpu) -> None:
    def tied() -> list[nn.Parameter]:
        torch.manual_seed(3)
        base = torch.randn(5000)
        params = [nn.Parameter(base[:3000]), nn.Parameter(torch.randn(7)), nn.Parameter(base[2000:])]
        params += [nn.Parameter(torch.randn(3)), nn.Parameter(base[4900:])]
        for param in params:
            param.grad = torch.randn_like(param)
        return params

    params, theirs = tied(), tied()
    ours, reference_sgd = FusedSGD(params, **OPTIONS, backend="triton"), torch.optim.SGD(theirs, **OPTIONS)
    for _ in range(2):
        ours.step()
        reference_sgd.step()
        assert [launch["tensors"] for launch in launches(ours)] == [2, 1, 1, 1], "those that share none, then in order"
        assert [launch["tiles"] for launch in launches(ours)] == [2, 2, 2, 1]
        assert_same(ours, reference_sgd)
    assert [launch.rows for launch in gpu.tables[-1].launches] == [[1, 3], [0], [2], [4]]


def test_nothing_is_launched_nor_brought_where_no_parameter_has_a_gradient_or_an_element(reader: str, gpu: Gpu) -> None:
    params = parameters(4, 0, 5)
    ours, _, _ = both(params)
    params[0].grad = params[2].grad = None
    ours.step()
    assert launches(ours) == gpu.launched == gpu.taken() == []
    move_gradients(params)
    params[2].grad = None
    ours.step()
    assert [launch["tensors"] for launch in launches(ours)] == [2], "those with elements"
    params[0].grad = None
    gpu.taken()
    ours.step()
    assert launches(ours) == gpu.taken() == [] and len(gpu.launched) == 1


def test_a_launch_without_gradients_for_any_of_its_rows_is_left_out(reader: str, gpu: Gpu) -> None:
    params = parameters(4) + parameters(5, dtype=torch.float64)
    ours, theirs, copies = both(params)
    for missing in (None, 0, 1, None):
        move_gradients(params, copies)
        if missing is not None:
            params[missing].grad = copies[missing].grad = None
        gpu.launched.clear()
        ours.step()
        theirs.step()
        names = [f"sgd_kernel<{name}>" for i, name in enumerate(("float32", "float64")) if i != missing]
        assert [launch["kernel"] for launch in launches(ours)] == [name for name, _ in gpu.launched] == names
        assert_same(ours, theirs)


# --- what lies in device memory ----------------------------------------------------------------------------------


class Tile(NamedTuple):
    param: int
    momentum_buffer: int
    begin: int
    count: int
    row_word: int
    group_words: int
    layout: int


def tiles_of(made: Any) -> list[Tile]:
    words = made.words[: made.layouts_at].view(-1, WORDS_OF_TILE)
    return [Tile(*line) for line in words.tolist()]


def addresses_in(tensor: Tensor) -> Tensor:
    """Of every element, in the order of its indices."""
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [1] * tensor.dim()
        shape[d] = size
        offsets += (torch.arange(size) * stride).view(shape)
    return tensor.data_ptr() + tensor.element_size() * offsets.flatten()


def what_a_tile_steps(made: Any, words: list[int], tile: Tile, itemsize: int) -> Tensor:
    """Where its elements of parameter, gradient and momentum buffer lie, a line each, as sgd_kernel.py defines it."""
    gradient = words[tile.row_word] & ADDRESS
    within = torch.arange(tile.count)
    if tile.layout < 0:
        p, g, b = within, tile.begin + within, within
    else:
        layouts = made.words[made.layouts_at :].tolist()
        dims = [layouts[tile.layout + 1 + 4 * d : tile.layout + 5 + 4 * d] for d in range(layouts[tile.layout])]
        p, g, b = torch.zeros(3, tile.count, dtype=torch.int64)
        index = tile.begin + within
        for size, *strides in dims:
            for offset, stride in zip((p, g, b), strides, strict=True):
                offset += index % size * stride
            index //= size
        assert not index.any()
    of_buffer = tile.momentum_buffer + itemsize * b if tile.momentum_buffer else torch.zeros_like(b)
    return torch.stack([tile.param + itemsize * p, gradient + itemsize * g, of_buffer], 1)


def assert_words_tell_of_every_element_once(gpu: Gpu, optimizer: FusedSGD) -> None:
    made = gpu.tables[-1]
    tiles, words = tiles_of(made), gpu.words
    rows = [(g, param) for g, group in enumerate(optimizer.param_groups) for param in group["params"]]
    stepped = 0
    for launch in made.launches:
        of_launch = tiles[launch.at // WORDS_OF_TILE :][: launch.tiles]
        stepped += len(of_launch)
        assert sorted({tile.row_word for tile in of_launch}) == sorted(launch.rows)
        for r in launch.rows:
            g, param = rows[r]
            own = [tile for tile in of_launch if tile.row_word == r]
            elements = 8192 // param.element_size()
            assert [tile.begin for tile in own] == list(range(0, param.numel(), elements))
            assert [tile.count for tile in own] == [min(elements, param.numel() - tile.begin) for tile in own]
            group = words[own[0].group_words : own[0].group_words + WORDS_OF_GROUP]
            assert {tile.group_words for tile in own} == {own[0].group_words}
            assert [*group[:-1], group[-1] & FLAGS] == words_of(optimizer.param_groups[g], param.dtype)
            buffer = optimizer.state[param].get("momentum_buffer")
            if param.grad is None:
                assert words[r] == 0
                continue
            assert words[r] & ~ADDRESS in ((FIRST, RUNNING) if buffer is not None else (0,))
            told = torch.cat([what_a_tile_steps(made, words, tile, param.element_size()) for tile in own])
            of_param = addresses_in(param)
            of_buffer = torch.zeros_like(of_param) if buffer is None else addresses_in(buffer)
            expected = torch.stack([of_param, addresses_in(param.grad), of_buffer], 1)
            assert torch.equal(told[told[:, 0].argsort()], expected[of_param.argsort()])
    assert stepped == len(tiles)


def words_of(group: dict[str, Any], dtype: torch.dtype) -> list[int]:
    """A group's words, all of its hyperparameters numbers."""
    opmath, integer = (torch.float64, torch.int64) if dtype == torch.float64 else (torch.float32, torch.int32)
    values = [-group["lr"], group["weight_decay"], group["momentum"], 1 - group["dampening"]]
    flags = (group["weight_decay"] != 0) << 25 | bool(group["nesterov"]) << 26 | bool(group["maximize"]) << 27
    words = [torch.tensor(value, dtype=torch.float64).to(opmath).view(integer).item() for value in values]
    return [*([word & 0xFFFFFFFF for word in words] if opmath == torch.float32 else words), flags]


def misaligned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An element off the alignment of a vector."""
    return torch.randn(math.prod(shape) + 1, dtype=dtype)[1:].view(shape)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_words_tell_of_every_element_once(reader: str, gpu: Gpu, momentum: float) -> None:
    """Whatever the sizes (none, one, a tile, more), layouts and alignments, dtypes and groups."""
    groups = []
    for dtype in DTYPES:
        whole = 8192 // dtype.itemsize
        params = parameters(1, 0, whole, whole + 1, 2 * whole + 7, (), (3, 1, 2), dtype=dtype)
        params += [nn.Parameter(misaligned(5, 7, dtype=dtype)), nn.Parameter(torch.randn(5, 9, dtype=dtype)[:, 1:8:2])]
        params.append(nn.Parameter(torch.randn(4, 3, 2, 5, dtype=dtype).to(memory_format=torch.channels_last)))
        for param in params[-3:]:
            param.grad = torch.randn(param.shape, dtype=dtype)
        for shape, view in (
            ((5, 30), lambda t: t.T),  # transposed
            ((1, 40), lambda t: t.expand(30, 40)),  # one row again and again
            ((70, 80), lambda t: t[::2, ::2]),  # gaps, and more than a tile
            ((2, 3, 4, 5), lambda t: t.permute(2, 0, 3, 1)),
        ):
            gradient = view(torch.randn(shape, dtype=dtype))
            params.append(nn.Parameter(torch.randn(gradient.shape, dtype=dtype)))
            params[-1].grad = gradient
        params[0].grad = None
        groups.append({"params": params, "lr": 0.1 + dtype.itemsize})
    halves = [groups[2]["params"].pop(), groups[3]["params"].pop()]
    groups.append({"params": [*parameters(3, dtype=torch.float64), *halves, *parameters(3)], "maximize": True})
    params = [param for group in groups for param in group["params"]]
    gpu.is_idle = True
    optimizer = FusedSGD(groups, lr=0.25, momentum=momentum, dampening=0.125, weight_decay=1e-3, backend="triton")
    optimizer.step()
    assert_words_tell_of_every_element_once(gpu, optimizer)
    params[0].grad = torch.randn_like(params[0])
    params[5].grad = None
    optimizer.param_groups[1] |= {"lr": 1e-40, "weight_decay": 0.0}
    optimizer.step()
    assert_words_tell_of_every_element_once(gpu, optimizer)
    for group in optimizer.param_groups:
        group |= {"nesterov": momentum != 0, "dampening": 0.0}
    optimizer.step()
    assert_words_tell_of_every_element_once(gpu, optimizer)


def test_a_buffer_of_other_strides_is_laid_out_by_its_own(reader: str, gpu: Gpu) -> None:
    params = parameters((6, 5), (4, 3))
    ours, theirs, _ = both(params)
    for optimizer in (ours, theirs):
        first = optimizer.param_groups[0]["params"][0]
        torch.manual_seed(1)
        optimizer.state[first]["momentum_buffer"] = torch.randn(5, 6).T
        optimizer.step()
        optimizer.step()
    assert_words_tell_of_every_element_once(gpu, ours)
    assert_same(ours, theirs)


# Beyond 2**31 elements


def test_tiles_of_a_row_of_more_than_2_to_the_31_elements() -> None:
    """And of one behind it: their places are not 32 bits wide."""
    numel, param, buffer = 2**31 + 5000, 2**46 + 2, 2**47 + 4
    storage = table.DTYPES.index(torch.bfloat16)
    rows = [
        table.TableRow(param, buffer, numel, storage, 2, None, False),
        table.TableRow(64, 0, 10, storage, 2, [(10, 2**33, 1, 2**40)], False),
    ]
    made = table.table(rows, "torch")
    (launch,) = made.launches
    assert launch.tiles == math.ceil(numel / 4096) + 1
    words = made.words[: made.layouts_at].view(-1, WORDS_OF_TILE)
    own = words[:-1]
    begins = torch.arange(launch.tiles - 1) * 4096
    assert torch.equal(own[:, 2], begins)
    assert torch.equal(own[:, 0], param + 2 * begins) and torch.equal(own[:, 1], buffer + 2 * begins)
    assert int(own[:, 3].sum()) == numel and own[:-1, 3].unique().tolist() == [4096]
    assert own[:, 4].unique().tolist() == [0] and own[:, 6].unique().tolist() == [-1]
    assert words[-1].tolist() == [64, 0, 0, 10, 1, 2, 0]
    assert made.words[made.layouts_at :].tolist() == [1, 10, 2**33, 1, 2**40]


@pytest.fixture
def reserved() -> Callable[[], Tensor]:
    """64 GiB of addresses, of which only what is touched takes memory: a tensor of 2**34 floats."""

    def reserve() -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        try:
            return torch.frombuffer(mmap.mmap(-1, 2**36, flags=flags), dtype=torch.float32)
        except OSError as error:
            pytest.skip(f"64 GiB of addresses cannot be had here: {error}")

    return reserve


def test_the_last_tile_of_more_than_2_to_the_31_elements_is_stepped(reserved: Callable[[], Tensor]) -> None:
    """By the kernel itself: the tiles before it would take the interpreter an hour."""
    numel = 2**31 + 3000
    params, gradients, momenta = (reserved()[1 : 1 + numel] for _ in range(3))
    values = [torch.randn(3002) for _ in range(3)]
    for tensor, value in zip((params, gradients, momenta), values, strict=True):
        tensor[-3002:] = value
    row = table.TableRow(params.data_ptr(), momenta.data_ptr(), numel, 0, 1, None, False)
    made = table.table([row], "torch")
    words = torch.tensor([gradients.data_ptr() | RUNNING, *words_of({**GROUP, "lr": 0.5}, torch.float32)])
    (launch,) = made.launches
    run = launcher.launcher_of(launch.kernel, CPU, 2)
    first = made.words.data_ptr() + (launch.tiles - 2) * WORDS_OF_TILE * 8
    run(first, 0, words.data_ptr(), 0, 0, stream=0)
    p, g, b = values
    reference.sgd([p[2:]], [g[2:]], [b[2:]], lr=0.5, momentum=0.9)
    for ours, expected in zip((params, gradients, momenta), (p, g, b), strict=True):
        assert_same_bits(ours[-3002:], expected, "the last elements")


GROUP = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}


def test_strides_that_reach_past_2_to_the_31_elements(reader: str, reserved: Callable[[], Tensor]) -> None:
    strides = ((2**32 + 8, 1), (1, 2**31 + 3), (2**31 - 1, 2**32))
    ours, theirs = ([nn.Parameter(reserved().as_strided((3, 4), each)) for each in strides] for _ in range(2))
    for mine, other, each in zip(ours, theirs, (strides[1], strides[2], strides[0]), strict=True):
        values, gradient = torch.randn(3, 4), torch.randn(3, 4)
        for param in (mine, other):
            param.detach().copy_(values)
            param.grad = reserved().as_strided((3, 4), each).copy_(gradient)
    fused, expected = FusedSGD(ours, **OPTIONS, backend="triton"), torch.optim.SGD(theirs, **OPTIONS)
    for _ in range(2):
        fused.step()
        expected.step()
    assert_same(fused, expected)


# --- what is brought to the device, and when ---------------------------------------------------------------------


def test_a_warm_step_brings_nothing(reader: str, gpu: Gpu) -> None:
    params = parameters(3000, 5) + parameters(8, dtype=torch.float64)
    ours, theirs, copies = both(params)
    for step in range(5):
        refill_gradients(params, copies)
        ours.step()
        theirs.step()
        # The second step is no first one any more: it updates the momentum buffers.
        assert gpu.taken() == [["table", "words"], ["words"], [], [], []][step]
    assert gpu.kernels == ["sgd_kernel<float32>", "sgd_kernel<float64>"]
    assert_same(ours, theirs)


def test_words_alone_are_brought_when_gradients_move_or_come_and_go(reader: str, gpu: Gpu) -> None:
    params = parameters(3000, 5, (8, 9))
    ours, theirs, copies = both(params)
    kept = []
    for _ in range(2):
        ours.step()
        theirs.step()
    gpu.taken()

    def brought_by_a_step() -> list[str]:
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
        return gpu.taken()

    for _ in range(3):
        kept.append(move_gradients(params, copies))
        assert brought_by_a_step() == ["words"]
        assert brought_by_a_step() == []
    gradients = params[1].grad, copies[1].grad
    params[1].grad = copies[1].grad = None
    assert brought_by_a_step() == ["words"]
    assert brought_by_a_step() == []
    params[1].grad, copies[1].grad = gradients
    assert brought_by_a_step() == ["words"]
    assert brought_by_a_step() == []
    assert len(gpu.tables) == 1 and len(gpu.kernels) == 1


def test_hyperparameters_that_change_bring_words_and_never_ask_for_another_kernel(reader: str, gpu: Gpu) -> None:
    params = parameters(30, 5) + parameters(6, dtype=torch.bfloat16)
    optimizer = FusedSGD(
        [{"params": params[:1]}, {"params": params[1:]}], lr=0.1, momentum=0.9, weight_decay=0.01, backend="triton"
    )
    expected = [twin.detach() for twin in twins(params)]
    momenta: list[Tensor | None] = [None] * 3

    def brought_by_a_step() -> list[str]:
        optimizer.step()
        for i, param in enumerate(params):
            group = optimizer.param_groups[min(i, 1)]
            names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
            options = {name: v.item() if isinstance(v := group[name], Tensor) else v for name in names}
            own = [momenta[i]]
            reference.sgd([expected[i]], [param.grad], own, **options)
            momenta[i] = own[0]
        assert_equal(params, expected)
        return gpu.taken()

    for _ in range(2):
        brought_by_a_step()
    kernels = list(gpu.kernels)
    group = optimizer.param_groups[1]
    for changed in (
        {"lr": 0.05},
        {"lr": 3},
        {"momentum": 0.5},
        {"weight_decay": 0.0},
        {"weight_decay": 1e-3, "dampening": 0.5},
        {"dampening": 0.0, "nesterov": True},
        {"maximize": True},
        {"momentum": 0.0, "nesterov": False},
        {"momentum": 0.9},
        {"lr": torch.tensor(0.2)},
        {"lr": torch.tensor(0.3)},
        {"weight_decay": torch.tensor(0.1)},
        {"lr": 0.1},
    ):
        group |= changed
        assert brought_by_a_step() == ["words"], changed
        assert brought_by_a_step() == [], changed
    assert gpu.kernels == kernels and len(gpu.tables) == 1


def test_hyperparameters_set_to_equal_values_bring_nothing(reader: str, gpu: Gpu) -> None:
    params = parameters(30)
    ours, theirs, _ = both(params, dampening=0.25)
    equal = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01, "nesterov": 0, "maximize": 0}
    for step in range(4):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0] |= {name: float(str(value)) for name, value in equal.items()}
            optimizer.step()
        assert step < 2 or gpu.taken() == []
        gpu.taken()
    assert_same(ours, theirs)


def test_zeros_of_either_sign_are_told_apart(reader: str) -> None:
    """They are equal, and step apart: p + 0 * g is 0, p - 0 * g is -0 for p = -0 and g = 1."""
    params = [nn.Parameter(torch.tensor([-0.0, 0.0]))]
    params[0].grad = torch.tensor([1.0, 1.0])
    ours, theirs, copies = both(params, momentum=0.0, weight_decay=0.0, lr=0.0)
    for lr in (0.0, -0.0, 0.0):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        assert_same(ours, theirs)
        for param in (params[0], copies[0]):
            param.detach().copy_(torch.tensor([-0.0, 0.0]))


def test_a_buffer_or_a_layout_that_is_new_brings_the_table(reader: str, gpu: Gpu) -> None:
    params = parameters((6, 5), (4, 3), 7)
    params[2].grad = None
    ours, theirs, copies = both(params)

    def brought_by_a_step() -> list[str]:
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
        return gpu.taken()

    assert brought_by_a_step() == ["table", "words"]
    assert brought_by_a_step() == ["words"]
    kept = []
    for transposed in (True, True, False):
        gradient = torch.randn(5, 6).T if transposed else torch.randn(6, 5)
        kept += [params[0].grad, copies[0].grad]
        params[0].grad, copies[0].grad = gradient, gradient.clone(memory_format=torch.preserve_format)
        assert brought_by_a_step() == (["words"] if len(kept) == 4 else ["table", "words"])
        assert [launch["kernel"] for launch in launches(ours)] == [
            "sgd_kernel<float32, strided>" if transposed else "sgd_kernel<float32>"
        ]
    params[2].grad, copies[2].grad = torch.ones(7), torch.ones(7)
    assert brought_by_a_step() == ["table", "words"], "of the new momentum buffer"
    assert brought_by_a_step() == ["words"]
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3)))
        optimizer.param_groups[0]["params"][-1].grad = torch.ones(3)
    assert brought_by_a_step() == ["table", "words"], "of a new plan"


def test_what_is_at_work_is_not_written_into(reader: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch on another stream, or a graph, may have yet to read the words of the step before."""
    params = parameters(30)
    ours, _, _ = both(params)
    seen: list[tuple[Tensor, Tensor]] = []
    upload = launcher.upload

    def watched(words: Tensor, device: torch.device) -> Tensor:
        seen.append((upload(words, device), words.clone()))
        return seen[-1][0]

    monkeypatch.setattr(launcher, "upload", watched)
    kept = []
    for _ in range(4):
        ours.step()
        kept.append(move_gradients(params))
    assert len({memory.data_ptr() for memory, _ in seen}) == 5
    assert all(torch.equal(memory, words) for memory, words in seen)


# --- streams and graphs ------------------------------------------------------------------------------------------


def test_on_another_stream_words_are_brought_anew_and_the_tables_use_is_noted(reader: str, gpu: Gpu) -> None:
    """Gpu checks every launch: it must have been told of the streams that read the memory."""
    params = parameters(30)
    ours, theirs, copies = both(params)
    for _ in range(2):
        ours.step()
        theirs.step()
    gpu.taken()
    for stream, expected in ((2, ["words"]), (2, []), (1, ["words"]), (3, ["words"]), (3, [])):
        gpu.stream = stream
        before = gpu.noted
        refill_gradients(params, copies)
        ours.step()
        theirs.step()
        assert gpu.taken() == expected
        assert gpu.noted == before + len(expected)
    gpu.stream = 2
    move_gradients(params, copies)
    ours.step()
    theirs.step()
    assert gpu.taken() == ["words"]
    assert_same(ours, theirs)
    assert len(gpu.tables) == 1


@pytest.mark.parametrize("stream", [1, 2], ids=["the stream of the steps before", "another stream"])
def test_a_step_can_be_captured_and_replayed_between_steps(reader: str, gpu: Gpu, stream: int) -> None:
    params = parameters(3000, 5)
    lr = torch.tensor(0.1)
    ours, theirs, copies = both(params, lr=lr)
    theirs.param_groups[0]["lr"] = 0.1

    def step_theirs() -> None:
        theirs.param_groups[0]["lr"] = lr.item()
        theirs.step()
        assert_same(ours, theirs)

    for _ in range(3):
        ours.step()
        step_theirs()
    gpu.taken()
    with gpu.capture(stream) as graph:
        ours.step()
    assert gpu.taken() == ["words"]
    assert_same(ours, theirs)
    refill_gradients(params, copies)
    ours.step()
    step_theirs()
    assert gpu.taken() == ["words"], "the captured copy is made at replays"
    for value in (0.1, 0.3):
        lr.fill_(value)
        refill_gradients(params, copies)
        replay(graph)
        step_theirs()
        refill_gradients(params, copies)
        ours.step()
        step_theirs()
        assert gpu.taken() == []
    kept = move_gradients(params, copies)
    ours.step()
    step_theirs()
    for gradient, mine, other in zip(kept[::2], params, copies, strict=True):
        other.grad = gradient.copy_(torch.randn_like(mine))  # those that the graph has captured
    replay(graph)
    step_theirs()
    assert len(gpu.tables) == 1


def test_two_captures_have_words_of_their_own(reader: str, gpu: Gpu) -> None:
    params = parameters(30)
    ours, theirs, copies = both(params)
    for _ in range(2):
        ours.step()
        theirs.step()
    gpu.taken()
    graphs = []
    for _ in range(2):
        with gpu.capture(2) as graph:
            ours.step()
            ours.step()
        graphs.append(graph)
    assert gpu.taken() == ["words"] * 4
    for graph in (*graphs, graphs[0]):
        refill_gradients(params, copies)
        replay(graph)
        theirs.step()
        theirs.step()
        assert_same(ours, theirs)


def test_a_table_made_in_a_capture_is_not_counted_on_outside_of_it(reader: str, gpu: Gpu) -> None:
    params = parameters(30, (4, 5))
    ours, theirs, copies = both(params, momentum=0.0)
    with gpu.capture(2) as graph:
        ours.step()
    assert gpu.taken() == ["table", "words"]
    assert_same(ours, theirs)
    for _ in range(2):
        ours.step()
        theirs.step()
    assert gpu.taken() == ["table", "words"]
    assert_same(ours, theirs)
    replay(graph)
    theirs.step()
    assert_same(ours, theirs)
    kept = [params[1].grad]
    params[1].grad, copies[1].grad = torch.randn(5, 4).T, torch.zeros(4, 5)
    copies[1].grad.copy_(params[1].grad)
    with gpu.capture(2) as strided:
        ours.step()
    assert gpu.taken() == ["table", "words"]
    with gpu.capture(2) as again:
        ours.step()
    assert gpu.taken() == ["table", "words"], "nor in another capture"
    ours.step()
    theirs.step()
    assert gpu.taken() == ["table", "words"]
    for each in (strided, again):
        replay(each)
        theirs.step()
        assert_same(ours, theirs)
    assert kept


def test_a_first_step_with_momentum_cannot_be_captured_and_says_so(reader: str, gpu: Gpu) -> None:
    params = parameters(4, 5)
    ours, theirs, _ = both(params)
    versions = [param._version for param in params]
    for _ in range(2):
        with (
            gpu.capture(2) as graph,
            pytest.raises(
                RuntimeError,
                match=r"group 0, parameter 0 has no momentum buffer yet.*call step\(\) once before the capture",
            ),
        ):
            ours.step()
        assert graph == gpu.taken() == gpu.launched == [] and not any(ours.state.values())
        assert [param._version for param in params] == versions
        assert_same(ours, theirs)
    for _ in range(2):
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_a_parameter_that_meets_its_first_gradient_in_a_capture_is_named(reader: str, gpu: Gpu) -> None:
    params = parameters(4, 5)
    params[1].grad = None
    ours, theirs, copies = both(params)
    ours.step()
    theirs.step()
    move_gradients(params, copies)
    with gpu.capture(2) as graph, pytest.raises(RuntimeError, match="group 0, parameter 1 has no momentum buffer yet"):
        ours.step()
    assert graph == [] and "momentum_buffer" not in ours.state.get(params[1], {})
    assert_same(ours, theirs)
    for _ in range(2):
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
    with gpu.capture(2) as graph:
        ours.step()
    replay(graph)
    theirs.step()
    assert_same(ours, theirs)


def test_the_functional_form_can_be_captured_but_for_a_first_step(gpu: Gpu) -> None:
    """Its plan is gone when the graph is replayed."""
    params, gradients = [torch.randn(300), torch.randn(4, 5)], [torch.randn(300), torch.randn(5, 4).T]
    expected = [param.clone() for param in params]
    momenta: list[Tensor | None] = [None, None]
    with gpu.capture(2) as graph, pytest.raises(RuntimeError, match=r"tensor 0|parameter 0"):
        functional.sgd(params, gradients, momenta, lr=0.1, momentum=0.9, backend="triton")
    assert graph == [] and momenta == [None, None]
    assert_equal(params, expected)
    their_momenta: list[Tensor | None] = [None, None]
    functional.sgd(params, gradients, momenta, lr=0.1, momentum=0.9, backend="triton")
    reference.sgd(expected, gradients, their_momenta, lr=0.1, momentum=0.9)
    with gpu.capture(2) as graph:
        functional.sgd(params, gradients, momenta, lr=0.1, momentum=0.9, backend="triton")
    assert_equal(params, expected)
    for _ in range(2):
        replay(graph)
        reference.sgd(expected, gradients, their_momenta, lr=0.1, momentum=0.9)
        assert_equal([*params, *momenta], [*expected, *their_momenta])
    assert gpu.taken() == ["table", "words"] * 2


# --- what fails on the way there ---------------------------------------------------------------------------------


def fail_once(gpu: Gpu, what: str, nth: int = 1) -> None:
    left = [nth]

    def before(kind: str) -> None:
        left[0] -= kind == what
        if left[0] == 0:
            left[0] = -1
            raise torch.OutOfMemoryError(f"planted in {what}")

    gpu.before = before


@pytest.mark.parametrize("what", ["table", "words", "kernel", "launch"])
@pytest.mark.parametrize("when", ["first step", "warm", "moved gradients", "new layout", "new buffer", "new lr"])
def test_what_fails_before_the_first_launch_leaves_nothing_behind(reader: str, gpu: Gpu, what: str, when: str) -> None:
    params = parameters(4, (3, 5), 6)
    params[2].grad = None
    ours, theirs, copies = both(params)

    def step_both() -> None:
        ours.step()
        theirs.step()
        assert_same(ours, theirs)

    for _ in range(0 if when == "first step" else 3):
        step_both()
    kept = []
    if when == "moved gradients":
        kept = move_gradients(params[:2], copies[:2])
    if when == "new layout":
        params[1].grad = torch.randn(5, 3).T
        copies[1].grad = params[1].grad.clone()
    if when == "new buffer":
        params[2].grad, copies[2].grad = torch.ones(6), torch.ones(6)
    if when == "new lr":
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.3
    gpu.taken()
    versions = [param._version for param in params]
    fail_once(gpu, what)
    brings = {"first step": ("table", "words"), "new layout": ("table", "words"), "new buffer": ("table", "words")}
    fails = what == "launch" or what in brings.get(when, () if when == "warm" else ("words",))
    fails |= what == "kernel" and when in brings
    with pytest.raises(torch.OutOfMemoryError, match="planted") if fails else contextlib.nullcontext():
        ours.step()
    if fails:
        assert_same(ours, theirs)
        assert [param._version for param in params] == versions
        assert len(buffers(ours)) == len(buffers(theirs))
        ours.step()
    theirs.step()
    assert_same(ours, theirs)
    for _ in range(2):
        step_both()
    gpu.taken()
    step_both()
    assert gpu.taken() == [] and kept is not None


def test_a_first_step_that_failed_gives_its_momentum_buffers_back(
    in_python: None, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(4, 5)
    ours, _, _ = both(params)
    made: list[weakref.ref[Tensor]] = []
    empty_like = torch.empty_like

    def noted(*arguments: Any) -> Tensor:
        buffer = empty_like(*arguments)
        made.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(torch, "empty_like", noted)
    fail_once(gpu, "words")
    with contextlib.suppress(torch.OutOfMemoryError):
        ours.step()
    assert [buffer() for buffer in made] == [None, None]


def test_a_step_that_failed_can_be_followed_by_another_one(reader: str, gpu: Gpu) -> None:
    """With other gradients, on another stream, in a capture: what was not brought is not counted on."""
    params = parameters(4, 5)
    ours, theirs, copies = both(params)
    for _ in range(3):
        ours.step()
        theirs.step()
    first = [(mine.grad, other.grad) for mine, other in zip(params, copies, strict=True)]
    kept = move_gradients(params, copies)
    fail_once(gpu, "words")
    with pytest.raises(torch.OutOfMemoryError):
        ours.step()
    for mine, other, gradients in zip(params, copies, first, strict=True):
        mine.grad, other.grad = gradients  # those of the step before the one that failed
    ours.step()
    theirs.step()
    assert_same(ours, theirs)
    fail_once(gpu, "words")
    gpu.stream = 2
    with pytest.raises(torch.OutOfMemoryError):
        ours.step()
    fail_once(gpu, "words")
    with pytest.raises(torch.OutOfMemoryError), gpu.capture(3):
        ours.step()
    with gpu.capture(3) as graph:
        ours.step()
    for go in (lambda: replay(graph), ours.step):
        go()
        theirs.step()
        assert_same(ours, theirs)
    assert kept


# --- both readers: what they keep, and for how long --------------------------------------------------------------


@pytest.mark.parametrize("has_one_for_torch", [False, True])
def test_two_threads_in_one_optimizer_are_told(reader: str, gpu: Gpu, preferred: None, has_one_for_torch: bool) -> None:
    """The second one; the first one's step is none the worse for it."""
    params = parameters(30, (3, 4))
    if has_one_for_torch:
        params += parameters(5, dtype=torch.complex64)
    copies = twins(params)
    ours, theirs = FusedSGD(params, **OPTIONS), torch.optim.SGD(copies, **OPTIONS)
    with pytest.warns(UserWarning, match="complex64") if has_one_for_torch else contextlib.nullcontext():
        ours.step()
    theirs.step()
    ours.step()
    theirs.step()
    kept = move_gradients(params, copies)
    versions = [param._version for param in params]
    entered, may_go, raised = threading.Event(), threading.Event(), []

    def before(what: str) -> None:
        entered.set()
        assert may_go.wait(60)

    def step() -> None:
        try:
            ours.step()
        except BaseException as error:
            raised.append(error)

    gpu.before = before
    thread = threading.Thread(target=step)
    thread.start()
    try:
        assert entered.wait(60)
        gpu.before = lambda what: None
        with pytest.raises(RuntimeError, match=r"step\(\) of this optimizer is already running"):
            ours.step()
    finally:
        may_go.set()
        thread.join()
    assert raised == [] and kept
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    for _ in range(2):
        theirs.step()
        assert_same(ours, theirs)
        ours.step()


def test_nothing_of_a_step_stays_alive(reader: str) -> None:
    params = parameters(10, (3, 4))
    lr, weight_decay = torch.tensor(0.1), torch.tensor(0.2)
    optimizer = FusedSGD(params, **OPTIONS | {"lr": lr, "weight_decay": weight_decay}, backend="triton")
    for _ in range(3):
        optimizer.step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    words = [weakref.ref(each) for each in (lr, weight_decay, optimizer.grad_scale)]  # last_step_skipped has the other
    gradients = [weakref.ref(param.grad.untyped_storage()) for param in params]  # type: ignore[union-attr]
    optimizer.step()
    set_scaler(optimizer)
    del lr, weight_decay
    optimizer.param_groups[0] |= {"lr": 0.1, "weight_decay": 0.2}
    optimizer.defaults |= {"lr": 0.1, "weight_decay": 0.2}
    for param in params:
        param.grad = None
    assert [word() for word in words] == [None] * 3
    assert [gradient() for gradient in gradients] == [None, None]


@pytest.mark.parametrize("fails_in", ["words", "launch"])
def test_nothing_of_a_step_that_failed_stays_alive(reader: str, gpu: Gpu, fails_in: str) -> None:
    ours, _, params, _ = warm()
    lr = torch.tensor(0.1)
    ours.param_groups[0]["lr"] = lr
    move_gradients(params)
    kept = [weakref.ref(lr), *(weakref.ref(param.grad.untyped_storage()) for param in params)]
    fail_once(gpu, fails_in)
    try:
        ours.step()
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("no error")
    ours.param_groups[0]["lr"] = 0.1
    del lr
    for param in params:
        param.grad = None
    assert [each() for each in kept] == [None] * 3


def test_a_step_that_another_tensor_ends_holds_no_gradient(reader: str) -> None:
    ours, _, params, _ = warm()
    move_gradients(params)
    params[1].grad = torch.ones(3, 4).to_sparse()
    storage = weakref.ref(params[0].grad.untyped_storage())  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"parameter 1: .* its gradient has layout"):
        ours.step()
    params[0].grad = None
    assert storage() is None


def test_an_optimizer_goes_with_its_last_reference(reader: str) -> None:
    """The learning rate refers to it: a plan that held that would close a cycle."""
    ours, _, params, _ = warm()
    lr: Any = torch.tensor(0.1)
    lr.owner = ours
    ours.param_groups[0]["lr"] = lr
    ours.step()
    gone = [weakref.ref(ours), weakref.ref(params[0]), weakref.ref(ours.state[params[0]]["momentum_buffer"])]
    del ours, params, lr, _
    gc.collect()
    assert [each() for each in gone] == [None] * 3


class Makers(TorchFunctionMode):
    """Notes what makes tensors, as a default device would have a say in it."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {func.__name__} & {"empty_like", "tensor", "arange", "cat", "frombuffer", "cumsum"}
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "inference": torch.inference_mode,
    "a default device": lambda: torch.device("meta"),
    "a listener": Makers,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_modes_have_no_say_in_what_a_step_makes(reader: str, gpu: Gpu, mode: Callable[[], Any]) -> None:
    params = parameters(10, (3, 4))
    ours, theirs, copies = both(params)
    entered = mode()
    for _ in range(3):
        with entered:
            ours.step()
        theirs.step()
        assert_same(ours, theirs)
        move_gradients(params, copies)
    params[1].grad = torch.randn(4, 3).T
    copies[1].grad = params[1].grad.clone()
    with mode():
        ours.step()
    theirs.step()
    assert_same(ours, theirs)
    assert [type(buffer) for buffer in buffers(ours)] == [Tensor] * 2
    assert not any(buffer.is_inference() or buffer.requires_grad for buffer in buffers(ours))
    assert getattr(entered, "seen", set()) == set()


# --- the reader in Python ----------------------------------------------------------------------------------------


@pytest.fixture(params=["with TensorGuards", "without TensorGuards"])
def guards(request: pytest.FixtureRequest, in_python: None, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without TensorGuards":
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    return str(request.param)


@pytest.fixture
def whole_readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each step that looks at every tensor by itself."""
    seen: list[int] = []
    read_rows = plan.StepPlan.read_rows

    def counted(*arguments: Any) -> None:
        seen.append(1)
        read_rows(*arguments)

    monkeypatch.setattr(plan.StepPlan, "read_rows", counted)
    return seen


def test_without_tensor_guards_each_tensor_is_asked(in_python: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(3), torch.zeros(3, 4)]
    likeness = plan._Likeness(tensors)
    assert "TensorGuards" in repr(likeness._check), "else the tests without it show nothing of their own"
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    alone = plan._Likeness(tensors)
    assert "TensorGuards" not in repr(alone._check)
    for each in (likeness, alone):
        assert each.holds([torch.ones(3), torch.ones(3, 4)])
        for other in (
            torch.zeros(4, 3).T,
            torch.zeros(3, 4, dtype=torch.float64),
            torch.zeros(12),
            nn.Parameter(tensors[1]),
        ):
            assert not each.holds([tensors[0], other])


def test_steps_alike_are_remembered_whichever_gradients_are_missing(guards: str, whole_readings: list[int]) -> None:
    params = parameters(30, 5, (3, 4))
    ours, theirs, copies = both(params)
    patterns = [(), (0,), (1, 2), (2,)]
    for turn in range(8):
        for missing in patterns:
            kept = move_gradients(params, copies)
            for i in missing:
                params[i].grad = copies[i].grad = None
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["lr"] *= 0.9
                optimizer.step()
            assert_same(ours, theirs)
            del kept
        if turn == 1:
            whole_readings.clear()
    assert whole_readings == []


def test_steps_alike_are_forgotten_with_the_table_that_they_were_of(guards: str) -> None:
    """A gradient lies in another way in a step that lacks another one, and as before in the next."""
    params = parameters((3, 4), 5)
    ours, theirs, copies = both(params)
    for step in range(9):
        move_gradients(params, copies)
        if step % 3 == 2:
            params[0].grad = torch.randn(4, 3).T
            copies[0].grad = params[0].grad.clone()
            params[1].grad = copies[1].grad = None
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_more_patterns_than_are_remembered_are_stepped_as_well(in_python: None, whole_readings: list[int]) -> None:
    params = parameters(1, 2, 3, 4, 5)
    ours, theirs, copies = both(params)
    ours.step()
    theirs.step()
    for pattern in (*range(32), *range(32), 31, 31, 31):
        move_gradients(params, copies)
        for i in range(5):
            if pattern >> i & 1:
                params[i].grad = copies[i].grad = None
        whole_readings.clear()
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
    assert whole_readings == []
    assert len(plan_of(ours)._moments) <= plan._MOMENTS


def gradient_in_another_layout(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    gradient = torch.empty(4, 3).T
    param.grad = gradient.copy_(param.grad)


def parameters_in_other_memory(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    param.data = param.data.clone()


def parameters_in_another_layout(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    param.data = torch.empty(4, 3).T.copy_(param.data)


def parameters_of_other_strides_where_they_are(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    param.data = param.data.view(4, 3).T


def a_buffer_of_other_strides_where_it_is(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    buffer = optimizer.state[param]["momentum_buffer"]
    buffer.data = buffer.data.view(4, 3).T


def parameters_and_gradients_of_another_dtype(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    for each in optimizer.param_groups[0]["params"]:
        optimizer.state[each]["momentum_buffer"] = optimizer.state[each]["momentum_buffer"].double()
        gradient, each.grad = each.grad, None
        each.data = each.data.double()
        each.grad = gradient.double()


def a_buffer_of_ones(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["momentum_buffer"] = torch.ones(3, 4)


def a_buffer_in_other_memory(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    buffer = optimizer.state[param]["momentum_buffer"]
    buffer.data = buffer.data.clone() + 1


def no_buffer(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    del optimizer.state[param]["momentum_buffer"]


def no_state(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.state.clear()


def no_state_of_one(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    del optimizer.state[param]


def no_momentum(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.param_groups[0]["momentum"] = 0.0


def one_parameter_less(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.param_groups[0]["params"].remove(optimizer.param_groups[0]["params"][0])


def another_order(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.param_groups[0]["params"].reverse()


def a_group_more(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    more = nn.Parameter(torch.ones(3))
    more.grad = torch.ones(3)
    optimizer.add_param_group({"params": [more], "lr": 1.0})


def a_state_that_was_loaded(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def a_learning_rate_in_a_tensor(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.2)


CHANGES = [
    gradient_in_another_layout,
    parameters_in_other_memory,
    parameters_in_another_layout,
    parameters_of_other_strides_where_they_are,
    a_buffer_of_other_strides_where_it_is,
    parameters_and_gradients_of_another_dtype,
    a_buffer_of_ones,
    a_buffer_in_other_memory,
    no_buffer,
    no_state,
    no_state_of_one,
    no_momentum,
    one_parameter_less,
    another_order,
    a_group_more,
    a_state_that_was_loaded,
    a_learning_rate_in_a_tensor,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_steps_alike_is_noticed(guards: str, change: Callable[..., None]) -> None:
    ours, theirs, _, _ = warm()
    for optimizer in (ours, theirs):
        change(optimizer, optimizer.param_groups[0]["params"][1])
    for _ in range(3):
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_a_gradient_that_comes_to_lie_in_written_memory_is_left_to_torch(guards: str, preferred: None) -> None:
    """In a step that is like the one before but for that address: torch's order of reading and writing decides."""

    def made() -> tuple[list[nn.Parameter], Tensor]:
        torch.manual_seed(5)
        base = torch.randn(140)
        params = [nn.Parameter(base[40:80]), nn.Parameter(torch.randn(40))]
        for param in params:
            param.grad = torch.randn(40)
        return params, base

    (params, base), (copies, their_base) = made(), made()
    ours, theirs = FusedSGD(params, **OPTIONS), torch.optim.SGD(copies, **OPTIONS)
    for _ in range(3):
        ours.step()
        theirs.step()
    warned = False
    for begin in (80, 0, 60, 79, 1, 0, 100, 80):  # behind or before the parameter, or with some of its elements
        params[1].grad, copies[1].grad = base[begin : begin + 40], their_base[begin : begin + 40]
        overlaps = 0 < begin < 80
        with pytest.warns(UserWarning, match="shares memory") if overlaps and not warned else contextlib.nullcontext():
            ours.step()
        warned |= overlaps
        theirs.step()
        assert_same(ours, theirs)
        assert (launches(ours) == []) == overlaps
    buffer, their_buffer = ours.state[params[0]]["momentum_buffer"], theirs.state[copies[0]]["momentum_buffer"]
    params[1].grad, copies[1].grad = buffer, their_buffer
    ours.step()
    theirs.step()
    assert_same(ours, theirs)
    assert launches(ours) == [], "nor are momentum buffers read"
    insisting = FusedSGD(params, **OPTIONS, backend="triton")
    for _ in range(2):
        params[1].grad = torch.ones(40)
        insisting.step()
    before = [param.detach().clone() for param in params]
    params[1].grad = base[60:100]
    with pytest.raises(RuntimeError, match=r"the gradient of group 0, parameter 1 shares memory"):
        insisting.step()
    assert_equal(params, before)


def test_a_longer_gradient_at_an_address_that_was_free_of_overlaps(guards: str, preferred: None) -> None:
    def made() -> tuple[list[nn.Parameter], Tensor]:
        torch.manual_seed(5)
        base = torch.randn(100)
        params = [nn.Parameter(base[40:]), nn.Parameter(torch.randn(50)), nn.Parameter(torch.randn(10))]
        for param in params:
            param.grad = torch.randn_like(param)
        return params, base

    (params, base), (copies, their_base) = made(), made()
    ours, theirs = FusedSGD(params, **OPTIONS), torch.optim.SGD(copies, **OPTIONS)
    for step in range(5):
        if step == 3:
            params[2].grad, copies[2].grad = base[:10], their_base[:10]
        if step == 4:
            params[2].grad, copies[2].grad = torch.ones(10), torch.ones(10)
            params[1].grad, copies[1].grad = base[:50], their_base[:50]
        with pytest.warns(UserWarning, match="shares memory") if step == 4 else contextlib.nullcontext():
            ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_a_gradient_that_comes_to_lie_off_its_alignment_is_refused(guards: str) -> None:
    """A GPU faults on it."""
    ours, _, params, _ = warm()
    before = [param.detach().clone() for param in params]
    memory = torch.zeros(4 * 30 + 1, dtype=torch.uint8)
    params[0].grad = torch.frombuffer(memory.numpy(), dtype=torch.float32, offset=1, count=30)
    with pytest.raises(RuntimeError, match="its gradient's address is no multiple of its element size"):
        ours.step()
    assert_equal(params, before)
