"""`python -m bench.gpu.report FILE`: a results file of gpu_check as Markdown. `--short`: as gpu_check ends with it.

Everything in it is made from the file. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.cases.implementations import LIMIT, OURS, TRITON
from bench.gpu.cases import OWN
from bench.gpu.goals import RATIOS

Run = dict[str, Any]
IN = (RATIOS[OURS], RATIOS[TRITON])  # the units of ratios in tables
DTYPES = ("float32", "float64", "float16", "bfloat16")


def data(run: Run, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = run["stages"].get(stage, {}).get("data", {})
    return found


def markdown(run: Run) -> str:
    """The whole report."""
    parts = [machine_line(run), goals(run), speed(run), options(run), host(run), first_steps(run), roofline(run)]
    parts += [tiles(run), launches(run), arithmetic(run), checks(run)]
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
        limit = by_name.get(LIMIT, {}).get("bytes_per_second") or _limit(run, case["dtype"])
        for name, row in by_name.items():
            rows.append(
                [
                    case["title"],
                    _marked(name),
                    *(_spread(row.get(f"{what}_us")) for what in ("host", "device", "graph")),
                    _number(row.get("kernel_us")),
                    _spread(row.get("whole_us")),
                    _number(row.get("kernels")),
                    _share(case, row, limit, name),
                    *(_spread(row.get(f"{what}_{in_}")) for in_ in IN for what in ("host", "device")),
                ]
            )
    head = ["tensors", "implementation", "host µs", "device µs", "as a graph µs", "kernels µs", "whole µs", "launches"]
    head += ["of the limit", "host, in ours", "device, in ours", "host, in Triton's", "device, in Triton's"]
    note = "Medians and quartiles of interleaved rounds. The limit: the best plain kernel that moves the same bytes."
    left_out = [f"Left out: {reason}." for reason in data(run, "speed").get("left_out", [])]
    absent = sorted({f"{name}: {why}" for case in cases for name, why in case["absent"].items()})
    left_out += [f"Not compared with: {'; '.join(absent)}."] if absent else []
    return "\n\n".join(["Time of step()", table(head, rows, left=2), " ".join([note, *left_out])])


def options(run: Run) -> str | None:
    """Options in one pass, against torch's calls in sequence."""
    rows = []
    for case in data(run, "options").get("cases", []):
        for row in case["rows"]:
            times = [_spread(row.get(f"{what}_us")) for what in ("host", "device", "whole")]
            ratios = [_spread(row.get(f"{what}_{IN[0]}")) for what in ("host", "device")]
            name = _marked(row["implementation"])
            rows.append([case["title"], name, *times, _number(row.get("kernel_us")), _number(row["kernels"]), *ratios])
    if not rows:
        return None
    head = ["tensors and options", "implementation", "host µs", "device µs", "whole µs", "kernels µs", "launches"]
    head += ["host, in ours", "device, in ours"]
    return "\n\n".join(["Time of a step with options", table(head, rows, left=2)])


def _marked(implementation: str) -> str:
    """A name in a table, in bold where it is one of wd_fused's."""
    return f"**{implementation}**" if implementation in OWN else implementation


def host(run: Run) -> str | None:
    """The host's time with what changes between two steps."""
    rows = []
    for case in data(run, "host").get("cases", []):
        for row in case["rows"]:
            times = [_spread(row.get(f"{what}_us")) for what in ("steady", "moved", "new_lr")]
            ratios = [_spread(row.get(f"steady_{in_}")) for in_ in IN]
            rows.append([case["title"], _marked(row["implementation"]), *times, *ratios])
    if not rows:
        return None
    head = ["tensors", "implementation", "as before µs", "gradients moved µs", "another lr µs"]
    head += ["as before, in ours", "as before, in Triton's"]
    return "Host time of step() on an idle GPU\n\n" + table(head, rows, left=2)


def first_steps(run: Run) -> str | None:
    found = data(run, "first-step")
    names = ("import_seconds", "first_step_seconds", "second_step_seconds", "third_step_seconds")
    rows = [
        [_marked(row["implementation"]), row["cache"], *(_milliseconds(row.get(name)) for name in names)]
        for row in found.get("rows", [])
    ]
    if not rows:
        return None
    head = ["implementation", "kernels", "import ms", "first step ms", "second ms", "third ms"]
    text = "A process's first steps, of 161 tensors of 8 elements\n\n" + table(head, rows, left=2)
    every = found.get("all_kernels", {})
    if "seconds" in every:
        text += f"\n\nAll {every['kernels']} kernels of the Triton backend compile in {every['seconds']:.1f} s."
    return text


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else _number(1e3 * seconds)


def tiles(run: Run) -> str | None:
    """Bandwidth of the Triton kernel by tile and warps, a column a dtype, beside what it is compared with."""
    runs = data(run, "tiles").get("runs", [])
    if not runs:
        return None
    cells: dict[str, dict[str, str]] = {}
    for one in runs:
        for row in one["rows"]:
            cells.setdefault(_tile_named(row), {})[one["dtype"]] = _of_a_tile(row)
    rows = [[name, *(found.get(one["dtype"], "–") for one in runs)] for name, found in cells.items()]
    title = f"The Triton kernel over one tensor of {runs[0]['elements']:,} elements, TB/s, by its tile and warps"
    return title + "\n\n" + table(["", *(one["dtype"] for one in runs)], rows)


