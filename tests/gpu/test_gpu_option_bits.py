"""FusedSGD's options on a GPU: bits against the reference, computed on the CPU; launches, waiting, graphs."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_support import (
    DEVICE,
    LAYOUTS,
    SIMULATED,
    affordable,
    assert_same_bits,
    backend_in_use,
    laid_out,
    launches,
    many,
    needs_free,
    no_waiting,
    synchronize,
)

from wd_fused import FusedSGD, reference
from wd_fused.options import clipping, spec

SIZES = (1, 7, 128, 1_025, 8_193, 40_001)
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ENTRIES = ("momentum_buffer", "momentum_scale", "master", "remainder", "compensation", "ema")
COMBINATIONS = {
    "clip": {"max_grad_norm": 1.0},
    "clip, average": {"max_grad_norm": 1.0, "ema_decay": 0.9, "ema_warmup": True},
    "penalties": {"l1_penalty": 1e-3, "decoupled_weight_decay": 0.1, "ema_decay": 0.3, "zero_grads": True},
    "int8 momentum": {"momentum_dtype": torch.int8, "max_grad_norm": 1.0},
}
COMBINATIONS_OF_BFLOAT16 = {
    "full": {"master_weights": "full", "ema_decay": 0.9, "max_grad_norm": 1.0},
    "split": {"master_weights": "split", "ema_decay": 0.9},
    "split24": {"master_weights": "split24", "momentum_dtype": torch.int8},
    "kahan": {"rounding": "kahan", "ema_decay": 0.9},
    "average in bfloat16": {"ema_decay": 0.9, "ema_dtype": torch.bfloat16, "max_grad_norm": 1.0},
    "stochastic": {"rounding": "stochastic", "max_grad_norm": 1.0},
}
CASES = [
    *((name, dtype, options) for name, options in COMBINATIONS.items() for dtype in (torch.float32, torch.bfloat16)),
    ("clip, average", torch.float64, COMBINATIONS["clip, average"]),
    ("penalties", torch.float16, COMBINATIONS["penalties"]),
    *((name, torch.bfloat16, options) for name, options in COMBINATIONS_OF_BFLOAT16.items()),
]


def parameters(dtype, device, sizes=SIZES, layout="contiguous"):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    return [laid_out(each, layout).requires_grad_() for each in values]


def give_gradients(*lists, seed=0, layout="contiguous"):
    """Multiples of 1/16, whose squares add up exactly in any order; the same in each list."""
    generator = torch.Generator().manual_seed(seed)
    for same in zip(*lists, strict=True):
        gradient = torch.randint(-32, 33, same[0].shape, generator=generator) / 16
        for param in same:
            param.grad = laid_out(gradient.to(param.device, param.dtype), layout)


def optimizer(params, **options):
    return FusedSGD(params, **OPTIONS | options, backend=backend_in_use())


@pytest.mark.parametrize(("name", "dtype", "options"), CASES, ids=[f"{name}-{dtype}" for name, dtype, _ in CASES])
@pytest.mark.parametrize("scale", [None, 4.0])
def test_every_option_has_the_references_bits(name, dtype, options, scale):
    assert_steps_agree(name, dtype, options, scale=scale)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, COMBINATIONS["clip, average"]),
        (torch.float16, COMBINATIONS["penalties"]),
        (torch.bfloat16, COMBINATIONS["clip"]),
        *((torch.bfloat16, COMBINATIONS_OF_BFLOAT16[name]) for name in ("full", "split24", "stochastic")),
    ],
    ids=["clip, average", "penalties, float16", "clip, bfloat16", "full", "split24", "stochastic"],
)
@pytest.mark.parametrize(
    ("of_parameters", "of_gradients"),
    [*((layout, "contiguous") for layout in LAYOUTS), ("contiguous", "odd offset"), ("channels_last", "reversed")],
)
def test_every_layout_has_the_references_bits(dtype, options, of_parameters, of_gradients):
    shapes = ((3, 5, 2, 4), (40, 129), (1, 257, 1), (6, 7, 33))
    assert_steps_agree(of_parameters, dtype, options, shapes, of_parameters, of_gradients)


def assert_steps_agree(
    name, dtype, options, shapes=SIZES, of_parameters="contiguous", of_gradients="contiguous", scale=None
):
    """Three steps on the GPU and of the reference on the CPU, over tensors of the same layouts."""
    ours, theirs = (parameters(dtype, device, shapes, of_parameters) for device in (DEVICE, "cpu"))
    fused, reference = optimizer(ours, **options), FusedSGD(theirs, **OPTIONS | options, backend="torch")
    for step in range(3):
        give_gradients(ours, theirs, seed=step, layout=of_gradients)
        if step == 1:
            ours[2].grad = theirs[2].grad = None
        for each, device in ((fused, DEVICE), (reference, "cpu")):
            if scale is not None:
                each.grad_scale, each.found_inf = torch.tensor(scale, device=device), torch.zeros((), device=device)
            each.step()
            if scale is not None:
                del each.grad_scale, each.found_inf
        assert_same_bits([p.cpu() for p in ours], theirs, f"{name}, step {step}")
        for entry in ENTRIES:
            pairs = [
                (fused.state[own][entry].cpu(), reference.state[other][entry])
                for own, other in zip(ours, theirs, strict=True)
                if entry in reference.state[other]
            ]
            if pairs and pairs[0][0].dtype.is_floating_point:
                assert_same_bits(*zip(*pairs, strict=True), f"{name}, {entry}, step {step}")
            assert all(torch.equal(*pair) for pair in pairs), f"{name}, {entry}, step {step}"
        if "max_grad_norm" in options:
            assert_same_bits([fused.grad_norm.cpu()], [reference.grad_norm], f"{name}, norm, step {step}")


def pair(*params, **options):
    """The optimizer on the GPU, and the reference's on the CPU over copies; and a function that steps both."""
    params = [param for of_dtype in params for param in of_dtype]
    twins = [param.detach().cpu().clone().requires_grad_() for param in params]
    ours, theirs = optimizer(params, **options), FusedSGD(twins, **OPTIONS | options, backend="torch")

    def step(seed, missing=()):
        give_gradients(params, twins, seed=seed)
        for i in missing:
            params[i].grad = twins[i].grad = None
        ours.step()
        theirs.step()
        assert_same_bits([p.cpu() for p in params], twins, f"step {seed}")
        if theirs.grad_norm is not None:
            assert_same_bits([ours.grad_norm.cpu()], [theirs.grad_norm], f"norm, step {seed}")

    return ours, step


