"""A step captured in a CUDA graph: replays are steps, bit for bit, whatever becomes of the optimizer meanwhile."""

from __future__ import annotations

import gc

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    SGD_ARGUMENTS,
    Reference,
    affordable,
    assert_same_bits,
    buffers_of,
    copy_gradients,
    empty_cache,
    forget,
    fused,
    give_gradients,
    numbers,
    parameters,
    source,
    synchronize,
    twin,
)
from torch import nn

from wd_fused import reference

pytestmark = pytest.mark.gpu_backend("cuda", "triton")


class Captured:
    """An optimizer whose step is in a graph, and the reference that steps with it. Gradients stay where they are."""

    def __init__(self, params, warm_up=2, **arguments):
        self.params = params
        give_gradients(params, seed=0)
        self.gradients = [param.grad for param in params]
        self.optimizer = fused(params, **arguments)
        self.expected = Reference(self.optimizer)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(warm_up):
                self.optimizer.step()
        torch.cuda.current_stream().wait_stream(aside)
        for _ in range(warm_up):
            self.expected.step()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.optimizer.step()
        self.expected.assert_agrees("a capture is not a step:")

    def new_gradients(self, seed):
        generator = source(seed)
        for gradient in self.gradients:
            gradient.copy_(numbers(gradient.shape, gradient.dtype, generator))

    def replay(self, seed):
        self.new_gradients(seed)
        self.graph.replay()
        self.expected.step()


def churn():
    """Takes and fills whatever memory was given back, so that a freed table would hold other data."""
    sizes = (128, 1_024, 16_384, affordable(1 << 20, 1 << 17)) * 20
    empty = [torch.full((size,), -1, dtype=torch.int32, device=DEVICE) for size in sizes]
    synchronize()
    del empty


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replays_are_steps(dtype):
    captured = Captured(parameters(dtype))
    for seed in range(1, 6):
        captured.replay(seed)
    captured.expected.assert_agrees()


def test_replays_and_plain_steps_take_turns():
    captured = Captured([p for dtype in DTYPES for p in parameters(dtype)])
    for seed in range(1, 7):
        if seed % 2:
            captured.replay(seed)
        else:
            captured.new_gradients(seed)
            captured.optimizer.step()
            captured.expected.step()
    captured.expected.assert_agrees()


def test_lr_and_weight_decay_in_tensors_change_between_replays():
    lr = torch.tensor(0.1, device=DEVICE)
    weight_decay = torch.tensor(0.01, device=DEVICE)
    captured = Captured(parameters(torch.float32), lr=lr, weight_decay=weight_decay)
    for seed in range(1, 5):
        lr.mul_(0.5)
        weight_decay.mul_(2.0)
        captured.replay(seed)
    captured.expected.assert_agrees()


def test_without_momentum_the_first_step_can_be_inside_the_capture():
    captured = Captured(parameters(torch.float32), warm_up=0, momentum=0.0)
    for seed in range(1, 4):
        captured.replay(seed)
    captured.expected.assert_agrees()


def test_many_tensors():
    """More than one launch of the CUDA backend, with parameters of many thousand bytes. All lie in one tensor, which
    the reference steps as a whole."""
    sizes = [1 + i % affordable(50, 5) for i in range(affordable(5_000, 4_200))]
    whole = numbers(sum(sizes), torch.float32, source(0))
    gradient, expected, buffer = torch.zeros_like(whole), whole.clone(), [None]
    params = [part.requires_grad_() for part in whole.detach().split(sizes)]
    for param, part in zip(params, gradient.split(sizes), strict=True):
        param.grad = part
    optimizer, graph = fused(params), torch.cuda.CUDAGraph()
    for seed in range(4):
        gradient.copy_(numbers(whole.shape, torch.float32, source(seed)))
        if seed == 2:
            with torch.cuda.graph(graph):
                optimizer.step()
        graph.replay() if seed >= 2 else optimizer.step()
        reference.sgd([expected], [gradient.clone()], buffer, **SGD_ARGUMENTS)
        assert_same_bits([whole], [expected], f"step {seed}")


