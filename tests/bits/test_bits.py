"""FusedSGD against torch.optim.SGD and against the reference, bit for bit: random cases, every instruction set, every
half-precision number, threads, more than 2**31 elements. Run by pytest.

float32 and float64 are compared with torch.optim.SGD (foreach=False and True), float16 and bfloat16 with
wd_fused.reference, whose distance from torch is bounded by a test of its own. Every NaN counts as the same one.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import strategies
import torch
from hypothesis import given
from strategies import (
    FLOATS,
    HALVES,
    INTEGER,
    Case,
    GroupSpec,
    Tensors,
    TensorSpec,
    assert_same_bits,
    bits,
    cases,
    laid_out,
    memory,
    numbers,
    special_values,
)
from torch import Tensor

from wd_fused import FusedSGD, functional, reference
from wd_fused.build import extension

pytestmark = [
    pytest.mark.usefixtures("fused_backend"),
    pytest.mark.filterwarnings("ignore:FusedSGD. torch's own code steps"),
]

ISAS = ("baseline", "avx2")


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Any:
    module = extension.load()
    assert module is not None, extension.status().reason
    return module


# --- running a case ----------------------------------------------------------------------------------------------


class OptimizerRun:
    """A case stepped by an optimizer."""

    def __init__(self, optimizer_class: type[torch.optim.SGD], case: Case, dtypes: Any, **options: Any) -> None:
        self.tensors = Tensors(case, dtypes)
        groups = [
            {"params": params, **group.arguments()}
            for params, group in zip(self.tensors.params, case.all_groups(), strict=True)
        ]
        self.optimizer = optimizer_class(groups, **options)
        for params, buffers in zip(self.tensors.params, self.tensors.buffers, strict=True):
            for param, buffer in zip(params, buffers, strict=True):
                if buffer is not None:
                    self.optimizer.state[param]["momentum_buffer"] = buffer

    def step(self, step: int) -> None:
        for params, gradients in zip(self.tensors.params, self.tensors.gradients(step), strict=True):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = None if gradient is None else self.gradient(gradient)
        self.optimizer.step()

    def gradient(self, as_given: Tensor) -> Tensor:
        return as_given

    def results(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        for g, params in enumerate(self.tensors.params):
            for i, param in enumerate(params):
                state = self.optimizer.state.get(param, {})
                yield f"group {g}, parameter {i}", param, state.get("momentum_buffer")


class TorchRun(OptimizerRun):
    """A case stepped by torch.optim.SGD, with copies of gradients whose elements share memory.

    torch's own loop rounds lr·g first in the elements past the last full vector where g is expanded, and nowhere else.
    Its foreach implementation writes Nesterov's term into the gradient, which an expanded one does not take.
    """

    def __init__(self, case: Case, dtypes: Any, **options: Any) -> None:
        super().__init__(torch.optim.SGD, case, dtypes, **options)

    def gradient(self, as_given: Tensor) -> Tensor:
        overlapping = (
            as_given.numel() > 1 and as_given.untyped_storage().nbytes() < as_given.numel() * as_given.itemsize
        )
        return as_given.contiguous() if overlapping else as_given


class ReferenceRun:
    """A case stepped by wd_fused.reference, on the CPU, or by a function with its arguments."""

    def __init__(self, case: Case, dtypes: Any, sgd: Any = reference.sgd, **options: Any) -> None:
        device = torch.device("cpu") if sgd is reference.sgd else strategies.DEVICE
        self.case, self.tensors, self.sgd, self.options = case, Tensors(case, dtypes, device), sgd, options
        self.buffers = self.tensors.buffers

    def step(self, step: int) -> None:
        gradients = self.tensors.gradients(step)
        for g, group in enumerate(self.case.all_groups()):
            here = [i for i, gradient in enumerate(gradients[g]) if gradient is not None]
            buffers = [self.buffers[g][i] for i in here]
            self.sgd(
                [self.tensors.params[g][i] for i in here],
                [gradients[g][i] for i in here],
                buffers,
                **group.options(),
                **self.options,
            )
            for i, buffer in zip(here, buffers, strict=True):
                self.buffers[g][i] = buffer

    def results(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        for g, params in enumerate(self.tensors.params):
            for i, param in enumerate(params):
                yield f"group {g}, parameter {i}", param, self.buffers[g][i]


def assert_same_results(ours: Any, expected: Any, what: str) -> None:
    for (name, param, buffer), (_, other_param, other_buffer) in zip(ours.results(), expected.results(), strict=True):
        assert_same_bits(param, other_param, f"{what}: {name}")
        assert_same_bits(memory(param), memory(other_param), f"{what}: memory of {name}")
        assert (buffer is None) == (other_buffer is None), f"{what}: {name}: {buffer=}, expected {other_buffer=}"
        if buffer is not None and other_buffer is not None:
            assert_same_bits(buffer, other_buffer, f"{what}: momentum buffer of {name}")


def step_together(ours: Any, expected: Any, what: str) -> None:
    for step in range(expected.tensors.case.steps):
        ours.step(step)
        expected.step(step)
        assert_same_results(ours, expected, f"step {step}, {what}")


# --- random cases ------------------------------------------------------------------------------------------------


@given(case=cases(dtypes=FLOATS))
def test_random_cases_have_torchs_bits(case: Case, fused_backend: str) -> None:
    ours = OptimizerRun(FusedSGD, case, FLOATS, backend=fused_backend)
    step_together(ours, TorchRun(case, FLOATS, foreach=False), "foreach=False")
    ours = OptimizerRun(FusedSGD, case, FLOATS, backend=fused_backend)
    step_together(ours, TorchRun(case, FLOATS, foreach=True), "foreach=True")


@given(case=cases())
def test_random_cases_have_the_references_bits(case: Case, fused_backend: str) -> None:
    dtypes = FLOATS + HALVES
    for numerics in ("torch", "opmath"):
        ours = OptimizerRun(FusedSGD, case, dtypes, backend=fused_backend, numerics=numerics)
        step_together(ours, ReferenceRun(case, dtypes, numerics=numerics), f"numerics={numerics}")


@given(case=cases())
def test_functional_sgd_has_the_references_bits(case: Case, fused_backend: str) -> None:
    dtypes = FLOATS + HALVES
    for numerics in ("torch", "opmath"):
        ours = ReferenceRun(case, dtypes, functional.sgd, backend=fused_backend, numerics=numerics)
        step_together(ours, ReferenceRun(case, dtypes, numerics=numerics), f"numerics={numerics}")


@given(case=cases())
def test_gradients_are_not_written_and_versions_rise(case: Case, fused_backend: str) -> None:
    ours = OptimizerRun(FusedSGD, case, FLOATS + HALVES, backend=fused_backend)
    for step in range(case.steps):
        params = [param for params in ours.tensors.params for param in params]
        versions = [param._version for param in params]
        buffers = [ours.optimizer.state.get(param, {}).get("momentum_buffer") for param in params]
        buffer_versions = [None if buffer is None else buffer._version for buffer in buffers]
        ours.step(step)
        gradients = [gradient for gradients in ours.tensors.gradients(step) for gradient in gradients]
        momenta = [
            group.momentum for group, specs in zip(case.all_groups(), ours.tensors.specs, strict=True) for _ in specs
        ]
        for i, param in enumerate(params):
            if gradients[i] is None:
                assert param.grad is None
                continue
            assert_same_bits(param.grad, gradients[i], f"step {step}, gradient {i}")
            assert param._version > versions[i], f"step {step}, parameter {i}"
            if buffers[i] is not None and momenta[i] != 0:
                assert buffers[i]._version > buffer_versions[i], f"step {step}, momentum buffer {i}"


def hard_case(dtypes: tuple[torch.dtype, ...], seed: int = 1) -> Case:
    """One case with every dtype, tails, tiles, threads, layouts, missing gradients and special values, for the tests
    that compare machines rather than cases."""
    shapes = ((1,), (67,), (257,), (9, 31), (4, 3, 5, 7), (16_385,), (2, 5, 83, 101))
    layouts = ("contiguous", "channels_last", "odd offset", "column gaps", "reversed")
    tensors = tuple(
        TensorSpec(
            dtype,
            shape,
            layout=layouts[n % 5],
            gradient_layout=layouts[n // 2 % 5],
            buffer_layout=("none", "contiguous", "row gaps")[n % 3],
            has_gradient=(True, n % 4 != 0, True),
            special=(0.0, 0.3)[n % 2],
        )
        for dtype in dtypes
        for n, shape in enumerate(shapes)
    )
    groups = (
        GroupSpec(tensors, lr=0.1, momentum=0.9, weight_decay=5e-4),
        GroupSpec(tensors[::3], lr=1 / 3, momentum=0.9, weight_decay=0.01, nesterov=True, maximize=True),
        GroupSpec(tensors[1::3], lr=1e-3, momentum=0.5, dampening=0.3),
        GroupSpec(tensors[2::4], lr=0.7, weight_decay=1e-3),
        GroupSpec(tensors[::5], lr=0.7),
    )
    return Case(groups, seed, interleaved=3, interleaved_length=300)


@pytest.mark.some_backends("cpu")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_has_the_same_bits(isa: str, compiled: Any) -> None:
    best = compiled.cpu_isa()
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this processor has no {isa}")
    compiled.use_cpu_isa(isa)
    try:
        assert compiled.cpu_isa() == isa
        for numerics in ("torch", "opmath"):
            dtypes = FLOATS + HALVES
            ours = OptimizerRun(FusedSGD, hard_case(dtypes), dtypes, backend="cpu", numerics=numerics)
            step_together(ours, ReferenceRun(hard_case(dtypes), dtypes, numerics=numerics), f"{isa}, {numerics}")
        ours = OptimizerRun(FusedSGD, hard_case(FLOATS), FLOATS, backend="cpu")
        step_together(ours, TorchRun(hard_case(FLOATS), FLOATS, foreach=False), isa)
    finally:
        compiled.use_cpu_isa(best)


@pytest.mark.some_backends("cpu")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("numerics", ["torch", "opmath"])
def test_half_precision_of_any_bits_is_alike_on_every_instruction_set(
    numerics: str, dtype: torch.dtype, compiled: Any
) -> None:
    """Every pattern of 16 bits in random company, signalling NaNs included; lengths with all remainders by 8."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(65_536, generator=generator) for _ in range(4)]
    values = [[all_halves(dtype)[order][:length].clone() for length in (65_536, *range(1, 18))] for order in orders]
    nan_with_payload = struct.unpack("<d", b"\xff" * 7 + b"\x7f")[0]
    best = compiled.cpu_isa()
    for options in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "maximize": True}):
        for rate, decay in ((0.1, 5e-4), (0.1, 0.0), (math.inf, 5e-4), (0.1, math.inf), (nan_with_payload, 0.1)):
            results = {}
            for isa in ISAS[: ISAS.index(best) + 1]:
                params = [torch.nn.Parameter(value.clone()) for value in values[0]]
                optimizer = FusedSGD(params, lr=0.1, weight_decay=decay, **options, backend="cpu", numerics=numerics)
                optimizer.param_groups[0]["lr"] = rate
                compiled.use_cpu_isa(isa)
                try:
                    for grads in values[1:]:
                        for param, grad in zip(params, grads, strict=True):
                            param.grad = grad
                        optimizer.step()
                finally:
                    compiled.use_cpu_isa(best)
                buffers = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum" in options]
                results[isa] = [*params, *buffers]
            for isa, tensors in results.items():
                for tensor, expected in zip(tensors, results["baseline"], strict=True):
                    assert_same_bits(tensor, expected, f"{isa}, {options}, lr {rate}, weight decay {decay}")


