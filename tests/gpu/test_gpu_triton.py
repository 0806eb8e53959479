"""What is the Triton backend's own on a GPU: the CUDA backend's bits, one compilation, uploads only where needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu_support import (
    DTYPES,
    LAYOUTS,
    Reference,
    affordable,
    assert_same_bits,
    buffers_of,
    copy_gradients,
    fewest_launches,
    fused,
    give_gradients,
    laid_out,
    launches,
    no_waiting,
    numbers,
    parameters,
    source,
    triton_module,
    twin,
    why_not_usable,
)

from wd_fused import FusedSGD, backends

pytestmark = pytest.mark.gpu_backend("triton")


def mixes() -> Iterator[dict[str, Any]]:
    for maximize in (False, True):
        yield {"momentum": 0.0, "weight_decay": 0.0, "maximize": maximize}
        yield {"momentum": 0.9, "dampening": 0.1, "maximize": maximize}
        yield {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "maximize": maximize}


# --- the same bits as the CUDA backend ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numerics", ["torch", "opmath"])
def test_bits_are_the_cuda_backends(dtype, numerics):
    if (reason := why_not_usable("cuda")) is not None:
        pytest.skip(f"cuda: {reason}")
    generator = source(6)
    shapes = [(7,), (33, affordable(65, 5)), (16, 8, 3, 3), (affordable(20_011, 2_011),)]
    for mix in mixes():
        params = parameters(dtype, seed=5, special=0.1)
        params += [
            laid_out(numbers(s, dtype, generator), layout).requires_grad_() for s in shapes for layout in LAYOUTS
        ]
        twins = [param.detach().clone().requires_grad_() for param in params]  # of the same strides, or contiguous
        ours = fused(params, **mix, numerics=numerics)
        theirs = FusedSGD(twins, lr=0.1, **{"weight_decay": 5e-4} | mix, numerics=numerics, backend="cuda")
        for step in range(affordable(3, 2)):
            give_gradients(params, seed=30 + step, special=0.1)
            copy_gradients(params, twins)
            ours.step()
            theirs.step()
            assert_same_bits(params, twins, f"{mix}, step {step}, parameters")
            assert_same_bits(buffers_of(ours), buffers_of(theirs), f"{mix}, step {step}, momentum buffers")


# --- compilations -------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whatever Triton is asked to compile from now on, found in its cache or not."""
    import triton

    made: list[Any] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **seen: made.append(seen["src"]))
    return made


def test_a_kernel_is_compiled_once_a_process(compilations):
    """Of the fixture too: what it counts is there to be counted."""
    launcher = triton_module("launcher")
    launcher._loaded.cache_clear()
    for _ in range(3):
        optimizer = fused(parameters(torch.float32, sizes=(5, 40_001)))
        give_gradients(optimizer.param_groups[0]["params"], seed=1)
        optimizer.step()
    assert len(compilations) == 1


def test_nothing_is_compiled_again_when_numbers_sizes_or_addresses_change(compilations):
    def step(params, **arguments):
        optimizer = fused(params, **arguments)
        for seed in range(2):
            give_gradients(params, seed)
            optimizer.step()
        return optimizer

    params = parameters(torch.float32)
    optimizer = step(params)
    del compilations[:]
    group = optimizer.param_groups[0]
    for changed in (
        {"lr": 0.05},
        {"lr": 1.0, "momentum": 0.5},
        {"weight_decay": 0.0},
        {"dampening": 0.5},
        {"dampening": 0.0, "nesterov": True},
        {"momentum": 0.0, "nesterov": False},
        {"lr": torch.tensor(0.1, device=params[0].device)},
        {"maximize": True},
    ):
        group |= changed
        give_gradients(params, seed=3)
        optimizer.step()
    for sizes in ((1,), (16, 32), (1_000,) * 40, (40_001, 7), (1 << 20, 3)):
        step(parameters(torch.float32, sizes=sizes))
    optimizer.grad_scale = torch.tensor(2.0, device=params[0].device)
    optimizer.found_inf = torch.tensor(0.0, device=params[0].device)
    optimizer.step()
    assert compilations == []


