"""`python -m bench.gpu.check` without a GPU: what it says, how it counts, and what it makes of made-up results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import cases
from bench.cases.implementations import FOREACH, FUSED, LIMIT, OURS, TRITON
from bench.gpu import cases as gpu_cases
from bench.gpu import check, goals, tools, trace
from bench.gpu import report as gpu_report
from bench.gpu.stage import as_text, ratio_of_rounds, spread

ROOT = Path(__file__).resolve().parents[2]

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@without_gpu
def test_without_a_gpu_it_says_so_lists_what_is_missing_and_writes_nothing_unasked(tmp_path):
    results = ROOT / "bench" / "results"
    before = set(results.iterdir())
    out = tmp_path / "run.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.check", "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "nothing can be checked here: torch" in done.stdout and done.stderr == ""
    run = json.loads(out.read_text())
    assert run["no_gpu"] in done.stdout and run["stages"] == {} and run["machine"]["gpu"] is None
    assert "Nothing was measured" in gpu_report.markdown(run)
    assert set(results.iterdir()) == before


@without_gpu
@pytest.mark.parametrize("stage", ["arithmetic", "speed"])
def test_without_a_gpu_every_stage_says_so(stage, tmp_path):
    command = [sys.executable, "-m", f"bench.gpu.{stage}", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "torch" in done.stderr and not list(tmp_path.iterdir())


@without_gpu
def test_tests_for_the_gpu_are_skipped_with_one_reason_and_each_belongs_to_one_of_the_two_stages():
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpu"]
    counts = []
    for step in check.STEPS:
        if step.tests is not None:
            done = subprocess.run([*command, "-m", step.tests], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
            assert "no GPU that torch can use" in done.stdout and "passed" not in done.stdout
            skipped, deselected = re.search(r"(\d+) skipped, (\d+) deselected", done.stdout).groups()
            counts.append((int(skipped), int(deselected)))
    (of_cuda, left_by_cuda), (of_triton, left_by_triton) = counts
    assert (of_cuda, of_triton) == (left_by_triton, left_by_cuda) and min(of_cuda, of_triton) > 150


def test_a_stage_that_does_not_exist_is_named_with_those_that_do(capsys):
    with pytest.raises(SystemExit):
        check.main(["--only", "speed,sped"])
    assert "no part or stage sped; there are correctness: build, first-step, tests," in capsys.readouterr().err


def run_of(monkeypatch, tmp_path, *arguments):
    """The exit status of gpu_check's main program, and the stages that it ran, each of which ends at once."""

    def started(command, log, limit):
        log.write_text("")
        return 0

    monkeypatch.setattr(check, "started", started)
    monkeypatch.setattr(check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(check.report, "short", lambda run: "")
    out = tmp_path / "run.json"
    status = check.main(["--out", str(out), *arguments])
    return status, json.loads(out.read_text())["stages"]


@pytest.mark.parametrize(
    ("only", "stages"),
    [
        ("correctness", ["build", "first-step", "tests", "arithmetic", "launches", "sanitizer"]),
        ("speed", ["roofline", "speed", "options", "host", "ncu"]),
        ("triton", ["tests-triton", "tiles"]),
        ("triton,build", ["build", "tests-triton", "tiles"]),
    ],
)
def test_each_part_runs_its_own_stages(monkeypatch, tmp_path, only, stages):
    monkeypatch.setattr(check, "of_tests", lambda *_: {"status": "passed", "failures": [], "data": {}})
    _, ran = run_of(monkeypatch, tmp_path, "--only", only)
    assert list(ran) == stages


def test_every_stage_belongs_to_a_part_whose_time_is_less_than_ten_minutes():
    assert {step.part for step in check.STEPS} == set(check.PARTS)
    assert check.PART_SECONDS < 600


def test_a_check_of_correctness_that_finds_no_time_left_is_no_success(monkeypatch, tmp_path):
    status, ran = run_of(monkeypatch, tmp_path, "--only", "sanitizer", "--seconds", "0")
    assert ran["sanitizer"]["status"] == "no time left" and status == 1
    status, ran = run_of(monkeypatch, tmp_path, "--only", "host", "--seconds", "0")
    assert ran["host"]["status"] == "no time left" and status == 0


def test_what_one_part_took_is_not_taken_from_the_next(monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])

    def started(command, log, limit):
        log.write_text("")
        clock[0] += 500
        return 0

    monkeypatch.setattr(check, "started", started)
    runner = check.Runner(tmp_path, quick=True, seconds=505)
    for name in ("arithmetic", "launches", "host"):
        (step,) = [step for step in check.STEPS if step.name == name]
        runner.run(step)
    assert [stage["status"] == "no time left" for stage in runner.stages.values()] == [False, True, False]


