"""Tensors as training has them: strided, misaligned, empty, missing, very many, very large, mixed dtypes and groups."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    SIMULATED,
    Reference,
    affordable,
    assert_same_bits,
    copy_gradients,
    difference,
    fewest_launches,
    fused,
    give_gradients,
    laid_out,
    launches,
    needs_free,
    numbers,
    parameters,
    source,
    twin,
)

from wd_fused import FusedSGD, reference

# Of the CUDA backend, about: its gradients' addresses are parameters of the kernel.
MOST_TENSORS_OF_A_LAUNCH = 4_000


def run_against_reference(groups, steps=3, **arguments):
    ours = fused(groups, **arguments)
    expected = Reference(ours)
    for step in range(steps):
        give_gradients([p for group in ours.param_groups for p in group["params"]], seed=step)
        ours.step()
        expected.step()
    expected.assert_agrees()
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_gradients_of_every_layout(layout, dtype):
    generator = source(3)
    shapes = [(7,), (affordable(40_003, 4_003),), (33, 65), (4, 3, 5), (16, 8, 3, 3), (2, affordable(64, 5), 33, 17)]
    params = [laid_out(numbers(shape, dtype, generator), layout).requires_grad_() for shape in shapes]
    ours = fused(params)
    expected = Reference(ours)
    for gradient_layout in (layout, "contiguous", *random.Random(5).sample(LAYOUTS, 3)):
        for param in params:
            param.grad = laid_out(numbers(param.shape, dtype, generator), gradient_layout)
        ours.step()
        expected.step()
        expected.assert_agrees(f"gradients {gradient_layout}:")


@pytest.mark.parametrize("layout", ["odd offset", "column gaps", "row gaps"])
def test_nobody_writes_between_a_strided_tensors_elements(layout):
    values = numbers((37, 41), torch.float32, source(1))
    param = laid_out(values, layout).requires_grad_()
    param.grad = laid_out(values, layout)

    def around(tensor):
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        kept = whole.clone()
        kept.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
        return kept

    before, gradient = around(param.detach()), param.grad.clone()
    for _ in range(2):
        fused([param]).step()
    assert_same_bits([around(param.detach()), param.grad], [before, gradient])


def at(offset, size, dtype, generator):
    """Elements that begin so many behind an address of 16 bytes' alignment."""
    return numbers(size + offset, dtype, generator)[offset:]


