"""The numbers of the Triton backend, its kernel interpreted: what the kernel reads on the device (learning rate, weight
decay, torch.amp.GradScaler's words), how it narrows doubles, and the interpreter's own arithmetic. Run by pytest.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_support
from plan_support import OPTIONS, move_gradients, parameters
from strategies import assert_same_bits, bits, special_values
from torch import Tensor, nn
from triton_support import (
    DTYPES,
    Gpu,
    assert_equal,
    assert_same,
    both,
    buffers,
    kernels,
    refill_gradients,
    set_scaler,
)

from wd_fused import FusedSGD, reference

pytestmark = pytest.mark.usefixtures("interpreted")
# Fixtures.
quickly_interpreted = triton_support.quickly_interpreted
interpreted = triton_support.interpreted
reader = triton_support.reader
gpu = triton_support.gpu

sgd_kernel, exact_interpreter = kernels("sgd_kernel"), kernels("exact_interpreter")


# --- what the kernel reads itself --------------------------------------------------------------------------------


def unscaled(gradient: Tensor, scale: Tensor, numerics: str) -> Tensor:
    """As torch.amp.GradScaler does it: times the reciprocal."""
    opmath = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    made = gradient.to(opmath) * scale.double().reciprocal().float().to(opmath)
    return made.to(gradient.dtype) if numerics == "torch" else made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_grad_scale_and_found_inf_are_read_by_the_kernel(
    reader: str, gpu: Gpu, dtype: torch.dtype, maximize: bool
) -> None:
    """Nothing is brought for another scale or verdict; the gradients keep their scale."""
    numerics = "opmath" if maximize else "torch"
    params = parameters(300, (4, 5), dtype=dtype) + parameters(7, dtype=torch.float64)
    params[1].grad = torch.randn(5, 4, dtype=dtype).T
    optimizer = FusedSGD(params, **OPTIONS, nesterov=True, maximize=maximize, backend="triton", numerics=numerics)
    expected, momenta = [param.detach().clone() for param in params], [None] * 3
    scale, found_inf = torch.tensor(1.0), torch.tensor(0.0)

    def step_expected() -> None:
        gradients = [unscaled(param.grad, scale, numerics) for param in params]
        reference.sgd(expected, gradients, momenta, **OPTIONS, nesterov=True, maximize=maximize, numerics=numerics)
        assert_equal(params, expected)
        assert_equal(buffers(optimizer), momenta)

    for _ in range(2):
        optimizer.step()
        step_expected()
    gpu.taken()
    for value in (2.0**16, 3.0, 1e-30, 0.0, math.inf):
        scale.fill_(value)
        with torch.no_grad():
            for param in params:
                param.grad.copy_(torch.randn_like(param) * min(value, 1e4))
        gradients = [param.grad.clone() for param in params]
        for verdict in (1.0, 0.0):
            found_inf.fill_(verdict)
            set_scaler(optimizer, grad_scale=scale, found_inf=found_inf)
            before = [tensor.detach().clone() for tensor in (*params, *buffers(optimizer))]
            optimizer.step()
            set_scaler(optimizer)
            assert_equal([param.grad for param in params], gradients)
            if verdict:
                assert_equal([*params, *buffers(optimizer)], before)
        step_expected()
    assert gpu.taken() == []
    set_scaler(optimizer, grad_scale=torch.tensor(4.0))
    scale.fill_(4.0)
    optimizer.step()
    step_expected()
    set_scaler(optimizer, found_inf=torch.tensor(math.nan))
    optimizer.step()
    assert_equal(params, expected)
    set_scaler(optimizer, found_inf=torch.tensor(-0.0))
    scale.fill_(1.0)
    optimizer.step()
    step_expected()
    assert gpu.taken() == []


def test_a_scalers_words_are_not_a_reason_to_lose_the_bits_of_torch(reader: str) -> None:
    """A scale that is a power of two, with torch.optim.SGD itself."""
    params = parameters(300, 5)
    ours, theirs, copies = both(params)
    for step in range(4):
        move_gradients(params, copies)
        if step:
            set_scaler(ours, grad_scale=torch.tensor(1024.0), found_inf=torch.tensor(0.0))
            for param in params:
                param.grad.mul_(1024.0)
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_a_first_step_under_a_scaler_waits_for_its_verdict(reader: str, gpu: Gpu) -> None:
    """A skipped one leaves no momentum buffer, which dampening would tell from a filled one."""
    params = parameters(5, 3)
    ours, theirs, copies = both(params, dampening=0.5)
    for step, overflow in enumerate((True, True, False, True, False)):
        move_gradients(params, copies)
        for param in params:
            param.grad.mul_(8.0)
        scaled = [param.grad.clone() for param in params]
        set_scaler(ours, grad_scale=torch.tensor(8.0), found_inf=torch.tensor(float(overflow)))
        ours.step()
        if step < 2:
            assert gpu.launched == [] and not any(ours.state.values())
        if not overflow:
            theirs.step()
        assert_same(ours, theirs)
        if step != 2:  # that one unscales them, as the scaler does for an optimizer that does not
            assert_equal([param.grad for param in params], scaled)
        else:
            assert_equal([param.grad for param in params], [param.grad for param in copies])


@pytest.mark.parametrize("overflow", [False, True])
def test_a_first_gradient_under_a_scaler_waits_for_its_verdict(reader: str, overflow: bool) -> None:
    """In a plan that has stepped before; without the new parameter the kernel would have read both words."""
    params = parameters(5, 3)
    gradient, params[1].grad = params[1].grad, None
    ours, theirs, copies = both(params, dampening=0.5)
    for _ in range(2):
        ours.step()
        theirs.step()
    params[1].grad, copies[1].grad = gradient, gradient.clone()
    for verdict in (overflow, False):
        set_scaler(ours, grad_scale=torch.tensor(1.0), found_inf=torch.tensor(float(verdict)))
        ours.step()
        if not verdict:
            theirs.step()
        assert len(buffers(ours)) == len(buffers(theirs))
        assert_same(ours, theirs)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scalers_words_that_a_kernel_cannot_read_are_read_on_the_host(reader: str, gpu: Gpu, overflow: bool) -> None:
    def in_a_parameter() -> Tensor:
        return params[1].detach()[0]

    makers: dict[str, Callable[[float], Tensor]] = {
        "float64": lambda value: torch.tensor(value, dtype=torch.float64),
        "float16": lambda value: torch.tensor(value, dtype=torch.float16),
        "int32": lambda value: torch.tensor(value, dtype=torch.int32),
        "lazily negated": lambda value: torch.view_as_complex(torch.tensor([0.0, -value])).conj().imag,
        "misaligned": lambda value: off_its_alignment(torch.float32).fill_(value),
        "in memory that is written": lambda value: in_a_parameter().fill_(value),
    }
    for name, make in makers.items():
        for word in ("grad_scale", "found_inf"):
            params = parameters(300, 5)
            ours, theirs, copies = both(params)
            ours.step()
            theirs.step()
            value = 4.0 if word == "grad_scale" else float(overflow)
            given = make(value)
            with torch.no_grad():
                copies[1].copy_(params[1])
            words = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(float(overflow))} | {word: given}
            gpu.launched.clear()
            set_scaler(ours, **words)
            ours.step()
            for param in copies:
                param.grad.div_(4.0)
            if not overflow:
                theirs.step()
            assert_same(ours, theirs)
            assert len(gpu.launched) == (not overflow), (name, word)
            assert_equal([p.grad for p in params], [p.grad.mul(4.0 if overflow else 1.0) for p in copies])


def test_a_verdict_of_two_elements_is_no_verdict(reader: str, gpu: Gpu) -> None:
    """Nor is anything written; a word of one element may have dimensions."""
    params = parameters(300)
    ours, theirs, copies = both(params)
    ours.step()
    theirs.step()
    set_scaler(ours, grad_scale=torch.tensor(4.0), found_inf=torch.zeros(2))
    with pytest.raises(RuntimeError, match="2 elements"):
        ours.step()
    assert_same(ours, theirs)
    assert_equal([param.grad for param in params], [param.grad for param in copies])
    set_scaler(ours, grad_scale=torch.full((1, 1), 4.0), found_inf=torch.zeros(1))
    copies[0].grad.div_(4.0)
    ours.step()
    theirs.step()
    assert_same(ours, theirs)
    assert_equal([params[0].grad], [copies[0].grad * 4])


def off_its_alignment(dtype: torch.dtype) -> Tensor:
    memory = torch.zeros(dtype.itemsize + 1, dtype=torch.uint8)
    return torch.frombuffer(memory.numpy(), dtype=dtype, offset=1, count=1).view(())


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("of_params", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_tensor_hyperparameter_is_read_by_the_kernel(
    reader: str, gpu: Gpu, name: str, of_params: torch.dtype
) -> None:
    """In whichever dtype; changed in place without a word to the optimizer, and with nothing brought for it."""
    for dtype in DTYPES:
        params = parameters(40, (3, 4), dtype=of_params)
        params[1].grad = torch.randn(4, 3, dtype=of_params).T
        value = torch.tensor(0.3, dtype=dtype)
        optimizer = FusedSGD(params, **OPTIONS | {name: value}, backend="triton")
        expected, momenta = [param.detach().clone() for param in params], [None, None]
        for step, new in enumerate((0.7, 65504.0, 0.0, 1e-7)):
            value.fill_(new)
            optimizer.step()
            reference.sgd(expected, [param.grad for param in params], momenta, **OPTIONS | {name: value.item()})
            assert_equal(params, expected)
            assert step < 2 or gpu.taken() == []
            gpu.taken()
            refill_gradients(params)


def doubles_that_are_hard_to_narrow() -> Tensor:
    """Patterns of all kinds, those next to the middle between two floats and to the ends of float's range above all."""
    generator = torch.Generator().manual_seed(11)
    floats = torch.randint(-(2**31), 2**31, (4000,), dtype=torch.int64, generator=generator).to(torch.int32)
    below_normal = torch.randint(0, 2**23, (2000,), dtype=torch.int32, generator=generator)
    floats = torch.cat([floats, below_normal, torch.tensor([0, 1, 2, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F7FFFFE])])
    here = floats.to(torch.int32).view(torch.float32).double()
    there = (floats + 1).to(torch.int32).view(torch.float32).double()
    middle = ((here + there) / 2).view(torch.int64)
    near = torch.cat([middle + step for step in (-1, 0, 1)] + [here.view(torch.int64) + step for step in (-1, 0, 1)])
    anything = torch.randint(-(2**63), 2**63 - 1, (4000,), generator=generator)
    fraction = torch.randint(0, 2**52, (4000,), generator=generator)
    exponent = torch.randint(840, 1160, (4000,), generator=generator)  # float's are 874 to 1150
    in_range = exponent << 52 | fraction
    ends = torch.tensor(
        [2.0**-149, 2.0**-150, 2.0**-151, 2.0**-126, 2.0**128, (2 - 2.0**-24) * 2.0**127, math.inf, math.nan, 5e-324]
    ).double()
    exact = torch.tensor([2.0**-150 * (1 + 2.0**-52), (2 - 2.0**-24) * 2.0**127], dtype=torch.float64)
    ends = torch.cat([ends, exact, special_values(torch.float64), special_values(torch.float32).double()])
    patterns = torch.cat([near, anything, in_range, ends.view(torch.int64)])
    return torch.cat([patterns, patterns ^ (-(2**63))]).view(torch.float64)