# Stages: how one ends is told from what it left


def stage_program(tmp_path, source):
    program = tmp_path / "program.py"
    program.write_text("import json, sys, time\nout = sys.argv[sys.argv.index('--out') + 1]\n" + source)
    return str(program)


@pytest.mark.parametrize(
    ("source", "status", "failures"),
    [
        ("json.dump({'data': {'a': 1}, 'failures': []}, open(out, 'w'))", "passed", []),
        ("json.dump({'data': {'a': 1}, 'failures': ['x']}, open(out, 'w')); sys.exit(1)", "failed", ["x"]),
        ("json.dump({'data': {'absent': 'a'}, 'failures': []}, open(out, 'w'))", "absent", []),
        ("raise ValueError('broken')", "error", ["ValueError: broken"]),
        ("import os; os.abort()", "error", ["it printed nothing"]),
        (
            "json.dump({'data': {'a': 1}, 'failures': []}, open(out, 'w')); print('half'); time.sleep(60)",
            "out of time",
            ["stopped at its time limit"],
        ),
    ],
    ids=["passed", "failed", "absent", "exception", "abort", "hang"],
)
def test_a_stages_end(tmp_path, source, status, failures):
    runner = check.Runner(tmp_path, quick=True, seconds=1_000)
    runner.run(check.Step("arithmetic", check.CORRECTNESS, (stage_program(tmp_path, source),), 3))
    stage = runner.stages["arithmetic"]
    assert stage["status"] == status and stage["failures"] == failures
    assert ("said" in stage) == (status in ("error", "out of time"))
    if status == "out of time":
        assert stage["data"] == {"a": 1}, "what it had is kept"


def test_a_stage_takes_what_it_has_started_with_it_when_it_is_stopped(tmp_path):
    child = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nopen('{}', 'w').write(str(child.pid))\n"
    pid_file = tmp_path / "pid"
    program = stage_program(tmp_path, child.format(pid_file) + "time.sleep(60)")
    status = check.started([sys.executable, program, "--out", "x"], tmp_path / "log", 3)
    assert status is None
    pid = int(pid_file.read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}/stat").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    raise AssertionError("its child was left running")


def test_no_stage_begins_when_the_time_is_over(tmp_path):
    runner = check.Runner(tmp_path, quick=True, seconds=0)
    runner.run(check.STEPS[0])
    assert runner.stages["build"]["status"] == "no time left"
    assert check.failed(check.STEPS[0], runner.stages)