def of_cuda(*kernels):
    return {"cuda": [f"{kernel}4096>" for kernel in kernels]}


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        (
            {"max_grad_norm": 1.0},
            of_cuda("norm_kernel<", "sgd_kernel<float32, options, ")
            | {"triton": ["norm_kernel<float32>", "sgd_kernel<float32, options>"]},
        ),
        (
            {"max_grad_norm": 1.0, "ema_decay": 0.9},
            of_cuda("norm_kernel<", "sgd_kernel<float32, options, average float32, ")
            | {"triton": ["norm_kernel<float32>", "sgd_kernel<float32, options, averages>"]},
        ),
        ({"ema_decay": 0.9, "l1_penalty": 1e-4}, of_cuda("sgd_kernel<float32, options, average float32, ")),
        ({"momentum_dtype": torch.int8}, of_cuda("sgd_kernel<float32, options, momentum int8, ")),
        (
            {"momentum_dtype": torch.bfloat16, "ema_decay": 0.9},  # not one of the kinds that have a kernel
            of_cuda("general_kernel<"),
        ),
    ],
    ids=["clip", "clip, average", "penalty, average", "int8 momentum", "no kernel of its own"],
)
def test_a_step_is_one_launch_or_two_where_it_clips_that_nobody_waits_for(options, kernels):
    ours, step = pair(parameters(torch.float32, DEVICE), **options)
    step(0)
    step(1)
    with no_waiting():
        ours.step()
        norm = ours.grad_norm
    made = [launch["kernel"] for launch in launches(ours)]
    assert len(made) == 1 + ("max_grad_norm" in options)
    assert made == kernels.get(backend_in_use(), made)
    assert norm is None or (norm.device.type, norm.shape) == (DEVICE.type, ())


@pytest.mark.gpu_backend("cuda")
def test_a_norm_in_double_clips_rows_of_every_dtype():
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    ours, step = pair(*(parameters(dtype, DEVICE, (9, 2_000)) for dtype in dtypes), max_grad_norm=1.0)
    step(0)
    step(1)
    assert [launch["kernel"] for launch in launches(ours)] == [
        "norm_kernel<4096>", "general_kernel<4096>", "sgd_kernel<float64, options, 4096>", "general_kernel<4096>",
    ]  # fmt: skip


@pytest.mark.gpu_backend("cuda")
def test_more_tensors_than_a_launch_takes_have_one_norm_between_them():
    fit, fit_norm = (4_096 - 64 - 88) // 8, (4_096 - 80) // 8  # csrc/cuda/cuda_launch.h
    params = many([2] * (2 * fit + 1))
    twin = torch.cat([param.detach() for param in params]).cpu().requires_grad_()
    ours, theirs = optimizer(params, max_grad_norm=1.0), FusedSGD([twin], **OPTIONS, max_grad_norm=1.0, backend="torch")
    give_gradients([twin])
    for param, gradient in zip(params, twin.grad.to(DEVICE).split(2), strict=True):
        param.grad = gradient
    ours.step()
    theirs.step()
    assert [(launch["kernel"], launch["tensors"]) for launch in launches(ours)] == [
        ("norm_kernel<4096>", fit_norm), ("norm_kernel<4096>", 2 * fit + 1 - fit_norm),
        *[("sgd_kernel<float32, options, 4096>", tensors) for tensors in (fit, fit, 1)],
    ]  # fmt: skip
    assert_same_bits([ours.grad_norm.cpu()], [theirs.grad_norm], "norm")
    assert_same_bits([torch.cat([param.detach() for param in params]).cpu()], [twin], "parameters")