def test_a_first_step_with_momentum_in_a_capture_is_an_error_that_names_parameter_and_remedy_and_harms_nothing():
    params = parameters(torch.float32)
    give_gradients(params, seed=1)
    optimizer = fused(params)
    expected = Reference(optimizer)
    before = [param.detach().clone() for param in params]
    graph = torch.cuda.CUDAGraph()
    names_both = r"^group 0, parameter 0 has no momentum buffer.* step\(\) once before the capture"
    with pytest.raises(RuntimeError, match=names_both), torch.cuda.graph(graph):
        optimizer.step()
    del graph
    synchronize()
    assert_same_bits(params, before)
    optimizer.step()
    expected.step()
    expected.assert_agrees("afterwards, a plain step:")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    expected.step()
    expected.assert_agrees("and a capture:")


def test_a_parameter_that_meets_its_first_gradient_in_a_capture_is_named():
    params = parameters(torch.float32, sizes=(4, 5))
    give_gradients(params[:1], seed=1)
    optimizer = fused(params)
    optimizer.step()
    give_gradients(params, seed=2)
    refused = pytest.raises(RuntimeError, match="group 0, parameter 1 has no momentum buffer yet")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    synchronize()
    assert "momentum_buffer" not in optimizer.state.get(params[1], {})


@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES], ids=["float32", "all dtypes"])
def test_backward_and_step_are_captured_together(dtypes):
    """Gradients in the graph's own memory; then steps outside, with gradients elsewhere, and replays again.

    The loss is made of operators whose gradients are computed element by element: the same bits in a graph or not.
    """
    params = [p for dtype in dtypes for p in parameters(dtype, sizes=(5, 1_000, 20_001))]
    inputs = [torch.zeros_like(param) for param in params]
    twins = twin(params)
    ours = fused(params)
    theirs = torch.optim.SGD(twins, **SGD_ARGUMENTS, foreach=False)

    def backward(tensors):
        sum((tensor * values * tensor).float().sum() for tensor, values in zip(tensors, inputs, strict=True)).backward()

    def new_inputs(seed):
        generator = source(seed)
        for values in inputs:
            values.copy_(numbers(values.shape, values.dtype, generator) / 8)

    def expect(what):
        theirs.zero_grad()
        backward(twins)
        theirs.step()
        assert_same_bits(params, twins, what)

    def plain_step(seed):
        new_inputs(seed)
        ours.zero_grad()
        backward(params)
        ours.step()
        expect(f"plain step {seed}")

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for seed in range(3):
            plain_step(seed)
    torch.cuda.current_stream().wait_stream(aside)
    ours.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward(params)
        ours.step()
    for seed in range(3, 12):
        if seed in (6, 7, 8):
            plain_step(seed)
            churn()
            continue
        new_inputs(seed)
        graph.replay()
        expect(f"replay {seed}")


def test_a_scaled_step_is_captured_and_reads_scale_and_overflow_at_each_replay():
    params = parameters(torch.float32)
    give_gradients(params, seed=1)
    optimizer = fused(params)
    twins = twin(params)
    copy_gradients(params, twins)
    theirs = torch.optim.SGD(twins, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=False)
    optimizer.step()
    theirs.step()
    optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    unscaled = [copied.grad.clone() for copied in twins]
    for scale, overflow in ((2.0, 0.0), (8.0, 0.0), (8.0, 1.0), (0.5, 0.0)):
        optimizer.grad_scale.fill_(scale)
        optimizer.found_inf.fill_(overflow)
        graph.replay()
        if not overflow:
            for copied, gradient in zip(twins, unscaled, strict=True):
                copied.grad = gradient * (1 / scale)
            theirs.step()
        assert_same_bits(params, twins, f"scale {scale}, overflow {overflow}")