def test_what_pytest_found_is_counted_and_kept(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'bits differ'\n"
        "def test_no(): pytest.skip('no second GPU')\n"
    )
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={junit}", "test_some.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    stage = check.of_tests(done.returncode, junit, done.stdout)
    assert stage["status"] == "failed"
    assert stage["data"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert stage["data"]["skipped"] == {"test_some::test_no": "no second GPU"}
    assert stage["failures"] == ["test_some::test_bad: AssertionError: bits differ"]
    # Stopped half-way, it leaves no XML: what it printed is counted.
    stage = check.of_tests(None, tmp_path / "none.xml", done.stdout)
    assert stage["status"] == "out of time" and stage["data"]["counts"]["failed"] == 1
    assert stage["failures"][0] == "test_some.py::test_bad"
    # Python's own error is not a test's.
    stage = check.of_tests(1, tmp_path / "none.xml", "python3: No module named pytest\n")
    assert stage["status"] == "error" and stage["failures"] == ["pytest ended with 1: python3: No module named pytest"]
    # All of them skipped, there was nothing to test with.
    command = [*command, "-k", "test_no"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    alone = check.of_tests(done.returncode, junit, done.stdout)
    assert alone["status"] == "absent" and alone["data"]["absent"] == "no second GPU"


# Numbers


def test_spreads_and_ratios_of_interleaved_rounds():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "count": 5}
    assert spread([2.0])["median"] == 2.0
    assert ratio_of_rounds([2.0, 40.0, 6.0], [1.0, 10.0, 3.0])["median"] == 2.0  # of ratios, not a ratio of medians


def test_bytes_moved_are_five_accesses_an_element():
    by_name = {case.name: case for case in gpu_cases.GPU_STEP}
    assert by_name["1x1G"].bytes_moved == 20 << 30
    assert by_name["1x1G-bfloat16"].bytes_moved == 10 << 30


def test_a_tensor_that_does_not_fit_is_halved_until_it_does_and_says_so():
    one, many = gpu_cases.GPU_STEP[1], gpu_cases.GPU_STEP[2]
    assert gpu_cases.fitting(one, 80 << 30) is one
    fewer = gpu_cases.fitting(one, 8 << 30)
    assert (fewer.name, fewer.title) == ("1x512M-bfloat16", "one of 512 M elements, bfloat16")
    assert fewer.elements == 1 << 29 and fewer.dtype == "bfloat16" and fewer.rounds == one.rounds
    assert gpu_cases.fitting(one, 1 << 20) is None and gpu_cases.fitting(many, 1 << 20) is None


def test_the_models_are_the_published_ones():
    counts = {
        name: (len(cases.model_shapes(name)), cases.Case("", "", cases.model_shapes(name)).elements)
        for name in ("resnet50", "vit_l_16", "gpt2_xl")
    }
    assert counts == {
        "resnet50": (161, 25_557_032),
        "vit_l_16": (296, 304_326_632),
        "gpt2_xl": (580, 1_557_611_200),
    }


def event(category, name, ts, dur=1.0):
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur}


def test_a_trace_is_counted_by_kind_and_the_profilers_own_waiting_is_not():
    events = [
        event("user_annotation", trace.MARK, 100.0, 50.0),
        event("gpu_user_annotation", trace.MARK, 130.0, 90.0),
        event("cuda_runtime", "cudaLaunchKernel", 101.0),
        event("kernel", "void wd_fused::sgd_kernel<float>(Parameters)", 140.0, 7.5),
        event("kernel", "void at::native::reduce_kernel<512>(R)", 150.0, 3.0),
        event("kernel", "void wd_fused::sgd_kernel<float>(Parameters)", 300.0, 8.5),  # the host had gone on by then
        event("gpu_memcpy", "Memcpy HtoD", 145.0),
        event("cuda_runtime", "cudaStreamSynchronize", 120.0),
        event("cuda_runtime", "cudaMemcpyAsync", 121.0),
        event("cuda_runtime", "cudaDeviceSynchronize", 400.0),  # after the steps
        {"ph": "M", "name": "process_name"},
    ]
    seen = trace.counted(events, steps=2, ignored="reduce_kernel")
    assert (seen["kernels"], seen["memcpys"], seen["memsets"], seen["waits"]) == (1.0, 0.5, 0.0, 0.5)
    assert seen["kernel_us"] == 8.0
    assert seen["kernel_names"] == {"wd_fused::sgd_kernel<float>(Parameters)": 2}


@pytest.mark.parametrize(
    ("status", "said", "verdict", "errors"),
    [
        (0, "cuda: bits as the reference's\n========= ERROR SUMMARY: 0 errors", "clean", 0),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean", 0),
        (97, "========= Invalid __global__ write\n========= ERROR SUMMARY: 3 errors", "errors", 3),
        (3, "cuda: bits differ from the reference's\n========= ERROR SUMMARY: 0 errors", "errors", 0),
        (1, "========= Error: Device not supported", "cannot run here", None),
        (None, "", "out of time", None),
    ],
)
def test_what_the_sanitizer_says(status, said, verdict, errors):
    row = tools.sanitizer_row(status, said)
    assert (row["verdict"], row["errors"]) == (verdict, errors)
    assert row["right_bits"] == (["cuda"] if "bits as" in said else [])


