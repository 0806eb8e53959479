"""The host's side of the CUDA backend, with the kernel compiled for the CPU: what is launched, what lies in device
memory and when that changes, what is read on the device, and what goes wrong in time. Run by pytest; needs no GPU.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import struct
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import cuda_on_cpu_backend
import pytest
import torch
from plan_support import OPTIONS, launches, move_gradients, parameters, plan_of, twins
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wd_fused import FusedSGD, backends

HEADER_BYTES, GROUP_BYTES, SMALL, LARGE = 48, 40, 4096, 32760
TILE = struct.Struct("<QQiiiHH")  # csrc/plan/cuda_launch.h: CudaTile
TILE_BYTES, WARP_TILE = 32768, 1024


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.FUSED, "cuda", cuda_on_cpu_backend.CudaOnCpu())


@pytest.fixture
def capturing() -> Iterator[Any]:
    """Call it with True: the current stream is capturing a CUDA graph."""
    library = ctypes.CDLL(cuda_on_cpu_backend.module().__file__)
    yield lambda flag: library.cuda_on_cpu_set_capturing(int(flag))
    library.cuda_on_cpu_set_capturing(0)


def assert_equal(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.detach(), other.detach())


# What is launched


def test_a_step_is_one_launch_whatever_the_number_of_groups_and_dtypes() -> None:
    floats, doubles = parameters(5, 70_000, (3, 4)), parameters(9, dtype=torch.float64)
    halves = parameters(33, 2000, dtype=torch.bfloat16) + parameters(17, dtype=torch.float16)
    groups = [{"params": floats}, {"params": halves, "lr": 0.2}, {"params": doubles, "weight_decay": 0.0}]
    optimizer = FusedSGD(groups, **OPTIONS, backend="cuda")
    for _ in range(3):
        optimizer.step()
        (launch,) = launches(optimizer)
        assert launch["kernel"] == f"sgd_kernel<mixed, torch, {SMALL}>"
        assert launch["tensors"] == 7


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
@pytest.mark.parametrize("numerics", ["torch", "opmath"])
def test_rows_of_one_dtype_get_the_kernel_for_it(dtype: torch.dtype, name: str, numerics: str) -> None:
    optimizer = FusedSGD(parameters(5, 6, dtype=dtype), **OPTIONS, backend="cuda", numerics=numerics)
    optimizer.step()
    used = "torch" if name == "float32" else numerics  # nothing lies between storage and opmath in float32
    assert [launch["kernel"] for launch in launches(optimizer)] == [f"sgd_kernel<{name}, {used}, {SMALL}>"]


def test_a_step_has_as_few_launches_as_the_parameters_allow() -> None:
    """One word a tensor, and the hyperparameters of each group that a launch has rows of."""
    fit = (LARGE - HEADER_BYTES - GROUP_BYTES) // 8
    for count, expected in ((500, 1), (fit, 1), (fit + 1, 2), (2 * fit, 2), (10_000, 3)):
        params = parameters(*[2] * count)
        theirs = twins(params)
        optimizer, reference = FusedSGD(params, **OPTIONS, backend="cuda"), torch.optim.SGD(theirs, **OPTIONS)
        optimizer.step()
        reference.step()
        made = launches(optimizer)
        assert len(made) == expected
        assert sum(launch["tensors"] for launch in made) == count
        assert all(launch["parameter_bytes"] == (SMALL if launch["tensors"] <= 501 else LARGE) for launch in made)
        assert_equal(params, theirs)


def test_a_group_for_every_tensor_needs_more_launches_and_no_more_than_that() -> None:
    count = 1500
    params = parameters(*[3] * count)
    theirs = twins(params)
    with_lr = [0.1 + 0.001 * i for i in range(count)]
    ours = FusedSGD(
        [{"params": [p], "lr": lr} for p, lr in zip(params, with_lr, strict=True)], momentum=0.9, backend="cuda"
    )
    reference = torch.optim.SGD(
        [{"params": [p], "lr": lr} for p, lr in zip(theirs, with_lr, strict=True)], momentum=0.9
    )
    for optimizer in (ours, reference):
        optimizer.step()
        optimizer.step()
    assert len(launches(ours)) == math.ceil(count / ((LARGE - HEADER_BYTES) // (8 + GROUP_BYTES)))
    assert_equal(params, theirs)


def test_nothing_is_launched_where_no_parameter_has_a_gradient_or_an_element() -> None:
    params = parameters(4, 0)
    optimizer = FusedSGD(params, **OPTIONS, backend="cuda")
    params[0].grad = None
    optimizer.step()
    assert launches(optimizer) == []
    move_gradients(params)
    optimizer.step()
    assert [launch["tensors"] for launch in launches(optimizer)] == [1]


def test_parameters_that_share_memory_are_stepped_one_launch_after_another() -> None:
    def tied() -> list[nn.Parameter]:
        torch.manual_seed(3)
        base = torch.randn(100)
        params = [nn.Parameter(base[:60]), nn.Parameter(base[40:]), nn.Parameter(torch.randn(7))]
        for param in params:
            param.grad = torch.randn_like(param)
        return params

    params, theirs = tied(), tied()
    optimizer, reference = FusedSGD(params, **OPTIONS, backend="cuda"), torch.optim.SGD(theirs, **OPTIONS)
    for _ in range(2):
        optimizer.step()
        reference.step()
    assert [launch["tensors"] for launch in launches(optimizer)] == [1, 1, 1]
    assert_equal(params, theirs)


# What lies in device memory


def test_the_table_is_the_tiles_of_every_row() -> None:
    sizes = (40_001, 300, 0, 8192, 1024, 1025)
    params = parameters(*sizes)
    optimizer = FusedSGD(params, **OPTIONS, backend="cuda")
    optimizer.step()
    (table,) = plan_of(optimizer).tables()
    tiles = list(TILE.iter_unpack(table))
    counts = [count for *_, count, _ in tiles]
    assert counts == [8192] * 4 + [7233, 8192, 1025, 300, 1024], "those for blocks first, those for warps after them"
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


def test_the_table_stays_over_100_steps_with_moving_and_missing_gradients_and_new_hyperparameters() -> None:
    torch.manual_seed(5)
    params = parameters(3000, 5, (8, 9), 1)
    theirs = twins(params)
    optimizer, reference = FusedSGD(params, **OPTIONS, backend="cuda"), torch.optim.SGD(theirs, **OPTIONS)
    optimizer.step()
    reference.step()
    plan, table = plan_of(optimizer), plan_of(optimizer).tables()
    kept = []
    for step in range(100):
        kept.append(move_gradients(params, theirs))
        if step % 3 == 0:
            params[1].grad = theirs[1].grad = None
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] *= 0.99
            each.step()
        assert plan_of(optimizer) is plan and plan.tables() == table
        assert [launch["tensors"] for launch in launches(optimizer)] == [4]
    assert_equal(params, theirs)


def test_a_momentum_buffer_that_comes_later_enters_the_table() -> None:
    params = parameters(10, 20)
    theirs = twins(params)
    params[1].grad = theirs[1].grad = None
    optimizer, reference = FusedSGD(params, **OPTIONS, backend="cuda"), torch.optim.SGD(theirs, **OPTIONS)
    for _ in range(3):
        optimizer.step()
        reference.step()
        move_gradients(params, theirs)
    assert_equal(params, theirs)


def test_gradients_in_another_layout_enter_the_table_and_leave_it() -> None:
    params = parameters((6, 5), (4, 3))
    theirs = twins(params)
    optimizer, reference = FusedSGD(params, **OPTIONS, backend="cuda"), torch.optim.SGD(theirs, **OPTIONS)
    optimizer.step()
    reference.step()
    flat = plan_of(optimizer).tables()
    for transposed in (True, False, True):
        gradient = torch.randn(5, 6).T if transposed else torch.randn(6, 5)
        params[0].grad, theirs[0].grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
        (table,) = plan_of(optimizer).tables()
        assert (len(table) > len(flat[0])) == transposed
    assert_equal(params, theirs)


# What is read on the device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("of_params", [torch.float32, torch.float64], ids=str)
def test_a_tensor_hyperparameter_is_read_by_the_kernel(name: str, dtype: torch.dtype, of_params: torch.dtype) -> None:
    """Changed in place without a word to the optimizer; torch.optim.SGD is given what it holds as a float."""
    params = parameters(40, 3, dtype=of_params)
    theirs = twins(params)
    value = torch.tensor(0.3, dtype=dtype)
    optimizer = FusedSGD(params, **OPTIONS | {name: value}, backend="cuda")
    reference = torch.optim.SGD(theirs, **OPTIONS)
    for new in (0.1, 0.7, 0.0, 1e-3):
        value.fill_(new)
        reference.param_groups[0][name] = value.item()
        optimizer.step()
        reference.step()
        assert_equal(params, theirs)
        move_gradients(params, theirs)


@pytest.mark.parametrize("scale", [2.0**16, 3.0, 1.0, 0.1])
@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scale_and_found_inf_are_read_by_the_kernel(scale: float, overflow: bool) -> None:
    """As GradScaler hands them over; its own unscaling multiplies by the reciprocal."""
    params = parameters(50, 3)
    theirs = twins(params)
    optimizer, reference = FusedSGD(params, **OPTIONS, backend="cuda"), torch.optim.SGD(theirs, **OPTIONS)
    optimizer.step()
    reference.step()
    move_gradients(params, theirs)
    before = [param.grad.clone() for param in params if param.grad is not None]
    optimizer.grad_scale = torch.tensor(scale)
    optimizer.found_inf = torch.tensor(float(overflow))
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert len(launches(optimizer)) == 1
    assert all(torch.equal(b, p.grad) for b, p in zip(before, params, strict=True) if p.grad is not None)
    if not overflow:
        for param in theirs:
            assert param.grad is not None
            param.grad.mul_(torch.tensor(scale).double().reciprocal().float())
        reference.step()
    assert_equal(params, theirs)


def test_an_overflow_in_a_first_step_makes_no_momentum_buffer() -> None:
    params = parameters(5, 3)
    theirs = twins(params)
    options = OPTIONS | {"dampening": 0.5}  # a first step takes none of it
    optimizer, reference = FusedSGD(params, **options, backend="cuda"), torch.optim.SGD(theirs, **options)
    for overflow in (True, True, False, True, False):
        optimizer.found_inf = torch.tensor(float(overflow))
        optimizer.step()
        if not overflow:
            reference.step()
        assert len(optimizer.state) == len(reference.state)
        assert_equal(params, theirs)


# What goes wrong in time


def test_a_first_step_with_momentum_cannot_be_captured_and_says_so(capturing: Any) -> None:
    params = parameters(4, 5)
    before = [param.detach().clone() for param in params]
    optimizer = FusedSGD(params, **OPTIONS, backend="cuda")
    capturing(True)
    with pytest.raises(
        RuntimeError, match=r"group 0, parameter 0 has no momentum buffer yet.*call step\(\) once before"
    ):
        optimizer.step()
    assert not optimizer.state and all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    capturing(False)
    optimizer.step()
    capturing(True)
    optimizer.step()
    assert len(launches(optimizer)) == 1


def test_a_parameter_that_meets_its_first_gradient_in_a_capture_is_named(capturing: Any) -> None:
    params = parameters(4, 5)
    params[1].grad = None
    optimizer = FusedSGD(params, **OPTIONS, backend="cuda")
    optimizer.step()
    move_gradients(params)
    capturing(True)
    with pytest.raises(RuntimeError, match="group 0, parameter 1 has no momentum buffer yet"):
        optimizer.step()
    assert "momentum_buffer" not in optimizer.state.get(params[1], {})


def test_a_first_step_without_momentum_can_be_captured(capturing: Any) -> None:
    params = parameters(4)
    theirs = twins(params)
    capturing(True)
    FusedSGD(params, lr=0.1, weight_decay=0.1, backend="cuda").step()
    torch.optim.SGD(theirs, lr=0.1, weight_decay=0.1).step()
    assert_equal(params, theirs)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_launch_that_fails_names_the_kernel_and_leaves_the_optimizer_as_it_was(steps_before: int) -> None:
    params = parameters(4, 3000)
    theirs = twins(params)
    optimizer, reference = FusedSGD(params, **OPTIONS, backend="cuda"), torch.optim.SGD(theirs, **OPTIONS)
    for _ in range(steps_before):
        optimizer.step()
        reference.step()
    ctypes.CDLL(cuda_on_cpu_backend.module().__file__).cuda_on_cpu_fail_once()
    with pytest.raises(RuntimeError, match=r"in the launch of sgd_kernel<float32, torch, 4096>"):
        optimizer.step()
    assert_equal(params, theirs)
    assert len(optimizer.state) == (2 if steps_before else 0)
    optimizer.step()
    reference.step()
    assert_equal(params, theirs)


def test_an_element_off_its_own_alignment_is_refused() -> None:
    """A GPU faults on it."""
    memory = torch.zeros(41, dtype=torch.uint8)
    odd = nn.Parameter(torch.frombuffer(memory.numpy(), dtype=torch.float32, offset=1, count=10))
    odd.grad = torch.ones(10)
    optimizer = FusedSGD([odd], lr=0.1, backend="cuda")
    with pytest.raises(RuntimeError, match=r"group 0, parameter 0.*its address is no multiple of its element size"):
        optimizer.step()
    gradient_odd = parameters(10)
    gradient_odd[0].grad = odd.detach()
    optimizer = FusedSGD(gradient_odd, lr=0.1, backend="cuda")
    with pytest.raises(RuntimeError, match="its gradient's address is no multiple of its element size"):
        optimizer.step()


def test_a_first_step_without_the_memory_for_it_changes_nothing_and_the_next_one_works() -> None:
    """The second parameter, of 16 TiB that nobody touches, leaves no room for its momentum buffer."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        reserved = mmap.mmap(-1, 2**44, flags=flags)
    except OSError as error:
        pytest.skip(f"16 TiB of addresses cannot be had here: {error}")
    huge = nn.Parameter(torch.frombuffer(reserved, dtype=torch.float32))
    huge.grad = huge.detach()
    params = parameters(4)
    theirs = twins(params)
    optimizer, reference = FusedSGD([*params, huge], **OPTIONS, backend="cuda"), torch.optim.SGD(theirs, **OPTIONS)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="memory"):
            optimizer.step()
        assert_equal(params, theirs)
        assert not any(optimizer.state.values())
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    reference.step()
    assert_equal(params, theirs)