@pytest.mark.some_backends("cpu")
def test_an_instruction_set_that_is_not_there_is_refused(compiled: Any) -> None:
    before = compiled.cpu_isa()
    with pytest.raises(ValueError, match="amx"):
        compiled.use_cpu_isa("amx")
    assert compiled.cpu_isa() == before


@pytest.mark.some_backends("cpu")
def test_the_number_of_threads_does_not_change_the_bits(threads: int) -> None:
    dtypes = FLOATS + HALVES
    torch.set_num_threads(1)
    expected = OptimizerRun(FusedSGD, hard_case(dtypes), dtypes, backend="cpu")
    for step in range(3):
        expected.step(step)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        ours = OptimizerRun(FusedSGD, hard_case(dtypes), dtypes, backend="cpu")
        for step in range(3):
            ours.step(step)
        assert_same_results(ours, expected, f"{count} threads")


@pytest.mark.some_backends("cpu")
def test_the_multiply_add_rule_is_torchs(compiled: Any) -> None:
    """Values of the test's own: 3·(1/3 + rounding) − 1 is not zero only if the product is not rounded."""
    x = torch.full((67,), 1 / 3, dtype=torch.float64)
    sums = torch.add(torch.full((67,), -1.0, dtype=torch.float64), x, alpha=3)
    rule = "fused" if bool((sums != 0).all()) else "separate" if bool((sums == 0).all()) else "mixed"
    assert compiled.multiply_add_rule() == rule