def _tile_named(row: Run) -> str:
    if "tile_bytes" not in row:
        return _marked(row["implementation"])
    name = f"{row['tile_bytes']:,} bytes, {row['warps']} warps"
    return f"**{name}** (shipped)" if row["shipped"] else name


def _of_a_tile(row: Run) -> str:
    if "failed" in row:
        return row["failed"][:60]
    words = [_tera(row["bytes_per_second"])]
    if row.get("registers") is not None:
        words.append(f"{row['registers']} registers" + (f", {row['spills']} spilled" if row["spills"] else ""))
    return "; ".join(words + ["**wrong bits**"] * (row.get("right_bits") is False))


def _limit(run: Run, dtype: str) -> dict[str, Any] | None:
    runs = {r["dtype"]: r for r in data(run, "roofline").get("runs", [])}
    found: dict[str, Any] | None = runs.get(dtype, {}).get("best", {}).get("bytes_per_second")
    return found


def _share(case: Run, row: Run, limit: dict[str, Any] | None, name: str) -> str:
    """A row's bandwidth by device time as a share of the limit: of what must be moved, whatever it moves besides."""
    if limit is None or case["cold_l2"] or name == LIMIT:
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
            _marked(row["implementation"]),
            "moved" if row["gradients_move"] else "as before",
            *(_number(row[name]) for name in ("kernels", "memcpys", "memsets", "waits", "allocations")),
            "no" if row["waits_by_torch"] is None else "yes",
        ]
        for row in data(run, "launches").get("rows", [])
    ]
    if not rows:
        return None
    head = [
        "tensors",
        "implementation",
        "gradients",
        "kernels",
        "copies",
        "fills",
        "waits",
        "allocations",
        "torch sees it wait",
    ]
    return "A steady step\n\n" + table(head, rows, left=3)


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
    if "counts" in found:
        return " (" + ", ".join(f"{count} {what}" for what, count in found["counts"].items()) + ")"
    if name == "build" and found.get("architectures"):
        took = found["build_seconds"]
        return f" (for {found['architectures']}, {'built before' if took is None else f'built in {took:.0f} s'})"
    if name == "sanitizer" and found:
        return " (" + ", ".join(f"{check} {row['verdict']}" for check, row in found.items()) + ")"
    if name == "ncu" and found.get("kernels"):
        shown = [
            f"{k.get('case') or '?'}: {_number(k.get('dram_percent'))} % of DRAM, "
            f"{_number(k.get('issue_percent'))} % of issue slots, {_number(k.get('xu_percent'))} % of XU, "
            f"{_number(k.get('occupancy_percent'))} % occupancy, {_number(k.get('registers'))} registers, "
            f"{_number(_micro(k.get('duration')))} µs"
            for k in found["kernels"]
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
    cases = data(run, "speed").get("cases", [])
    if cases:
        lines.append(f"speed µs{'':<18}     host  device   graph kernels launches  in ours: host device")
    for case in cases:
        lines.append(f"      {case['title']}")
        for row in case["rows"]:
            times = [_median(row.get(f"{what}_us")) for what in ("host", "device", "graph")]
            figures = [*times, row.get("kernel_us"), row.get("kernels")]
            figures += [_median(row.get(f"{what}_ratio")) for what in ("host", "device")]
            lines.append(f"      {row['implementation']:<20}" + "".join(f"{_number(figure):>8}" for figure in figures))
    cases = data(run, "host").get("cases", [])
    if cases:
        lines.append(f"host  µs{'':<18}as before   moved new lr")
    for case in cases:
        lines.append(f"      {case['title']}")
        for row in case["rows"]:
            times = [_number(_median(row.get(f"{what}_us"))) for what in ("steady", "moved", "new_lr")]
            lines.append(f"      {row['implementation']:<20}" + "".join(f"{time:>8}" for time in times))
    for row in data(run, "first-step").get("rows", []):
        took = [f"{_milliseconds(row.get(f'{n}_step_seconds'))} ms" for n in ("first", "second", "third")]
        lines.append(f"first {row['implementation']:<20} kernels {row['cache']}: " + ", then ".join(took))
    for one in data(run, "tiles").get("runs", []):
        ranked = [row for row in one["rows"] if "bytes_per_second" in row]
        ranked.sort(key=lambda row: -row["bytes_per_second"]["median"])
        best = [f"{_tile_named(row)} {row['bytes_per_second']['median'] / 1e12:.3f}" for row in ranked[:4]]
        lines.append(f"tiles {one['dtype']:<9} TB/s: " + "; ".join(best))
    for row in run.get("goals", []):
        verdict = {True: "met", False: "MISSED", None: "not measured"}[row["met"]]
        lines.append(
            f"goal  {row['case']:<13} {row['what']:<53} {row['goal']:>4g} {_number(row['measured']):>6} {verdict}"
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
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.report", description="A GPU's results as Markdown.")
    parser.add_argument("file", type=Path, help="bench/results/gpu-….json")
    parser.add_argument("--short", action="store_true", help="as gpu_check prints it")
    chosen = parser.parse_args(arguments)
    try:
        run = json.loads(chosen.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"bench.gpu.report: {chosen.file}: {error}", file=sys.stderr)
        return 1
    print(short(run) if chosen.short else markdown(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