def test_a_device_that_the_build_does_not_cover_is_a_reason_with_a_remedy() -> None:
    """In a process of its own: the answer is asked for once."""
    script = """
import ctypes, sys, warnings
sys.path.insert(0, "tests")
import cuda_on_cpu_backend, torch
from wd_fused import FusedSGD, backends
module = cuda_on_cpu_backend.module()
ctypes.CDLL(module.__file__).cuda_on_cpu_set_why_not(b"built for 8.0: set TORCH_CUDA_ARCH_LIST=9.0 and build again")
backends.FUSED["cuda"] = cuda_on_cpu_backend.CudaOnCpu()
backends.PREFERENCE["cpu"] = ("cuda",)
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    FusedSGD([param], lr=1.0).step()
assert param.tolist() == [0, 0, 0]
assert ["TORCH_CUDA_ARCH_LIST=9.0" in str(warning.message) for warning in caught] == [True], caught
try:
    FusedSGD([param], lr=1.0, backend="cuda").step()
except RuntimeError as error:
    assert "TORCH_CUDA_ARCH_LIST=9.0" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", script], cwd=cuda_on_cpu_backend.ROOT, check=True, timeout=300)


# What a plan keeps, and for how long; what it is given that it cannot use


def test_a_learning_rate_in_memory_that_the_step_writes_is_read_before() -> None:
    """Read by the kernel, some elements would get one learning rate and some another."""
    memory = torch.full((20_000,), 0.5)
    param = nn.Parameter(memory)
    param.grad = torch.ones(20_000)
    FusedSGD([param], lr=memory[:1].view(()), backend="cuda").step()
    assert param.unique().tolist() == [0.0]


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_hyperparameter_without_memory_of_its_own_has_its_value(name: str) -> None:
    params = parameters(10)
    theirs = twins(params)
    FusedSGD(params, **OPTIONS | {name: torch._efficientzerotensor(())}, backend="cuda").step()
    torch.optim.SGD(theirs, **OPTIONS | {name: 0.0}).step()
    assert_equal(params, theirs)


def test_nothing_of_a_step_stays_alive_in_the_plan() -> None:
    """A reference held in C++ would close a cycle that the garbage collector cannot see."""

    params = parameters(10)
    lr = torch.tensor(0.1)
    optimizer = FusedSGD(params, **OPTIONS | {"lr": lr}, backend="cuda")
    optimizer.step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    words = [weakref.ref(lr), weakref.ref(optimizer.grad_scale)]  # last_step_skipped has the other, in Python
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf, lr
    optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] = 0.1
    assert [word() for word in words] == [None, None]


@pytest.mark.parametrize("value", [2.0, True])
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_word_of_grad_scaler_that_is_no_tensor_is_refused(backend: str, name: str, value: Any) -> None:
    params = parameters(10)
    optimizer = FusedSGD(params, **OPTIONS, backend=backend)
    optimizer.step()
    before = params[0].detach().clone()
    setattr(optimizer, name, value)
    with pytest.raises(TypeError, match=f"{name} must be a Tensor"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_step_that_raises_leaves_the_gradients_scaled(backend: str) -> None:
    """Otherwise the step that is tried again would unscale them once more."""
    params = parameters(10, 4)
    params[1].grad = torch.ones(4).to_sparse()
    optimizer = FusedSGD(params, **OPTIONS, backend=backend)
    given = params[0].grad
    assert given is not None
    before = given.clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="group 0, parameter 1"):
        optimizer.step()
    assert torch.equal(given, before)


def test_a_step_that_raises_holds_no_gradient() -> None:
    params = parameters(10, 4)
    optimizer = FusedSGD(params, **OPTIONS, backend="cuda")
    optimizer.step()
    move_gradients(params)
    params[1].grad = torch.ones(4).to_sparse()
    storage = weakref.ref(params[0].grad.untyped_storage())  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="Sparse"):
        optimizer.step()
    params[0].grad = None
    assert storage() is None


def test_a_mode_that_makes_other_tensors_has_no_say_in_the_plans_memory() -> None:
    params = parameters(10)
    theirs = twins(params)
    optimizer = FusedSGD(params, **OPTIONS, backend="cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer.step()
    torch.optim.SGD(theirs, **OPTIONS).step()
    assert_equal(params, theirs)
    assert type(optimizer.state[params[0]]["momentum_buffer"]) is Tensor
