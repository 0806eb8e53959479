"""`python -m wd_fused`: what it tells, and that a wrong bit makes it fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import wd_fused
from wd_fused import backends, report, self_test
from wd_fused.build import extension, toolchain

ROOT = Path(__file__).resolve().parents[2]


def run_report(**env: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(
        [sys.executable, "-m", "wd_fused"], env=environment, capture_output=True, text=True, timeout=600
    )


def line(output: str, name: str) -> str:
    """The report's line of that name."""
    found = re.search(rf"^  {re.escape(name)} +(.+)$", output, re.MULTILINE)
    assert found is not None, f"no line {name!r} in\n{output}"
    return found.group(1)


def test_it_tells_versions_tools_extension_backends_devices_and_tests_itself() -> None:
    done = run_report()
    assert done.returncode == 0, done.stdout + done.stderr
    assert line(done.stdout, "wd_fused").startswith(wd_fused.__version__)
    assert line(done.stdout, "torch").startswith(torch.__version__)
    assert line(done.stdout, "python").endswith(sys.executable)
    assert toolchain.cxx_compiler() in line(done.stdout, "c++")
    assert line(done.stdout, "source").split(",")[0] in ("built ahead of time", "JIT build")
    assert line(done.stdout, "CPU code") in ("avx512", "avx2", "baseline")
    assert line(done.stdout, "cpu") == "available"
    if not torch.cuda.is_available():
        assert line(done.stdout, "cuda").startswith("not available: ")
        assert re.search(
            r"^  cuda +none(: this torch is built without CUDA| that torch can use: .+)$", done.stdout, re.M
        )
    assert re.match(r"possible by nvcc \d+\.\d+, for torch's CUDA|not possible: ", line(done.stdout, "CUDA build"))
    assert re.match(r"for \d+\.\d|none: .", line(done.stdout, "CUDA part"))
    assert f"{torch.get_num_threads()} threads" in done.stdout
    tested = re.findall(r"^  (\w+) +(float\d+) on cpu: ok, 0 of ([\d,]+) elements differ$", done.stdout, re.MULTILINE)
    assert {(backend, dtype) for backend, dtype, _ in tested} >= {
        (backend, dtype) for backend in ("cpu", "torch") for dtype in ("float32", "float64")
    }
    assert all(int(count.replace(",", "")) > 100_000 for *_, count in tested)
    assert re.search(r"^self-test passed in ", done.stdout, re.MULTILINE)
    assert re.search(
        r'^fused on (cpu, by backend "cpu"|cuda:0, by backend "(cuda|triton)")$', done.stdout, re.MULTILINE
    )
    assert "NOT FUSED" not in done.stdout


