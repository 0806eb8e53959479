"""A few steps over few tensors, for the tools that watch a program.

`python -m bench.gpu.small_case memory|profile BACKENDS [CASE[/OPTIONS]…]`, the backends as in cuda,triton.

Started by tools.py under compute-sanitizer (memory) and ncu (profile). The first makes its numbers on the CPU and
compares there too, so that next to nothing but this project's kernel runs on the GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from bench import cases
from bench.cases import OPTIONS, Case
from bench.gpu import cases as gpu_cases
from bench.gpu.cases import PROFILED
from wd_fused import FusedSGD, reference
from wd_fused.backends import NUMERICS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_CLIP: dict[str, Any] = {"max_grad_norm": 1.0}
# Kinds of options: a kernel's every storage, rounding and norm is in one of them.
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "clip": (torch.float32, _CLIP),
    "clip-average": (torch.float32, _CLIP | {"ema_decay": 0.9}),
    "penalties": (torch.float32, {"l1_penalty": 1e-3, "decoupled_weight_decay": 0.1, "zero_grads": True}),
    "double": (torch.float64, _CLIP | {"ema_decay": 0.9}),
    "half": (torch.float16, _CLIP | {"ema_decay": 0.9, "ema_dtype": torch.float16}),
    "bfloat16": (torch.bfloat16, _CLIP),
    "bfloat16-average": (torch.bfloat16, _CLIP | {"ema_decay": 0.9}),
    "full": (torch.bfloat16, _CLIP | {"master_weights": "full"}),
    "split": (torch.bfloat16, {"master_weights": "split", "ema_decay": 0.9}),
    "split24": (torch.bfloat16, _CLIP | {"master_weights": "split24", "momentum_dtype": torch.int8}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "momentum_dtype": torch.float32}),
    "kahan": (torch.bfloat16, _CLIP | {"rounding": "kahan", "momentum_dtype": torch.bfloat16}),
}
WRONG = 3  # exit status: the results differ from the reference


def placed(values: Tensor, layout: str, device: str = gpu_cases.DEVICE) -> Tensor:
    """A copy of 12 x 5 x 3 values or so on the device; the same values, laid out otherwise."""
    if layout == "misaligned":
        room = torch.zeros(values.numel() + 5, dtype=values.dtype).to(device)
        view = room[3 : 3 + values.numel()].view(values.shape)
    elif layout == "transposed":
        view = torch.zeros(values.shape[::-1], dtype=values.dtype).to(device).permute(2, 1, 0)
    elif layout == "gaps":
        view = torch.zeros((*values.shape[:-1], 2 * values.shape[-1]), dtype=values.dtype).to(device)[..., ::2]
    else:
        return values.to(device, copy=True)
    view.copy_(values.to(device))
    return view


SHAPES_AND_LAYOUTS = (
    *(((n,), "plain") for n in (0, 1, 5, 64, 1_023, 1_025, 40_001)),
    *(((12, 5, 3), layout) for layout in ("misaligned", "transposed", "gaps")),
    ((4_100, 3, 3), "misaligned"),
)


def memory(backend: str, numerics: str) -> bool:
    """Three steps of tensors of all dtypes and layouts in one optimizer; whether the bits are the reference's."""
    generator = torch.Generator().manual_seed(11)

    def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shapes_and_layouts = SHAPES_AND_LAYOUTS
    groups = []
    expected: list[tuple[list[Tensor], list[Tensor | None]]] = []
    for g, options in enumerate(({}, {"nesterov": True}, {"momentum": 0.0}, {"weight_decay": 0.0, "maximize": True})):
        values = [numbers(*shape, dtype=dtype) for dtype in DTYPES[g:] for shape, _ in shapes_and_layouts]
        layouts = [layout for _ in DTYPES[g:] for _, layout in shapes_and_layouts]
        params = [placed(v, layout).requires_grad_() for v, layout in zip(values, layouts, strict=True)]
        groups.append({"params": params, **options})
        expected.append((values, [None] * len(values)))
    optimizer = FusedSGD(groups, **OPTIONS, backend=backend, numerics=numerics)
    for step in range(3):
        for group, (values, buffers) in zip(optimizer.param_groups, expected, strict=True):
            chosen = [i for i in range(len(values)) if step != 1 or i % 3]  # gradients that are missing
            grads = [numbers(*values[i].shape, dtype=values[i].dtype) for i in chosen]
            for param in group["params"]:
                param.grad = None
            for i, grad in zip(chosen, grads, strict=True):
                gradient = placed(grad, "misaligned" if i % 2 else "plain")
                group["params"][i].grad = gradient
            own = [buffers[i] for i in chosen]
            options = {name: group[name] for name in (*OPTIONS, "nesterov", "maximize")}
            reference.sgd([values[i] for i in chosen], grads, own, **options, numerics=numerics)
            for i, buffer in zip(chosen, own, strict=True):
                buffers[i] = buffer
        optimizer.step()
    return all(
        torch.equal(param.detach().cpu(), value)
        for group, (values, _) in zip(optimizer.param_groups, expected, strict=True)
        for param, value in zip(group["params"], values, strict=True)
    )


