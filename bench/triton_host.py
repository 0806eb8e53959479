"""What the Triton backend's step takes on the host, without a GPU: the launch itself is replaced by nothing.

`python -m bench.triton_host --write docs/triton.md`. Beside it the whole step of torch.optim.SGD on the CPU, of tensors
so small that it is Python and dispatch, of which a GPU's step has as much, and launches on top. Interleaved rounds, as
bench/README.md describes them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import formats
from bench.cases import OPTIONS
from bench.conftest import RESULTS, Start
from bench.formats import Spread

BEGIN, END = "<!-- host: begin -->", "<!-- host: end -->"
TENSORS = (161, 1_000)
ROUNDS = 41
STEPS = 5  # of a block, that are timed together
CPP, PYTHON = "read in C++", "read in Python"
FUSED, FOREACH = "torch `fused=True`", "torch `foreach=True`"
SAME, MOVED, LR = "nothing changed", "all gradients moved", "another lr"


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of a step, by number of tensors, by what has changed since the last one, by implementation and round."""
    os.environ["TRITON_INTERPRET"] = "1"  # so that the backend takes CPU tensors; nothing is interpreted
    import torch

    from wd_fused import FusedSGD, backends, extension

    if extension.load() is None:
        raise SystemExit(f"the C++ extension is needed: {extension.status().reason}")
    backends.triton_kernels()
    from wd_fused.triton_kernels import launcher

    launcher.launcher_of = lambda kernel, device, programs: lambda *addresses, stream: None  # type: ignore[assignment]
    start = Start()
    seconds: dict[str, dict[str, dict[str, list[float]]]] = {}
    shuffle = random.Random(0).shuffle
    gc.disable()
    for count in TENSORS:
        params = [torch.nn.Parameter(torch.randn(8)) for _ in range(count)]
        sets = [[torch.randn(8) for _ in params] for _ in range(2)]  # of gradients
        optimizers: dict[str, torch.optim.Optimizer] = {
            FUSED: torch.optim.SGD(params, fused=True, **OPTIONS),
            FOREACH: torch.optim.SGD(params, foreach=True, **OPTIONS),
            CPP: FusedSGD(params, backend="triton", **OPTIONS),
            PYTHON: FusedSGD(params, backend="triton", **OPTIONS),
        }
        changes = {SAME: _nothing, MOVED: _move, LR: _another_lr}
        times = {change: {name: [] for name in optimizers} for change in changes}
        for change, make in changes.items():
            for round_ in range(-2, rounds):  # two to warm up
                names = list(optimizers)
                shuffle(names)
                for name in names:
                    reader = None if name == PYTHON else extension.load()
                    backends.TritonBackend.module = lambda self, reader=reader: reader  # type: ignore[assignment,misc]
                    block = [_timed(optimizers[name], params, sets, make) for _ in range(STEPS)]
                    if round_ >= 0:
                        times[change][name].append(statistics.median(block))
        seconds[str(count)] = times
    gc.enable()
    import triton

    return {
        "seconds": seconds,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "cores": os.cpu_count(),
        "load_average_at_start": start.load_average,
        "cores_used_by_others": start.used_by_others(),
    }


def _nothing(optimizer: Any, params: list[Any], sets: list[list[Any]]) -> None:
    for param, gradient in zip(params, sets[0], strict=True):
        param.grad = gradient


def _move(optimizer: Any, params: list[Any], sets: list[list[Any]]) -> None:
    sets.reverse()
    _nothing(optimizer, params, sets)


def _another_lr(optimizer: Any, params: list[Any], sets: list[list[Any]]) -> None:
    optimizer.param_groups[0]["lr"] *= 0.999


def _timed(optimizer: Any, params: list[Any], sets: list[list[Any]], change: Callable[..., None]) -> float:
    change(optimizer, params, sets)
    begin = time.perf_counter_ns()
    optimizer.step()
    return (time.perf_counter_ns() - begin) * 1e-9


def markdown(run: dict[str, Any], file: str) -> str:
    head = ["tensors", "since the last step", CPP, PYTHON, f"{FUSED} takes, against C++", "against Python"]
    rows = []
    for count, by_change in run["seconds"].items():
        for change, by_name in by_change.items():
            ratios = [
                Spread.of([a / b for a, b in zip(by_name[FUSED], by_name[ours], strict=True)]) for ours in (CPP, PYTHON)
            ]
            times = [formats.time(Spread.of(by_name[ours]).median) for ours in (CPP, PYTHON)]
            rows.append([f"{int(count):,}", change, *times, *map(formats.times_as_long, ratios)])
    others = run["cores_used_by_others"]
    busy = f"load average {run['load_average_at_start'][0]:.1f} at the start"
    busy += "" if others is None else f", other processes had {others:.0%} of the cores' time"
    return (
        f"{formats.table(head, rows)}\n\nMeasured on {run['date']}: {run['cores']} cores, torch {run['torch']}, Triton "
        f"{run['triton']}; {busy}. From bench/results/{file}."
    )


def block(run: dict[str, Any], file: str) -> str:
    how = "<!-- made by `python -m bench.triton_host --write docs/triton.md`: not edited by hand -->"
    return f"{BEGIN}\n{how}\n\n{markdown(run, file)}\n\n{END}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", metavar="FILE", type=Path, help="keep the run and put its table into this document")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    run = measure(arguments.rounds)
    file = f"triton-host-{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.json"
    if arguments.write is None:
        print(markdown(run, file + " (not kept)"))
        return
    text = arguments.write.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    (RESULTS / file).write_text(json.dumps(run) + "\n", encoding="utf-8")
    arguments.write.write_text(before + block(run, file) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