@triton.jit
def narrow_all(doubles, floats, numel, elements: tl.constexpr):
    at = tl.program_id(0) * elements + tl.arange(0, elements)
    tl.store(floats + at, sgd_kernel._narrowed(tl.load(doubles + at, mask=at < numel, other=0)), mask=at < numel)


def test_the_kernel_narrows_doubles_as_torch_does() -> None:
    """By integers alone: a GPU need have no doubles for a float32 kernel."""
    doubles = doubles_that_are_hard_to_narrow()
    floats = torch.empty(len(doubles))
    elements = 4096
    narrow_all[(math.ceil(len(doubles) / elements),)](doubles.view(torch.int64), floats, len(doubles), elements)
    assert len(doubles) > 80_000
    assert_same_bits(floats, doubles.float(), "narrowed")


def test_a_double_that_is_hard_to_narrow_is_read_as_its_float(reader: str) -> None:
    """lr: p = 0 and g = -1 become p = lr. weight_decay: p = 1 and g = 0 become a momentum buffer of weight_decay."""
    values = [1 + 2.0**-24, 1 + 3 * 2.0**-24, 1 + 2.0**-24 + 2.0**-52, 2.0**-149, 2.0**-150, 2.0**-150 * (1 + 2.0**-52)]
    values += [3 * 2.0**-150, 1e-40, 1e39, (2 - 2.0**-24) * 2.0**127, 3.4028235e38, math.inf, 0.0, 5e-324]
    tensors = [torch.tensor(value, dtype=torch.float64) for value in values]
    for name in ("lr", "weight_decay"):
        params = [nn.Parameter(torch.full((1,), float(name == "weight_decay"))) for _ in values]
        for param in params:
            param.grad = torch.full((1,), 0.0 if name == "weight_decay" else -1.0)
        groups = [{"params": [param], name: tensor} for param, tensor in zip(params, tensors, strict=True)]
        optimizer = FusedSGD(groups, lr=1.0, momentum=0.9, backend="triton")
        optimizer.step()
        made = params if name == "lr" else buffers(optimizer)
        assert_equal(made, [tensor.float().view(1) for tensor in tensors])


