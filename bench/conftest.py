"""Options, fixtures and the results file of the benchmarks: cases by implementations by devices.

`pytest bench` writes bench/results/cpu-DATE-TIME.json (cpu-cuda-... where there is a GPU); `pytest bench --smoke` runs
everything once, small, and writes nothing unless --benchmark-json names a file.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bench.cases import Case
from bench.cases.implementations import available, versions
from bench.gpu.stage import why_no_gpu
from bench.measure import measured
from bench.measure.measured import Measured

RESULTS = Path(__file__).with_name("results")

_run = pytest.StashKey["Run"]()
_start = pytest.StashKey["Start"]()

DEVICES = ("cpu", "cuda")


class Run:
    """What a results file has beside pytest-benchmark's rows.

    Attributes:
        memory: measurements of memory: they are not times, so pytest-benchmark has no rows for them.
        calls: what a step asks of torch or of the GPU.
        absent: why there is no row, by device, implementation, suite and case; None: all of them.
    """

    def __init__(self) -> None:
        self.memory: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.absent: dict[tuple[str, str | None, str | None, str | None], str] = {}

    def absent_rows(self) -> list[dict[str, Any]]:
        keys = ("device", "implementation", "suite", "case")
        return [dict(zip(keys, where, strict=True)) | {"reason": reason} for where, reason in self.absent.items()]


class Start:
    """How busy the machine was when the run began, and what is needed to tell at its end how busy others kept it."""

    def __init__(self) -> None:
        self.load_average = [round(load, 2) for load in os.getloadavg()]
        self._machine = _machine_busy_seconds()
        self._own = _own_seconds()
        self._clock = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._clock

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
    parser.addoption(
        "--full", action="store_true", help="whole cases as memory allows, more rounds, torch.compile in more cases"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    for name in ("smoke", "full"):
        if not hasattr(config.option, name):  # `pytest .` meets this file too late for it to add an option
            setattr(config.option, name, False)
    config.stash[_run] = Run()
    # What was compiled in an earlier run would be found again, and the time that it took with it.
    compiled = tempfile.TemporaryDirectory(prefix="wd_fused-bench-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name
    config.add_cleanup(compiled.cleanup)
    config.stash[_start] = Start()
    config.option.benchmark_disable_gc = True
    config.option.benchmark_only = False  # it would skip the measurements of memory, which have no row
    if config.option.benchmark_json is None and not config.option.smoke and not config.option.collectonly:
        now = datetime.now(timezone.utc)
        devices = "-".join(device for device in DEVICES if why_not(device) is None)
        config.option.benchmark_json = RESULTS / f"{devices}-{now:%Y-%m-%d-%H%M%S}.json"


@cache
def why_not(device: str) -> str | None:
    """Why nothing can be measured on a device, or None."""
    return None if device == "cpu" else why_no_gpu()


def grid(
    metafunc: pytest.Metafunc, chosen: Iterable[Case], names: Iterable[str], devices: Iterable[str] = DEVICES
) -> None:
    """Parametrises by device, case and implementation; a case's implementations follow one another, so that one
    workload at a time is in memory. What is not here, device or implementation, is skipped once, with the reason."""
    chosen, absent = tuple(chosen), metafunc.config.stash[_run].absent
    sets = []

    def left_out(device: str, name: str | None, reason: str) -> None:
        absent[device, name, None, None] = reason
        sets.append(
            pytest.param(device, None, name, id=f"{device}-{name or ''}", marks=pytest.mark.skip(reason=reason))
        )

    for device in devices:
        if (reason := why_not(device)) is not None:
            left_out(device, None, reason)
            continue
        missing = available(device)[1]
        for name in names:
            if name in missing:
                left_out(device, name, missing[name])
        sets += [
            pytest.param(device, case, name, id=f"{device}-{case.name}-{name}")
            for case in chosen
            for name in names
            if name not in missing
        ]
    metafunc.parametrize(("device", "case", "implementation"), sets)


@pytest.fixture
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("smoke"))


@pytest.fixture
def memory_rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Where a measurement of memory goes."""
    return request.config.stash[_run].memory


