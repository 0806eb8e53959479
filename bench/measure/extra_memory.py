"""`python -m bench.measure.extra_memory CASE IMPLEMENTATION [OPTIONS]`: what a step takes beside what must be there.

Started by test_memory.py and test_options_cpu.py, a fresh process for each measurement on the CPU. Prints one JSON
object. Linux only: the kernel's own account of the process (peak resident size, /proc/self/status) is asked, so that
nothing can be allocated unseen. On a GPU torch's allocator is asked, in the process of the benchmarks.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.cases import BY_NAME, Case, many, options, parameters
from bench.cases.implementations import OWN, Absent, Make, failure, implementation_of
from bench.cases.options import OptionSet

ROOT = Path(__file__).resolve().parents[2]
# Freed memory must go back to the kernel, or it would serve a later allocation unseen. For the process to be started.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LATER_STEPS = 3


def unavailable() -> str | None:
    """Why this machine cannot measure it, or None."""
    try:
        _forget_peak()
    except OSError as error:
        return f"the peak of a process's memory cannot be reset here ({error})"
    return None


def in_a_process(*arguments: str) -> dict[str, int]:
    """What a fresh process prints for these arguments."""
    command = [sys.executable, "-m", "bench.measure.extra_memory", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def measure(case: Case, implementation: str) -> dict[str, int]:
    """Bytes at the peak of the first step, less the momentum buffers it makes, and of later steps (the largest)."""
    make = _maker("cpu", implementation)
    _run_once(make)
    params = parameters(case)
    optimizer = make(params)
    momentum_buffers = 4 * case.elements
    first = _peak_above_now(optimizer.step) - momentum_buffers
    later = max(_peak_above_now(optimizer.step) for _ in range(LATER_STEPS))
    return {"first_step": first, "later_step": later, "momentum_buffers": momentum_buffers}


def measure_on_gpu(case: Case, implementation: str) -> dict[str, int]:
    """The same of torch's allocator on the current GPU: bytes of tensors, without what it keeps for later.

    Raises:
        Absent: the implementation fails here; the message says how.
    """
    import torch

    from bench.gpu import cases as gpu_cases

    def peak_above_now() -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        return torch.cuda.max_memory_allocated() - before

    params = parameters(case, gpu_cases.DEVICE)
    momentum_buffers = sum(param.nbytes for param in params)
    make = _maker("cuda", implementation)
    try:
        optimizer = make(params)
        first = peak_above_now() - momentum_buffers
    except Exception as error:
        if implementation in OWN:
            raise
        raise Absent(failure(error)) from error
    later = max(peak_above_now() for _ in range(LATER_STEPS))
    return {"first_step": max(0, first), "later_step": later, "momentum_buffers": momentum_buffers}


def _maker(device: str, implementation: str) -> Make:
    return next(iter(implementation_of(implementation, device).makers.values()))


def measure_options(case: Case, implementation: str, chosen: OptionSet) -> dict[str, int]:
    """The same with options; what it makes before its first step counts, less the states that its options name."""
    _run_once(lambda params: options.stepper(chosen, implementation, params), chosen.dtype)
    params = parameters(dataclasses.replace(case, dtype=chosen.dtype))
    made = []

    def first_step() -> None:
        made.append(options.stepper(chosen, implementation, params))
        made[0].step()

    peak = _peak_above_now(first_step)
    states = sum(tensor.nbytes for tensor in made[0].states())
    later = max(_peak_above_now(made[0].step) for _ in range(LATER_STEPS))
    return {"first_step": peak - states, "later_step": later, "states": states}


def _run_once(make: Callable[..., object], dtype: str = "float32") -> None:
    """Steps of something small and of something cut among threads: code pages and threads' stacks are there before."""
    for case in (many(20, 64), many(2, 500_000)):
        optimizer = make(parameters(dataclasses.replace(case, dtype=dtype)))
        for _ in range(3):
            optimizer.step()  # type: ignore[attr-defined]


def _peak_above_now(action: Callable[[], object]) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    _forget_peak()
    before = _status("VmRSS")
    action()
    return max(0, _status("VmHWM") - before)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:  # malloc reads them when the process starts
        os.execve(
            sys.executable,
            [sys.executable, "-m", "bench.measure.extra_memory", *sys.argv[1:]],
            os.environ | ENVIRONMENT,
        )
    case, implementation, *chosen = sys.argv[1:]
    if chosen:
        print(json.dumps(measure_options(BY_NAME[case], implementation, options.BY_NAME[chosen[0]])))
    else:
        print(json.dumps(measure(BY_NAME[case], implementation)))