def test_a_weight_decay_that_is_0_in_float32_alone_is_added_all_the_same(reader: str) -> None:
    """0 * inf is NaN; a weight decay of 0, of either sign, adds nothing. As a number and as a Tensor."""
    cases = [(1e-46, True), (5e-324, True), (-0.0, False), (0.0, False)]
    for value, is_added in cases:
        for dtype in (None, torch.float64, torch.float32):
            param = nn.Parameter(torch.tensor([math.inf, 1.0]))
            param.grad = torch.tensor([1.0, 1.0])
            weight_decay = value if dtype is None else torch.tensor(value, dtype=dtype)
            FusedSGD([param], lr=1.0, weight_decay=weight_decay, backend="triton").step()
            is_nan = is_added and dtype != torch.float32
            assert param.isnan().tolist() == [is_nan, False], (value, dtype)
            assert param[1] == 0.0


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_tensor_that_the_kernel_cannot_read_has_its_value(reader: str, name: str) -> None:
    def each(params: list[nn.Parameter]) -> Iterator[Tensor]:
        yield torch.tensor(2)
        yield torch._efficientzerotensor(())
        yield off_its_alignment(torch.float32).fill_(0.25)
        yield torch.view_as_complex(torch.tensor([0.0, -0.5])).conj().imag
        yield params[0].detach()[:1].fill_(0.5).view(())  # memory that the step writes

    for place in range(5):
        params = parameters(3000)
        value = list(each(params))[place]
        ours, theirs, _ = both(params, **{name: value.item()})
        ours.param_groups[0][name] = value
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