def test_what_ncu_says():
    said = (
        "==PROF== Connected to process 7\nsome output of the program\n"
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n'
        '"","","ns","register/thread"\n'
        '"0","sgd_kernel","4,700,000","64"\n"1","sgd_kernel","2,400,000","72"\n"2","sgd_kernel","2,500,000","72"\n'
        "profiled 1x1G, cuda: 1\nprofiled 10000x64, cuda: 2\n"
    )
    assert tools.ncu_rows(said) == [
        {"case": "1x1G, cuda", "kernel": "sgd_kernel", "duration": 4_700_000.0, "registers": 64.0},
        {"case": "10000x64, cuda", "kernel": "sgd_kernel", "duration": 2_400_000.0, "registers": 72.0},
        {"case": "10000x64, cuda", "kernel": "sgd_kernel", "duration": 2_500_000.0, "registers": 72.0},
    ]
    assert tools.ncu_rows("==ERROR== no permission") == []


# The report


def made_up_row(name, microseconds, **others):
    quartiles = {"median": microseconds, "low": microseconds, "high": microseconds, "count": 5}
    row = {"implementation": name, "kernels": 1.0, "kernel_us": microseconds} | dict.fromkeys(
        ("host_us", "whole_us", "device_us"), quartiles
    )
    row["bytes_per_second"] = spread([20e9 / microseconds])
    for unit, its_microseconds in ((OURS, 4_800.0), (TRITON, 4_850.0)):
        for what in ("host", "whole", "device"):
            if unit != name:
                row[f"{what}_{goals.RATIOS[unit]}"] = spread([microseconds / its_microseconds])
    return row | others


TIMES = {OURS: 4_800.0, TRITON: 4_850.0, FUSED: 4_900.0, FOREACH: 9_000.0, LIMIT: 4_700.0}


def made_up_run():
    rows = [made_up_row(name, microseconds) for name, microseconds in TIMES.items()]
    case = {"case": "1x1G", "title": "one of 1 G elements", "dtype": "float32", "rows": rows, "cold_l2": False}
    speed = {"cases": [case | {"absent": {"apex": "not installed"}}], "left_out": ["GPT-2 XL: 9 GiB of memory free"]}
    launch_row = {"title": "ResNet-50", "implementation": OURS, "kernels": 1.0, "memcpys": 0.0, "memsets": 0.0}
    launch_row |= {"waits": 0.0, "allocations": 0, "waits_by_torch": None, "gradients_move": True}
    host_row = {"implementation": TRITON} | {f"{what}_us": spread([9.5]) for what in ("steady", "moved", "new_lr")}
    host_row["steady_ratio"] = spread([1.5])
    tiles_row = {"implementation": TRITON, "tile_bytes": 8192, "warps": 4, "shipped": True, "right_bits": True}
    tiles_row |= {"bytes_per_second": spread([4e12]), "registers": 48, "spills": 0}
    tile_rows = [tiles_row, tiles_row | {"warps": 2, "shipped": False, "right_bits": False, "spills": 12}]
    tile_rows += [{"implementation": OURS, "bytes_per_second": spread([4.1e12])}]
    tile_rows += [tiles_row | {"warps": 8, "shipped": False, "failed": "OutOfResources: registers"}]
    del tile_rows[-1]["bytes_per_second"]
    tiles_run = {"dtype": "bfloat16", "elements": 1 << 28, "rows": tile_rows}
    first_row = {"implementation": TRITON, "cache": "empty", "import_seconds": 0.5, "first_step_seconds": 1.25}
    bits_row = {"dtype": "float32", "left": OURS, "right": "torch loop", "differing": 0, "elements": 90_000}
    stages = {
        "tests": {"status": "failed", "failures": ["test_x: 3 differ"], "data": {"counts": {"passed": 9, "failed": 1}}},
        "arithmetic": {"status": "passed", "data": {"rows": [bits_row | {"mixes": []}]}},
        "launches": {"status": "passed", "data": {"rows": [launch_row]}},
        "speed": {"status": "passed", "data": speed},
        "host": {"status": "passed", "data": {"cases": [{"title": "161 of 8 elements", "rows": [host_row]}]}},
        "tiles": {"status": "passed", "data": {"runs": [tiles_run]}},
        "first-step": {
            "status": "passed",
            "data": {"rows": [first_row], "all_kernels": {"kernels": 12, "seconds": 9.5}},
        },
        "sanitizer": {"status": "absent", "data": {"absent": "compute-sanitizer was not found"}},
    }
    machine = {"gpu": "NVIDIA Imaginary", "capability": "9.0", "memory_bytes": 80 << 30, "driver": None}
    return {
        "machine": machine | {"cuda": "13.0", "torch": "2.14.1", "python": "3.12.3"},
        "commit": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-01-02 03:04:05 UTC",
        "stages": {name: {"seconds": 1.0, "failures": []} | stage for name, stage in stages.items()},
        "goals": goals.reached(speed),
        "missing": ["ncu: not found"],
    }


