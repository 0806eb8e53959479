"""The options of the tail on a GPU: bits against the reference, computed on the CPU; launches, waiting, graphs."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_support import DEVICE, affordable, assert_same_bits, backend_in_use, launches, no_waiting, synchronize

from wd_fused import FusedSGD
from wd_fused import backends as registry

SIZES = (1, 7, 128, 1_025, 8_193, 40_001)
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ENTRIES = ("momentum_buffer", "momentum_scale", "master", "remainder", "compensation", "ema")
TAILS = {
    "clip": {"max_grad_norm": 1.0},
    "clip, average": {"max_grad_norm": 1.0, "ema_decay": 0.9, "ema_warmup": True},
    "penalties": {"l1_penalty": 1e-3, "decoupled_weight_decay": 0.1, "ema_decay": 0.3, "zero_grads": True},
    "int8 momentum": {"momentum_dtype": torch.int8, "max_grad_norm": 1.0},
}
TAILS_OF_BFLOAT16 = {
    "full": {"master_weights": "full", "ema_decay": 0.9, "max_grad_norm": 1.0},
    "split": {"master_weights": "split", "ema_decay": 0.9},
    "split24": {"master_weights": "split24", "momentum_dtype": torch.int8},
    "kahan": {"rounding": "kahan", "ema_decay": 0.9},
    "stochastic": {"rounding": "stochastic", "max_grad_norm": 1.0},
}
CASES = [
    *((name, dtype, options) for name, options in TAILS.items() for dtype in (torch.float32, torch.bfloat16)),
    ("clip, average", torch.float64, TAILS["clip, average"]),
    ("penalties", torch.float16, TAILS["penalties"]),
    *((name, torch.bfloat16, options) for name, options in TAILS_OF_BFLOAT16.items()),
]


@pytest.fixture(autouse=True)
def with_tail(gpu_backend):
    if not registry.FUSED[gpu_backend].takes_tail:
        pytest.skip(f"the plans of {gpu_backend} do not know the options")


def parameters(dtype, device, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in sizes]


def give_gradients(*lists, seed=0):
    """Multiples of 1/16, whose squares add up exactly in any order; the same in each list."""
    generator = torch.Generator().manual_seed(seed)
    for same in zip(*lists, strict=True):
        gradient = torch.randint(-32, 33, same[0].shape, generator=generator) / 16
        for param in same:
            param.grad = gradient.to(param.device, param.dtype, copy=True)


def optimizer(params, **options):
    return FusedSGD(params, **OPTIONS | options, backend=backend_in_use())


@pytest.mark.parametrize(("name", "dtype", "options"), CASES, ids=[f"{name}-{dtype}" for name, dtype, _ in CASES])
@pytest.mark.parametrize("scale", [None, 4.0])
def test_every_option_has_the_references_bits(name, dtype, options, scale):
    ours, theirs = parameters(dtype, DEVICE), parameters(dtype, "cpu")
    fused, reference = optimizer(ours, **options), FusedSGD(theirs, **OPTIONS | options, backend="torch")
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
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


@pytest.mark.gpu_backend("cuda")
def test_clip_step_and_average_are_two_launches_that_nobody_waits_for():
    params = parameters(torch.float32, DEVICE)
    fused = optimizer(params, max_grad_norm=1.0, ema_decay=0.999)
    give_gradients(params)
    fused.step()
    with no_waiting():
        fused.step()
        norm = fused.grad_norm
    assert [launch["kernel"] for launch in launches(fused)] == ["norm_kernel<4096>", "tail_kernel<float32, 4096>"]
    assert norm.device.type == DEVICE.type and norm.shape == ()


@pytest.mark.gpu_backend("cuda")
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


@pytest.mark.gpu_backend("cuda")
def test_a_norm_that_is_not_finite_skips_a_scaled_step_on_the_device():
    params = parameters(torch.float32, DEVICE)
    fused = optimizer(params, max_grad_norm=1.0)
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
    assert fused.grad_norm.isinf()


@pytest.mark.gpu_backend("cuda")
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
