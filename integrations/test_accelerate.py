"""FusedSGD through Hugging Face Accelerate, beside torch.optim.SGD through the same. Run by pytest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate_digits import prepared, train
from torch import Tensor

from integrations.conftest import Evidence, fused, momentum_buffers, run_example
from wd_fused import FusedSGD

FRAMEWORK = "accelerate"


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps its settings for a process."""
    yield
    AcceleratorState._reset_state(True)


def changed(parts: list[Any]) -> list[Tensor]:
    """What training changes."""
    model, optimizer = parts[:2]
    assert isinstance(optimizer, AcceleratedOptimizer)
    if isinstance(optimizer.optimizer, FusedSGD):
        fused(optimizer)
    return [tensor.clone() for tensor in [*model.state_dict().values(), *momentum_buffers(optimizer)]]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_training_loop(mixed_precision: str, accumulated: int, evidence: Evidence) -> None:
    """prepare, accumulate, backward, clip_grad_norm_ and a prepared scheduler; also with mixed_precision="bf16\""""
    results = []
    for kind in (FusedSGD, torch.optim.SGD):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated, mixed_precision=mixed_precision)
        parts = prepared(accelerator, kind)
        train(accelerator, *parts)
        results.append(changed(parts))
        assert parts[3].get_last_lr()[0] < 0.1
    evidence.same_bits(*results)


@pytest.mark.parametrize("saved_by", [FusedSGD, torch.optim.SGD])
@pytest.mark.parametrize("loaded_by", [FusedSGD, torch.optim.SGD])
def test_saved_and_loaded(saved_by: Any, loaded_by: Any, evidence: Evidence, tmp_path: Path) -> None:
    """save_state, then load_state in either class, against going on without"""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    parts = prepared(accelerator, saved_by)
    train(accelerator, *parts)
    accelerator.save_state(str(tmp_path))
    train(accelerator, *parts)
    whole = changed(parts)
    accelerator.free_memory()
    parts = prepared(accelerator, loaded_by)
    accelerator.load_state(str(tmp_path))
    train(accelerator, *parts)
    evidence.same_bits(changed(parts), whole)


def test_options(evidence: Evidence) -> None:
    """max_grad_norm of FusedSGD instead of clip_grad_norm_, with accumulate"""
    results, norm = [], None
    for kind, options in ((FusedSGD, {"max_grad_norm": 0.2}), (torch.optim.SGD, {})):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        parts = prepared(accelerator, kind, **options)
        clip = accelerator.clip_grad_norm_
        accelerator.clip_grad_norm_ = (  # type: ignore[method-assign]
            (lambda *_: None) if options else (lambda params, _, clip=clip: clip(params, 0.2))
        )
        train(accelerator, *parts)
        results.append(changed(parts))
        norm = fused(parts[1]).grad_norm if options else norm
    assert norm is not None and norm > 0.2, "nothing was clipped at the end"
    evidence.near(*results, 1e-3)


def test_the_example(tmp_path: Path) -> None:
    """examples/accelerate_digits.py: trains, saves, loads"""
    assert "the same: True" in run_example("accelerate_digits.py", tmp_path)
