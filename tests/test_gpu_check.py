"""`python -m bench.gpu_check` without a GPU: what it says, how it counts, and what it makes of made-up results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import cases, gpu_check, gpu_goals, gpu_report, gpu_tools, gpu_trace  # noqa: E402
from bench.cases import FOREACH, FUSED, OURS  # noqa: E402
from bench.gpu_stage import as_text, ratio_of_rounds, spread  # noqa: E402

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@without_gpu
def test_without_a_gpu_it_says_so_lists_what_is_missing_and_writes_nothing_unasked(tmp_path):
    results = ROOT / "bench" / "results"
    before = set(results.iterdir())
    out = tmp_path / "run.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--out", str(out)], cwd=ROOT, capture_output=True, text=True
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
    command = [sys.executable, "-m", f"bench.gpu_{stage}", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "torch" in done.stderr and not list(tmp_path.iterdir())


@without_gpu
def test_tests_for_the_gpu_are_skipped_with_one_reason():
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "no GPU that torch can use" in done.stdout and "passed" not in done.stdout


def test_a_stage_that_does_not_exist_is_named():
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "speed,sped"])


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
    runner = gpu_check.Runner(tmp_path, quick=True, seconds=1_000)
    runner.run(gpu_check.Step("arithmetic", (stage_program(tmp_path, source),), 3))
    stage = runner.stages["arithmetic"]
    assert stage["status"] == status and stage["failures"] == failures
    assert ("said" in stage) == (status in ("error", "out of time"))
    if status == "out of time":
        assert stage["data"] == {"a": 1}, "what it had is kept"


def test_a_stage_takes_what_it_has_started_with_it_when_it_is_stopped(tmp_path):
    child = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nopen('{}', 'w').write(str(child.pid))\n"
    pid_file = tmp_path / "pid"
    program = stage_program(tmp_path, child.format(pid_file) + "time.sleep(60)")
    status = gpu_check.started([sys.executable, program, "--out", "x"], tmp_path / "log", 3)
    assert status is None
    pid = int(pid_file.read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}/stat").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    raise AssertionError("its child was left running")


def test_no_stage_begins_when_the_time_is_over(tmp_path):
    runner = gpu_check.Runner(tmp_path, quick=True, seconds=0)
    runner.run(gpu_check.STEPS[0])
    assert runner.stages["build"]["status"] == "no time left"
    assert not gpu_check.failed(gpu_check.STEPS[0], runner.stages)


def test_what_pytest_found_is_counted_and_kept(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'bits differ'\n"
        "def test_no(): pytest.skip('no second GPU')\n"
    )
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={junit}", "test_some.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    stage = gpu_check.of_tests(done.returncode, junit, done.stdout)
    assert stage["status"] == "failed"
    assert stage["data"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert stage["data"]["skipped"] == {"test_some::test_no": "no second GPU"}
    assert stage["failures"] == ["test_some::test_bad: AssertionError: bits differ"]
    # Stopped half-way, it leaves no XML: what it printed is counted.
    stage = gpu_check.of_tests(None, tmp_path / "none.xml", done.stdout)
    assert stage["status"] == "out of time" and stage["data"]["counts"]["failed"] == 1
    assert stage["failures"][0] == "test_some.py::test_bad"
    # Python's own error is not a test's.
    stage = gpu_check.of_tests(1, tmp_path / "none.xml", "python3: No module named pytest\n")
    assert stage["status"] == "error" and stage["failures"] == ["pytest ended with 1: python3: No module named pytest"]


# Numbers


def test_spreads_and_ratios_of_interleaved_rounds():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "count": 5}
    assert spread([2.0])["median"] == 2.0
    assert ratio_of_rounds([2.0, 40.0, 6.0], [1.0, 10.0, 3.0])["median"] == 2.0  # of ratios, not a ratio of medians


def test_bytes_moved_are_five_accesses_an_element():
    by_name = {case.name: case for case in cases.GPU_STEP}
    assert by_name["1x1G"].bytes_moved == 20 << 30
    assert by_name["1x1G-bfloat16"].bytes_moved == 10 << 30


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
        event("user_annotation", gpu_trace.MARK, 100.0, 50.0),
        event("gpu_user_annotation", gpu_trace.MARK, 130.0, 90.0),
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
    seen = gpu_trace.counted(events, steps=2, ignored="reduce_kernel")
    assert (seen["kernels"], seen["memcpys"], seen["memsets"], seen["waits"]) == (1.0, 0.5, 0.0, 0.5)
    assert seen["kernel_us"] == 8.0
    assert seen["kernel_names"] == {"wd_fused::sgd_kernel<float>(Parameters)": 2}


@pytest.mark.parametrize(
    ("status", "said", "verdict", "errors"),
    [
        (0, "bits as the reference's\n========= ERROR SUMMARY: 0 errors", "clean", 0),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean", 0),
        (97, "========= Invalid __global__ write\n========= ERROR SUMMARY: 3 errors", "errors", 3),
        (3, "bits differ from the reference's\n========= ERROR SUMMARY: 0 errors", "errors", 0),
        (1, "========= Error: Device not supported", "cannot run here", None),
        (None, "", "out of time", None),
    ],
)
def test_what_the_sanitizer_says(status, said, verdict, errors):
    row = gpu_tools.sanitizer_row(status, said)
    assert (row["verdict"], row["errors"]) == (verdict, errors)


def test_what_ncu_says():
    said = (
        "==PROF== Connected to process 7\nsome output of the program\n"
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n'
        '"","","ns","register/thread"\n'
        '"0","sgd_kernel","4,700,000","64"\n"1","sgd_kernel","2,400,000","72"\n'
    )
    assert gpu_tools.ncu_rows(said) == [
        {"kernel": "sgd_kernel", "duration": 4_700_000.0, "registers": 64.0},
        {"kernel": "sgd_kernel", "duration": 2_400_000.0, "registers": 72.0},
    ]
    assert gpu_tools.ncu_rows("==ERROR== no permission") == []


# The report


def made_up_row(name, microseconds, **others):
    quartiles = {"median": microseconds, "low": microseconds, "high": microseconds, "count": 5}
    row = {"implementation": name, "kernels": 1.0, "kernel_us": microseconds} | dict.fromkeys(
        ("host_us", "whole_us", "device_us"), quartiles
    )
    row["bytes_per_second"] = spread([20e9 / microseconds])
    ratio = spread([microseconds / 4_800.0])
    return row | {"host_ratio": ratio, "whole_ratio": ratio, "device_ratio": ratio} | others


def made_up_run():
    rows = [made_up_row(OURS, 4_800.0), made_up_row(FUSED, 4_900.0), made_up_row(FOREACH, 9_000.0)]
    rows.append(made_up_row(gpu_goals.STREAM, 4_700.0))
    case = {"case": "1x1G", "title": "one of 1 G elements", "dtype": "float32", "rows": rows, "cold_l2": False}
    speed = {"cases": [case | {"absent": {"apex": "not installed"}}], "left_out": ["GPT-2 XL: 9 GiB of memory free"]}
    launch_row = {"title": "ResNet-50", "implementation": OURS, "kernels": 1.0, "memcpys": 0.0, "memsets": 0.0}
    launch_row |= {"waits": 0.0, "allocations": 0, "waits_by_torch": None}
    bits_row = {"dtype": "float32", "left": OURS, "right": "torch loop", "differing": 0, "elements": 90_000}
    stages = {
        "tests": {"status": "failed", "failures": ["test_x: 3 differ"], "data": {"counts": {"passed": 9, "failed": 1}}},
        "arithmetic": {"status": "passed", "data": {"rows": [bits_row | {"mixes": []}]}},
        "launches": {"status": "passed", "data": {"rows": [launch_row]}},
        "speed": {"status": "passed", "data": speed},
        "sanitizer": {"status": "absent", "data": {"absent": "compute-sanitizer was not found"}},
    }
    machine = {"gpu": "NVIDIA Imaginary", "capability": "9.0", "memory_bytes": 80 << 30, "driver": None}
    return {
        "machine": machine | {"cuda": "13.0", "torch": "2.14.1", "python": "3.12.3"},
        "commit": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-01-02 03:04:05 UTC",
        "stages": {name: {"seconds": 1.0, "failures": []} | stage for name, stage in stages.items()},
        "goals": gpu_goals.reached(speed),
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
        "- tests: failed in 1 s (9 passed, 1 failed)\n  - test_x: 3 differ",
        "- sanitizer: absent in 1 s (compute-sanitizer was not found)",
        "- missing here: ncu: not found",
    ):
        assert part.replace("FusedSGD", OURS) in text or part in text, part
    short = gpu_report.short(run)
    assert len(short) < 9_000 and "MISSED" in short and "test_x: 3 differ" in short


def test_results_are_one_line_a_list_and_the_same_json():
    results = {"a": [1, 2, {"b": [3, 4]}], "c": {"d": 1.5, "e": None}, "long": list(range(200)), "text": "x { y ] z"}
    text = as_text(results)
    assert json.loads(text) == results
    assert '"c": {"d": 1.5, "e": null}' in text


def test_a_steady_step_that_does_more_than_it_may_is_a_failure():
    from bench import gpu_launches

    row = {"case": "x", "implementation": OURS, "tensors": 161, "kernels": 1.0, "plan": [{}], "allocations": 0}
    row |= {"memcpys": 0.0, "memsets": 0.0, "waits": 0.0, "waits_by_torch": None}
    assert gpu_launches.broken(row) == []
    assert gpu_launches.broken(row | {"tensors": 10_000, "kernels": 3.0, "plan": [{}] * 3}) == []
    for wrong in (
        {"kernels": 2.0},
        {"kernels": 0.0},
        {"memcpys": 1.0},
        {"allocations": 2},
        {"waits_by_torch": "it did"},
    ):
        assert len(gpu_launches.broken(row | wrong)) == 1, wrong


def test_a_differing_bit_between_what_must_agree_is_a_failure():
    from bench import gpu_arithmetic

    def row(left, right, dtype, differing):
        counts = {"elements": 10, "differing": differing, "mixes": ["momentum"]}
        return {"left": left, "right": right, "dtype": dtype, **counts}

    ours, loop, reference = gpu_arithmetic.OURS, gpu_arithmetic.LOOP, gpu_arithmetic.REFERENCE
    assert gpu_arithmetic.broken([row(ours, reference, "float16", 0), row(loop, reference, "float16", 5)]) == []
    assert gpu_arithmetic.broken([row(ours, loop, "bfloat16", 5)]) == []  # found out, not required
    (sentence,) = gpu_arithmetic.broken([row(ours, loop, "float32", 5)])
    assert sentence == "float32: 5 of 10 elements differ between FusedSGD and torch loop (momentum)"
    assert len(list(gpu_arithmetic.mixes())) == 16