# --- uploads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes, in bytes, of all that is brought to the GPU from now on."""
    launcher = triton_module("launcher")
    made: list[int] = []
    upload: Callable[..., Any] = launcher.upload

    def counted(words: bytes, *arguments: Any) -> Any:
        made.append(len(words))
        return upload(words, *arguments)

    monkeypatch.setattr(launcher, "upload", counted)
    return made


def test_a_step_uploads_nothing_where_neither_gradients_nor_numbers_have_changed(uploads):
    params = [p for dtype in DTYPES for p in parameters(dtype, sizes=(3, 1_000, 20_001))]
    optimizer = fused(params)
    expected = Reference(optimizer)
    give_gradients(params, seed=1)
    for step in range(6):
        with_numbers = source(step)
        for param in params:
            param.grad.copy_(numbers(param.shape, param.dtype, with_numbers))
        if step == 2:
            assert uploads
            del uploads[:]
        optimizer.step()
        expected.step()
    assert uploads == []
    expected.assert_agrees()


def test_gradients_that_moved_or_another_lr_are_one_upload_of_a_few_words_a_tensor(uploads):
    params = [p for dtype in DTYPES for p in parameters(dtype, sizes=(3, 1_000, 20_001))]
    optimizer = fused(params)
    expected = Reference(optimizer)
    held = []
    for step in range(8):
        if step < 5:
            held.append([param.grad for param in params])
            give_gradients(params, seed=step)
        else:
            optimizer.param_groups[0]["lr"] *= 0.5
        del uploads[:]
        with no_waiting():
            optimizer.step()
        expected.step()
        if step >= 2:
            assert len(uploads) == 1 and uploads[0] <= 8 * (len(params) + 12 * len(DTYPES)), f"step {step}"
    expected.assert_agrees()


def test_a_step_that_uploads_is_one_copy_and_no_more_kernels_by_the_profilers_account():
    from bench.gpu.trace import profiled

    params = [p for dtype in DTYPES for p in parameters(dtype, sizes=(7, 3_000))]
    optimizer = fused(params)
    sets = []
    for seed in range(2):
        give_gradients(params, seed)
        sets.append([param.grad for param in params])
    steps = iter(range(100))

    def step():
        for param, gradient in zip(params, sets[next(steps) % 2], strict=True):
            param.grad = gradient
        optimizer.step()

    for _ in range(4):
        step()
    seen = profiled(step, steps=4)
    assert (seen["kernels"], seen["memcpys"]) == (fewest_launches(params), 1), seen
    assert (seen["memsets"], seen["waits"]) == (0, 0), seen


# --- launches -----------------------------------------------------------------------------------------------------


def test_thousands_of_tensors_of_many_groups_are_one_launch():
    count = affordable(100, 20)  # of groups, with 100 tensors each
    sizes = (8,) * 100
    groups = [{"params": parameters(torch.float32, seed=g, sizes=sizes), "lr": 0.1 / (1 + g)} for g in range(count)]
    optimizer = fused(groups)
    expected = Reference(optimizer)
    for step in range(2):
        give_gradients([p for group in groups for p in group["params"]], seed=step)
        optimizer.step()
        expected.step()
    expected.assert_agrees()
    (launch,) = launches(optimizer)
    assert launch["tensors"] == 100 * count


def test_a_strided_tensor_takes_a_launch_of_its_own_and_flat_ones_keep_their_kernel():
    params = parameters(torch.float32, sizes=(5, 5_000))
    optimizer = fused(params)
    give_gradients(params, seed=1)
    optimizer.step()
    (launch,) = launches(optimizer)
    assert "strided" not in launch["kernel"]
    params.append(laid_out(numbers((33, 65), torch.float32, source(2)), "row gaps").requires_grad_())
    optimizer = fused(params)
    expected = Reference(optimizer)
    for step in range(2):
        give_gradients(params, seed=step)
        optimizer.step()
        expected.step()
    expected.assert_agrees()
    flat, strided = sorted(launches(optimizer), key=lambda launch: "strided" in launch["kernel"])
    assert "strided" not in flat["kernel"] and flat["tensors"] == 2
    assert "strided" in strided["kernel"] and strided["tensors"] == 1