def test_without_the_extension_it_says_why_and_tests_what_is_left(tmp_path: Path) -> None:
    # A copy, so that a module built in place is not there.
    shutil.copytree(ROOT / "wd_fused", tmp_path / "wd_fused", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    (tmp_path / "triton_kernels").symlink_to(ROOT / "triton_kernels")
    done = subprocess.run(
        [sys.executable, "-m", "wd_fused"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "WD_FUSED_JIT": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"^self-test passed in .*\nNOT FUSED on \w+.*: .*WD_FUSED_JIT=0", done.stdout, re.MULTILINE)
    assert line(done.stdout, "source") == "none"
    assert "WD_FUSED_JIT=0 forbids the JIT build" in line(done.stdout, "reason")
    assert line(done.stdout, "WD_FUSED_JIT") == "0"
    assert "WD_FUSED_JIT=0" in line(done.stdout, "cpu")
    assert "float32 on cpu: ok" in done.stdout
    assert done.stderr == "", "what the report tells is not warned of as well"


def test_as_json_it_says_the_same_to_programs(capsys: pytest.CaptureFixture[str]) -> None:
    status = report.main("--json")
    told = json.loads(capsys.readouterr().out)
    assert told["wd_fused"] == wd_fused.__version__ and told["status"] == status == 0
    assert told["versions"]["torch"].startswith(torch.__version__)
    assert {"tools", "extension", "backends", "devices", "self_test"} <= set(told)
    assert told["fused"] and told["not_fused"] == {}
    assert all("ok, 0 of" in result["result"] for result in told["self_test"])


def test_help_and_a_mistyped_argument_build_and_test_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, status in (("--help", 0), ("--jsno", os.EX_USAGE)):
        with pytest.raises(SystemExit) as ended:
            report.main(argument)
        said = capsys.readouterr()
        assert ended.value.code == status
        assert "--json" in said.out + said.err and "self-test" not in said.out
    assert "unknown: --jsno" in said.err


class LearningRateOneBitOff(torch.optim.SGD):
    """An optimizer whose learning rate is the next float64: few bits of the result differ."""

    def __init__(self, params: Any, lr: float, backend: str, **options: Any) -> None:
        super().__init__(params, lr=lr * (1 + 2**-52), **options)


def test_a_differing_bit_is_counted_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_test, "FusedSGD", LearningRateOneBitOff)
    assert report.main() == 1
    output = capsys.readouterr().out
    counts = re.findall(r"float64 on cpu: FAILED, ([\d,]+) of [\d,]+ elements differ", output)
    assert counts and all(int(count.replace(",", "")) > 0 for count in counts)
    assert re.search(r"^self-test FAILED \(\d of \d\) in ", output, re.MULTILINE)


def test_a_step_that_raises_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no step today")

    monkeypatch.setattr(self_test, "FusedSGD", refuse)
    assert report.main() == 1
    assert "FAILED, RuntimeError: no step today" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "choices", "status", "said"),
    [
        (0, {"cpu": "cpu"}, 0, ['fused on cpu, by backend "cpu"']),
        (0, {"cpu": "torch"}, 2, ["NOT FUSED on cpu, torch's own code does the step: because"]),
        (0, {"cpu": ""}, 2, ["NOT FUSED on cpu, torch's own code does the step: because"]),
        (1, {"cpu": "torch", "cuda:0": "triton"}, 0, ['fused on cuda:0, by backend "triton"']),
        (
            2,
            {"cpu": "cpu", "cuda:0": "cuda", "cuda:1": "torch"},
            2,
            [
                'fused on cuda:0, by backend "cuda"',
                "NOT FUSED on cuda:1, torch's own code does the step: because",
            ],
        ),
    ],
)
def test_the_exit_status_tells_whether_anything_is_fused_where_models_train(
    gpus: int,
    choices: dict[str, str],
    status: int,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(report, "_chosen", lambda device: (choices[device], "because"))
    monkeypatch.setattr(report, "_devices", lambda: iter(()))
    monkeypatch.setattr(report, "_usable", lambda: [])
    assert report.main() == status
    output = capsys.readouterr().out
    assert re.search(r"^self-test passed in ", output, re.MULTILINE)
    assert output.splitlines()[-len(said) :] == said


def test_a_wrong_bit_is_worse_than_a_step_that_is_not_fused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_test, "FusedSGD", LearningRateOneBitOff)
    monkeypatch.setattr(report, "_usable", lambda: ["torch"])
    monkeypatch.setattr(report, "_chosen", lambda device: ("torch", "because"))
    assert report.main() == 1


def test_what_is_found_is_told_once_and_remembered() -> None:
    assert extension.load() is extension.load()
    assert extension.status() is extension.status()


class Module:
    """The compiled module, as far as the report asks it about GPUs."""

    def __init__(self, missing: str | None) -> None:
        self.missing = missing

    def why_not_cuda(self, index: int) -> str | None:
        return self.missing


