"""A step on a GPU as a training loop meets it: launches, memory, waiting, hyperparameters, checkpoints, errors."""

from __future__ import annotations

import copy
import secrets
import sys
import weakref
from pathlib import Path

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    SGD_ARGUMENTS,
    Reference,
    assert_same_bits,
    buffers_of,
    copy_gradients,
    empty_cache,
    fewest_launches,
    fused,
    give_gradients,
    launches,
    no_waiting,
    numbers,
    parameters,
    source,
    twin,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from wd_fused import FusedSGD, functional, reference
from wd_fused import backends as registry
from wd_fused.build import extension

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def warm(params, steps=2, **arguments):
    """An optimizer whose plan and momentum buffers are there."""
    optimizer = fused(params, **arguments)
    for step in range(steps):
        give_gradients(params, seed=step)
        optimizer.step()
    return optimizer


# What a step asks of the GPU


def test_the_gpu_is_taken_by_the_backend_and_backends_says_so(gpu_backend):
    optimizer = FusedSGD(parameters(torch.float32, sizes=(4,)), lr=0.1)
    (entry,) = optimizer.backends()
    assert entry.backend == gpu_backend and "first choice" in entry.reason
    assert registry.available()[gpu_backend] is None


@pytest.mark.gpu_backend("cuda")
def test_the_extension_was_built_for_this_gpu():
    module = extension.load()
    assert module is not None, extension.status().reason
    assert module.cuda_architectures(), extension.status().cuda
    assert module.why_not_cuda(0) is None


def test_a_step_is_one_launch_by_the_plans_own_account():
    params = [p for seed in range(20) for p in parameters(torch.float32, seed)]
    optimizer = warm(params)
    (launch,) = launches(optimizer)
    assert launch["tensors"] == sum(param.numel() > 0 for param in params)


def test_a_step_is_one_kernel_a_bucket_and_nothing_else_by_the_profilers_account():
    from bench.gpu.trace import profiled

    profiled(lambda: torch.ones(3, device=DEVICE))  # its own first use
    for params in (parameters(torch.float32), [p for dtype in DTYPES for p in parameters(dtype, sizes=(7, 3_000))]):
        optimizer = warm(params)
        seen = profiled(optimizer.step, steps=4)
        assert seen["kernels"] == fewest_launches(params), seen
        assert (seen["memcpys"], seen["memsets"], seen["waits"]) == (0, 0, 0), seen
        assert all("sgd_kernel" in name for name in seen["kernel_names"]), seen


def test_a_steady_step_neither_waits_nor_rebuilds_while_gradients_move(gpu_backend):
    """Nor takes memory; but the Triton backend, whose gradients' addresses lie in the GPU's."""
    params = [p for dtype in DTYPES for p in parameters(dtype)]
    optimizer = warm(params)
    plans = optimizer._plans
    held = []
    counter = "allocation.all.allocated"
    for step in range(100):
        held.append([p.grad for p in params])
        for param in params:
            param.grad = None
        give_gradients([p for i, p in enumerate(params) if (i + step) % 7], seed=step)
        optimizer.param_groups[0]["lr"] *= 0.99
        before = torch.cuda.memory_stats()[counter]
        with no_waiting():
            optimizer.step()
        taken = torch.cuda.memory_stats()[counter] - before
        assert taken <= (0 if gpu_backend == "cuda" else 1), f"step {step} took memory {taken} times"
        held = held[-3:]
    assert optimizer._plans is plans


def test_a_step_whose_gradients_stay_takes_no_memory():
    optimizer = warm([p for dtype in DTYPES for p in parameters(dtype)])
    counter = "allocation.all.allocated"
    before = torch.cuda.memory_stats()[counter]
    for _ in range(5):
        with no_waiting():
            optimizer.step()
    assert torch.cuda.memory_stats()[counter] == before


def test_the_first_step_takes_the_momentum_buffers_and_one_table():
    params = parameters(torch.float32, sizes=(10_000, 20_000))
    optimizer = fused(params)
    give_gradients(params, seed=1)
    before = torch.cuda.memory_allocated()
    optimizer.step()
    taken = torch.cuda.memory_allocated() - before - 4 * 30_000
    assert 0 <= taken < 16_384


