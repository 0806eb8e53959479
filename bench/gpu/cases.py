"""What is stepped on a GPU, and by whom: the cases and the implementations of the GPU's stages. No torch at import."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from bench.cases import ITEMSIZE, Case, many, model_shapes
from bench.cases.implementations import FOREACH, FUSED, LOOP, OPTIMI, OURS, TRITON, Make, available

if TYPE_CHECKING:
    from torch import Tensor

DEVICE = "cuda"

# wd_fused's two backends for a GPU. Ratios are given in the times of either.
OWN = {OURS: "cuda", TRITON: "triton"}
# Those that are ready at once: compiling and tuning for each size would take longer than all the rest. `make bench` has
# them, and apex and Transformer Engine.
GPU_IMPLEMENTATIONS = (*OWN, FUSED, FOREACH, LOOP, OPTIMI)

_RESNET50 = model_shapes("resnet50")
# Named in the goals of goals.py.
GPU_STEP = (
    Case("1x1G", "one of 1 G elements", ((1 << 30,),), rounds=15),
    Case("1x1G-bfloat16", "one of 1 G elements, bfloat16", ((1 << 30,),), rounds=15, dtype="bfloat16"),
    Case("resnet50", "ResNet-50's 161 tensors, 25.6 M elements", _RESNET50, rounds=31),
    Case("vit_l_16", "ViT-L/16's 296 tensors, 304 M elements", model_shapes("vit_l_16"), rounds=15),
    Case("gpt2_xl", "GPT-2 XL's 580 tensors, 1.56 G elements", model_shapes("gpt2_xl"), rounds=9),
    many(10_000, 64, rounds=9),
    many(1_000, 64, rounds=21),
    many(161, 8, rounds=31),
)
GPU_QUICK = (Case("1x16M", "one of 16 M elements", ((1 << 24,),), rounds=5), many(300, 64, rounds=5))
# Of which the host's time is looked at more closely.
GPU_HOST = (many(161, 8, rounds=31), GPU_STEP[2], many(1_000, 64, rounds=21), many(10_000, 64, rounds=9))
# Of which launches are counted: the same shapes in several dtypes.
GPU_LAUNCHES = (
    *(Case(f"resnet50-{dtype}", f"ResNet-50, {dtype}", _RESNET50, dtype=dtype) for dtype in ITEMSIZE),
    many(10_000, 64),
)
# Of which ncu profiles a step, with kinds of options that small_case.py names.
GPU_PROFILE = (
    Case("1x128M", "one of 128 M elements", ((1 << 27,),)),
    Case("1x128M-bfloat16", "one of 128 M elements, bfloat16", ((1 << 27,),), dtype="bfloat16"),
)
PROFILED_OPTIONS = (
    *(f"1x128M/{kind}" for kind in ("clip", "clip-average")),
    *(
        f"1x128M-bfloat16/{kind}"
        for kind in ("bfloat16", "bfloat16-average", "full", "split", "split24", "stochastic", "kahan")
    ),
)
PROFILED = "profiled"  # begins the line that says how many kernels a step has launched


def fitting(case: Case, free_bytes: int) -> Case | None:
    """The case, or where memory is short one of fewer elements if it is a single tensor; None: there is no room.

    optimi has a momentum buffer of its own, and foreach takes a third more for a while.
    """
    while 2.2 * case.bytes_held > free_bytes:
        if len(case.shapes) > 1 or case.elements < 1 << 24:
            return None
        fewer = case.elements // 2
        what = f"1x{fewer >> 20}M" + (f"-{case.dtype}" if case.dtype != "float32" else "")
        title = f"one of {fewer >> 20} M elements" + (f", {case.dtype}" if case.dtype != "float32" else "")
        case = dataclasses.replace(case, name=what, title=title, shapes=((fewer,),))
    return case


def gpu_optimizers() -> tuple[dict[str, Make], dict[str, str]]:
    """The constructors of what can be used here, and why the others are absent."""
    found, absent = available("cuda")
    constructors = {name: next(iter(found[name].makers.values())) for name in GPU_IMPLEMENTATIONS if name in found}
    return constructors, {name: absent[name] for name in GPU_IMPLEMENTATIONS if name in absent}


class Gradients:
    """Two sets of gradients, of which the parameters have one."""

    def __init__(self, params: list[Tensor]) -> None:
        self._params = params
        own = [param.grad for param in params]
        self._sets = [own, [None if grad is None else grad.clone() for grad in own]]

    def move(self) -> None:
        """The parameters get the other set, with the same numbers."""
        self._sets.reverse()
        for param, grad in zip(self._params, self._sets[0], strict=True):
            param.grad = grad
