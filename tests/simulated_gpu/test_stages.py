"""gpu_check's stages that step, over tiny cases on the simulated GPU: they run, find nothing wrong and are reported.
The times are of nothing. Run by `make simulated-gpu`.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.simulated_gpu import control

pytestmark = pytest.mark.skipif(control.LIBRARY not in os.environ, reason="runs on the simulated GPU alone")

if control.LIBRARY in os.environ:
    from bench import cases
    from bench.cases.implementations import OURS, TRITON
    from bench.gpu import arithmetic, first_step, goals, launches, options, report, timing
    from bench.gpu import cases as gpu_cases
    from bench.gpu import host as gpu_host
    from bench.gpu import speed as gpu_speed
    from bench.gpu import tiles as gpu_tiles
    from bench.gpu.cases import OWN
    from bench.gpu.stage import Stage
    from tests.benchmarks.test_gpu_check import made_up_run

    SMALL = cases.Case("2x5", "2 of 5 elements", ((5,),) * 2, rounds=2)
    LARGE = cases.Case("1x2500", "one of 2,500 elements", ((2_500,),), rounds=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a stage takes more memory than the tests before it may have left
    mixes = list(arithmetic.mixes())[6::9]
    monkeypatch.setattr(gpu_cases, "GPU_QUICK", (LARGE, SMALL))
    monkeypatch.setattr(arithmetic, "mixes", lambda: mixes)
    monkeypatch.setattr(arithmetic, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(arithmetic, "SIZES", (1, 300))
    for name, value in {"FEW_ELEMENTS": 2_500, "CHECKED": 4_500, "ROUNDS": 1, "PAIRS": [(4096, 2), (8192, 4)]}.items():
        monkeypatch.setattr(gpu_tiles, name, value)
    monkeypatch.setattr(options, "compile_ahead", lambda: 0.0)  # in processes of their own
    monkeypatch.setattr(first_step, "CASE", SMALL)
    monkeypatch.setattr(timing.Timer, "sweep_l2", lambda self: None)


def data_of(module: Any, folder: Path) -> dict[str, Any]:
    stage = Stage(folder / "stage.json", quick=True, given={})
    module.run(stage)
    assert stage.failures == []
    return json.loads(json.dumps(stage.data))


def reported(**stages: dict[str, Any]) -> str:
    """What the report of a run says that had these stages, with their data."""
    found = {name: {"status": "passed", "seconds": 0.0, "failures": [], "data": data} for name, data in stages.items()}
    return report.markdown(made_up_run() | {"stages": found})


def test_speed_options_and_host_are_measured_over_both_backends_and_held_against_the_goals(tmp_path):
    speed, host, chosen = (data_of(module, tmp_path) for module in (gpu_speed, gpu_host, options))
    own = {OURS, TRITON}
    for case in (*speed["cases"], *host["cases"]):
        assert {row["implementation"] for row in case["rows"]} > own, case["case"]
    assert len(chosen["cases"]) == 2 * 6
    for case in chosen["cases"]:
        assert {row["implementation"] for row in case["rows"]} == own | {goals.TORCH_IN_SEQUENCE}, case["title"]
    assert goals.reached(speed, chosen)
    text = reported(speed=speed, host=host, options=chosen)
    for part in ("one of 2,500 elements", "gradients moved", "clip, SGD, average"):
        assert part in text, part


def test_launches_are_counted(tmp_path):
    rows = data_of(launches, tmp_path)["rows"]
    seen = {(row["implementation"], row["gradients_move"]): row["memcpys"] for row in rows}
    assert seen[TRITON, False] == 0 and seen[TRITON, True] == 1
    assert seen[OURS, False] == seen[OURS, True] == 0


def test_the_arithmetic_is_compared(tmp_path):
    pairs = {(row["left"], row["right"]) for row in data_of(arithmetic, tmp_path)["rows"]}
    assert {("FusedSGD Triton", "FusedSGD"), ("FusedSGD Triton", "torch loop")} <= pairs


def test_tiles_are_tried(tmp_path):
    data = data_of(gpu_tiles, tmp_path)
    assert "4,096 bytes, 2 warps" in reported(tiles=data)
    for run in data["runs"]:
        assert [row.get("right_bits") for row in run["rows"]] == [True, True, None], run["rows"]
        assert [row.get("shipped") for row in run["rows"]].count(True) == 1


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_first_step_is_timed(backend):
    steps = first_step.first_steps(backend)
    row = {"implementation": {own: name for name, own in OWN.items()}[backend], "cache": "built before"}
    assert "| built before |" in reported(**{"first-step": {"rows": [row | steps]}})