# --- the interpreter with a GPU's arithmetic ---------------------------------------------------------------------


def numbers_for_fma(dtype: Any, generator: np.random.Generator) -> Iterator[tuple[Any, Any, Any]]:
    """Random and special patterns; sums that cancel, or that lie in the middle between two numbers; far apart ones."""
    integer, digits = (np.uint32, 23) if dtype == np.float32 else (np.uint64, 52)
    n = 3000

    def normal() -> Any:
        return generator.standard_normal(n).astype(dtype)

    def anything() -> Any:
        return generator.integers(0, np.iinfo(integer).max, n, dtype=integer, endpoint=True).view(dtype)

    special = special_values(torch.float32 if dtype == np.float32 else torch.float64).numpy()
    yield tuple(each.reshape(-1) for each in np.meshgrid(special, special, special))
    for share in (0.0, 0.3, 1.0):
        yield tuple(np.where(generator.random(n) < share, anything(), normal()) for _ in range(3))
        a, x = (np.where(generator.random(n) < share, anything(), normal()) for _ in range(2))
        off = 1 + generator.integers(-3, 4, n).astype(dtype) * dtype(2.0**-digits)
        yield a, x, (-(a * x) * off).astype(dtype)
        yield a, x, (a * x * dtype(2.0) ** generator.integers(-2 * digits - 6, 2 * digits + 6, n)).astype(dtype)
    # The product is nearly half of the sum's last place: what is missing decides, and is far below a wider type's.
    place = dtype(2.0**-digits)
    steps = [generator.integers(low, 1000, n).astype(dtype) * place for low in (1, 0)]
    yield (1 + steps[0]) * dtype(2.0**-8), (1 - steps[0]) * place * 2**7, 1 + steps[1]
    tiny = dtype(2.0) ** dtype(-126 if dtype == np.float32 else -1022)
    yield normal() * tiny, normal(), anything() % tiny
    yield normal() * tiny, normal() / 1024, normal() * tiny


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_the_interpreters_multiply_add_is_libms(dtype: Any) -> None:
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    of_libm = library.fmaf if dtype == np.float32 else library.fma
    c_type = ctypes.c_float if dtype == np.float32 else ctypes.c_double
    of_libm.restype, of_libm.argtypes = c_type, [c_type] * 3
    ours = exact_interpreter.fma_float32 if dtype == np.float32 else exact_interpreter.fma_float64
    with np.errstate(all="ignore"):
        for k, (a, x, y) in enumerate(numbers_for_fma(dtype, np.random.default_rng(5))):
            expected = np.frompyfunc(of_libm, 3, 1)(a, x, y).astype(dtype)
            made = torch.from_numpy(ours(a, x, y))
            assert_same_bits(made, torch.from_numpy(expected), f"numbers {k}")


