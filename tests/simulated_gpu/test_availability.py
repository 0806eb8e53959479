"""Where the simulated GPU cannot be built, it says why, before anything is compiled."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from tests.simulated_gpu import __main__ as command
from tests.simulated_gpu import build


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """What torch and the toolchain tell of it, to be changed."""
    part = types.SimpleNamespace(home="/toolkit", nvcc="/toolkit/bin/nvcc", version="13.0")
    told = types.SimpleNamespace(cuda="13.0", part=part)
    real = build._module_at

    def module_at(path: Path) -> Any:
        if path.name == "version.py":
            return types.SimpleNamespace(__version__="2.0", cuda=told.cuda)
        if path.name == "toolchain.py" and told.part is not None:
            return types.SimpleNamespace(cuda_part=lambda *_: told.part)
        return real(path)

    monkeypatch.setattr(build, "_module_at", module_at)
    return told


def test_a_torch_without_cuda(machine):
    machine.cuda = machine.part = None
    with pytest.raises(build.Unavailable, match=r"torch, 2\.0, is built without CUDA"):
        build.environment()


def test_a_torch_for_another_cuda(machine):
    machine.cuda = "12.8"
    with pytest.raises(build.Unavailable, match=r"torch is built for CUDA 12\.8, the simulated GPU has .* CUDA 13"):
        build.environment()


def test_a_machine_without_nvcc_or_a_compiler(machine, monkeypatch):
    machine.part = "no nvcc on PATH nor in CUDA_HOME: install it"
    with pytest.raises(build.Unavailable, match="no nvcc on PATH"):
        build.environment()
    machine.part = types.SimpleNamespace(home="/toolkit", nvcc="/toolkit/bin/nvcc", version="13.0")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.Unavailable, match="no C\\+\\+ compiler: no-such-compiler"):
        build.environment()


def test_a_script_is_then_refused_with_the_reason(machine):
    machine.part = "no nvcc on PATH"
    with pytest.raises(SystemExit, match="cannot be built: no nvcc on PATH"):
        command.main(["script.py"])


def test_a_program_that_is_missing_is_named():
    with pytest.raises(build.Unavailable, match="no-such-program is not on PATH"):
        build._run(["no-such-program"])
