"""docs/options.md: its example runs, every option is described, defaults and bytes are those of the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import wd_fused
from wd_fused import FusedSGD
from wd_fused.options import spec

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "options.md"
OF_THE_NORM = {"norm_per_group", "error_if_nonfinite", "process_group"}
OF_THE_OPTIMIZER = OF_THE_NORM | {"ema_buffers", "rounding_seed", "report_numerics"}
OPTIONS = spec.NAMES | OF_THE_OPTIMIZER


def example(page: Path, number: int) -> str:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[number]


def test_the_example_of_the_page_runs() -> None:
    names: dict[str, Any] = {}
    exec(example(PAGE, 0), names)
    assert float(names["optimizer"].grad_norm) > 0
    assert {"remainder", "ema", "momentum_buffer"} == set(names["optimizer"].state[names["model"].weight])


def test_the_options_are_those_of_the_constructor() -> None:
    arguments = list(inspect.signature(FusedSGD).parameters)
    assert set(arguments[arguments.index("numerics") + 1 :]) == OPTIONS


def test_every_option_is_described_in_both_tables() -> None:
    first, second = PAGE.read_text(encoding="utf-8").split("## What each does")
    for part in (first, second):
        rows = "\n".join(line.split(" | ")[0] for line in part.splitlines() if line.startswith("| `"))
        assert [name for name in OPTIONS if f"`{name}`" not in rows] == []


def test_the_page_marks_those_that_may_stand_in_a_group_and_tells_the_defaults() -> None:
    first, _ = PAGE.read_text(encoding="utf-8").split("## What each does")
    rows = re.findall(r"^\| `(\w+)`( \*)? \| `(.*?)` \|", first, re.MULTILINE)
    described = {name: (bool(star), default) for name, star, default in rows if name in OPTIONS}
    defaults = {name: inspect.signature(FusedSGD).parameters[name].default for name in OPTIONS}
    assert described == {name: (name in spec.NAMES, repr(value).replace("'", '"')) for name, value in defaults.items()}


def test_every_method_of_the_page_exists() -> None:
    named = set(re.findall(r"`(?:optimizer\.)?(\w+)\([^`]*\)`", PAGE.read_text(encoding="utf-8")))
    own = {"ema_parameters", "swap_ema", "master_parameters", "load_master_parameters", "step", "state_dict"}
    assert own <= named
    assert all(hasattr(FusedSGD, name) for name in own) and hasattr(wd_fused.FusedSGD, "grad_norm")


# Bytes an element of every state, as the page's table has them.


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"master_weights": "full"}, '`master_weights="full"`'),
        ({"master_weights": "split"}, '`master_weights="split"`'),
        ({"master_weights": "split24"}, '`master_weights="split24"`'),
        ({"rounding": "kahan"}, '`rounding="kahan"`'),
        ({"rounding": "stochastic"}, '`rounding="stochastic"`'),
        ({}, "plain bfloat16"),
    ],
)
def test_the_bytes_of_the_table_are_those_of_the_tensors(options: dict[str, Any], row: str) -> None:
    param = torch.nn.Parameter(torch.randn(1024).bfloat16())
    param.grad = torch.randn(1024).bfloat16()
    optimizer = FusedSGD([param], momentum=0.9, **options)
    optimizer.step()
    line = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {row} |"))
    _, entries, total, _ = [cell.strip() for cell in line.strip("|").split("|")][1:]
    told = {name: int(count) for name, count in re.findall(r"`(\w+)` (\d+)", entries)}
    assert told == {name: tensor.nbytes / 1024 for name, tensor in optimizer.state[param].items()}
    assert int(total) == sum(told.values()) + param.element_size()