# Hyperparameters on the device


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scalar_dtype", DTYPES, ids=str)
def test_lr_and_weight_decay_on_the_gpu_are_read_there_at_every_step(dtype, scalar_dtype):
    params = parameters(dtype)
    lr = torch.tensor(0.1, dtype=scalar_dtype, device=DEVICE)
    weight_decay = torch.tensor(0.01, dtype=scalar_dtype, device=DEVICE)
    optimizer = fused(params, lr=lr, weight_decay=weight_decay)
    expected = Reference(optimizer)
    for step in range(4):
        give_gradients(params, seed=step)
        if step < 2:
            optimizer.step()
        else:
            with no_waiting():
                lr.mul_(0.7)
                weight_decay.mul_(1.5 if step < 3 else 0.0)
                optimizer.step()
        expected.step()
        expected.assert_agrees(f"step {step}")


@pytest.mark.parametrize("scalar_dtype", DTYPES, ids=str)
def test_numbers_on_the_gpu_that_are_rounded_subnormal_or_infinite(scalar_dtype):
    """As the host rounds them. 0·p makes 0 of −0 and NaN of infinity: a weight decay too small for float32 is added."""
    generator = torch.Generator().manual_seed(12)
    exponents = torch.randint(-150, 20, (40, 2), generator=generator)
    exact = torch.rand(40, 2, generator=generator, dtype=torch.float64) * torch.exp2(exponents.double())
    values = torch.cat([exact, torch.tensor([[1.0, 1e-46], [float("inf"), float("inf")], [0.0, 0.0]])])
    values = values.to(scalar_dtype).to(DEVICE)
    groups = []
    for lr, weight_decay in values:
        params = [param for dtype in DTYPES for param in parameters(dtype, sizes=(33,), special=0.1)]
        groups.append({"params": params, "lr": lr, "weight_decay": weight_decay})
    optimizer = fused(groups)
    expected = Reference(optimizer)
    give_gradients([param for group in groups for param in group["params"]], seed=1, special=0.1)
    optimizer.step()
    expected.step()
    expected.assert_agrees()


def test_a_learning_rate_on_the_gpu_is_rounded_to_float32_as_the_host_rounds_it():
    """p − lr·g of p = 0 and g = −1 is the number itself: powers of two, ties, subnormals, their neighbours."""
    generator = torch.Generator().manual_seed(secrets.randbelow(2**31))
    print("seed", generator.initial_seed())
    powers = torch.exp2(torch.arange(-151, 129, dtype=torch.float64))
    random = torch.rand(40, generator=generator, dtype=torch.float64) + 1
    odd = torch.randint(2**23, 2**24, (40,), generator=generator).double() + 0.5  # between two of float32's
    exact = torch.cat([powers, random * powers[100:140], odd, odd * 2.0**-140, random * 2.0**-130])
    whole = exact.view(torch.int64)
    lr = torch.cat([whole - 1, whole, whole + 1]).view(torch.float64)
    on_gpu = lr.to(DEVICE)
    param = torch.zeros(len(lr), device=DEVICE)
    groups = [{"params": [param[i : i + 1].requires_grad_()], "lr": on_gpu[i]} for i in range(len(lr))]
    minus_one = -torch.ones(1, device=DEVICE)
    for group in groups:
        group["params"][0].grad = minus_one
    fused(groups, momentum=0.0, weight_decay=0.0).step()
    assert_same_bits([param.cpu()], [lr.float()])


def test_a_learning_rate_in_memory_that_the_step_writes_is_read_before():
    """Read by the kernel, some elements would get one learning rate and some another."""
    memory = torch.full((20_000,), 0.5, device=DEVICE)
    param = memory.requires_grad_()
    param.grad = torch.ones(20_000, device=DEVICE)
    fused([param], lr=memory.detach()[:1].view(()), momentum=0.0, weight_decay=0.0).step()
    assert param.unique().tolist() == [0.0]


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_hyperparameter_without_memory_of_its_own_has_its_value(name):
    params = parameters(torch.float32, sizes=(10,))
    optimizer = fused(params, **{name: torch._efficientzerotensor((), device=DEVICE)})
    expected = Reference(optimizer)
    give_gradients(params, seed=1)
    optimizer.step()
    expected.step()
    expected.assert_agrees()