def test_norms_of_many_groups():
    params = parameters(torch.float32, DEVICE, (3,) * 20 + (9_000, 20_000))
    twins = [param.detach().cpu().clone().requires_grad_() for param in params]
    ours, theirs = (
        FusedSGD(
            [{"params": [p], "lr": 0.01 * i} | ({"max_grad_norm": 0.1 * i} if i % 3 else {}) for i, p in enumerate(of)],
            **OPTIONS | {"norm_per_group": True}, backend=backend,
        )
        for of, backend in ((params, backend_in_use()), (twins, "torch"))
    )  # fmt: skip
    for step in range(2):
        give_gradients(params, twins, seed=step)
        ours.step()
        theirs.step()
        assert_same_bits([ours.grad_norm.cpu()], [theirs.grad_norm], "norms")
        assert ours.grad_norm.isnan().tolist() == [i % 3 == 0 for i in range(len(params))]
        assert_same_bits([p.cpu() for p in params], twins, f"step {step}")


def test_the_plan_stays_while_gradients_move_and_are_missing():
    params = parameters(torch.float32, DEVICE, (3_000, 5, 72))
    ours, step = pair(params, max_grad_norm=1.0, ema_decay=0.5, ema_warmup=True)
    step(0)
    plans = ours._plans
    for seed in range(1, 6):
        step(seed, missing=[1] if seed % 3 == 0 else [])
        assert ours._plans is plans


def test_the_norm_is_the_same_in_every_run_and_that_of_float64():
    params = parameters(torch.float32, DEVICE, (affordable(3_000_001, 200_001), 70_000, 5))
    generator = torch.Generator().manual_seed(1)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)
    fused = optimizer(params, max_grad_norm=1e9)
    norms = []
    for _ in range(5):
        fused.step()
        norms.append(fused.grad_norm.item())
    exact = math.sqrt(sum(float((param.grad.double() ** 2).sum()) for param in params))
    assert len(set(norms)) == 1
    assert norms[0] == pytest.approx(exact, rel=1e-7)


@pytest.mark.skipif(SIMULATED, reason="a simulated GPU would take minutes for so many elements")
@pytest.mark.usefixtures("much_memory")
def test_the_norm_of_more_elements_than_blocks_have_a_tile_for_each():
    """More than 67 million: a block adds up several tiles."""
    needs_free(2)
    param = torch.zeros(70_000_001, device=DEVICE).requires_grad_()
    param.grad = (torch.arange(param.numel(), device=DEVICE) % 7 - 3) / 16
    fused = optimizer([param], max_grad_norm=1.0)
    fused.step()
    exact = math.sqrt(float((param.grad.double() ** 2).sum()))
    assert fused.grad_norm.item() == pytest.approx(exact, rel=1e-7)


@pytest.mark.skipif(SIMULATED, reason="a simulated GPU would step so many elements for an hour")
@pytest.mark.usefixtures("much_memory")
def test_a_clipped_tensor_of_more_than_2_to_the_31_elements():
    """Piece by piece against the reference, with the coefficient of the norm of all pieces."""
    numel, piece = 2**31 + 17, 2**27
    needs_free(18)
    param, gradient = (torch.empty(numel, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))

    def filled(tensor, begin, seed):
        part = tensor[begin : begin + piece]
        return part.normal_(generator=torch.Generator(DEVICE).manual_seed(seed + begin))

    pieces = range(0, numel, piece)
    for begin in pieces:
        filled(param, begin, 1)
        filled(gradient, begin, 2)
    param.requires_grad_()
    param.grad = gradient
    fused = optimizer([param], max_grad_norm=1e4)
    fused.step()
    squares = sum(float((gradient[begin : begin + piece].double() ** 2).sum()) for begin in pieces)
    assert fused.grad_norm.item() == pytest.approx(math.sqrt(squares), rel=1e-6)
    numbers = spec.GroupStep(max_norm=1e4, l1=0.0, decoupled=0.0, l2=True, average_weight=0.0, random_key=0)
    step = spec.StepOptions((numbers,), False, False, torch.float32, True)
    (coefficient,) = clipping.coefficients(fused.grad_norm.cpu(), step)
    assert coefficient < 1
    row = spec.RowOptions(
        "parameter", False, torch.bfloat16, None, None, None, averages=False, clips=True, zeroes=False
    )  # fmt: skip
    buffer = fused.state[param]["momentum_buffer"]
    for begin in pieces:
        count = min(piece, numel - begin)
        expected = filled(torch.empty(count, dtype=torch.bfloat16, device=DEVICE), 0, 1 + begin)
        buffers = [None]
        reference.sgd_with_options(
            [expected], [gradient[begin : begin + count]], buffers, [row], [0],
            reference.Hyperparameters(numbers, **OPTIONS, coefficient=coefficient),
        )  # fmt: skip
        own = [param.detach()[begin : begin + count], buffer[begin : begin + count]]
        assert_same_bits(own, [expected, buffers[0]], f"from element {begin}")