class TestDevices:
    """A line a GPU, on a machine that has some, or whose driver does not serve torch."""

    def devices(self, monkeypatch: pytest.MonkeyPatch, cuda: str | None, module: Module) -> dict[str, str]:
        properties = SimpleNamespace(name="GPU of the tests", major=9, minor=0, total_memory=80 * 2**30)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(report, "_choice", lambda device: f"what {device} gets")
        monkeypatch.setattr(extension, "load", lambda: module)
        monkeypatch.setattr(extension, "status", lambda: extension.Status("jit", cuda=cuda))
        return dict(report._devices())

    def test_a_GPU_that_the_CUDA_part_runs_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said = self.devices(monkeypatch, None, Module(None))["cuda:0"]
        assert said == "GPU of the tests, compute capability 9.0, 80 GiB; the CUDA part runs on it; what cuda:0 gets"

    def test_a_GPU_that_it_was_not_built_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said = self.devices(monkeypatch, None, Module("built for 8.0"))["cuda:0"]
        assert "; the CUDA part does not run on it: built for 8.0; " in said

    def test_a_GPU_and_no_CUDA_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said = self.devices(monkeypatch, "no nvcc", Module(None))["cuda:0"]
        assert "; the extension has no CUDA part; " in said

    def test_what_auto_takes_and_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WD_FUSED_BACKEND", raising=False)
        assert report._choice("cpu") == 'backend="auto" takes cpu: it is the first choice for cpu'
        monkeypatch.setitem(backends.PREFERENCE, "cpu", ("cuda", "cpu"))
        monkeypatch.setattr(backends.FUSED["cuda"], "refusal", lambda tensor: "no nvcc\nat all")
        assert report._choice("cpu") == 'backend="auto" takes cpu: it is the next choice for cpu; cuda: no nvcc'
        monkeypatch.setattr(backends.FUSED["cpu"], "refusal", lambda tensor: "no compiler")
        assert report._choice("cpu") == 'backend="auto" takes torch: cuda: no nvcc'
        monkeypatch.setenv("WD_FUSED_BACKEND", "fast")
        assert "WD_FUSED_BACKEND='fast'" in report._choice("cpu")

    def test_a_driver_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
        too_old = "The NVIDIA driver on your system is too old (found version 11040)"

        def warn() -> bool:
            warnings.warn(too_old, UserWarning, stacklevel=1)
            return False

        def refuse() -> None:
            raise RuntimeError(f"{too_old}. Please update your GPU driver")

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", warn)
        monkeypatch.setattr(torch.cuda, "init", refuse)
        said = dict(report._devices())["cuda"]
        assert said == f"none that torch can use: {too_old}. Please update your GPU driver"
        assert not recwarn.list, "what the report tells is not warned of as well"


class TestCudaHome:
    """A folder is the CUDA toolkit's only if it holds its headers, wherever nvcc is started from."""

    @pytest.fixture(autouse=True)
    def _no_other_toolkit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.delenv("CUDA_PATH", raising=False)

    def toolkit(self, folder: Path) -> Path:
        (folder / "include").mkdir(parents=True)
        (folder / "include" / "cuda_runtime.h").touch()
        (folder / "bin").mkdir()
        return folder

    def program(self, path: Path, script: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def test_nvcc_as_a_wrapper_script_is_asked_where_it_is(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        toolkit = self.toolkit(tmp_path / "toolkit")
        # As the real one answers to --dryrun: on standard error.
        real = self.program(toolkit / "bin" / "nvcc", f"echo '#$ TOP={toolkit}/bin/..' >&2")
        wrapper = self.program(tmp_path / "wrapped" / "bin" / "nvcc", f'exec {real} "$@"')
        monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
        assert toolchain.cuda_home() == (str(toolkit), "nvcc --dryrun")

    def test_a_link_to_nvcc_is_followed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        toolkit = self.toolkit(tmp_path / "toolkit")
        real = self.program(toolkit / "bin" / "nvcc", "exit 1")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").symlink_to(real)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        assert toolchain.cuda_home() == (str(toolkit), "nvcc on PATH")

    def test_CUDA_HOME_comes_first_but_is_not_believed_without_headers(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        named = self.toolkit(tmp_path / "named")
        monkeypatch.setenv("CUDA_HOME", str(named))
        assert toolchain.cuda_home() == (str(named), "CUDA_HOME")
        (named / "include" / "cuda_runtime.h").unlink()
        assert toolchain.cuda_home()[0] != str(named)
