"""Runs the cases of this folder in groups of 2, 4 and 1 processes over gloo, and writes down how each ended.

Called by test_distributed.py as a program of its own: `python worlds.py FOLDER`. Torch is imported once; the processes
are forked from there, one world after the other, so that a larger one finds what a smaller one has saved. A case that
fails ends its world, because its ranks may stand at different calls; the next world goes on behind it.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor

ORDER = (2, 4, 1)  # of the worlds
SECONDS_A_CASE = 25


class World(NamedTuple):
    """What a case is told: who it is, among how many, and a folder that all worlds share."""

    rank: int
    size: int
    folder: Path


Case = Callable[[World], None]
CASES: dict[str, tuple[Case, tuple[int, ...]]] = {}


def case(*sizes: int) -> Callable[..., Case]:
    """Registers a function that every process of a world of each of these sizes calls, by its name or another."""

    def register(function: Case, name: str | None = None) -> Case:
        CASES[name or function.__name__] = (function, sizes)
        return function

    return register


def load_cases() -> dict[str, tuple[int, ...]]:
    """The names of all cases, with the sizes of their worlds."""
    for module in ("ddp_cases", "norm_cases", "dtensor_cases", "checkpoint_cases"):
        importlib.import_module(module)
    return {name: sizes for name, (_, sizes) in CASES.items()}


# ---- running


def live(world: World, names: list[str], attempt: int) -> None:
    """One process. Its records: a line for each case that ended, with the traceback if it failed."""
    torch.set_num_threads(1)
    store = world.folder / f"store-{world.size}-{attempt}"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=SECONDS_A_CASE),
    )
    with open(world.folder / f"records-{world.size}-{world.rank}", "a", encoding="utf-8") as records:
        for name in names:
            error = None
            faulthandler.dump_traceback_later(SECONDS_A_CASE + 5, exit=True)  # what still hangs after the timeout
            try:
                CASES[name][0](world)
                dist.barrier()
            except BaseException:
                error = traceback.format_exc()
            print(json.dumps([name, error]), file=records, flush=True)
            if error is not None:
                os._exit(1)
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


def run_world(size: int, names: list[str], folder: Path, attempt: int) -> dict[str, list[str]]:
    """The errors of each case that was begun, of none if it passed on all ranks."""
    context = torch.multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    for rank in range(size):
        processes.append(context.Process(target=live, args=(World(rank, size, folder), names, attempt), daemon=True))
        processes[-1].start()
    for process in processes:
        process.join()
    results: dict[str, list[str]] = {}
    for rank, process in enumerate(processes):
        path = folder / f"records-{size}-{rank}"
        records = dict(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        for name in names:
            error = records.get(name, f"it did not end: exit status {process.exitcode}")
            results.setdefault(name, []).extend([f"rank {rank}: {error}"] if error is not None else [])
            if error is not None:
                break  # what comes behind it has not begun
    return results


def main(folder: Path) -> None:
    for package in ("torch._dynamo", "sklearn.datasets"):  # what cases import later: once, not in each process
        if find_spec(package.partition(".")[0]) is not None:
            importlib.import_module(package)
    gc.freeze()  # no pages copied in each process because a collector has marked them
    sizes = load_cases()
    results: dict[str, list[str]] = {}
    for size in ORDER:
        pending = [name for name in sizes if size in sizes[name]]
        attempt = 0
        while pending:
            done = run_world(size, pending, folder, attempt)
            failed = next((name for name in pending if done.get(name)), pending[-1])
            upto = pending[: pending.index(failed) + 1]
            results |= {f"{name}-{size}": done[name] for name in upto}
            pending = pending[len(upto) :]
            attempt += 1
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


# ---- what cases compare


def bits(tensor: Tensor) -> Tensor:
    """Of what this rank holds: integers, which tell -0.0 from 0.0."""
    local = tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return local.contiguous().view(integers[local.element_size()]) if local.is_floating_point() else local


def assert_same_bits(ours: Any, theirs: Any, what: str = "parameter") -> None:
    """Of two sequences of tensors; of DTensors the local parts, and the placements."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert isinstance(a, DTensor) == isinstance(b, DTensor), f"{what} {i}: {type(a)}, {type(b)}"
        if isinstance(a, DTensor):
            assert a.placements == b.placements, f"{what} {i}: {a.placements}, {b.placements}"
        assert a.shape == b.shape and a.dtype == b.dtype, f"{what} {i}: {a.shape} {a.dtype}, {b.shape} {b.dtype}"
        differing = (bits(a) != bits(b)).sum().item()
        assert differing == 0, f"{what} {i}: {differing} of {bits(a).numel()} elements differ"


def whole(tensor: Tensor) -> Tensor:
    """Of a DTensor all that is in it, on every rank; in int32 where gloo knows no such integers."""
    if not isinstance(tensor, DTensor):
        return tensor
    return (tensor.to(torch.int32) if tensor.dtype == torch.int16 else tensor).full_tensor().to(tensor.dtype)


def assert_same_on_all_ranks(tensors: Any, world: World) -> None:
    flat = torch.cat([bits(tensor).flatten() for tensor in tensors])
    gathered = [torch.empty_like(flat) for _ in range(world.size)]
    dist.all_gather(gathered, flat)
    for rank, other in enumerate(gathered):
        assert torch.equal(flat, other), f"ranks {world.rank} and {rank} have other parameters"


def momentum_buffers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order of the groups, of parameters that have one."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    return [optimizer.state[p]["momentum_buffer"] for p in params if "momentum_buffer" in optimizer.state.get(p, {})]


if __name__ == "__main__":
    sys.modules["worlds"] = sys.modules["__main__"]  # the cases import it by this name
    main(Path(sys.argv[1]))
