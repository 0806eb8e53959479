"""FusedSGD in several processes on one machine: DDP, FSDP2, tensor parallelism, checkpoints; beside torch.optim.SGD.

One program runs all cases of the folder "distributed", in worlds of 2, 4 and 1 processes; each case is a test here.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from wd_fused import FusedSGD

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

FOLDER = Path(__file__).resolve().parent
EXAMPLE = FOLDER.parents[1] / "examples" / "train_ddp.py"
SECONDS = 120

sys.path.insert(0, str(FOLDER))
from worlds import load_cases  # noqa: E402

# What a process says that aborts: the reason may stand far above what it printed last.
DYING = re.compile(r"terminate called|what\(\):|Fatal Python error|Assertion .* failed")
CASES = [f"{name}-{size}" for name, sizes in load_cases().items() for size in sizes]
LOCAL = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}  # whatever the machine's name leads to


def run(*command: str | Path, folder: Path) -> str:
    """What a program prints; a failure if it fails, or does not end in time: then it and its children are killed."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**LOCAL, **os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONUTF8": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # on which torchrun ends what it has started
        try:
            printed, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
        pytest.fail(f"{command[0]} did not end within {SECONDS} s; it printed\n{printed[-20_000:]}")
    assert process.returncode == 0, f"{command[0]}: exit status {process.returncode}; it printed\n{printed[-20_000:]}"
    return printed


class Worlds(NamedTuple):
    errors: dict[str, list[str]]  # of each case in each world
    printed: str


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    folder = tmp_path_factory.mktemp("worlds")
    printed = run(FOLDER / "worlds.py", folder, folder=folder)
    return Worlds(json.loads((folder / "results.json").read_text(encoding="utf-8")), printed)


@pytest.mark.parametrize("case", CASES)
def test_in_several_processes(case: str, worlds: Worlds) -> None:
    if errors := worlds.errors[case]:
        died = [line for line in worlds.printed.splitlines() if DYING.search(line)]
        printed = ["all cases printed, at the end:", worlds.printed[-5_000:]]
        pytest.fail("\n".join([*errors, *died, *printed]), pytrace=False)


# ---- the example


def test_the_ddp_example_trains_by_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example needs the extra 'demo'")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    printed = run(*launcher, EXAMPLE, "--epochs", "3", folder=tmp_path)
    assert "the same bits on 2 ranks and as torch.optim.SGD" in printed
    found = re.search(r"validation accuracy (\d+\.\d)%", printed)
    assert found is not None and float(found.group(1)) > 80, printed


# ---- files of one process


def trained(optimizer_class: type[torch.optim.SGD], steps: int) -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    optimizer = optimizer_class(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    go_on(model, optimizer, range(steps))
    return model, optimizer


def go_on(model: nn.Module, optimizer: torch.optim.SGD, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("saver", [FusedSGD, torch.optim.SGD])
@pytest.mark.parametrize("loader", [FusedSGD, torch.optim.SGD])
def test_a_file_of_tensors_and_numbers_goes_from_class_to_class(
    saver: type[torch.optim.SGD], loader: type[torch.optim.SGD], tmp_path: Path
) -> None:
    model, optimizer = trained(saver, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved", weights_only=True)
    fresh, continued = trained(loader, 0)
    fresh.load_state_dict(saved["model"])
    continued.load_state_dict(saved["optimizer"])
    go_on(fresh, continued, range(3, 6))
    expected, _ = trained(torch.optim.SGD, 6)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), expected.parameters(), strict=True))


def test_a_file_that_ends_in_the_middle_and_groups_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    model, optimizer = trained(FusedSGD, 3)
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    content = (tmp_path / "saved").read_bytes()
    (tmp_path / "half").write_bytes(content[: len(content) // 2])
    before = copy.deepcopy(optimizer.state_dict())
    parameters = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="zip archive"):
        optimizer.load_state_dict(torch.load(tmp_path / "half", weights_only=True))
    fewer = FusedSGD([nn.Parameter(torch.zeros(5))], lr=7.0)
    with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
        optimizer.load_state_dict(fewer.state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert torch.equal(optimizer.state_dict()["state"][key]["momentum_buffer"], entry["momentum_buffer"])
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())
    go_on(model, optimizer, range(3, 6))
    expected, _ = trained(torch.optim.SGD, 6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