@pytest.mark.some_backends("cpu")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_bits_follow_torchs_cpu_capability(capability: str) -> None:
    """The random cases and the multiply-add rule, in a process whose torch uses other vector code."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    if capability != "default":
        told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        if told.stdout.strip().lower() != capability:
            pytest.skip(f"torch has no {capability} code on this processor: it uses {told.stdout.strip()}")
    chosen = "(random_cases or multiply_add_rule_is or functional_sgd_has or every_half) and not cuda and not triton"
    command = [sys.executable, "-m", "pytest", "-x", "-q", str(Path(__file__)), "-k", chosen, "-p", "no:cacheprovider"]
    environment["HYPOTHESIS_PROFILE"] = "few"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout


# --- half precision ----------------------------------------------------------------------------------------------


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_number_is_loaded_and_stored_unchanged(dtype: torch.dtype, fused_backend: str) -> None:
    numbers = all_halves(dtype)
    param = torch.nn.Parameter(numbers.to(strategies.DEVICE, copy=True))
    expected_buffer = numbers.flip(0).contiguous()
    expected_buffer[~expected_buffer.isfinite()] = 1.0  # 0·inf would be NaN
    param.grad = expected_buffer.to(strategies.DEVICE, copy=True)
    optimizer = FusedSGD([param], lr=0.0, momentum=0.9, backend=fused_backend)
    optimizer.step()
    assert_same_bits(optimizer.state[param]["momentum_buffer"], expected_buffer, "momentum buffer")
    # p + (−0)·g is p, but for −0 + 0, which is 0: where the gradient is negative.
    becomes_zero = (bits(numbers) == -32768) & (torch.signbit(expected_buffer))
    assert_same_bits(param, torch.where(becomes_zero, torch.zeros_like(numbers), numbers), "parameter")
    assert int(becomes_zero.sum()) <= 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("numerics", ["torch", "opmath"])
def test_every_half_precision_number_rounds_as_in_the_reference(
    dtype: torch.dtype, numerics: str, fused_backend: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    options = [
        {"lr": 1.0},
        {"lr": 0.1, "weight_decay": 1 / 3},
        {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4},
        {"lr": 0.7, "momentum": 0.3, "nesterov": True, "maximize": True},
        {"lr": 2.0**-12, "momentum": 2.0**-11, "dampening": 0.3},
    ]
    for chosen in options:
        for scale in (1.0, 2.0**-14, 2.0**-24):
            order = torch.randperm(65_536, generator=generator)
            gradients = (all_halves(dtype)[order] * scale).to(dtype)
            buffer = numbers((65_536,), dtype, generator, 0.2, torch.device("cpu")) * scale
            ours, expected = torch.nn.Parameter(all_halves(dtype).to(strategies.DEVICE)), all_halves(dtype)
            ours.grad = gradients.to(strategies.DEVICE)
            optimizer = FusedSGD([ours], **chosen, backend=fused_backend, numerics=numerics)
            buffers = [None]
            if "momentum" in chosen:
                optimizer.state[ours]["momentum_buffer"] = buffer.to(strategies.DEVICE, copy=True)
                buffers = [buffer.clone()]
            optimizer.step()
            reference.sgd([expected], [gradients.clone()], buffers, **chosen, numerics=numerics)
            assert_same_bits(ours, expected, f"{chosen}, scale {scale}")
            if "momentum" in chosen:
                assert_same_bits(optimizer.state[ours]["momentum_buffer"], buffers[0], f"buffer, {chosen}, {scale}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}, {"weight_decay": 0.1}],
    ids=str,
)
def test_half_precision_is_as_close_to_the_exact_step_as_torch_is(
    dtype: torch.dtype, foreach: bool, options: dict[str, Any], fused_backend: str
) -> None:
    """torch's loop and foreach round differently on the CPU (foreach rounds 0.9 itself). So: one step from one state,
    no farther from the same step in float64 than torch on average, and few units in the last place from torch. The
    unit is that of the largest term: what cancels leaves its error behind."""
    generator = torch.Generator().manual_seed(5)
    values, gradient, buffer = (numbers((10_007,), dtype, generator) for _ in range(3))

    def stepped(optimizer_class: Any, dtype: torch.dtype, **extra: Any) -> tuple[Tensor, Tensor]:
        param = torch.nn.Parameter(values.to(dtype, copy=True))
        param.grad = gradient.to(dtype, copy=True)
        optimizer = optimizer_class([param], lr=0.1, **options, **extra)
        if "momentum" in options:
            optimizer.state[param]["momentum_buffer"] = buffer.to(dtype, copy=True)
        optimizer.step()
        return param.detach().double(), optimizer.state[param].get("momentum_buffer", buffer).double()

    ours, our_buffer = stepped(FusedSGD, dtype, backend=fused_backend)
    theirs, their_buffer = stepped(torch.optim.SGD, dtype, foreach=foreach)
    exact, exact_buffer = stepped(torch.optim.SGD, torch.float64)

    def units(difference: Tensor, *terms: Tensor) -> Tensor:
        largest = torch.stack([term.double().abs() for term in terms]).amax(0)
        largest = largest.clamp_min(torch.finfo(dtype).smallest_normal)
        return difference.abs() / (torch.exp2(torch.floor(torch.log2(largest))) * torch.finfo(dtype).eps)

    assert (ours - exact).abs().mean() <= 1.02 * (theirs - exact).abs().mean()
    assert (our_buffer - exact_buffer).abs().mean() <= 1.02 * (their_buffer - exact_buffer).abs().mean()
    assert units(our_buffer - their_buffer, buffer, gradient, our_buffer).max() <= 2
    update = 0.1 * (gradient.double().abs() + buffer.double().abs())
    assert units(ours - theirs, values, ours, update).max() <= (4 if "momentum" in options else 1.5)
    assert (ours != values.double()).sum() > 9000


# --- what the arithmetic has been wrong about, or could be --------------------------------------------------------


def both_stepped(make: Any, steps: int = 1, **options: Any) -> list[tuple[Tensor, Tensor | None]]:
    """(parameter, momentum buffer) of FusedSGD and of torch.optim.SGD, on a parameter with gradient from make()."""
    results = []
    for optimizer_class in (FusedSGD, torch.optim.SGD):
        param = make()
        optimizer = optimizer_class([param], **options, foreach=False)
        for _ in range(steps):
            optimizer.step()
        results.append((param, optimizer.state.get(param, {}).get("momentum_buffer")))
    return results


@pytest.mark.parametrize("weight_decay", [1e-46, 5e-324])
@pytest.mark.parametrize("scalar", [float, torch.tensor], ids=["float", "Tensor"])
def test_weight_decay_too_small_for_float32_is_still_added(weight_decay: float, scalar: Any) -> None:
    """0·p makes 0 of −0 and NaN of infinity."""

    def make() -> Tensor:
        param = torch.nn.Parameter(torch.tensor([1.0, math.inf, 2.0], device=strategies.DEVICE))
        param.grad = torch.tensor([-0.0, 1.0, -0.0], device=strategies.DEVICE)
        return param

    value = scalar(weight_decay) if scalar is float else torch.tensor(weight_decay, dtype=torch.float64)
    (ours, our_buffer), (theirs, their_buffer) = both_stepped(make, lr=1.0, momentum=0.9, weight_decay=value)
    assert_same_bits(our_buffer, their_buffer, "momentum buffer")
    assert_same_bits(ours, theirs, "parameter")


@pytest.mark.parametrize("size", [8, 1000, 40_000])
@pytest.mark.parametrize("shift", [-7, -1, 1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_gradient_that_overlaps_its_parameter(size: int, shift: int, momentum: float) -> None:
    def make() -> Tensor:
        base = numbers((size + abs(shift),), torch.float32, torch.Generator().manual_seed(6))
        param = torch.nn.Parameter(base[max(shift, 0) :][:size])
        param.grad = base[max(-shift, 0) :][:size]
        return param

    (ours, our_buffer), (theirs, their_buffer) = both_stepped(make, 2, lr=0.1, momentum=momentum, weight_decay=0.5)
    assert_same_bits(ours, theirs, "parameter")
    if momentum:
        assert_same_bits(our_buffer, their_buffer, "momentum buffer")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_gradient_that_is_its_parameter(momentum: float) -> None:
    def make() -> Tensor:
        param = torch.nn.Parameter(numbers((70_001,), torch.float32, torch.Generator().manual_seed(7)))
        param.grad = param.detach()
        return param

    (ours, our_buffer), (theirs, their_buffer) = both_stepped(make, 3, lr=0.1, momentum=momentum, weight_decay=0.5)
    assert_same_bits(ours, theirs, "parameter")
    if momentum:
        assert_same_bits(our_buffer, their_buffer, "momentum buffer")


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_gradients_that_are_other_parameters(options: dict[str, Any]) -> None:
    """torch goes parameter by parameter: what was stepped before is seen as a gradient afterwards."""
    results = []
    for optimizer_class in (FusedSGD, torch.optim.SGD):
        generator = torch.Generator().manual_seed(8)
        params = [torch.nn.Parameter(numbers((50_000,), torch.float32, generator)) for _ in range(4)]
        for i, param in enumerate(params):
            param.grad = params[i - 1].detach()
        optimizer = optimizer_class(params, lr=0.1, foreach=False, **options)
        for _ in range(2):
            optimizer.step()
        results.append(params)
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert_same_bits(ours, theirs, f"parameter {i}")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("position", [0, 1])
def test_one_gradient_that_is_another_parameter(position: int, momentum: float) -> None:
    results = []
    for optimizer_class in (FusedSGD, torch.optim.SGD):
        generator = torch.Generator().manual_seed(13)
        params = [torch.nn.Parameter(numbers((1000,), torch.float32, generator)) for _ in range(2)]
        params[1 - position].grad = numbers((1000,), torch.float32, generator)
        params[position].grad = params[1 - position].detach()
        optimizer = optimizer_class(params, lr=0.1, momentum=momentum, foreach=False)
        for _ in range(2):
            optimizer.step()
        results.append(params)
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert_same_bits(ours, theirs, f"parameter {i}")


@pytest.mark.parametrize("position", [0, 1])
def test_a_parameter_that_overlaps_one_that_torchs_code_steps(position: int) -> None:
    """The one at `position` has a momentum buffer of another dtype, as after model.to(): torch's code steps it."""
    results = []
    for optimizer_class in (FusedSGD, torch.optim.SGD):
        generator = torch.Generator().manual_seed(14)
        base = numbers((1001,), torch.float32, generator)
        params = [torch.nn.Parameter(base[:1000]), torch.nn.Parameter(base[1:])]
        optimizer = optimizer_class(params, lr=0.1, momentum=0.9, weight_decay=0.5, foreach=False)
        optimizer.state[params[position]]["momentum_buffer"] = numbers((1000,), torch.float64, generator)
        for _ in range(2):
            for param in params:
                param.grad = numbers((1000,), torch.float32, generator)
            optimizer.step()
        results.append(base)
    assert_same_bits(*results, "both parameters")