def test_a_scalers_whole_step_and_update_in_a_graph():
    params = parameters(torch.float32)
    twins = twin(params)
    give_gradients(params, seed=1)
    copy_gradients(params, twins)
    ours = fused(params, fused=True)
    theirs = torch.optim.SGD(twins, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=False)
    scalers = [torch.amp.GradScaler(DEVICE.type, init_scale=16.0, growth_interval=2) for _ in range(2)]
    graph = torch.cuda.CUDAGraph()
    for scaler in scalers:
        scaler.scale(torch.zeros((), device=DEVICE))

    def step(scaler, optimizer):
        scaler.step(optimizer)
        scaler.update()

    def gradients(seed, overflow):
        generator = source(seed)
        for param, copied in zip(params, twins, strict=True):
            param.grad.copy_(numbers(param.shape, param.dtype, generator))
            if overflow and param.numel():
                param.grad.view(-1)[0] = float("nan")
            copied.grad = param.grad.clone()

    for seed in range(2):
        gradients(seed, False)
        step(scalers[0], ours)
        step(scalers[1], theirs)
    with torch.cuda.graph(graph):
        step(scalers[0], ours)
    for seed in range(2, 7):
        gradients(seed, seed == 4)
        graph.replay()
        step(scalers[1], theirs)
        assert_same_bits(params, twins, f"step {seed}")
        assert scalers[0].get_scale() == scalers[1].get_scale()


def test_a_step_on_another_stream_does_not_break_a_capture_of_the_same_thread():
    """Not even one that brings new gradients' addresses to the GPU."""
    params = parameters(torch.float32)
    optimizer = fused(params)
    expected = Reference(optimizer)
    values = torch.zeros(3, device=DEVICE)
    give_gradients(params, seed=9)
    optimizer.step()  # which takes the momentum buffers from torch
    expected.step()
    for seed in range(3):
        give_gradients(params, seed)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        synchronize()
        with torch.cuda.graph(graph):
            values.add_(1.0)
            with torch.cuda.stream(stream):
                optimizer.step()
        synchronize()
        graph.replay()
        expected.step()
        expected.assert_agrees(f"step {seed}")
    assert values.tolist() == [3.0] * 3


# The graph outlives what it was made with


def test_memory_comes_and_goes_between_replays():
    captured = Captured(parameters(torch.float32))
    for seed in range(1, 5):
        churn()
        empty_cache()
        captured.replay(seed)
    captured.expected.assert_agrees()


def test_the_plan_is_made_anew_while_the_graph_lives():
    captured = Captured(parameters(torch.float32))
    optimizer = captured.optimizer
    for seed in range(1, 5):
        plans = optimizer._plans
        optimizer.param_groups[0][f"key {seed}"] = None  # which might have been an option's: another plan
        captured.new_gradients(seed)
        optimizer.step()
        captured.expected.step()
        assert optimizer._plans is not plans
        del plans
        forget()
        churn()
        captured.replay(10 + seed)
    captured.expected.assert_agrees()


def test_the_optimizer_is_gone_while_the_graph_lives():
    params = parameters(torch.float32)
    captured = Captured(params)
    buffers = [captured.optimizer.state[param]["momentum_buffer"] for param in params]
    graph, expected, gradients = captured.graph, captured.expected, captured.gradients
    groups = captured.optimizer.param_groups
    del captured.optimizer
    expected._optimizer = Groups(groups)
    forget()
    others = [fused(parameters(torch.float32, seed=s)) for s in range(5)]  # their tables may take freed memory
    for other in others:
        give_gradients(other.param_groups[0]["params"], seed=1)
        other.step()
    churn()
    for seed in range(1, 4):
        generator = source(seed)
        for gradient in gradients:
            gradient.copy_(numbers(gradient.shape, gradient.dtype, generator))
        graph.replay()
        expected.step()
    assert_same_bits(params, expected.params)
    assert_same_bits(buffers, [b for group in expected.buffers for b in group])


