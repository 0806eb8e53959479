"""What the CUDA backend launches, what lies in device memory and when that changes, and what goes wrong in time."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from gpu_support import (
    DEVICE,
    Reference,
    assert_same_bits,
    buffers_of,
    copy_gradients,
    fused,
    give_gradients,
    launches,
    many,
    numbers,
    parameters,
    source,
)

pytestmark = pytest.mark.gpu_backend("cuda")

HEADER_BYTES, GROUP_BYTES, SMALL, LARGE = 64, 88, 4096, 32760
FIT = (LARGE - HEADER_BYTES - GROUP_BYTES) // 8  # tensors of one group
TILE = struct.Struct("<QQiiiHH")  # csrc/plan/table.h: DeviceTile
TILE_BYTES = 32768


def tables(optimizer):
    (part,) = optimizer._plans.parts
    return part.plan.tables()


def step_by_reference(optimizer, steps=1):
    """Gives gradients that lie together, steps, and compares all parameters at once."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    expected = Reference(optimizer)
    for step in range(steps):
        for param, gradient in zip(params, many([p.numel() for p in params], seed=step), strict=True):
            param.grad = gradient.detach()
        optimizer.step()
        expected.step()
    assert_same_bits([torch.cat([p.detach() for p in params])], [torch.cat([p.detach() for p in expected.params])])


# What is launched


@pytest.mark.parametrize("numerics", ["torch", "opmath"])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_rows_of_one_dtype_get_the_kernel_for_it(dtype, name, numerics):
    optimizer = fused(parameters(dtype, sizes=(5, 6)), numerics=numerics)
    give_gradients(optimizer.param_groups[0]["params"], seed=1)
    optimizer.step()
    used = "torch" if name == "float32" else numerics  # nothing lies between storage and opmath in float32
    assert [launch["kernel"] for launch in launches(optimizer)] == [f"sgd_kernel<{name}, {used}, {SMALL}>"]


@pytest.mark.parametrize(("count", "sizes"), [(493, [SMALL]), (494, [LARGE]), (FIT + 1, [LARGE, SMALL])])
def test_a_step_has_as_few_launches_as_the_parameters_allow(count, sizes):
    """One word a tensor, and the hyperparameters of each group that a launch has rows of."""
    optimizer = fused(many([2] * count))
    step_by_reference(optimizer)
    made = launches(optimizer)
    assert [launch["parameter_bytes"] for launch in made] == sizes
    assert sum(launch["tensors"] for launch in made) == count


def test_a_group_for_every_tensor_needs_more_launches_and_no_more_than_that():
    count = 700
    groups = [{"params": [param], "lr": 0.1 + 0.001 * i} for i, param in enumerate(many([3] * count))]
    optimizer = fused(groups)
    step_by_reference(optimizer)
    assert len(launches(optimizer)) == math.ceil(count / ((LARGE - HEADER_BYTES) // (8 + GROUP_BYTES))) == 3


def test_nothing_is_launched_where_no_parameter_has_a_gradient_or_an_element():
    params = parameters(torch.float32, sizes=(4, 0))
    optimizer = fused(params)
    params[1].grad = torch.zeros_like(params[1])
    optimizer.step()
    assert launches(optimizer) == []
    give_gradients(params, seed=1)
    optimizer.step()
    assert [launch["tensors"] for launch in launches(optimizer)] == [1]


# What lies in device memory


def test_the_table_is_the_tiles_of_every_row():
    params = parameters(torch.float32, sizes=(40_001, 300, 0, 8192, 1024, 1025))
    optimizer = fused(params)
    give_gradients(params, seed=1)
    optimizer.step()
    (table,) = tables(optimizer)
    tiles = list(TILE.iter_unpack(table))
    counts = [count for *_, count, _ in tiles]
    assert counts == [300, 1024] + [8192] * 4 + [7233, 8192, 1025], "those for warps first"
    (launch,) = launches(optimizer)
    assert launch["tiles"] == len(tiles) and launch["blocks"] == 7 + math.ceil(2 / (256 // 32))
    stepped = [param for param in params if param.numel()]
    covered = {i: [] for i in range(len(stepped))}
    for address, buffer, piece, row, layout, count, group in tiles:
        begin = piece * TILE_BYTES // 4
        state = optimizer.state[stepped[row]]["momentum_buffer"]
        assert (address, buffer) == (stepped[row].data_ptr() + 4 * begin, state.data_ptr() + 4 * begin)
        assert (layout, group) == (-1, 0)
        covered[row].append((begin, begin + count))
    for row, pieces in covered.items():
        begins, ends = zip(*sorted(pieces), strict=True)
        assert (begins[0], *ends) == (*begins, stepped[row].numel()), "every element once"


def test_gradients_in_another_layout_enter_the_table_and_leave_it():
    params = parameters(torch.float32, sizes=((6, 5), (4, 3)))
    optimizer = fused(params)
    expected = Reference(optimizer)
    lengths = []
    for step, transposed in enumerate((False, True, False, True)):
        give_gradients(params, seed=step)
        if transposed:
            params[0].grad = numbers((5, 6), torch.float32, source(step)).T
        optimizer.step()
        expected.step()
        lengths.append(len(tables(optimizer)[0]))
    expected.assert_agrees()
    assert lengths[0] == lengths[2] < lengths[1] == lengths[3]


# What goes wrong in time


class Odd:
    """Memory at an address that no element may have, as other libraries hand it over."""

    def __init__(self, count):
        self.memory = torch.zeros(4 * count + 1, dtype=torch.uint8, device=DEVICE)
        self.__cuda_array_interface__ = {
            "shape": (count,), "typestr": "<f4", "version": 2, "data": (self.memory.data_ptr() + 1, False)
        }  # fmt: skip


def test_an_element_off_its_own_alignment_is_refused():
    """A GPU faults on it."""
    odd = torch.as_tensor(Odd(10), device=DEVICE).requires_grad_()
    assert odd.data_ptr() % 4 == 1
    odd.grad = torch.ones(10, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"group 0, parameter 0.*its address is no multiple of its element size"):
        fused([odd]).step()
    (param,) = parameters(torch.float32, sizes=(10,))
    param.grad = odd.detach()
    with pytest.raises(RuntimeError, match="its gradient's address is no multiple of its element size"):
        fused([param]).step()


def test_parameters_that_share_memory_are_stepped_one_launch_after_another():
    def tied():
        base = numbers(100, torch.float32, source(3))
        return [base[:60].requires_grad_(), base[40:].requires_grad_(), *parameters(torch.float32, sizes=(7,))]

    params, theirs = tied(), tied()
    ours, reference = fused(params), torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=False)
    for step in range(2):
        give_gradients(params, seed=step)
        copy_gradients(params, theirs)
        ours.step()
        reference.step()
    assert [launch["tensors"] for launch in launches(ours)] == [1, 1, 1]
    assert_same_bits(params, theirs)
    assert_same_bits(buffers_of(ours), buffers_of(reference))
