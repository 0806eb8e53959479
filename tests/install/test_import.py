"""What is there right after `import wd_fused`, what has been loaded by then, and what is needed for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from wd_fused.build import extension


def said_by(program: str, **environment: str) -> Any:
    """The JSON that a program of its own prints last."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


AS_THE_README_WRITES_THEM = """
import json, sys
import torch
before = set(sys.modules)
import wd_fused
said = {"imported": sorted({name.split(".")[0] for name in set(sys.modules) - before} - {"wd_fused"})}
said["loaded"] = "wd_fused._C" in sys.modules
hasattr(torch.ops.wd_fused, "__path__")  # as inspect asks
said["loaded for a question"] = "wd_fused._C" in sys.modules
p, g = torch.ones(3), torch.ones(3)
numbers = dict(lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)
torch.ops.wd_fused.sgd_([p], [g], [], [], **numbers)
said["one step"] = p.tolist()
wd_fused.functional.sgd([p], [g], [None], lr=0.5)
said["two steps"] = p.tolist()
said["other names"] = hasattr(torch.ops.wd_fused, "other")
print(json.dumps(said))
"""


def test_functional_and_the_operator_are_there_and_nothing_is_loaded_before_it_is_asked_for(environment):
    if extension.load() is None:
        pytest.skip(str(extension.status().reason))
    said = said_by(AS_THE_README_WRITES_THEM, **environment)
    assert not said["loaded"] and not said["loaded for a question"]
    assert not {"triton", "numpy", "sympy"} & set(said["imported"])
    assert (said["one step"], said["two steps"], said["other names"]) == ([0.5] * 3, [0.0] * 3, False)


COMPILED_FIRST = """
import json
import torch, torch._dynamo.testing
import wd_fused

counter = torch._dynamo.testing.CompileCounter()
numbers = dict(lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)

@torch.compile(backend=counter, fullgraph=True)
def step(p, g):
    torch.ops.wd_fused.sgd_([p], [g], [], [], **numbers)

p = torch.ones(3)
step(p, torch.ones(3))
step(p, torch.ones(3))
print(json.dumps([p.tolist(), counter.frame_count]))
"""


def test_the_operator_may_be_asked_for_by_the_compiler_first(environment):
    if extension.load() is None:
        pytest.skip(str(extension.status().reason))
    assert said_by(COMPILED_FIRST, **environment) == [[0.0] * 3, 1]


WITHOUT_THE_EXTENSION = """
import json
import torch
from wd_fused.build import extension
extension._found = (None, extension.Status("none", reason="no compiler"))
print(json.dumps(hasattr(torch.ops.wd_fused, "sgd_")))
"""


def test_without_the_extension_there_is_no_operator(environment):
    assert said_by(WITHOUT_THE_EXTENSION, **environment) is False


WITHOUT_NUMPY = """
import json, sys
sys.modules["numpy"] = None
import torch
from wd_fused import FusedSGD, backends
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
FusedSGD([p], lr=0.5, momentum=0.9).step()
print(json.dumps([p.tolist(), backends.available()["triton"]]))
"""


def test_numpy_is_needed_by_nothing(environment):
    pytest.importorskip("triton")
    values, why_not = said_by(WITHOUT_NUMPY, **environment)
    assert values == [0.5] * 3
    assert why_not is None or why_not.startswith("torch finds no GPU"), why_not
