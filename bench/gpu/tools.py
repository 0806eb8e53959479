"""Stages "sanitizer" and "ncu" of gpu_check: compute-sanitizer and Nsight Compute, if they are here.

`python -m bench.gpu.tools sanitizer|ncu --out FILE`.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from typing import Any

from bench.gpu import cases as gpu_cases
from bench.gpu.environment import cuda_tool, without_paths
from bench.gpu.stage import ROOT, Stage, main

# Of compute-sanitizer, with seconds. What memcheck says of API calls would be about torch: it tries some that may fail.
CHECKS = {"memcheck": 80, "racecheck": 70, "initcheck": 70, "synccheck": 50}
FOUND_ERRORS = 97
# Each tensor is then an allocation of its own, past whose end the sanitizer sees an access.
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes_read.sum": "dram_read",
    "dram__bytes_write.sum": "dram_written",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
    "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "xu_percent",
    "sm__inst_executed_pipe_fp64.avg.pct_of_peak_sustained_active": "fp64_percent",
}
KERNELS = "regex:(sgd|general|norm)_kernel"
CHOSEN = ("1x1G", "1x1G-bfloat16", "10000x64", *gpu_cases.PROFILED_OPTIONS)


def output_of(command: list[str], timeout: float, **environment: str) -> tuple[int | None, str]:
    """Exit status, None where it ran out of time, and all that it printed."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


def sanitizer(stage: Stage) -> None:
    tool = cuda_tool("compute-sanitizer")
    if tool is None:
        stage.data["absent"] = "compute-sanitizer was not found"
        return
    for check, seconds in CHECKS.items():
        began = time.perf_counter()
        command = [tool, "--tool", check, "--error-exitcode", str(FOUND_ERRORS), "--print-limit", "10"]
        command += ["--report-api-errors", "no"] if check == "memcheck" else []
        status, said = output_of(
            [*command, sys.executable, "-m", "bench.gpu.small_case", "memory", usable()], seconds, **NO_CACHE
        )
        row = sanitizer_row(status, said) | {"seconds": round(time.perf_counter() - began, 1)}
        stage.data[check] = row
        if row["verdict"] == "errors":
            stage.failures.append(f"{check}: {row['errors']} errors, exit status {status}")
        elif row["verdict"] == "out of time":
            stage.failures.append(f"{check}: not finished after {seconds} s")
        stage.save()


def sanitizer_row(status: int | None, said: str) -> dict[str, Any]:
    """What a run of compute-sanitizer says: errors that it counted and wrong results are held against the kernel."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", said)
    errors = sum(int(a or b) for a, b in found) if found else None
    refused = re.search(r"Device not supported|not supported on this|Target application terminated before first", said)
    if status is None:
        verdict = "out of time"
    elif refused and status != 0:
        verdict = "cannot run here"
    elif errors or status not in (0, None):
        verdict = "errors"
    elif errors is None:
        verdict = "no summary"
    else:
        verdict = "clean"
    row: dict[str, Any] = {"verdict": verdict, "errors": errors, "exit_status": status}
    row["right_bits"] = re.findall(r"^(\w+): bits as the reference's", said, re.MULTILINE)
    if verdict != "clean":
        row["said"] = without_paths(said)[-3000:].splitlines()
    return row


def ncu(stage: Stage) -> None:
    tool = cuda_tool("ncu")
    if tool is None:
        stage.data["absent"] = "ncu was not found"
        return
    chosen = [case.name for case in gpu_cases.GPU_QUICK] if stage.quick else list(CHOSEN)
    command = [
        tool, "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", KERNELS,
        "--metrics", ",".join(METRICS), "--csv", "--page", "raw", "--print-units", "base",
        sys.executable, "-m", "bench.gpu.small_case", "profile", usable(), *chosen,
    ]  # fmt: skip
    status, said = output_of(command, 110)
    stage.data["exit_status"] = status
    stage.data["kernels"] = ncu_rows(said)
    if not stage.data["kernels"]:
        stage.data["said"] = without_paths(said)[-3000:].splitlines()


def usable() -> str:
    """The backends that this machine can use, as small_case.py takes them."""
    from wd_fused import backends

    return ",".join(name for name in gpu_cases.OWN.values() if backends.FUSED[name].unavailable() is None)


def ncu_rows(said: str) -> list[dict[str, Any]]:
    """The kernels of ncu's raw page as CSV: a line of names, a line of units, a line a kernel."""
    lines = said.splitlines()
    launched = re.findall(rf"^{gpu_cases.PROFILED} (.*): (\d+)$", said, re.MULTILINE)
    names_of_kernels = [name for name, count in launched for _ in range(int(count))]
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    table = list(csv.reader(lines[start:]))
    names = table[0]
    rows = []
    for values in table[1:]:
        if len(values) != len(names) or not values[0].isdigit():  # the units, or what the program printed
            continue
        by_name = dict(zip(names, values, strict=True))
        row: dict[str, Any] = {"case": names_of_kernels[len(rows)] if len(rows) < len(names_of_kernels) else None}
        row["kernel"] = by_name.get("Kernel Name", "")[:120]
        row |= {short: number(by_name[name]) for name, short in METRICS.items() if name in by_name}
        rows.append(row)
    return rows


def number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


if __name__ == "__main__":
    which = sys.argv.pop(1)
    sys.exit(main("tools", {"sanitizer": sanitizer, "ncu": ncu}[which]))