def test_a_capture_on_the_stream_of_the_steps_before_it_outlives_the_optimizer():
    params = parameters(torch.float32)
    give_gradients(params, seed=0)
    optimizer = fused(params)
    expected = Reference(optimizer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizer.step()
            expected.step()
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    expected._optimizer = Groups(optimizer.param_groups)
    buffers = buffers_of(optimizer)  # which the graph writes
    del optimizer
    forget()
    churn()
    for _ in range(3):
        graph.replay()
        expected.step()
    assert_same_bits(params, expected.params)
    assert_same_bits(buffers, [b for group in expected.buffers for b in group])


class Groups:
    """All that the reference asks of an optimizer."""

    def __init__(self, param_groups):
        self.param_groups = param_groups


def test_several_graphs_of_one_optimizer_and_one_of_them_dropped():
    captured = Captured(parameters(torch.float32))
    second = torch.cuda.CUDAGraph()
    with torch.cuda.graph(second):
        captured.optimizer.step()
    captured.replay(1)
    captured.graph = second
    gc.collect()
    churn()
    for seed in range(2, 5):
        captured.replay(seed)
    captured.expected.assert_agrees()


# Models


def small_model():
    torch.manual_seed(1)
    layers = (nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    return nn.Sequential(*layers).to(DEVICE)


def images(seed):
    return numbers((16, 2, 8, 8), torch.float32, source(seed))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_model_of_make_graphed_callables_is_stepped(set_to_none):
    """Forward and backward are replayed; the gradients lie in the graph's memory or are added to others. The step is a
    plain one, over the same gradients as torch.optim.SGD's, so that it does not matter how they were computed."""
    model = small_model()
    params = list(model.parameters())
    graphed = torch.cuda.make_graphed_callables(model, (images(0),))
    twins = twin(params)
    ours, theirs = fused(params), torch.optim.SGD(twins, **SGD_ARGUMENTS, foreach=False)
    before = [param.detach().clone() for param in params]
    for seed in range(1, 7):
        ours.zero_grad(set_to_none)
        graphed(images(seed)).square().mean().backward()
        copy_gradients(params, twins)
        ours.step()
        theirs.step()
        assert_same_bits(params, twins, f"step {seed}")
        assert_same_bits(buffers_of(ours), buffers_of(theirs), f"step {seed}, momentum buffers")
        if seed % 2:
            churn()
    assert all(bool((param != old).any()) for param, old in zip(params, before, strict=True))


def test_a_whole_iteration_of_a_model_is_captured():
    """Forward, backward, step; at each replay other images, and at some another learning rate."""
    model = small_model()
    params = list(model.parameters())
    twins = twin(params)
    lr = torch.tensor(0.1, device=DEVICE)
    ours = fused(params, lr=lr, nesterov=True)
    theirs = torch.optim.SGD(twins, **SGD_ARGUMENTS, nesterov=True, foreach=False)
    given = images(0)

    def iteration():
        loss = model(given).square().mean()
        loss.backward()
        ours.step()
        return loss.detach()

    def expect(what):
        """The gradients are still where backward() has put them."""
        copy_gradients(params, twins)
        theirs.param_groups[0]["lr"] = lr.item()
        theirs.step()
        assert_same_bits(params, twins, what)
        assert_same_bits(buffers_of(ours), buffers_of(theirs), f"{what}, momentum buffers")

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for step in range(3):
            ours.zero_grad()
            iteration()
            expect(f"warm-up {step}")
    torch.cuda.current_stream().wait_stream(aside)
    ours.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = iteration()
    assert_same_bits(params, twins, "a capture is not a step")
    for seed in range(1, 9):
        given.copy_(images(1 + seed % 2))
        if seed % 3 == 0:
            lr.mul_(0.5)
        with torch.no_grad():
            expected_loss = model(given).square().mean()
        graph.replay()
        torch.testing.assert_close(loss, expected_loss)
        expect(f"replay {seed}")
        churn()


@pytest.mark.parametrize("numbers_in_tensors", [False, True])
def test_a_compiled_step_has_the_bits_of_a_plain_one(numbers_in_tensors):
    """Through the operator for the CUDA backend; by a break in the graph for others that were asked for."""
    torch._dynamo.reset()
    params = [p for dtype in DTYPES for p in parameters(dtype, sizes=(5, 1_000, 20_001))]
    twins = twin(params)
    arguments = {"lr": torch.tensor(0.1, dtype=torch.float64)} if numbers_in_tensors else {}
    compiled, plain = fused(params, **arguments), fused(twins)
    step = torch.compile(compiled.step, backend="aot_eager")
    for seed in range(3):
        give_gradients(params, seed)
        copy_gradients(params, twins)
        step()
        plain.step()
        assert_same_bits(params, twins, f"step {seed}")
        assert_same_bits(buffers_of(compiled), buffers_of(plain), f"step {seed}, momentum buffers")
    torch._dynamo.reset()