def test_a_one_element_lr_and_one_on_the_cpu_are_taken_too():
    for lr in (torch.tensor([0.1], device=DEVICE), torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)):
        params = parameters(torch.float32)
        optimizer = fused(params, lr=lr)
        expected = Reference(optimizer)
        for step in range(3):
            give_gradients(params, seed=step)
            optimizer.step()
            expected.step()
            lr.mul_(0.5)
        expected.assert_agrees()


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
def test_tensor_hyperparameters_give_torchs_bits(foreach):
    lr = torch.tensor(0.1, device=DEVICE)
    params = parameters(torch.float32)
    twins = twin(params)
    ours = fused(params, lr=lr)
    theirs = torch.optim.SGD(twins, **SGD_ARGUMENTS | {"lr": lr.clone()}, foreach=foreach)
    for step in range(3):
        give_gradients(params, seed=step)
        copy_gradients(params, twins)
        ours.step()
        theirs.step()
    assert_same_bits(params, twins)


# Checkpoints


@pytest.mark.parametrize("first", ["FusedSGD", "torch.optim.SGD"])
def test_a_checkpoint_goes_either_way_between_the_two_classes(first):
    params = parameters(torch.float32)
    twins = twin(params)
    classes = [FusedSGD, torch.optim.SGD] if first == "FusedSGD" else [torch.optim.SGD, FusedSGD]
    one, straight = classes[0](params, **SGD_ARGUMENTS), torch.optim.SGD(twins, **SGD_ARGUMENTS, foreach=False)
    optimizers = [one, straight]
    for round_ in range(3):
        for step in range(2):
            give_gradients(params, seed=10 * round_ + step)
            copy_gradients(params, twins)
            for optimizer in optimizers:
                optimizer.step()
        saved = copy.deepcopy(optimizers[0].state_dict())
        optimizers[0] = classes[(round_ + 1) % 2](params, lr=7.0)
        optimizers[0].load_state_dict(saved)
    assert_same_bits(params, twins)
    assert_same_bits(buffers_of(optimizers[0]), buffers_of(straight))


def test_a_checkpoint_saved_on_the_cpu_continues_on_the_gpu():
    params = parameters(torch.float32)
    optimizer = warm(params)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].cpu()
    other = twin(params)
    continued = fused(other)
    continued.load_state_dict(saved)
    give_gradients(params, seed=9)
    copy_gradients(params, other)
    optimizer.step()
    continued.step()
    assert_same_bits(params, other)


def test_a_model_moved_to_the_gpu_after_the_optimizer_was_made_is_stepped_there(gpu_backend):
    torch.manual_seed(3)
    model = torch.nn.Linear(30, 20)
    optimizer = FusedSGD(model.parameters(), lr=0.1)
    give_gradients_on_cpu = [torch.ones_like(p) for p in model.parameters()]
    for param, gradient in zip(model.parameters(), give_gradients_on_cpu, strict=True):
        param.grad = gradient
    optimizer.step()
    model.to(DEVICE)
    give_gradients(model.parameters(), seed=1)
    expected = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for value, param in zip(expected, model.parameters(), strict=True):
        reference.sgd([value], [param.grad], [None], lr=0.1)
    assert_same_bits(model.parameters(), expected)
    assert {entry.backend for entry in optimizer.backends()} == {gpu_backend}


# Lists of tensors


OPTIONS = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.01, "nesterov": True, "maximize": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numerics", ["torch", "opmath"])
def test_functional_sgd(dtype, numerics, gpu_backend):
    params = [p.detach() for p in parameters(dtype)]
    expected = [p.clone() for p in params]
    buffers, expected_buffers = [None] * len(params), [None] * len(params)
    for step in range(3):
        grads = [numbers(p.shape, dtype, source(step)) for p in params]
        functional.sgd(params, grads, buffers, **OPTIONS, backend=gpu_backend, numerics=numerics)
        reference.sgd(expected, grads, expected_buffers, **OPTIONS, numerics=numerics)
        assert_same_bits(params, expected, f"step {step}")
        assert_same_bits(buffers, expected_buffers, f"momentum buffers, step {step}")


