"""What is said where the Triton backend cannot be used: no Triton, no GPU, no C++ extension. Run by pytest; needs no
GPU. Which parameters it takes on one: tests/gpu/test_gpu_triton.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wd_fused import FusedSGD, backends
from wd_fused.build import extension

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(backends.FUSED["triton"], "_is_known_to_be_there", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = backends.available()["triton"]
    assert reason == "torch finds no GPU that it can use (torch.cuda.is_available() is False)"
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot be used: torch finds no GPU"):
        FusedSGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, backend="triton")


def test_without_the_extension_it_is_unavailable_and_says_what_would_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    why = "WD_FUSED_JIT=0 forbids the JIT build"
    monkeypatch.setattr(backends.FUSED["triton"], "_is_known_to_be_there", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "status", lambda: extension.Status("none", reason=why))
    reason = backends.available()["triton"]
    assert reason is not None and reason.endswith(f"which any C++ compiler builds, and that is not there: {why}")
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot be used: it needs the CPU part of the C\+\+ ext"):
        FusedSGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, backend="triton")


WITHOUT_TRITON = """
import json, sys, warnings
import torch
by_torch = "triton" in sys.modules
import wd_fused
from wd_fused import FusedSGD, backends
said = {"imported": not by_torch and "triton" in sys.modules}

def parameter():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return param

def stepped(**options):
    param = parameter()
    optimizer = FusedSGD([param], lr=1.0, **options)
    optimizer.step()
    assert param.tolist() == [0, 0, 0]
    return optimizer.backends()[0]

warnings.simplefilter("ignore")
said["on the CPU"] = stepped().backend
said["kernels"] = [name for name in sys.modules if name.startswith("wd_fused.triton_kernels")]
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
sys.modules["triton"] = None  # as if it were not installed
said["reason"] = backends.available()["triton"]
try:
    FusedSGD([parameter()], lr=1.0, backend="triton")
except RuntimeError as error:
    said["error"] = str(error)
backends.PREFERENCE["cpu"] = ("triton", "cpu")
said["auto"] = stepped().backend
backends.PREFERENCE["cpu"] = ("triton",)
said["alone"] = list(stepped()[2:])
print(json.dumps(said))
"""


def test_triton_is_imported_when_it_is_asked_for_and_its_absence_is_a_reason() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert not said["imported"] and said["kernels"] == []
    assert "cannot be imported" in said["reason"] and said["reason"].endswith("pip install triton")
    assert said["error"].startswith(f"backend='triton' cannot be used: {said['reason']}")
    assert said["auto"] == said["on the CPU"]
    assert said["alone"] == ["torch", said["reason"]]
