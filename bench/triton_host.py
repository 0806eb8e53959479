"""What the Triton backend's step takes on the host: launches and uploads are replaced by nothing.

`python -m tests.simulated_gpu -m bench.triton_host --write docs/triton.md`, or without the simulated GPU on a real one.
Beside it the whole step of torch.optim.SGD on the CPU, of tensors so small that it is Python and dispatch, of which a
GPU's step has as much, and launches on top. Interleaved rounds, as bench/README.md describes them.
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

from bench.cases import OPTIONS
from bench.conftest import RESULTS, Start
from bench.report import formats
from bench.report.formats import Spread

BEGIN, END = "<!-- host: begin -->", "<!-- host: end -->"
TENSORS = (161, 1_000)
ROUNDS = 41
STEPS = 5  # of a block, that are timed together
OURS = "a step"
FUSED = "torch `fused=True`"
SAME, MOVED, LR = "nothing changed", "all gradients moved", "another lr"


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of a step, by number of tensors, by what has changed since the last one, by implementation and round."""
    import torch

    from wd_fused import FusedSGD, backends

    if (reason := backends.FUSED["triton"].unavailable()) is not None:
        raise SystemExit(reason)
    from wd_fused.triton_kernels import launcher

    memory = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    launcher.launcher_of = lambda kernel, device, programs: lambda *addresses, stream: None
    launcher.upload = lambda words, device: memory
    start = Start()
    seconds: dict[str, dict[str, dict[str, list[float]]]] = {}
    shuffle = random.Random(0).shuffle
    gc.disable()
    for count in TENSORS:
        params = {
            name: [torch.nn.Parameter(torch.zeros(8, device=device)) for _ in range(count)]
            for name, device in ((FUSED, "cpu"), (OURS, "cuda"))
        }
        sets = {name: [[torch.zeros_like(param) for param in own] for _ in range(2)] for name, own in params.items()}
        optimizers: dict[str, torch.optim.Optimizer] = {
            FUSED: torch.optim.SGD(params[FUSED], fused=True, **OPTIONS),
            OURS: FusedSGD(params[OURS], backend="triton", **OPTIONS),
        }
        changes = {SAME: _nothing, MOVED: _move, LR: _another_lr}
        times = {change: {name: [] for name in optimizers} for change in changes}
        for change, make in changes.items():
            for round_ in range(-2, rounds):  # two to warm up
                names = list(optimizers)
                shuffle(names)
                for name in names:
                    block = [_timed(optimizers[name], params[name], sets[name], make) for _ in range(STEPS)]
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
        "gpu": "a simulated GPU" if "SIMULATED_GPU_LIBRARY" in os.environ else torch.cuda.get_device_name(),
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
    head = ["tensors", "since the last step", OURS, f"{FUSED} takes"]
    rows = []
    for count, by_change in run["seconds"].items():
        for change, by_name in by_change.items():
            ratio = Spread.of([a / b for a, b in zip(by_name[FUSED], by_name[OURS], strict=True)])
            time_of_ours = formats.time(Spread.of(by_name[OURS]).median)
            rows.append([f"{int(count):,}", change, time_of_ours, formats.times_as_long(ratio)])
    others = run["cores_used_by_others"]
    busy = f"load average {run['load_average_at_start'][0]:.1f} at the start"
    busy += "" if others is None else f", other processes had {others:.0%} of the cores' time"
    return (
        f"{formats.table(head, rows)}\n\nMeasured on {run['date']}: {run['cores']} cores, torch {run['torch']}, Triton "
        f"{run['triton']}, {run['gpu']}; {busy}. From bench/results/{file}."
    )


def block(run: dict[str, Any], file: str) -> str:
    command = "python -m tests.simulated_gpu -m bench.triton_host --write docs/triton.md"
    how = f"<!-- made by `{command}`: not edited by hand -->"
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