def test_goals_are_figures_met_missed_or_not_measured():
    rows = {(row["case"], row["what"]): row for row in made_up_run()["goals"]}
    bandwidth = rows["1x1G", "bandwidth, as a share of the best plain kernel's"]
    assert bandwidth["measured"] == pytest.approx(4_700 / 4_800, rel=1e-4) and bandwidth["met"] is True
    assert rows["1x1G", f"device time of {FUSED}, in ours"]["met"] is True
    foreach = rows["1x1G", f"device time of {FOREACH}, in ours"]
    assert foreach["measured"] == 1.875 and foreach["met"] is False
    assert rows["resnet50", "launches a step"]["met"] is None
    kernel = rows["1x1G", f"Triton: kernel time of {OURS}, in Triton's"]
    assert kernel["measured"] == pytest.approx(4_800 / 4_850, rel=1e-4) and kernel["met"] is True
    assert rows["161x8", f"Triton: host time of {FUSED}, in Triton's"]["met"] is None


def test_the_triton_backends_goals_are_of_its_own_times_and_of_the_case_that_was_measured():
    rows = [made_up_row(OURS, 10.0), made_up_row(TRITON, 11.0, kernels=2.0), made_up_row(FUSED, 19_400.0)]
    smaller = {"case": "1x256M", "instead_of": "1x1G", "rows": rows}
    speed = {"cases": [smaller, {"case": "resnet50", "instead_of": "resnet50", "rows": rows}]}
    found = {(row["case"], row["what"]): row for row in goals.reached(speed)}
    assert ("1x1G", f"Triton: kernel time of {OURS}, in Triton's") not in found
    assert found["1x256M", f"Triton: kernel time of {OURS}, in Triton's"]["met"] is False
    assert found["resnet50", f"Triton: host time of {FUSED}, in Triton's"]["measured"] == 4.0
    assert found["resnet50", "Triton: launches a step"]["met"] is False
    alone = {"case": "resnet50", "rows": rows[1:2]}  # no CUDA backend, no peer
    assert {row["met"] for row in goals.reached({"cases": [alone]})} == {None, False}


def test_the_report_has_every_part_and_its_short_form_fits_the_end_of_a_log():
    run = json.loads(as_text(made_up_run()))
    text = gpu_report.markdown(run)
    for part in (
        "NVIDIA Imaginary (compute capability 9.0, 80 GiB), driver not known",
        "commit 0123456789 with changes that are not committed",
        f"| 1x1G | device time of {FOREACH}, in ours | 2 | 1.88 | **missed** |",
        "97.9 %",
        "Left out: GPT-2 XL: 9 GiB of memory free.",
        "Not compared with: apex: not installed.",
        "| FusedSGD and torch loop |",
        f"| ResNet-50 | **{OURS}** | moved | 1 | 0 |",
        f"| 161 of 8 elements | **{TRITON}** | 9.5 (9.5 to 9.5) |",
        f"| **{TRITON}** | empty | 500 | 1,250 | – | – |",
        "All 12 kernels of the Triton backend compile in 9.5 s.",
        "| **8,192 bytes, 4 warps** (shipped) | 4.000 (4.000 to 4.000); 48 registers |",
        "| 8,192 bytes, 2 warps | 4.000 (4.000 to 4.000); 48 registers, 12 spilled; **wrong bits** |",
        "| 8,192 bytes, 8 warps | OutOfResources: registers |",
        "- tests: failed in 1 s (9 passed, 1 failed)\n  - test_x: 3 differ",
        "- sanitizer: absent in 1 s (compute-sanitizer was not found)",
        "- missing here: ncu: not found",
    ):
        assert part.replace("FusedSGD", OURS) in text or part in text, part
    short = gpu_report.short(run)
    assert "MISSED" in short and "test_x: 3 differ" in short
    assert "tiles bfloat16  TB/s: **wd_fused** 4.100; **8,192 bytes, 4 warps** (shipped) 4.000" in short


