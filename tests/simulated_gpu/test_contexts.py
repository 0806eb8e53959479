"""Devices on which a program gets a context, some hundred megabytes of a GPU each. Run by `make simulated-gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulated_gpu import control

pytestmark = pytest.mark.skipif(control.LIBRARY not in os.environ, reason="runs on the simulated GPU alone")

PROGRAM = """
import threading
import torch
from tests.simulated_gpu import control
from wd_fused import FusedSGD
from wd_fused.build import extension

assert extension.load() is not None, extension.status().reason
param = torch.ones(10, device="cuda:1", requires_grad=True)
param.grad = torch.ones_like(param)
asked = threading.Thread(target=lambda: extension.load().why_not_cuda(1))  # it has no current device yet
asked.start()
asked.join()
with torch.cuda.device(1):
    FusedSGD([param], lr=0.1, backend="cuda").step()
print([control.has_context(device) for device in (0, 1)])
"""


def test_a_step_on_the_second_gpu_makes_no_context_on_the_first(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulated_gpu.inside", str(script)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[False, True]", done.stdout + done.stderr
