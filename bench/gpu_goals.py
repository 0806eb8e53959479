"""What the CUDA backend is to reach, as figures beside what a run of gpu_check measured. Used by gpu_check.py.

Nothing is asserted here: a goal that is not met is a row that says so. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.cases import FOREACH, FUSED, OURS
from bench.gpu_stage import spread

STREAM = "streaming kernel"


@dataclass(frozen=True)
class Goal:
    """At least `least` of something, in a case of the speed stage; `launches`: at most."""

    case: str
    what: str  # bandwidth | device | kernel | host | launches
    least: float
    peer: str = FUSED

    @property
    def title(self) -> str:
        return {
            "bandwidth": "bandwidth, as a share of the best plain kernel's",
            "device": f"device time of {self.peer}, in ours",
            "kernel": f"kernel time of {self.peer}, in ours",
            "host": f"host time of {self.peer}, in ours",
            "launches": "launches a step",
        }[self.what]


GOALS = (
    Goal("1x1G", "bandwidth", 0.95, STREAM),
    Goal("1x1G", "device", 1.0),
    Goal("1x1G", "device", 2.0, FOREACH),
    Goal("1x1G-bfloat16", "bandwidth", 0.93, STREAM),
    Goal("1x1G-bfloat16", "device", 1.0),
    *(
        Goal(case, what, least)
        # About 4,000 gradients' addresses fit into a launch's parameters: 10,000 tensors take three.
        for case, launches, kernel in (
            ("resnet50", 1, 1.0),
            ("vit_l_16", 1, 1.0),
            ("gpt2_xl", 1, 1.0),
            ("10000x64", 3, 3.0),
        )
        for what, least in (("launches", launches), ("kernel", kernel), ("host", 8.0))
    ),
)


def reached(speed: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each goal: what it asks for, what was measured (None: it was not), whether that meets it."""
    found = {case["case"]: {row["implementation"]: row for row in case["rows"]} for case in speed.get("cases", [])}
    rows = []
    for goal in GOALS:
        measured = _measured(goal, found.get(goal.case, {}))
        met = (
            None
            if measured is None
            else (measured <= goal.least if goal.what == "launches" else measured >= goal.least)
        )
        rows.append(
            {"case": goal.case, "what": goal.title, "goal": goal.least, "measured": measured, "met": met}
        )  # fmt: skip
    return rows


def _measured(goal: Goal, rows: dict[str, Any]) -> float | None:
    ours, peer = rows.get(OURS), rows.get(goal.peer)
    if ours is None:
        return None
    if goal.what == "launches":
        return ours.get("kernels")
    if peer is None:
        return None
    if goal.what in ("bandwidth", "device"):
        return peer["device_ratio"]["median"]
    if goal.what == "host":
        return peer["host_ratio"]["median"]
    if not ours.get("kernel_us") or "kernel_us" not in peer:
        return None
    return spread([peer["kernel_us"] / ours["kernel_us"]])["median"]