def test_the_short_form_of_a_full_run_fits_into_the_last_12000_characters_of_a_log():
    run = made_up_run()
    times = {name: 12_345.6 for name in (*gpu_cases.GPU_IMPLEMENTATIONS, LIMIT, "device copy")}
    rows = [made_up_row(name, microseconds, graph_us=spread([1.0])) for name, microseconds in times.items()]
    run["stages"]["speed"]["data"]["cases"] = [
        {"case": case.name, "title": case.title, "rows": rows[: len(rows) - 2 * (len(case.shapes) > 1)]}
        for case in gpu_cases.GPU_STEP
    ]
    (host,) = run["stages"]["host"]["data"]["cases"]
    host["rows"] *= len(gpu_cases.GPU_IMPLEMENTATIONS)
    run["stages"]["host"]["data"]["cases"] = [host] * len(gpu_cases.GPU_HOST)
    from bench.gpu import arithmetic

    (bits,) = run["stages"]["arithmetic"]["data"]["rows"]
    run["stages"]["arithmetic"]["data"]["rows"] = [
        bits | {"left": left, "right": right, "dtype": dtype}
        for left, right in arithmetic.PAIRS
        for dtype in gpu_report.DTYPES
    ]
    run["goals"] = goals.reached(run["stages"]["speed"]["data"])
    assert 8_000 < len(gpu_report.short(run)) < 12_000


def test_results_are_one_line_a_list_and_the_same_json():
    results = {"a": [1, 2, {"b": [3, 4]}], "c": {"d": 1.5, "e": None}, "long": list(range(200)), "text": "x { y ] z"}
    text = as_text(results)
    assert json.loads(text) == results
    assert '"c": {"d": 1.5, "e": null}' in text


def test_a_steady_step_that_does_more_than_it_may_is_a_failure():
    from bench.gpu import launches

    row = {"case": "x", "implementation": OURS, "tensors": 161, "kernels": 1.0, "plan": [{}], "allocations": 0}
    row |= {"memcpys": 0.0, "memsets": 0.0, "waits": 0.0, "waits_by_torch": None, "gradients_move": False}
    assert launches.broken(row) == []
    assert launches.broken(row | {"tensors": 10_000, "kernels": 3.0, "plan": [{}] * 3}) == []
    for wrong in (
        {"kernels": 2.0},
        {"kernels": 0.0},
        {"memcpys": 1.0},
        {"allocations": 2},
        {"waits_by_torch": "it did"},
    ):
        assert len(launches.broken(row | wrong)) == 1, wrong
    triton = row | {"implementation": TRITON, "tensors": 10_000}
    moved = triton | {"gradients_move": True, "memcpys": 1.0, "allocations": 1}
    assert launches.broken(triton) == launches.broken(moved) == []
    for wrong in (
        triton | {"kernels": 3.0},
        triton | {"memcpys": 1.0},
        moved | {"memcpys": 2.0},
        moved | {"allocations": 2},
        moved | {"implementation": OURS, "allocations": 0},
    ):
        assert len(launches.broken(wrong)) == 1, wrong


def test_a_differing_bit_between_what_must_agree_is_a_failure():
    from bench.gpu import arithmetic

    def row(left, right, dtype, differing):
        counts = {"elements": 10, "differing": differing, "mixes": ["momentum"]}
        return {"left": left, "right": right, "dtype": dtype, **counts}

    ours, loop, reference = arithmetic.OURS, arithmetic.LOOP, arithmetic.REFERENCE
    assert arithmetic.broken([row(ours, reference, "float16", 0), row(loop, reference, "float16", 5)]) == []
    assert arithmetic.broken([row(ours, loop, "bfloat16", 5)]) == []  # found out, not required
    (sentence,) = arithmetic.broken([row(ours, loop, "float32", 5)])
    assert sentence == "float32: 5 of 10 elements differ between FusedSGD and torch loop (momentum)"
    (sentence,) = arithmetic.broken([row(arithmetic.TRITON, ours, "bfloat16", 1)])
    assert sentence == "bfloat16: 1 of 10 elements differ between FusedSGD Triton and FusedSGD (momentum)"
    assert len(list(arithmetic.mixes())) == 16
