"""What a step does on a GPU, by torch's profiler: launches, copies, waits, and how long its kernels run.

Read from the trace that the profiler exports, where every event says of which kind it is. Used by launches.py and
speed.py, and by tests/gpu. No torch at import.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# The calls of CUDA's runtime and driver that make the host wait for the GPU.
WAITS = re.compile(r"^cu(da)?\w*(Synchronize|Memcpy$)")
_KINDS = {"kernel": "kernels", "gpu_memcpy": "memcpys", "gpu_memset": "memsets"}
MARK = "wd_fused measured steps"


def profiled(
    step: Callable[[], object], steps: int = 1, before: Callable[[], object] | None = None, ignored: str = ""
) -> dict[str, Any]:
    """Counts for `steps` calls of `step`, as :func:`counted` gives them. Call it when `step` is warm.

    `before` is called before each step; `ignored` is in the name of each kernel that it launches.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(MARK):
            for _ in range(steps):
                if before is not None:
                    before()
                step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return counted(trace["traceEvents"], steps, ignored if before is not None else "")


def counted(events: Iterable[dict[str, Any]], steps: int, ignored: str = "") -> dict[str, Any]:
    """Per step: kernels, memcpys, memsets, waits, microseconds of kernels; and the names of the kernels.

    Work on the GPU counts wherever it lies in time, since it may run after the host has gone on. Of the host's calls
    only those inside the marked range count: the profiler waits for the GPU itself when it ends.
    """
    events = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in events if event.get("name") == MARK and event.get("cat") == "user_annotation"]
    counts = Counter(dict.fromkeys((*_KINDS.values(), "waits"), 0))
    kernels: Counter[str] = Counter()
    microseconds = 0.0
    for event in events:
        category, name = event.get("cat", ""), str(event.get("name", ""))
        if category == "kernel" and ignored and ignored in name:
            continue
        if category in _KINDS:
            counts[_KINDS[category]] += 1
            if category == "kernel":
                kernels[shortened(name)] += 1
                microseconds += float(event["dur"])
        elif category in ("cuda_runtime", "cuda_driver") and WAITS.search(name) and _inside(event, marks):
            counts["waits"] += 1
    result: dict[str, Any] = {name: count / steps for name, count in counts.items()}
    result["kernel_us"] = round(microseconds / steps, 3)
    result["kernel_names"] = dict(kernels.most_common(6))
    return result


def _inside(event: dict[str, Any], marks: list[dict[str, Any]]) -> bool:
    at = float(event["ts"])
    return any(float(mark["ts"]) <= at <= float(mark["ts"]) + float(mark["dur"]) for mark in marks)


def shortened(kernel: str) -> str:
    """A kernel's name without most of its template arguments."""
    kernel = kernel.removeprefix("void ")
    return kernel if len(kernel) <= 100 else kernel[:97] + "..."