def memory_with_options(backend: str) -> bool:
    """The same with a group for each kind of options; the gradients' squares add up exactly, in whatever order."""
    generator = torch.Generator().manual_seed(12)
    groups: list[dict[str, Any]] = []
    expected: list[dict[str, Any]] = []
    for dtype, options in KINDS.values():
        values = [torch.randn(shape, generator=generator).to(dtype) for shape, _ in SHAPES_AND_LAYOUTS]
        for of, device in ((groups, gpu_cases.DEVICE), (expected, "cpu")):
            params = [placed(v, layout, device) for v, (_, layout) in zip(values, SHAPES_AND_LAYOUTS, strict=True)]
            of.append({"params": [param.requires_grad_() for param in params], **options})
    optimizer = FusedSGD(groups, **OPTIONS, backend=backend)
    reference_optimizer = FusedSGD(expected, **OPTIONS, backend="torch")
    pairs = [
        pair
        for group, other in zip(optimizer.param_groups, reference_optimizer.param_groups, strict=True)
        for pair in zip(group["params"], other["params"], strict=True)
    ]
    for step in range(3):
        for i, (param, value) in enumerate(pairs):
            gradient = torch.randint(-32, 33, value.shape, generator=generator) / 16
            has_none = step == 1 and i % 3 == 0
            value.grad = None if has_none else gradient.to(value.dtype)
            param.grad = None if has_none else placed(gradient.to(value.dtype), "misaligned" if i % 2 else "plain")
        optimizer.step()
        reference_optimizer.step()
    return all(torch.equal(param.detach().cpu(), value.detach()) for param, value in pairs)


def profile(case: Case, backend: str, options: dict[str, Any]) -> None:
    """A step of a case between cudaProfilerStart and Stop."""
    params = cases.parameters(case, gpu_cases.DEVICE)
    optimizer = FusedSGD(params, **OPTIONS, **options, backend=backend)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    launches = optimizer._plans.parts[0].plan.launches()  # type: ignore[union-attr]
    named = "".join(f"/{name}" for name, (_, own) in KINDS.items() if own is options)
    print(f"{PROFILED} {case.name}{named}, {backend}: {len(launches)}")
    del params, optimizer
    torch.cuda.empty_cache()


def main() -> int:
    what, names, *chosen = sys.argv[1:]
    backends = names.split(",")
    if what == "memory":
        right = {
            backend: all([*(memory(backend, numerics) for numerics in NUMERICS), memory_with_options(backend)])
            for backend in backends
        }
        for backend, is_right in right.items():
            print(f"{backend}: {'bits as' if is_right else 'bits differ from'} the reference's")
        return 0 if all(right.values()) else WRONG
    by_name = {case.name: case for case in (*gpu_cases.GPU_STEP, *gpu_cases.GPU_QUICK, *gpu_cases.GPU_PROFILE)}
    for name in chosen:
        case, _, kind = name.partition("/")
        for backend in backends:
            profile(by_name[case], backend, KINDS[kind][1] if kind else {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
