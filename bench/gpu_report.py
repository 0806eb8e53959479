"""`python -m bench.gpu_report FILE`: a results file of gpu_check as Markdown. `--short`: as gpu_check ends with it.

Everything in it is made from the file. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import OURS
from bench.gpu_goals import STREAM

Run = dict[str, Any]
DTYPES = ("float32", "float64", "float16", "bfloat16")


def data(run: Run, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = run["stages"].get(stage, {}).get("data", {})
    return found


def markdown(run: Run) -> str:
    """The whole report."""
    parts = [machine_line(run), goals(run), speed(run), roofline(run), launches(run), arithmetic(run), checks(run)]
    return "\n\n".join(part for part in parts if part)


def machine_line(run: Run) -> str:
    """Where and when, and of what."""
    machine = run["machine"]
    if machine.get("gpu") is None:
        return f"No GPU: {run.get('no_gpu', 'not known why')}. Nothing was measured."
    commit = run["commit"]
    identity = "an unknown commit" if commit["id"] is None else f"commit {commit['id'][:10]}"
    changed = " with changes that are not committed" if commit["dirty"] else ""
    return (
        f"{machine['gpu']} (compute capability {machine['capability']}, {machine['memory_bytes'] / 2**30:.0f} GiB), "
        f"driver {machine['driver'] or 'not known'}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"Python {machine['python']}; {run['datetime']}, {identity}{changed}."
    )


def goals(run: Run) -> str | None:
    if not run.get("goals"):
        return None
    verdicts = {True: "met", False: "**missed**", None: "not measured"}
    rows = [
        [row["case"], row["what"], f"{row['goal']:g}", _number(row["measured"]), verdicts[row["met"]]]
        for row in run["goals"]
    ]
    return "Goals\n\n" + table(["case", "figure", "goal", "measured", ""], rows, left=2)


def speed(run: Run) -> str | None:
    cases = data(run, "speed").get("cases", [])
    if not cases:
        return None
    rows = []
    for case in cases:
        by_name = {row["implementation"]: row for row in case["rows"]}
        limit = by_name.get(STREAM, {}).get("bytes_per_second") or _limit(run, case["dtype"])
        for name, row in by_name.items():
            rows.append(
                [
                    case["title"],
                    f"**{name}**" if name == OURS else name,
                    *(_spread(row.get(f"{what}_us")) for what in ("host", "device", "graph")),
                    _number(row.get("kernel_us")),
                    _spread(row.get("whole_us")),
                    _number(row.get("kernels")),
                    _share(case, row, limit, name),
                    *(_spread(row.get(f"{what}_ratio")) for what in ("host", "device")),
                ]
            )
    head = ["tensors", "implementation", "host µs", "device µs", "as a graph µs", "kernels µs", "whole µs", "launches"]
    head += ["of the limit", "host, in ours", "device, in ours"]
    note = "Medians and quartiles of interleaved rounds. The limit: the best plain kernel that moves the same bytes."
    left_out = [f"Left out: {reason}." for reason in data(run, "speed").get("left_out", [])]
    absent = sorted({f"{name}: {why}" for case in cases for name, why in case["absent"].items()})
    left_out += [f"Not compared with: {'; '.join(absent)}."] if absent else []
    return "\n\n".join(["Time of step()", table(head, rows, left=2), " ".join([note, *left_out])])


def _limit(run: Run, dtype: str) -> dict[str, Any] | None:
    runs = {r["dtype"]: r for r in data(run, "roofline").get("runs", [])}
    found: dict[str, Any] | None = runs.get(dtype, {}).get("best", {}).get("bytes_per_second")
    return found


def _share(case: Run, row: Run, limit: dict[str, Any] | None, name: str) -> str:
    """A row's bandwidth by device time as a share of the limit: of what must be moved, whatever it moves besides."""
    if limit is None or case["cold_l2"] or name == STREAM:
        return "–"
    return f"{100 * row['bytes_per_second']['median'] / limit['median']:.1f} %"


def roofline(run: Run) -> str | None:
    runs = data(run, "roofline").get("runs", [])
    if not runs:
        return None
    rows = []
    for one in runs:
        for kernel in one["kernels"][:3]:
            speeds = kernel["bytes_per_second"]
            rows.append([one["dtype"], kernel["kernel"], _tera(speeds)])
        rows.append([one["dtype"], "copy from device to device", _tera(one["copy_bytes_per_second"])])
    elements = runs[0]["elements"]
    title = f"Plain kernels over {elements:,} elements: p, g and b read, p and b written (the three best), and a copy"
    return title + "\n\n" + table(["dtype", "kernel", "TB/s"], rows, left=2)


def _tera(bytes_per_second: dict[str, Any]) -> str:
    return "{median:.3f} ({low:.3f} to {high:.3f})".format(
        **{name: value / 1e12 for name, value in bytes_per_second.items()}
    )


def launches(run: Run) -> str | None:
    rows = [
        [
            row["title"],
            f"**{row['implementation']}**" if row["implementation"] == OURS else row["implementation"],
            *(_number(row[name]) for name in ("kernels", "memcpys", "memsets", "waits", "allocations")),
            "no" if row["waits_by_torch"] is None else "yes",
        ]
        for row in data(run, "launches").get("rows", [])
    ]
    if not rows:
        return None
    head = ["tensors", "implementation", "kernels", "copies", "fills", "waits", "allocations", "torch sees it wait"]
    return "A steady step\n\n" + table(head, rows, left=2)


