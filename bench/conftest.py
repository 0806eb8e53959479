"""Options and the results file of the benchmarks: what the machine was, how busy, and what has no row of its own.

`pytest bench` writes bench/results/cpu-DATE-TIME.json; `pytest bench --smoke` runs everything once, small, and writes
nothing unless --benchmark-json names a file.
"""

from __future__ import annotations

import json
import os
import re
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).with_name("results")

_memory = pytest.StashKey[list[dict[str, Any]]]()
_start = pytest.StashKey["Start"]()


class Start:
    """How busy the machine was when the run began, and what is needed to tell at its end how busy others kept it."""

    def __init__(self) -> None:
        self.load_average = [round(load, 2) for load in os.getloadavg()]
        self._machine = _machine_busy_seconds()
        self._own = _own_seconds()
        self._clock = time.monotonic()

    def used_by_others(self) -> float | None:
        """The share of the machine's cores that other processes have kept busy since; None where it cannot be told."""
        machine = _machine_busy_seconds()
        if self._machine is None or machine is None:
            return None
        others = machine - self._machine - (_own_seconds() - self._own)
        available = (time.monotonic() - self._clock) * (os.cpu_count() or 1)
        return round(max(0.0, others / available), 3)


def _machine_busy_seconds() -> float | None:
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="run every benchmark once, small: do they work at all?")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config.option, "smoke"):  # `pytest .` meets this file too late for it to add an option
        config.option.smoke = False
    config.stash[_memory] = []
    config.stash[_start] = Start()
    config.option.benchmark_disable_gc = True
    config.option.benchmark_only = False  # it would skip the measurements of memory, which have no row
    if config.option.benchmark_json is None and not config.option.smoke and not config.option.collectonly:
        now = datetime.now(timezone.utc)
        config.option.benchmark_json = RESULTS / f"cpu-{now:%Y-%m-%d-%H%M%S}.json"


@pytest.fixture
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("smoke"))


@pytest.fixture
def memory_rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Where a measurement of memory goes: it is not a time, so pytest-benchmark has no row for it."""
    return request.config.stash[_memory]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    import torch

    from wd_fused import extension

    start = config.stash[_start]
    module = extension.load()
    kept = {name: machine_info[name] for name in ("machine", "system", "python_version")}
    kept["cpu"] = machine_info["cpu"].get("brand_raw", machine_info["machine"])
    machine_info.clear()  # no host names in a published file
    machine_info.update(
        kept,
        cores=os.cpu_count(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        cpu_isa=module.cpu_isa() if module is not None else None,
        load_average_at_start=start.load_average,
        cores_used_by_others=start.used_by_others(),
    )


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["smoke"] = config.option.smoke
    output_json["extra_memory"] = config.stash[_memory]
    for row in output_json["benchmarks"]:
        for name in ("params", "options"):
            row.pop(name)
        row["stats"].pop("data", None)  # the interleaved rounds in extra_info are what the report is made from


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Rewrites the file with each list of numbers on one line: it is kept in the repository, and read there."""
    path = session.config.option.benchmark_json
    if path is not None and path.is_file():
        text = json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1)
        lists = re.compile(r"\[[-+.\deE,\s]+\]")
        path.write_text(lists.sub(lambda found: " ".join(found[0].split()), text) + "\n", encoding="utf-8")
