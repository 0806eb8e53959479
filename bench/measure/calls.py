"""What one steady step asks for: of torch its operators (CPU), of the GPU its launches, copies and fills.

Used by test_memory.py.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Case
from bench.cases.implementations import Absent
from bench.cases.lineup import Lineup
from bench.gpu.trace import profiled


def counted(case: Case, device: str, implementation: str) -> dict[str, Any]:
    """``{"operators": n}``, or on a GPU ``{"kernels": n, "memcpys": n, "memsets": n}``.

    Raises:
        Absent: the implementation fails here; the message says how.
    """
    lineup = Lineup(case, device, (implementation,), full=True)
    if implementation not in lineup.steps:
        raise Absent(lineup.absent[implementation])
    step = lineup.steps[implementation]
    if device == "cuda":
        profiled(step)  # the profiler's own first use
        profile = profiled(step)
        return {name: profile[name] for name in ("kernels", "memcpys", "memsets")}
    return {"operators": operators(step)}


def operators(step: Any) -> int:
    """The operators that a call asks for itself: not those that these are made of."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    return sum(1 for event in profiler.events() if "::" in event.name and not _within_operator(event))


def _within_operator(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and ("::" in parent.name or _within_operator(parent))