def arithmetic(run: Run) -> str | None:
    """Differing elements, a row for a pair and a column for a dtype."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in data(run, "arithmetic").get("rows", []):
        count = row["differing"]
        cell = "0" if count == 0 else f"{count:,} of {row['elements']:,}"
        found.setdefault((row["left"], row["right"]), {})[row["dtype"]] = cell
    if not found:
        return None
    rows = [[f"{a} and {b}", *(cells.get(dtype, "–") for dtype in DTYPES)] for (a, b), cells in found.items()]
    return "Elements of which the bits differ after a step from the same state, over all mixes of options\n\n" + table(
        ["", *DTYPES], rows
    )


def checks(run: Run) -> str:
    """A line for each stage, with what failed."""
    lines = []
    for name, stage in run["stages"].items():
        line = f"- {name}: {stage['status']} in {stage['seconds']:.0f} s{_told(name, stage)}"
        lines.append(line + "".join(f"\n  - {failure[:240]}" for failure in stage.get("failures", [])[:8]))
    for reason in run.get("missing", []):
        lines.append(f"- missing here: {reason}")
    return "Stages\n\n" + "\n".join(lines)


def _told(name: str, stage: Run) -> str:
    found = stage.get("data", {})
    if "absent" in found:
        return f" ({found['absent']})"
    if name == "tests" and "counts" in found:
        return " (" + ", ".join(f"{count} {what}" for what, count in found["counts"].items()) + ")"
    if name == "build" and found.get("architectures"):
        took = found["build_seconds"]
        return f" (for {found['architectures']}, {'built before' if took is None else f'built in {took:.0f} s'})"
    if name == "sanitizer" and found:
        return " (" + ", ".join(f"{check} {row['verdict']}" for check, row in found.items()) + ")"
    if name == "ncu" and found.get("kernels"):
        shown = [
            f"{case}: {_number(k.get('dram_percent'))} % of DRAM, {_number(k.get('occupancy_percent'))} % occupancy, "
            f"{_number(k.get('registers'))} registers, {_number(_micro(k.get('duration')))} µs"
            for case, k in zip(found["cases"], found["kernels"], strict=False)
        ]
        return " (" + "; ".join(shown) + ")"
    return ""


def _micro(nanoseconds: Any) -> Any:
    return nanoseconds / 1e3 if isinstance(nanoseconds, int | float) else None


def short(run: Run) -> str:
    """What a person wants to see at the end of a run, in a few thousand characters."""
    lines = [machine_line(run), ""]
    rows = data(run, "arithmetic").get("rows", [])
    if rows:
        of = max(row["elements"] for row in rows)
        lines.append(f"bits  differing elements of {of:<26,} float32  float64  float16 bfloat16")
    for pair in dict.fromkeys((row["left"], row["right"]) for row in rows):
        counts = {row["dtype"]: row["differing"] for row in rows if (row["left"], row["right"]) == pair}
        cells = "".join(f" {counts[dtype]:>8,}" if dtype in counts else "        –" for dtype in DTYPES)
        lines.append(f"      {' / '.join(pair):<44}{cells}")
    for one in data(run, "roofline").get("runs", []):
        lines.append(f"limit {one['dtype']:<9} {_tera(one['best']['bytes_per_second'])} TB/s, {one['best']['kernel']}")
    for case in data(run, "speed").get("cases", []):
        lines.append(f"speed {case['title']}")
        for row in case["rows"]:
            figures = [
                f"{what} {_number(_median(row.get(f'{what}_us')))}" for what in ("host", "device", "graph", "whole")
            ]
            figures += [f"kernels {_number(row.get('kernel_us'))} µs in {_number(row.get('kernels'))}"]
            if "device_ratio" in row:
                ratios = (row["host_ratio"]["median"], row["device_ratio"]["median"])
                figures.append("x ours {:.3g} host, {:.3g} device".format(*ratios))
            lines.append(f"      {row['implementation']:<20} " + ", ".join(figures))
    for row in run.get("goals", []):
        verdict = {True: "met", False: "MISSED", None: "not measured"}[row["met"]]
        lines.append(
            f"goal  {row['case']:<14} {row['what']:<52} {row['goal']:>5g} {_number(row['measured']):>8} {verdict}"
        )
    return "\n".join([*lines, "", checks(run)])


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; columns after the first `left` are flush right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] * left + ["---:"] * (len(head) - left)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _median(spread: Any) -> float | None:
    return spread["median"] if spread and "median" in spread else None


def _spread(spread: Any) -> str:
    if not spread or "median" not in spread:
        return "–"
    return f"{_number(spread['median'])} ({_number(spread['low'])} to {_number(spread['high'])})"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description="A GPU's results as Markdown.")
    parser.add_argument("file", type=Path, help="bench/results/gpu-….json")
    parser.add_argument("--short", action="store_true", help="as gpu_check prints it")
    chosen = parser.parse_args(arguments)
    try:
        run = json.loads(chosen.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"bench.gpu_report: {chosen.file}: {error}", file=sys.stderr)
        return 1
    print(short(run) if chosen.short else markdown(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