@pytest.mark.parametrize("shift", [-3, 0, 5])
def test_a_gradient_in_the_memory_of_its_momentum_buffer(shift: int) -> None:
    results = []
    for optimizer_class in (FusedSGD, torch.optim.SGD):
        generator = torch.Generator().manual_seed(9)
        param = torch.nn.Parameter(numbers((1000,), torch.float32, generator))
        base = numbers((1010,), torch.float32, generator)
        param.grad = base[5 + shift :][:1000]
        optimizer = optimizer_class([param], lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False)
        optimizer.state[param]["momentum_buffer"] = base[5:1005]
        for _ in range(3):
            optimizer.step()
        results.append((param, base))
    assert_same_bits(results[0][0], results[1][0], "parameter")
    assert_same_bits(results[0][1], results[1][1], "momentum buffer and gradient")


def test_parameters_that_share_a_momentum_buffer_or_memory() -> None:
    results = []
    for optimizer_class in (FusedSGD, torch.optim.SGD):
        generator = torch.Generator().manual_seed(10)
        base = numbers((100_000,), torch.float32, generator)
        views = (base[:60_000], base[40_000:], base[10_000:70_000])
        params = [torch.nn.Parameter(view) for view in views]
        shared = numbers((60_000,), torch.float32, generator)
        optimizer = optimizer_class(params, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False)
        for param in params:
            optimizer.state[param]["momentum_buffer"] = shared
        for _ in range(2):
            for param in params:
                param.grad = numbers((60_000,), torch.float32, generator)
            optimizer.step()
        results.append((base, shared))
    assert_same_bits(results[0][0], results[1][0], "parameters")
    assert_same_bits(results[0][1], results[1][1], "momentum buffer")