def test_the_numbers_for_the_multiply_add_tell_one_rounding_from_two() -> None:
    """Also from a product in double and a sum in double that is rounded twice."""
    for dtype in (np.float32, np.float64):
        with np.errstate(all="ignore"):
            sets = [*numbers_for_fma(dtype, np.random.default_rng(5))]
            a, x, y = (np.concatenate(each) for each in zip(*sets, strict=True))
            fma = exact_interpreter.fma_float32 if dtype == np.float32 else exact_interpreter.fma_float64
            exact = bits(torch.from_numpy(fma(a, x, y)))
            separate = bits(torch.from_numpy(a * x + y))
            wide = bits(torch.from_numpy((a.astype(np.longdouble) * x + y).astype(dtype)))
            if dtype == np.float32:
                wide = bits(torch.from_numpy((a.astype(np.float64) * x + y).astype(dtype)))
        assert int((exact != separate).sum()) > 500
        assert int((exact != wide).sum()) > 10


def test_bfloat16_is_rounded_to_nearest_as_torch_does() -> None:
    """Every upper half, with the lower halves around the middle, and others."""
    lower = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xABCD]
    patterns = (np.arange(2**16, dtype=np.uint32)[:, None] << 16 | np.array(lower, dtype=np.uint32)).reshape(-1)
    floats = torch.from_numpy(patterns.view(np.float32))
    ours = torch.from_numpy(exact_interpreter.to_bfloat16(floats.numpy()).view(np.int16)).view(torch.bfloat16)
    assert_same_bits(ours, floats.to(torch.bfloat16), "rounded")
    widened = torch.from_numpy(exact_interpreter.from_bfloat16(np.arange(2**16, dtype=np.uint16)))
    assert_same_bits(widened, torch.arange(2**16).to(torch.int16).view(torch.bfloat16).float(), "widened")


@triton.jit
def multiply_add(a, x, y, made, in_bfloat16, elements: tl.constexpr):
    at = tl.arange(0, elements)
    sum = tl.fma(tl.load(a + at), tl.load(x + at), tl.load(y + at))
    tl.store(made + at, sum)
    tl.store(in_bfloat16 + at, sum.to(tl.bfloat16))


def test_other_kernels_are_interpreted_as_ever() -> None:
    """Before, after, and after an exception; within exact() they have a GPU's arithmetic."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    usual = type(builder)
    torch.manual_seed(1)
    a, x, y = torch.randn(3, 256)
    exactly = (a.double() * x.double() + y.double()).float()  # of normal numbers like these, none in the middle

    def interpreted() -> tuple[Tensor, Tensor]:
        made, in_bfloat16 = torch.empty(256), torch.empty(256, dtype=torch.bfloat16)
        multiply_add[(1,)](a, x, y, made, in_bfloat16, 256)
        return made, in_bfloat16

    before = interpreted()
    assert not torch.equal(before[0], exactly), "as it is, the interpreter rounds twice"
    with exact_interpreter.exact():
        assert type(builder) is exact_interpreter._Exact
        within = interpreted()
    assert torch.equal(within[0], exactly) and torch.equal(within[1], exactly.bfloat16())
    assert type(builder) is usual
    for ours, as_before in zip(interpreted(), before, strict=True):
        assert torch.equal(ours, as_before)
    with pytest.raises(KeyError), exact_interpreter.exact():
        raise KeyError
    assert type(builder) is usual
    params = parameters(4)
    FusedSGD(params, **OPTIONS, backend="triton").step()
    assert type(builder) is usual
    for ours, as_before in zip(interpreted(), before, strict=True):
        assert torch.equal(ours, as_before)
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        with exact_interpreter.exact():
            assert np.isinf(np.float32(1) / np.float32(0))
        _ = np.float32(1) / np.float32(0)


def test_one_thread_at_a_time_has_the_exact_interpreter() -> None:
    entered = threading.Event()

    def enter() -> None:
        with exact_interpreter.exact():
            entered.set()

    thread = threading.Thread(target=enter)
    with exact_interpreter.exact():
        thread.start()
        assert not entered.wait(0.1)
    thread.join(60)
    assert entered.is_set()