@pytest.fixture
def calls_rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Where counts of a step's calls go."""
    return request.config.stash[_run].calls


@pytest.fixture
def skip_absent(request: pytest.FixtureRequest) -> Callable[[str, str | None, str, str | None, str], NoReturn]:
    """Skips a row and has the results file name the reason: device, implementation, suite, case (both None: all),
    reason."""

    def skip(device: str, implementation: str | None, suite: str, case: str | None, reason: str) -> NoReturn:
        request.config.stash[_run].absent[device, implementation, suite, case] = reason
        pytest.skip(reason)

    return skip


@pytest.fixture(scope="session")
def measured_of(request: pytest.FixtureRequest) -> Callable[..., Measured]:
    """A case of a device, measured, with those who take part, and measured.measure's options; only the last one asked
    for is kept."""
    kept: dict[Any, Measured] = {}
    smoke, full = request.config.getoption("smoke"), request.config.getoption("full")

    def measured_of(device: str, case: Case, names: tuple[str, ...], **how: bool) -> Measured:
        key = device, case, names, *how.items()
        if key not in kept:
            kept.clear()
            kept[key] = measured.measure(case, device, names, smoke, full, **how)
        return kept[key]

    return measured_of


def tell(
    benchmark: Any,
    suite: str,
    device: str,
    case: Case,
    implementation: str,
    seconds: dict[str, list[float]],
    **more: Any,
) -> None:
    """What a row of pytest-benchmark's table says of itself to the report; ``seconds`` by quantity, one per round."""
    benchmark.group = f"{suite}, {device}: {case.title}"
    benchmark.extra_info.update(
        suite=suite,
        device=device,
        case=case.name,
        title=case.title,
        dtype=case.dtype,
        tensors=len(case.shapes),
        elements=case.elements,
        implementation=implementation,
        seconds={what: [float(f"{s:.5g}") for s in own] for what, own in seconds.items()},
    )
    benchmark.extra_info.update(more)


@pytest.fixture
def row(benchmark: Any, smoke: bool, skip_absent: Any) -> Callable[[str, Measured, str], None]:
    """Writes a row of pytest-benchmark's table: suite, what was measured, implementation.

    The table's own times are of one implementation after another; the interleaved rounds, of which the report is made,
    ride along in extra_info.
    """

    def row(suite: str, found: Measured, implementation: str) -> None:
        lineup, case, device = found.lineup, found.case, found.lineup.device
        if implementation not in lineup.steps:
            skip_absent(device, implementation, suite, case.name, lineup.absent[implementation])
        seconds = found.seconds[implementation]
        told = {"one_of": case.one_of, "bytes_moved": case.bytes_moved, **lineup.info.get(implementation, {})}
        tell(benchmark, suite, device, case, implementation, seconds, **told)
        step, synchronize = lineup.steps[implementation], lineup.synchronize
        slow = min(next(iter(seconds.values()))) > 0.02

        def whole() -> None:
            step()
            synchronize()

        benchmark.pedantic(
            step if device == "cpu" else whole,
            rounds=1 if slow or smoke else 3,
            iterations=found.iterations.get(implementation, 1),
            warmup_rounds=0 if slow else 1,
        )

    return row


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    import torch

    from wd_fused.build import extension

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
        packages=versions(),
        gpu=_gpu(),
    )


def _gpu() -> dict[str, Any] | None:
    if why_not("cuda") is not None:
        return None
    import torch

    from bench.gpu.environment import driver

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["smoke"] = config.option.smoke
    output_json["full"] = config.option.full
    output_json["seconds"] = round(config.stash[_start].seconds(), 1)
    run = config.stash[_run]
    output_json |= {"extra_memory": run.memory, "calls": run.calls, "absent": run.absent_rows()}
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
