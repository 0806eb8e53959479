"""What a process does that runs on the simulated GPU, beside loading its libraries: torch's operators, the PTX of the
kernels of Triton, and what torch asks the silicon for. Called by inside.py and by the plugin, before the first tensor.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import control, operators

OPERATORS = "SIMULATED_GPU_OPERATORS"  # environment variables: a path each
TRITON_PTX = "SIMULATED_GPU_TRITON_PTX"


def start() -> None:
    import torch

    torch.cuda.init()
    operators.install(os.environ[OPERATORS])
    torch.cuda._sleep = _sleep
    _count_instead_of_profiling()
    with contextlib.suppress(ImportError):
        _write_ptx_of_triton()


def _sleep(cycles: int) -> None:
    import torch

    stream = torch.cuda.current_stream()
    control.hold(stream.cuda_stream, stream.device_index)


def _write_ptx_of_triton() -> None:
    """Triton hands the driver machine code. What it was made of lies where the driver finds it by a hash."""
    from triton.compiler.compiler import CompiledKernel

    load = CompiledKernel._init_handles

    def write_and_load(kernel: Any) -> None:
        path = Path(os.environ[TRITON_PTX], f"{control.digest(kernel.kernel):016x}.ptx")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(kernel.asm["ptx"])
            unfinished.rename(path)
        load(kernel)

    CompiledKernel._init_handles = write_and_load


def _count_instead_of_profiling() -> None:
    """torch's profiler sees nothing here: the simulated device tells what it was asked for."""
    from bench.gpu import trace

    def profiled(
        step: Callable[[], object], steps: int = 1, before: Callable[[], object] | None = None, ignored: str = ""
    ) -> dict[str, Any]:
        totals, names = dict.fromkeys(("kernels", "memcpys", "memsets", "waits"), 0), {}
        for _ in range(steps):
            if before is not None:
                before()
            control.kernels_run()
            was = control.counts()
            step()
            now = control.counts()
            for name in control.kernels_run():
                names[_demangled(name)] = names.get(_demangled(name), 0) + 1
            totals["kernels"] += now.kernels - was.kernels + now.operators - was.operators
            totals["memcpys"] += now.copies - was.copies
            totals["memsets"] += now.fills - was.fills
            totals["waits"] += now.waits - was.waits
        counted: dict[str, Any] = {name: total / steps for name, total in totals.items()}
        return counted | {"kernel_us": 0.0, "kernel_names": names}

    trace.profiled = profiled


def _demangled(name: str) -> str:
    """The kernel's own name, of the mangled one."""
    found = re.findall(r"\d+([a-z_]*kernel)", name)
    return found[-1] if found else name