@pytest.mark.gpu_backend("cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numerics", ["torch", "opmath"])
def test_the_operator(dtype, numerics):
    params = [p.detach() for p in parameters(dtype)]
    expected = [p.clone() for p in params]
    buffers, expected_buffers = [torch.full_like(p, 3.0) for p in params], [None] * len(params)
    for step in range(3):
        grads = [numbers(p.shape, dtype, source(step)) for p in params]
        torch.ops.wd_fused.sgd_(
            params, grads, buffers, [step == 0] * len(params), **OPTIONS, opmath=numerics == "opmath"
        )
        reference.sgd(expected, grads, expected_buffers, **OPTIONS, numerics=numerics)
        assert_same_bits(params, expected, f"step {step}")
        assert_same_bits(buffers, expected_buffers, f"momentum buffers, step {step}")


@pytest.mark.gpu_backend("cuda")
def test_the_operator_makes_its_table_once():
    """A compiled graph calls it with the same tensors each time; the gradients may lie elsewhere."""
    params = [p.detach() for dtype in DTYPES for p in parameters(dtype)]
    expected = [p.clone() for p in params]
    buffers, expected_buffers = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for step in range(4):
        grads = [numbers(p.shape, p.dtype, source(step)) for p in params]
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with no_waiting():
            torch.ops.wd_fused.sgd_(params, grads, buffers, [False] * len(params), **OPTIONS)
        taken = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        assert (taken != 0) == (step == 0), (step, taken)
        reference.sgd(expected, grads, expected_buffers, **OPTIONS, numerics="torch")
        assert_same_bits([*params, *buffers], [*expected, *expected_buffers], f"step {step}")
    del params[0], buffers[0], expected[0], expected_buffers[0], grads[0]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.ops.wd_fused.sgd_(params, grads, buffers, [False] * len(params), **OPTIONS)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] > before  # another list, another table


# Errors


def test_an_explicit_backend_of_gpus_refuses_a_parameter_on_the_cpu(gpu_backend):
    params = [torch.ones(3).requires_grad_()]
    params[0].grad = torch.ones(3)
    optimizer = FusedSGD(params, lr=0.1, backend=gpu_backend)
    with pytest.raises(RuntimeError, match=f'backend="{gpu_backend}" does not take it'):
        optimizer.step()
    assert torch.equal(params[0].detach(), torch.ones(3))


def test_a_gradient_that_cannot_be_used_is_an_error_before_anything_is_written():
    params = parameters(torch.float32, sizes=(100, 200))
    optimizer = warm(params)
    before = [p.detach().clone() for p in params]
    give_gradients(params, seed=5)
    with torch.no_grad():
        params[1].grad = None
        params[1].data = params[1].data[:150]
        params[1].grad = torch.ones(150, device=DEVICE)
        params[1].data = before[1].clone()
    with pytest.raises(RuntimeError, match=r"gradient has shape \[150\]"):
        optimizer.step()
    assert_same_bits(params, before)


@pytest.mark.usefixtures("much_memory")
def test_out_of_memory_at_the_first_step_changes_nothing_and_the_next_step_works():
    params = parameters(torch.float32, sizes=(1_000, 16 << 20, 1_000))
    give_gradients(params, seed=1)
    optimizer = fused(params)
    expected = Reference(optimizer)
    before = [p.detach().clone() for p in params]
    empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (16 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        assert_same_bits(params[::2], before[::2])
        assert not buffers_of(optimizer)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same_bits(params, before)
    for _ in range(2):
        optimizer.step()
        expected.step()
    expected.assert_agrees()


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_a_word_of_grad_scaler_that_is_no_tensor_is_refused(name):
    params = parameters(torch.float32, sizes=(10,))
    optimizer = warm(params)
    before = params[0].detach().clone()
    setattr(optimizer, name, True)
    with pytest.raises(TypeError, match=f"{name} must be a Tensor"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_a_step_that_raises_leaves_the_gradients_scaled_and_holds_none():
    """Otherwise the step that is tried again would unscale them once more."""
    params = parameters(torch.float32, sizes=(10, 4))
    optimizer = fused(params)
    for _ in range(2):
        give_gradients(params, seed=1)
        before = params[0].grad.clone()
        sparse = torch.ones(4, device=DEVICE).to_sparse()
        params[1].grad = sparse
        optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=DEVICE) for x in (8.0, 0.0))
        with pytest.raises(RuntimeError, match="group 0, parameter 1"):
            optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        assert torch.equal(params[0].grad, before)
        storage = weakref.ref(params[0].grad.untyped_storage())
        params[0].grad = None
        assert storage() is None
        give_gradients(params, seed=1)
        optimizer.step()