# --- memory that is brought to the GPU ----------------------------------------------------------------------------


def test_gradients_at_other_addresses_in_every_step_with_the_host_far_ahead(uploads):
    """What a step reads from the host may not be written anew before the GPU has read it."""
    params = parameters(torch.float32, sizes=(3, 1_000, 20_001))
    twins = twin(params)
    ours, theirs = fused(params), torch.optim.SGD(twins, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=False)
    sets = []
    for seed in range(60):
        give_gradients(params, seed)
        sets.append([param.grad for param in params])

    def give(to, gradients):
        for param, gradient in zip(to, gradients, strict=True):
            param.grad = gradient

    for gradients in sets[:3]:
        give(params, gradients)
        ours.step()
    del uploads[:]
    torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
    queued = torch.cuda.Event()
    queued.record()
    for gradients in sets[3:]:
        give(params, gradients)
        ours.step()
    ahead = not queued.query()
    for gradients in sets:
        give(twins, gradients)
        theirs.step()
    assert_same_bits(params, twins)
    assert_same_bits(buffers_of(ours), buffers_of(theirs))
    assert len(uploads) == 57
    assert ahead, "the sleep was too short for this test to show anything, or a step waited"


# --- numbers that the kernel reads --------------------------------------------------------------------------------


def doubles_that_are_hard_to_narrow() -> torch.Tensor:
    """Those next to the middle between two floats, and next to the ends of float's range, above all."""
    generator = source(11)
    floats = torch.randint(-(2**31), 2**31, (100,), dtype=torch.int64, generator=generator)
    floats = torch.cat([floats, torch.randint(0, 2**23, (50,), generator=generator)])  # below normal numbers
    floats = torch.cat([floats, torch.tensor([0, 1, 2, 0x7FFFFF, 0x800000, 0x7F7FFFFE])]).to(torch.int32)
    here, there = (bits.view(torch.float32).double() for bits in (floats, floats + 1))
    middle = ((here + there) / 2).view(torch.int64)
    near = torch.cat([middle + step for step in (-1, 0, 1)] + [here.view(torch.int64) + step for step in (-1, 1)])
    ends = [2.0**-149, 2.0**-150, 2.0**-150 * (1 + 2.0**-52), 3 * 2.0**-150, 2.0**-151, 2.0**-126, 2.0**128, 5e-324]
    ends += [(2 - 2.0**-24) * 2.0**127, 1e39, 3.4028235e38, float("inf"), float("nan")]
    every = torch.cat([near.view(torch.float64), torch.tensor(ends, dtype=torch.float64)])
    return torch.cat([every, -every])


def test_a_double_that_is_hard_to_narrow_is_read_as_its_float():
    """By integers alone: a GPU need have no doubles for a float32 kernel. p = 1 and g = -0 make a momentum buffer of
    weight_decay."""
    values = doubles_that_are_hard_to_narrow()
    values = values[values != 0]
    params = [torch.ones(1, device="cuda").requires_grad_() for _ in values]
    for param in params:
        param.grad = torch.full((1,), -0.0, device="cuda")
    decays = values.cuda().unbind()
    groups = [{"params": [param], "weight_decay": decay} for param, decay in zip(params, decays, strict=True)]
    optimizer = fused(groups, lr=1.0)
    optimizer.step()
    assert_same_bits([torch.cat(buffers_of(optimizer)).cpu()], [values.float()])


def test_a_weight_decay_that_is_0_in_float32_alone_is_added_all_the_same():
    """0 * inf is NaN; a weight decay of 0, of either sign, adds nothing. As a number and as a Tensor."""
    for value, is_added in ((1e-46, True), (5e-324, True), (-0.0, False), (0.0, False)):
        for dtype in (None, torch.float64, torch.float32):
            param = torch.tensor([float("inf"), 1.0], device="cuda").requires_grad_()
            param.grad = torch.ones(2, device="cuda")
            weight_decay = value if dtype is None else torch.tensor(value, dtype=dtype, device="cuda")
            fused([param], lr=1.0, momentum=0.0, weight_decay=weight_decay).step()
            assert param.isnan().tolist() == [is_added and dtype != torch.float32, False], (value, dtype)
            assert param[1] == 0.0


