"""The docstrings of what is public: their examples run, help() shows them as they are meant, none lacks an example."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pydoc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import wd_fused
from wd_fused import FusedSGD

MODULES = (
    "wd_fused.sgd",
    "wd_fused.step.base",
    "wd_fused.step.of_options",
    "wd_fused.step.checkpoint",
    "wd_fused.functional",
    "wd_fused.in_backward",
    "wd_fused.param_groups",
    "wd_fused.weight_decay_scheduler",
)


def public() -> Iterator[tuple[str, Any]]:
    """What a user calls: of the package, of its module functional, and of FusedSGD what is its own."""
    for name in wd_fused.__all__:
        found = getattr(wd_fused, name)
        if inspect.isfunction(found) or inspect.isclass(found):
            yield name, found
    yield "functional.sgd", wd_fused.functional.sgd
    own = FusedSGD.__mro__[: FusedSGD.__mro__.index(torch.optim.SGD)]
    for name, found in [each for cls in own for each in vars(cls).items()]:
        if not name.startswith("_") and name != "profile_hook_step":
            yield f"FusedSGD.{name}", found


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), extraglobs={"FusedSGD": FusedSGD, "torch": torch})
    assert result.failed == 0 < result.attempted


@pytest.mark.parametrize(("name", "found"), list(public()))
def test_each_public_docstring_has_an_example(name: str, found: Any) -> None:
    assert ">>> " in (inspect.getdoc(found) or "")


def test_help_shows_formulas_as_one_reads_them() -> None:
    text = pydoc.plain(pydoc.render_doc(FusedSGD))
    assert "p ← p − lr · b" in text
    assert not [sign for sign in ("\\text", "\\cdot", ".. math", "&\\") if sign in text]
    assert "tail" not in inspect.getdoc(FusedSGD)  # type: ignore[operator]