def test_nothing_of_a_step_stays_alive_in_the_plan():
    """A reference held in C++ would close a cycle that the garbage collector cannot see."""
    params = parameters(torch.float32, sizes=(10,))
    lr = torch.tensor(0.1, device=DEVICE)
    optimizer = warm(params, lr=lr)
    optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=DEVICE) for x in (2.0, 0.0))
    words = [weakref.ref(lr), weakref.ref(optimizer.grad_scale)]  # last_step_skipped has the other, in Python
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf, lr
    optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] = 0.1
    assert [word() for word in words] == [None, None]


def test_a_mode_that_makes_other_tensors_has_no_say_in_the_plans_memory():
    params = parameters(torch.float32, sizes=(10,))
    optimizer = fused(params)
    expected = Reference(optimizer)
    give_gradients(params, seed=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer.step()
    expected.step()
    expected.assert_agrees()
    assert type(optimizer.state[params[0]]["momentum_buffer"]) is torch.Tensor


# Several GPUs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_two_gpus_are_a_launch_each_and_the_current_device_stays():
    params = [p.detach().to(f"cuda:{i}").requires_grad_() for i in (0, 1) for p in parameters(torch.float32, seed=i)]
    twins = twin(params)
    ours, theirs = fused(params), torch.optim.SGD(twins, **SGD_ARGUMENTS, foreach=False)
    for step in range(3):
        for param, copied in zip(params, twins, strict=True):
            param.grad = numbers(param.shape, param.dtype, source(step)).to(param.device)
            copied.grad = param.grad.clone()
        with torch.cuda.device(step % 2):
            ours.step()
            assert torch.cuda.current_device() == step % 2
        theirs.step()
    for device in (0, 1):
        torch.cuda.synchronize(device)
    assert_same_bits(params, twins)
    assert len(launches(ours)) == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_with_empty_tensors_alone_beside_another():
    params = parameters(torch.float32, sizes=(5, 2_000))
    params += [p.detach().to("cuda:1").requires_grad_() for p in parameters(torch.float32, sizes=(0, 0))]
    twins = twin(params)
    ours, theirs = fused(params), torch.optim.SGD(twins, **SGD_ARGUMENTS, foreach=False)
    for _ in range(3):
        for param, copied in zip(params, twins, strict=True):
            param.grad, copied.grad = torch.ones_like(param), torch.ones_like(param)
        ours.step()
        theirs.step()
    assert_same_bits(params, twins)
    assert len(launches(ours)) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_step_on_a_gpu_that_is_not_the_current_one():
    params = [p.detach().to("cuda:1").requires_grad_() for p in parameters(torch.float32)]
    for param in params:
        param.grad = torch.ones_like(param)
    expected = [p.detach().clone() for p in params]
    with torch.cuda.device(0):
        fused(params, momentum=0.0).step()
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    reference.sgd(expected, [p.grad for p in params], [None] * len(params), lr=0.1, weight_decay=5e-4)
    assert_same_bits(params, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_lazy_copy_on_a_gpu_that_is_not_the_current_one_gets_its_memory_there():
    source_of_copy = numbers(1_000, torch.float32, source(1)).to("cuda:1")
    before = source_of_copy.clone()
    param = torch._lazy_clone(source_of_copy).requires_grad_()
    param.grad = torch.ones_like(param)
    with torch.cuda.device(0):
        fused([param], momentum=0.0, weight_decay=0.0).step()
    torch.cuda.synchronize(1)
    assert_same_bits([param, source_of_copy], [before.add(param.grad, alpha=-0.1), before])
