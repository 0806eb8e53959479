"""Stage "arithmetic" of gpu_check: whose bits equal whose on this GPU, counted.

Every step begins from the same parameters and momentum buffers for all who take part, so that a difference is one of
that step, not an old one's consequence. Says whether torch's loop and foreach follow wd_fused.reference, operator by
operator, which the design takes for granted and only a GPU can tell, and whether FusedSGD's backends do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import cases as gpu_cases
from bench.gpu.stage import Stage, main
from wd_fused import FusedSGD, backends, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
SIZES = (1, 7, 64, 1_000, 4_099, 100_003)
STEPS = 3  # the first, which makes the momentum buffers, and two more

# Who takes part, and who is compared with whom. A reference without a word behind it has numerics="torch".
REFERENCE, ON_CPU, REFERENCE_OPMATH = "reference", "reference on the CPU", "reference opmath"
OURS, OURS_OPMATH = "FusedSGD", "FusedSGD opmath"
TRITON, TRITON_OPMATH = "FusedSGD Triton", "FusedSGD Triton opmath"
LOOP, FOREACH, FUSED = "torch loop", "torch foreach", "torch fused"
PAIRS = (
    (REFERENCE, ON_CPU),
    (LOOP, REFERENCE),
    (FOREACH, REFERENCE),
    (FUSED, REFERENCE),
    (OURS, REFERENCE),
    (OURS, LOOP),
    (OURS, FOREACH),
    (OURS, FUSED),
    (OURS_OPMATH, REFERENCE_OPMATH),
    (FUSED, REFERENCE_OPMATH),
    (TRITON, REFERENCE),
    (TRITON, OURS),
    (TRITON, LOOP),
    (TRITON, FOREACH),
    (TRITON_OPMATH, REFERENCE_OPMATH),
    (TRITON_OPMATH, OURS_OPMATH),
)
# What must be 0; the rest is found out. Half precision against torch's operators is the design's claim, told apart.
REQUIRED = (
    (OURS, REFERENCE),
    (OURS_OPMATH, REFERENCE_OPMATH),
    (TRITON, REFERENCE),
    (TRITON, OURS),
    (TRITON_OPMATH, REFERENCE_OPMATH),
    (TRITON_OPMATH, OURS_OPMATH),
)
REQUIRED_FULL_PRECISION = ((OURS, LOOP), (OURS, FOREACH), (TRITON, LOOP), (TRITON, FOREACH))


def mixes() -> Iterator[dict[str, Any]]:
    """Every combination of the options that changes the formula."""
    for maximize in (False, True):
        for weight_decay in (0.0, 5e-4):
            common = {"lr": 0.1, "weight_decay": weight_decay, "maximize": maximize}
            yield {**common, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
            for dampening, nesterov in ((0.0, False), (0.1, False), (0.0, True)):
                yield {**common, "momentum": 0.9, "dampening": dampening, "nesterov": nesterov}


def told(mix: dict[str, Any]) -> str:
    """A mix in a few words: what is not as in plain SGD."""
    words = [name for name in ("momentum", "dampening", "weight_decay") if mix[name]]
    return " ".join(words + [name for name in ("nesterov", "maximize") if mix[name]]) or "plain"


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, every NaN as the same one."""
    tensor = tensor.detach().contiguous()
    nan = torch.full((), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return torch.where(tensor.isnan(), nan, tensor).view(INTEGER[tensor.element_size()])


def differing(left: list[Tensor], right: list[Tensor]) -> int:
    return sum(int((bits(a) != bits(b.to(a.device))).sum()) for a, b in zip(left, right, strict=True))


State = tuple[list[Tensor], list[Tensor | None]]  # parameters and momentum buffers


def with_reference(numerics: str, device: str) -> Callable[[State, list[Tensor], dict[str, Any]], list[Tensor]]:
    def step(state: State, grads: list[Tensor], mix: dict[str, Any]) -> list[Tensor]:
        params = [p.to(device, copy=True) for p in state[0]]
        buffers = [None if b is None else b.to(device, copy=True) for b in state[1]]
        reference.sgd(params, [g.to(device) for g in grads], buffers, **mix, numerics=numerics)
        return [*params, *(b for b in buffers if b is not None and mix["momentum"])]

    return step


def with_optimizer(
    make: Callable[..., torch.optim.SGD],
) -> Callable[[State, list[Tensor], dict[str, Any]], list[Tensor]]:
    def step(state: State, grads: list[Tensor], mix: dict[str, Any]) -> list[Tensor]:
        params = [p.clone().requires_grad_() for p in state[0]]
        optimizer = make(params, **mix)
        for param, grad, buffer in zip(params, grads, state[1], strict=True):
            param.grad = grad.clone()
            if buffer is not None and mix["momentum"]:
                optimizer.state[param]["momentum_buffer"] = buffer.clone()
        optimizer.step()
        return [*params, *(optimizer.state[p]["momentum_buffer"] for p in params if mix["momentum"])]

    return step


def participants() -> dict[str, Callable[[State, list[Tensor], dict[str, Any]], list[Tensor]]]:
    """All that can be had here."""
    own = {}
    for backend, names in {"cuda": (OURS, OURS_OPMATH), "triton": (TRITON, TRITON_OPMATH)}.items():
        if backends.FUSED[backend].unavailable() is None:
            for name, numerics in zip(names, ("torch", "opmath"), strict=True):
                own[name] = with_optimizer(partial(FusedSGD, backend=backend, numerics=numerics))
    return own | {
        REFERENCE: with_reference("torch", gpu_cases.DEVICE),
        ON_CPU: with_reference("torch", "cpu"),
        REFERENCE_OPMATH: with_reference("opmath", gpu_cases.DEVICE),
        LOOP: with_optimizer(lambda params, **mix: torch.optim.SGD(params, **mix, foreach=False)),
        FOREACH: with_optimizer(lambda params, **mix: torch.optim.SGD(params, **mix, foreach=True)),
        FUSED: with_optimizer(lambda params, **mix: torch.optim.SGD(params, **mix, fused=True)),
    }


def compared(dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """A row for every pair: how many elements differ, of how many, and in which mixes, at first and at later steps."""
    device = gpu_cases.DEVICE
    generator = torch.Generator().manual_seed(7)
    everybody = participants()
    pairs = [pair for pair in PAIRS if everybody.keys() >= set(pair)]
    rows = {pair: {"elements": 0, "differing": 0, "first_step": 0, "mixes": []} for pair in pairs}
    for mix in mixes():
        state: State = (
            [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype).to(device) for n in sizes],
            [None] * len(sizes),
        )
        for step in range(STEPS):
            grads = [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype).to(device) for n in sizes]
            results = {name: run(state, grads, mix) for name, run in everybody.items()}
            for pair, row in rows.items():
                count = differing(results[pair[0]], results[pair[1]])
                row["elements"] += sum(tensor.numel() for tensor in results[pair[0]])
                row["differing"] += count
                row["first_step"] += count if step == 0 else 0
                if count and told(mix) not in row["mixes"]:
                    row["mixes"].append(told(mix))
            after = results[REFERENCE]
            state = (after[: len(sizes)], list(after[len(sizes) :]) or [None] * len(sizes))
    name = str(dtype).removeprefix("torch.")
    return [{"dtype": name, "left": left, "right": right, **row} for (left, right), row in rows.items()]


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences for the rows that must have no difference and have one."""
    sentences = []
    for row in rows:
        pair = (row["left"], row["right"])
        required = pair in REQUIRED or (pair in REQUIRED_FULL_PRECISION and row["dtype"] in ("float32", "float64"))
        if required and row["differing"]:
            sentences.append(
                f"{row['dtype']}: {row['differing']:,} of {row['elements']:,} elements differ between {pair[0]} and "
                f"{pair[1]} ({', '.join(row['mixes'][:4])})"
            )
    return sentences


def run(stage: Stage) -> None:
    sizes = SIZES[:4] if stage.quick else SIZES
    stage.data["rows"] = []
    for dtype in DTYPES:
        rows = compared(dtype, sizes=sizes)
        stage.data["rows"] += rows
        stage.failures += broken(rows)
        stage.save()


if __name__ == "__main__":
    sys.exit(main("arithmetic", run))
