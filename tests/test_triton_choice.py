"""Which parameters the Triton backend takes, and what is said where it cannot: no Triton, no compiler, no GPU, no C++
extension. Run by pytest; needs no GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_support
from plan_support import OPTIONS, parameters, twins
from torch import nn
from triton_support import ROOT, assert_equal, assert_same, kernels, launcher, triton

from wd_fused import FusedSGD, backends

pytestmark = pytest.mark.usefixtures("interpreted")
# Fixtures.
quickly_interpreted = triton_support.quickly_interpreted
interpreted = triton_support.interpreted
preferred = triton_support.preferred

plan = kernels("plan")


# --- which backend, and what if it is none -----------------------------------------------------------------------


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Called with what stands for the compiler and the driver: CPU tensors are taken for those of a GPU."""

    def install(loaded: Callable[..., Any]) -> None:
        monkeypatch.setattr(launcher, "INTERPRETED", False)
        monkeypatch.setattr(launcher, "_loaded", loaded)
        monkeypatch.setattr(launcher, "_failures", {})
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")

    return install


def test_a_kernel_that_cannot_be_compiled_is_a_reason_that_names_it(
    not_interpreted: Callable[[Callable[..., Any]], None], preferred: None
) -> None:
    """Asked for once a dtype, not at each parameter and step."""
    asked = []

    def loaded(kernel: Any, index: int) -> Any:
        asked.append(kernel.name)
        raise FileNotFoundError("there is no cc")

    not_interpreted(loaded)
    params = parameters(4, 5) + parameters(3, dtype=torch.bfloat16)
    reason = f"Triton {triton.__version__} cannot build its kernel for GPU number 0: FileNotFoundError: there is no cc"
    assert backends.FUSED["triton"].refusal(params[0]) == reason
    theirs = twins(params)
    ours, expected = FusedSGD(params, **OPTIONS), torch.optim.SGD(theirs, **OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ours.step()
            expected.step()
    assert [reason in str(warning.message) for warning in caught] == [True], [str(w.message) for w in caught]
    assert_same(ours, expected)
    assert {(each.backend, each.reason) for each in ours.backends()} == {("torch", reason)}
    before = [param.detach().clone() for param in params]
    insisting = FusedSGD(params, **OPTIONS, backend="triton")
    with pytest.raises(
        RuntimeError, match=r'group 0, parameter 0: backend="triton" does not take it: Triton .* is no cc'
    ):
        insisting.step()
    assert_equal(params, before)
    assert not any(insisting.state.values())
    assert sorted(asked) == ["sgd_kernel<bfloat16, torch>", "sgd_kernel<float32>"]


def test_a_tensor_that_lies_elsewhere_is_refused(
    not_interpreted: Callable[[Callable[..., Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = launcher.why_not_on(torch.device("cuda", 1), torch.float32)
    assert on_gpu == "it is on cuda:1: Triton's interpreter (TRITON_INTERPRET=1) takes CPU tensors"
    elsewhere = nn.Parameter(torch.empty(3, device="meta"))
    elsewhere.grad = torch.empty(3, device="meta")
    optimizer = FusedSGD([elsewhere], **OPTIONS, backend="triton")
    with pytest.raises(RuntimeError, match=r"it is on meta: Triton's interpreter \(TRITON_INTERPRET=1\) takes CPU ten"):
        optimizer.step()
    not_interpreted(lambda *arguments: None)
    for each in (launcher, plan):
        monkeypatch.setattr(each, "DEVICE_TYPE", "cuda")
    (param,) = parameters(4)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r'backend="triton" does not take it: it is on cpu'):
        FusedSGD([param], **OPTIONS, backend="triton").step()
    assert torch.equal(param, before)


def test_without_a_gpu_and_not_interpreted_it_is_unavailable_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.triton_kernels(), "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = backends.available()["triton"]
    assert reason is not None and "TRITON_INTERPRET=1" in reason and "is_available() is False" in reason
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot be used: torch finds no GPU"):
        FusedSGD(parameters(3), lr=0.1, backend="triton")


def said_by(script: str, folder: Path, **env: str) -> Any:
    """The last line that a Python program prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
    said = said_by(WITHOUT_TRITON, ROOT)
    assert not said["imported"] and said["kernels"] == []
    assert "cannot be imported" in said["reason"] and said["reason"].endswith("pip install triton")
    assert said["error"].startswith(f"backend='triton' cannot be used: {said['reason']}")
    assert said["auto"] == said["on the CPU"]
    assert said["alone"] == ["torch", said["reason"]]


WITHOUT_THE_EXTENSION = """
import json, sys, warnings
import torch
from wd_fused import FusedSGD, backends, extension
import wd_fused

torch.manual_seed(0)
params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3000,), (4, 5))]
theirs = [torch.nn.Parameter(param.detach().clone()) for param in params]
options = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
ours, reference = FusedSGD(params, **options, backend="triton"), torch.optim.SGD(theirs, **options)
for _ in range(3):
    for param, other in zip(params, theirs):
        param.grad = torch.randn_like(param)
        other.grad = param.grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.step()
    reference.step()
said = {
    "equal": all(torch.equal(param, other) for param, other in zip(params, theirs)),
    "backends": sorted({each.backend for each in ours.backends()}),
    "plan": type(ours._plans.parts[0].plan).__module__,
    "kernels": sys.modules["wd_fused.triton_kernels"].__file__,
    "package": wd_fused.__file__,
    "extension": extension.status().reason,
}
print(json.dumps(said))
"""


def test_a_bare_checkout_steps_without_the_extension(tmp_path: Path) -> None:
    for folder in ("wd_fused", "csrc", "triton_kernels"):
        built = shutil.ignore_patterns("__pycache__", "*.so", "_C.json")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=built)
    said = said_by(WITHOUT_THE_EXTENSION, tmp_path, WD_FUSED_JIT="0", TRITON_INTERPRET="1")
    assert said["equal"]
    assert said["backends"] == ["triton"]
    assert said["plan"] == "wd_fused.triton_kernels.plan"
    assert Path(said["kernels"]).parent == tmp_path / "triton_kernels"
    assert Path(said["package"]).parent == tmp_path / "wd_fused"
    assert "WD_FUSED_JIT=0" in said["extension"]
