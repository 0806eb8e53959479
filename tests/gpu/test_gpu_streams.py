"""Steps on streams other than the default one: on the current stream, in order, and no memory freed under a kernel."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    DEVICE,
    Reference,
    assert_same_bits,
    forget,
    fused,
    give_gradients,
    parameters,
    synchronize,
)

pytestmark = pytest.mark.gpu_backend("cuda", "triton")

LONG = 200_000_000  # cycles: about a tenth of a second


def test_a_step_runs_on_the_current_stream_after_what_is_queued_there():
    params = parameters(torch.float32)
    optimizer = fused(params)
    expected = Reference(optimizer)
    stream = torch.cuda.Stream()
    for step in range(3):
        give_gradients(params, seed=step)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG // 10)
            for param in params:
                param.grad.mul_(2.0)  # queued behind the sleep: a step on another stream would miss it
            optimizer.step()
            done = torch.cuda.Event()
            done.record()
            assert step == 0 or not done.query(), "the step waited"
        torch.cuda.current_stream().wait_stream(stream)
        expected.step()
    expected.assert_agrees()


def test_steps_take_turns_on_several_streams():
    params = parameters(torch.float32)
    optimizer = fused(params)
    expected = Reference(optimizer)
    streams = [torch.cuda.Stream(), torch.cuda.current_stream(), torch.cuda.Stream()]
    for step in range(9):
        give_gradients(params, seed=step)
        synchronize()
        with torch.cuda.stream(streams[step % 3]):
            optimizer.step()
        synchronize()
        expected.step()
    expected.assert_agrees()


@pytest.mark.parametrize("moves", [False, True], ids=["gradients stay", "gradients move"])
def test_steps_alternate_between_streams_while_the_host_runs_ahead(moves):
    """Nothing is read or given away too early: neither what a step brings to the GPU, nor what it is brought from."""
    params = parameters(torch.float32)
    optimizer = fused(params)
    expected = Reference(optimizer)
    sets = []
    for step in range(9):
        if moves or step == 0:
            give_gradients(params, seed=step)
        sets.append([param.grad for param in params])

    def give(step):
        for param, gradient in zip(params, sets[step], strict=True):
            param.grad = gradient

    give(0)
    optimizer.step()
    synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    queued = torch.cuda.Event()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(LONG)
        queued.record()
    waste = []
    for step in range(1, 9):
        streams[step % 2].wait_stream(streams[1 - step % 2])
        with torch.cuda.stream(streams[step % 2]):
            give(step)
            optimizer.step()
            waste += [torch.full((size,), -1, dtype=torch.int32, device=DEVICE) for size in (64, 128, 512)]
    waited = not queued.query()
    synchronize()
    for step in range(9):
        give(step)
        expected.step()
    expected.assert_agrees()
    assert waited, "the sleep was too short for this test to show anything, or a step waited"


@pytest.mark.parametrize(
    ("warm_steps", "moves"), [(0, True), (2, True), (2, False)], ids=["first step", "later step", "same gradients"]
)
def test_a_table_is_not_freed_under_a_kernel_that_has_not_run_yet(warm_steps, moves):
    """The optimizer goes while its step waits on another stream; others of the same size are made in its place."""
    sizes = (100, 5_000, 40_001)
    params = parameters(torch.float32, seed=1, sizes=sizes)
    optimizer = fused(params)
    expected = Reference(optimizer)
    for step in range(warm_steps):
        give_gradients(params, seed=step)
        optimizer.step()
        expected.step()
    if moves:
        give_gradients(params, seed=9)
    others = [parameters(torch.float32, seed=2 + i, sizes=sizes) for i in range(4)]
    for other in others:
        give_gradients(other, seed=3)
    synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        optimizer.step()
        queued = torch.cuda.Event()
        queued.record()
    expected.step()
    buffers = [optimizer.state[param]["momentum_buffer"] for param in params]
    del optimizer
    expected._optimizer = None
    for other in others:
        fused(other).step()
    waste = [torch.full((size,), -1, dtype=torch.int32, device=DEVICE) for size in (64, 128, 512, 4_096) * 8]
    waited = not queued.query()
    synchronize()
    assert_same_bits(params, expected.params)
    assert_same_bits(buffers, [b for group in expected.buffers for b in group])
    assert waited, "the sleep was too short for this test to show anything"
    del waste
    forget()


def test_momentum_buffers_made_on_a_side_stream_belong_to_it():
    params = parameters(torch.float32, sizes=(1_000, 100_000))
    give_gradients(params, seed=1)
    optimizer = fused(params)
    expected = Reference(optimizer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        expected.step()
    expected.assert_agrees()