def run_with_buffers(params, gradients, buffers, **arguments):
    """Two steps with momentum buffers that are there before."""
    ours = fused(params, **arguments)
    expected = Reference(ours)
    expected.buffers = [[buffer.clone() for buffer in buffers]]
    for param, gradient, buffer in zip(params, gradients, buffers, strict=True):
        param.grad = gradient
        ours.state[param]["momentum_buffer"] = buffer
    for _ in range(2):
        ours.step()
        expected.step()
    expected.assert_agrees()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_offset_from_alignment(dtype):
    """Parameter, gradient and momentum buffer, each at each distance from 16 bytes' alignment."""
    generator = source(9)
    width = 16 // dtype.itemsize
    offsets = [(o, o, o) for o in range(width)] + [(0, 1, 0), (1, 0, 1), (1, 1, 0), (0, 0, width - 1)]
    rows = [(size, offset) for size in (3 * width + 1, 1_030, affordable(20_001, 5_000)) for offset in offsets]
    sizes = (1, 2, 7, 9, 31, affordable(517, 70))
    rows += [(sizes[i % len(sizes)], each) for i, each in enumerate(itertools.product(range(width), repeat=3))]
    tensors = [[at(offset, size, dtype, generator) for offset in each] for size, each in rows]
    params, gradients, buffers = zip(*tensors, strict=True)
    run_with_buffers([param.requires_grad_() for param in params], gradients, buffers, nesterov=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", [{"momentum": 0.0}, {"nesterov": True, "maximize": True}], ids=str)
def test_a_gradient_that_is_its_parameter(mix, dtype):
    params = [at(o, n, dtype, source(n + o)).requires_grad_() for n in (1, 9, 100, 1_025, 20_001) for o in (0, 1)]
    ours = fused(params, **mix)
    expected = Reference(ours)
    for param in params:
        param.grad = param.detach()
    for step in range(2):
        expected.step()  # which reads the gradients, too
        ours.step()
        expected.assert_agrees(f"step {step}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_warps_and_blocks_tiles(dtype):
    """Among others of every size before them, so that a block's warps have different tensors."""
    tiles = (1_024, 4_096, 8_192, 16_384)
    sizes = [size + more for size in tiles for more in (-1, 0, 1)]
    sizes[::4] = [size + 2 for size in sizes[::4]]
    run_against_reference(parameters(dtype, sizes=[*sizes, *range(0, 140, 3), *tiles[:2]]), steps=2)


def test_fragmented_memory():
    """Parameters, gradients and momentum buffers in holes between other allocations, in another order each."""
    shuffle = random.Random(2).shuffle
    held = [torch.empty(random.Random(i).choice((300, 5_000, 70_000)), device=DEVICE) for i in range(600)]
    shuffle(held)
    del held[::2]
    params = parameters(torch.float32, sizes=[1 + 37 * i for i in range(150)])
    order = list(params)
    for _ in range(3):
        shuffle(order)
        give_gradients(order, seed=len(held))
        del held[::3]
    run_against_reference(params)


def test_empty_tensors_alone_and_among_others():
    run_against_reference(parameters(torch.float32, sizes=(0, 0)))
    run_against_reference([*parameters(torch.float16, sizes=(0, 5, 0, 2_000, 0))])


def test_missing_gradients_leave_parameter_and_buffer_as_they_are():
    params = parameters(torch.float32, sizes=[100 + i for i in range(30)])
    ours = fused(params)
    expected = Reference(ours)
    choose = random.Random(3)
    plans = []
    for step in range(6):
        give_gradients(params, seed=step)
        for param in params:
            if choose.random() < 0.4:
                param.grad = None
        ours.step()
        expected.step()
        expected.assert_agrees(f"step {step}")
        plans.append(ours._plans)
    for param in params:
        param.grad = None
    before = [param.detach().clone() for param in params]
    ours.step()
    assert_same_bits(params, before, "no gradient at all")


@pytest.mark.parametrize("count", [5_000] if SIMULATED else [5_000, 10_000])
def test_thousands_of_tensors_take_few_launches(count, gpu_backend):
    choose = random.Random(count)
    sizes = [choose.choice((1, 8, affordable(64, 4), affordable(300, 30))) for _ in range(count)]
    whole = numbers(sum(sizes), torch.float32, source(count))
    expected, buffers = [whole.clone()], [None]
    params = [part.requires_grad_() for part in whole.detach().split(sizes)]
    ours = fused(params)
    for step in range(2):
        gradients = numbers(sum(sizes), torch.float32, source(count + step))
        for param, gradient in zip(params, gradients.split(sizes), strict=True):
            param.grad = gradient
        ours.step()
        reference.sgd(expected, [gradients], buffers, lr=0.1, momentum=0.9, weight_decay=5e-4)
    assert difference(whole, expected[0]) is None
    at_most = math.ceil(count / MOST_TENSORS_OF_A_LAUNCH) if gpu_backend == "cuda" else 1
    assert len(launches(ours)) <= at_most


def test_all_dtypes_in_one_optimizer_are_a_launch_each():
    ours = run_against_reference([p for dtype in DTYPES for p in parameters(dtype, sizes=(5, 1_000, 20_001))])
    made = launches(ours)
    assert [launch["tensors"] for launch in made] == [3] * len(DTYPES)
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        assert sum(launch["kernel"].startswith((f"sgd_kernel<{name},", f"sgd_kernel<{name}>")) for launch in made) == 1


def test_many_groups_take_no_more_launches_and_each_has_its_options():
    choose = random.Random(8)
    groups = []
    for g in range(60):
        momentum = choose.choice((0.0, 0.5, 0.9))
        options = {"lr": 10 ** -choose.uniform(1, 3), "momentum": momentum, "weight_decay": choose.choice((0, 1e-2))}
        options |= {"maximize": choose.random() < 0.5, "nesterov": momentum > 0 and choose.random() < 0.5}
        groups.append({"params": parameters(choose.choice(DTYPES), seed=g, sizes=(3, 100, 5_000)), **options})
    ours = run_against_reference(groups)
    assert len(launches(ours)) == fewest_launches(p for group in ours.param_groups for p in group["params"])


def test_hyperparameters_that_change_are_read_at_every_step():
    params = parameters(torch.float32)
    ours = fused(params)
    expected = Reference(ours)
    for step in range(5):
        ours.param_groups[0]["lr"] *= 0.7
        ours.param_groups[0]["weight_decay"] = 1e-3 * step
        give_gradients(params, seed=step)
        ours.step()
        expected.step()
    expected.assert_agrees()


def test_parameters_that_share_memory_are_stepped_in_order():
    base = numbers(3_000, torch.float32, source(1))
    other = base.clone()
    views = [base[:2_000].requires_grad_(), base[1_000:].requires_grad_()]
    twins = [other[:2_000].requires_grad_(), other[1_000:].requires_grad_()]
    ours, theirs = FusedSGD(views, lr=0.1), torch.optim.SGD(twins, lr=0.1, foreach=False)
    for step in range(3):
        give_gradients(views, seed=step)
        copy_gradients(views, twins)
        ours.step()
        theirs.step()
    assert_same_bits([base], [other])


def test_a_parameter_on_the_cpu_and_one_on_the_gpu_in_a_group(gpu_backend):
    generator = torch.Generator().manual_seed(1)
    on_cpu = torch.randn(1_000, generator=generator).requires_grad_()
    params = [on_cpu, *parameters(torch.float32, sizes=(1_000,))]
    twins = twin(params)
    ours = FusedSGD(params, lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(twins, lr=0.1, momentum=0.9, foreach=False)
    for _ in range(3):
        for param, copied in zip(params, twins, strict=True):
            param.grad = torch.randn(1_000, generator=generator).to(param.device)
            copied.grad = param.grad.clone()
        ours.step()
        theirs.step()
    assert_same_bits(params, twins)
    assert [entry.backend for entry in ours.backends()] == ["cpu", gpu_backend]


# --- more than 2**31 elements ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize(
    ("numel", "dtype", "gib"),
    [(2**31 + 17, torch.float16, 16), (3_000_000_000, torch.bfloat16, 21), (2**31 + 5, torch.float32, 29)],
    ids=["just above 2**31, float16", "3 billion, bfloat16", "just above 2**31, float32"],
)
@pytest.mark.skipif(SIMULATED, reason="a simulated GPU would step so many elements for an hour")
def test_a_tensor_of_more_than_2_to_the_31_elements(numel, dtype, gib):
    needs_free(gib)
    piece = 2**27
    param = torch.empty(numel, dtype=dtype, device=DEVICE)
    gradient = torch.empty_like(param)

    def fill(tensor, begin, seed):
        part = tensor[begin : begin + piece]
        return part.normal_(generator=torch.Generator(DEVICE).manual_seed(seed + begin))

    for begin in range(0, numel, piece):
        fill(param, begin, 1)
        fill(gradient, begin, 2)
    param.requires_grad_()
    param.grad = gradient
    ours = fused([param])
    for _ in range(2):
        ours.step()
    assert len(launches(ours)) == 1
    values = torch.empty(piece, dtype=dtype, device=DEVICE)
    buffer = ours.state[param]["momentum_buffer"]
    for begin in range(0, numel, piece):
        count = min(piece, numel - begin)
        expected = values[:count]
        expected.normal_(generator=torch.Generator(DEVICE).manual_seed(1 + begin))
        buffers = [None]
        for _ in range(2):
            reference.sgd(
                [expected], [gradient[begin : begin + count]], buffers, lr=0.1, momentum=0.9, weight_decay=5e-4
            )
        for ours_part, theirs in ((param.detach(), expected), (buffer, buffers[0])):
            assert torch.equal(ours_part[begin : begin + count], theirs), f"elements from {begin} on"


@pytest.mark.usefixtures("much_memory")
def test_a_strided_tensor_that_reaches_past_2_to_the_31_elements():
    needs_free(14)
    wide = torch.empty(3, 2**30 + 3, dtype=torch.float16, device=DEVICE)
    gradient = torch.empty_like(wide)
    param = wide[:, ::1_000_003].requires_grad_()
    values = numbers(param.shape, torch.float16, source(1))
    param.data.copy_(values)
    param.grad = gradient[:, ::1_000_003].copy_(numbers(param.shape, torch.float16, source(2)))
    ours = fused([param])
    expected = Reference(ours)
    for _ in range(2):
        ours.step()
        expected.step()
    expected.assert_agrees()