@pytest.mark.some_backends("cpu")
def test_denormals_are_flushed_where_torch_flushes_them(threads: int) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        torch.set_num_threads(1)

        def make() -> Tensor:
            generator = torch.Generator().manual_seed(11)
            scale = torch.exp2(torch.randint(-20, 3, (1003,), generator=generator).double())
            tiny = torch.finfo(torch.float32).smallest_normal
            param = torch.nn.Parameter((torch.randn(1003, generator=generator).double() * scale * tiny).float())
            param.grad = (torch.randn(1003, generator=generator).double() * scale * tiny).float()
            return param

        for nesterov in (False, True):
            ours, theirs = both_stepped(make, 3, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
            assert_same_bits(ours[0], theirs[0], "parameter")
            assert_same_bits(ours[1], theirs[1], "momentum buffer")
    finally:
        torch.set_flush_denormal(False)


# --- large -------------------------------------------------------------------------------------------------------


def available_gigabytes() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0.0


@pytest.mark.some_backends("cpu")
def test_more_than_two_to_the_31_elements() -> None:
    """Once with an expanded gradient (strided), once with a gradient of zeros that were never written, so take no
    memory (flat)."""
    if available_gigabytes() < 10:
        pytest.skip(f"needs 10 GB of memory, {available_gigabytes():.1f} GB are available")
    count = 2**31 + 70_001
    param = torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    places = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 65_536, count - 2, count - 1])
    with torch.no_grad():
        param[places] = torch.arange(9, dtype=torch.bfloat16)
    optimizer = FusedSGD([param], lr=0.5, backend="cpu")
    param.grad = torch.ones(1, dtype=torch.bfloat16).expand(count)
    optimizer.step()
    assert torch.equal(param[places].float(), torch.arange(9) - 0.5)
    sample = torch.arange(3, count, 1_000_003)
    assert (param[sample] == -0.5).all()
    assert (param[count - 3_000 : -3] == -0.5).all()

    untouched = mmap.mmap(-1, 2 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    param.grad = torch.frombuffer(untouched, dtype=torch.bfloat16)
    optimizer.param_groups[0]["weight_decay"] = 1.0  # p ← p − 0.5·(0 + p)
    optimizer.step()
    assert torch.equal(param[places].float(), (torch.arange(9) - 0.5) / 2)
    assert (param[sample] == -0.25).all()
    assert (param[count - 3_000 : -3] == -0.25).all()
    param.grad = None
    untouched.close()


# --- the comparison itself ---------------------------------------------------------------------------------------


@pytest.mark.some_backends("cpu")
@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
def test_the_comparison_sees_one_bit(dtype: torch.dtype) -> None:
    values = special_values(dtype)
    assert_same_bits(values, values.clone(), "itself")
    assert_same_bits(values, laid_out(values, "column gaps"), "another layout")
    for i in range(len(values)):
        if values[i].isnan():
            continue
        other = values.clone()
        integers = other.view(INTEGER[dtype.itemsize])
        integers[i] ^= 1 if not values[i].isinf() else -(2 ** (8 * dtype.itemsize - 1))
        with pytest.raises(AssertionError, match=f"1 of {len(values)} elements differ, first at \\({i},\\)"):
            assert_same_bits(values, other, "one bit off")
    payload = torch.tensor([math.nan], dtype=dtype)
    assert_same_bits(payload, -payload, "NaN of another sign")


@pytest.mark.some_backends("cpu")
@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_a_planted_error_of_one_unit_in_a_hyperparameter_is_seen(name: str) -> None:
    ours = OptimizerRun(FusedSGD, hard_case(FLOATS), FLOATS, backend="cpu")
    for group in ours.optimizer.param_groups:
        one_more = torch.nextafter(torch.tensor(group[name]), torch.tensor(math.inf)).item()
        group[name] = one_more if group[name] else 0.0
    with pytest.raises(AssertionError, match="elements differ"):
        step_together(ours, TorchRun(hard_case(FLOATS), FLOATS, foreach=False), "planted")


@pytest.mark.some_backends("cpu")
def test_a_planted_write_into_a_gap_is_seen() -> None:
    case = Case((GroupSpec((TensorSpec(torch.float32, (5,), layout="column gaps"),), lr=0.1),), seed=12)
    ours = OptimizerRun(FusedSGD, case, FLOATS, backend="cpu")
    memory(ours.tensors.params[0][0])[0] += 1
    with pytest.raises(AssertionError, match="memory of"):
        step_together(ours, TorchRun(case, FLOATS), "planted")
