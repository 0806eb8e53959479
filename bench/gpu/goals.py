"""What the CUDA and the Triton backend are to reach, as figures beside what a run of gpu_check measured. Used there.

Nothing is asserted here: a goal that is not met is a row that says so. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.cases.implementations import FOREACH, FUSED, LIMIT, OURS, TRITON
from bench.gpu.stage import spread

# How the stages call times in those of a backend: "host_ratio" is the host's time in that of ours.
RATIOS = {OURS: "ratio", TRITON: "ratio_to_triton"}
_WHOSE = {OURS: "ours", TRITON: "Triton's"}


@dataclass(frozen=True)
class Goal:
    """At least `least` of something, in a case of the speed stage; `launches`: at most."""

    case: str
    what: str  # bandwidth | device | kernel | host | launches
    least: float
    peer: str = FUSED
    of: str = OURS

    @property
    def title(self) -> str:
        whose = _WHOSE[self.of]
        title = {
            "bandwidth": "bandwidth, as a share of the best plain kernel's",
            "device": f"device time of {self.peer}, in {whose}",
            "kernel": f"kernel time of {self.peer}, in {whose}",
            "host": f"host time of {self.peer}, in {whose}",
            "launches": "launches a step",
        }[self.what]
        return title if self.of == OURS else f"Triton: {title}"


GOALS = (
    Goal("1x1G", "bandwidth", 0.95, LIMIT),
    Goal("1x1G", "device", 1.0),
    Goal("1x1G", "device", 2.0, FOREACH),
    Goal("1x1G-bfloat16", "bandwidth", 0.93, LIMIT),
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
    Goal("1x1G", "kernel", 0.97, OURS, of=TRITON),
    Goal("1x1G-bfloat16", "kernel", 0.97, OURS, of=TRITON),
    *(Goal(case, "host", 4.0, of=TRITON) for case in ("resnet50", "161x8")),
    *(Goal(case, "launches", 1, of=TRITON) for case in ("resnet50", "10000x64")),
)


# Of the stage "options", by case and options: how many times as long torch's calls in sequence take on the device.
TORCH_IN_SEQUENCE = "torch in sequence"
OPTION_GOALS = {("1x1G", "clip-ema"): 1.7}


def _option_goals(options: dict[str, Any]) -> list[dict[str, Any]]:
    found = {(case.get("instead_of", case["case"]), case["options"]): case for case in options.get("cases", [])}
    rows = []
    for (case, name), goal in OPTION_GOALS.items():
        measured = None
        by_name = {row["implementation"]: row for row in found.get((case, name), {"rows": []})["rows"]}
        if OURS in by_name and TORCH_IN_SEQUENCE in by_name:
            measured = by_name[TORCH_IN_SEQUENCE][f"device_{RATIOS[OURS]}"]["median"]
        what = f"{name}: device time of {TORCH_IN_SEQUENCE}, in ours"
        met = None if measured is None else measured >= goal
        rows.append({"case": case, "what": what, "goal": goal, "measured": measured, "met": met})
    return rows


def reached(speed: dict[str, Any], options: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A row for each goal: what it asks for, what was measured (None: it was not), whether that meets it.

    From the data of the stages "speed" and, unless None, "options".
    """
    cases = {case.get("instead_of", case["case"]): case for case in speed.get("cases", [])}
    rows = []
    for goal in GOALS:
        case = cases.get(goal.case, {"case": goal.case, "rows": []})
        measured = _measured(goal, {row["implementation"]: row for row in case["rows"]})
        met = (
            None
            if measured is None
            else (measured <= goal.least if goal.what == "launches" else measured >= goal.least)
        )
        rows.append(
            {"case": case["case"], "what": goal.title, "goal": goal.least, "measured": measured, "met": met}
        )  # fmt: skip
    return rows + ([] if options is None else _option_goals(options))


def _measured(goal: Goal, rows: dict[str, Any]) -> float | None:
    ours, peer = rows.get(goal.of), rows.get(goal.peer)
    if ours is None:
        return None
    if goal.what == "launches":
        return ours.get("kernels")
    if peer is None:
        return None
    if goal.what != "kernel":
        time = "host" if goal.what == "host" else "device"
        return peer[f"{time}_{RATIOS[goal.of]}"]["median"]
    if not ours.get("kernel_us") or "kernel_us" not in peer:
        return None
    return spread([peer["kernel_us"] / ours["kernel_us"]])["median"]