# --- what fails ---------------------------------------------------------------------------------------------------


def test_a_norm_that_ends_between_two_launches_spoils_none_after_it(monkeypatch):
    """Of float32 and float64, which have a kernel each; the last program to count itself forms the norm."""
    launcher = triton_module("launcher")
    launcher_of, launched, fails_at = launcher.launcher_of, [], [-1]

    def counted(kernel: Any, device: torch.device, programs: int) -> Callable[..., None]:
        run = launcher_of(kernel, device, programs)

        def launch(*addresses: int, stream: int) -> None:
            launched.append(kernel.name)
            if len(launched) == fails_at[0]:
                raise KeyboardInterrupt
            run(*addresses, stream=stream)

        return launch

    monkeypatch.setattr(launcher, "launcher_of", counted)
    runs = []
    for interrupts in (False, True):
        params = [numbers(20, dtype, source(5)).requires_grad_() for dtype in (torch.float32, torch.float64)]
        optimizer = fused(params, max_grad_norm=0.1)
        norms = []
        for step in range(3):
            give_gradients(params, seed=step)
            if interrupts and step == 1:
                del launched[:]
                fails_at[0] = 2
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
                assert ["norm" in name for name in launched] == [True, True]
                fails_at[0] = -1
            optimizer.step()
            norms.append(optimizer.grad_norm.clone())
        runs.append([*norms, *params])
    assert all(map(torch.equal, *runs))


def test_a_kernel_that_cannot_be_compiled_is_a_reason_that_names_it(monkeypatch):
    """Asked for once a dtype, not at each parameter and step; torch steps."""
    launcher, asked = triton_module("launcher"), []

    def loaded(kernel: Any, index: int) -> Any:
        asked.append(kernel.name)
        raise FileNotFoundError("there is no cc")

    monkeypatch.setattr(launcher, "_loaded", loaded)
    monkeypatch.setattr(launcher, "_failures", {})
    params = parameters(torch.float32, sizes=(4, 5)) + parameters(torch.bfloat16, sizes=(3,))
    optimizer = FusedSGD(params, lr=0.1)
    with pytest.warns(UserWarning, match="cannot build its kernel for .*: FileNotFoundError: there is no cc"):
        for seed in range(2):
            give_gradients(params, seed)
            optimizer.step()
    assert {own.backend for own in optimizer.backends()} == {"torch"}
    with pytest.raises(RuntimeError, match=r'backend="triton" does not take it: Triton .* is no cc'):
        fused(params).step()
    assert sorted(set(asked)) == ["sgd_kernel<bfloat16, torch>", "sgd_kernel<float32>"] and len(asked) == 2


def test_a_parameter_on_the_cpu_is_refused():
    assert backends.FUSED["triton"].refusal(torch.ones(3)) == "it is on cpu"


# --- DTensors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of one process."""
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import DeviceMesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cuda", [0])
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"max_grad_norm": 0.5, "ema_decay": 0.9, "l1_penalty": 0.01}),
        (torch.bfloat16, {"master_weights": "split", "decoupled_weight_decay": True}),
        (torch.bfloat16, {"rounding": "stochastic"}),
    ],
    ids=["clip, average", "masters", "stochastic"],
)
def test_dtensors_with_options_are_stepped_as_plain_tensors_are(mesh, dtype, options):
    from torch.distributed.tensor import Shard, distribute_tensor

    def as_dtensor(tensor: torch.Tensor) -> Any:
        return distribute_tensor(tensor.detach(), mesh, [Shard(0)])

    params = parameters(dtype, sizes=(7, 300))
    placed = [as_dtensor(param.clone()).requires_grad_() for param in params]
    ours, theirs = fused(placed, **options), fused(params, **options)
    for seed in range(3):
        give_gradients(params, seed)
        for own, param in zip(placed, params, strict=True):
            own.grad = as_dtensor(param.grad.clone())
        ours.step()
        theirs.step()
        assert_same_bits([own.to_local() for own in placed], params, f"step {seed}")
    assert {own.backend for own in ours.backends()} == {"triton"}