@pytest.mark.parametrize("per_group", [False, True])
def test_a_norm_that_is_not_finite_skips_a_scaled_step_on_the_device_and_no_other(per_group):
    params = parameters(torch.float32, DEVICE)
    fused = optimizer(params, max_grad_norm=1.0, norm_per_group=per_group)
    give_gradients(params)
    fused.step()
    before = [param.detach().clone() for param in params]
    params[3].grad.fill_(math.inf)
    fused.grad_scale = torch.tensor(2.0, device=DEVICE)
    with no_waiting():
        fused.step()
    del fused.grad_scale
    synchronize()
    assert_same_bits(params, before, "skipped")
    assert fused.grad_norm.isinf().all() and fused.last_step_skipped
    params[3].grad.fill_(1.0)
    fused.step()
    assert fused.last_step_skipped, "still: it is of steps under a scale"
    params[3].grad.fill_(math.inf)
    fused.step()
    assert params[0].isnan().sum() == 0 and params[3].isnan().all()  # as torch: 0 times the gradient


@pytest.mark.gpu_backend("cuda")  # Triton says it in other words
@pytest.mark.parametrize(
    ("dtype", "options", "before", "refusal"),
    [
        (torch.bfloat16, {"rounding": "stochastic"}, 1, "group 0, parameter 0: stochastic rounding cannot be captured"),
        (torch.float32, {"ema_decay": 0.9, "max_grad_norm": 1.0}, 0, "the first step of an average cannot be captured"),
        (torch.float32, {"ema_decay": 0.9, "ema_warmup": True}, 3,
         r"an average whose decay changes from step to step \(ema_warmup\) cannot"),
    ],
    ids=["stochastic", "first step of an average", "warm-up"],
)  # fmt: skip
def test_a_captured_step_must_not_depend_on_numbers_of_its_own(dtype, options, before, refusal):
    params = parameters(dtype, DEVICE, (40,))
    give_gradients(params)
    fused = FusedSGD(params, lr=0.1, **options, backend=backend_in_use())
    for _ in range(before):
        fused.step()
    with pytest.raises(RuntimeError, match=refusal), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fused.step()
    synchronize()


def test_replays_of_a_captured_step_clip_and_average():
    params, twins = parameters(torch.float32, DEVICE), parameters(torch.float32, DEVICE)
    captured, eager = (optimizer(of, max_grad_norm=1.0, ema_decay=0.9) for of in (params, twins))
    give_gradients(params, twins)
    captured.step()
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
        eager.step()
    synchronize()
    assert_same_bits(params, twins, "parameters")
    averages = [[of.state[p]["ema"] for p in own] for of, own in ((captured, params), (eager, twins))]
    assert_same_bits(*averages, "averages")


def test_the_norm_may_be_read_on_another_stream_when_the_optimizer_is_gone():
    """It lies in memory of the optimizer's, which others may be given once it has been read."""
    params, others = parameters(torch.float32, DEVICE), [parameters(torch.float32, DEVICE) for _ in range(3)]
    give_gradients(params, *others)
    fused = optimizer(params, max_grad_norm=1.0)
    for _ in range(2):  # the first forms it on the host
        fused.step()
    expected = fused.grad_norm.item()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        copied = fused.grad_norm.clone()
    del fused
    for other in others:
        optimizer(other, max_grad_norm=0.5).step()
    synchronize()
    assert copied.item() == expected


@pytest.mark.gpu_backend("cuda")
def test_a_captured_step_has_every_kernel_that_a_norm_in_double_takes():
    """One launch of float32 alone, another with float64, which has the norm of both in double. The first step, which
    forms the norm on the host, takes others."""
    params = parameters(torch.float32, DEVICE, (1,) * 4_200) + parameters(torch.float64, DEVICE, (1,) * 10)
    give_gradients(params)
    fused = optimizer(params, max_grad_norm=1.0)
    fused.step()
    before = [param.detach().clone() for param in params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused.step()
    assert len({launch["kernel"] for launch in launches(fused)}) >= 2
    graph.replay()
    synchronize()
    assert not torch.equal(params[0], before[0])
