"""The int8 momentum of the CUDA kernels: a quotient and a root that are only approximate round to the exact ones'
number, or are too near to a tie to tell, which csrc/cuda/cuda_state.cuh asks before. Run by pytest; needs no GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "cuda_state.cuh"
F = np.float32
ULP = 2.0**-23  # the errors that the PTX manual allows rcp.approx and sqrt.approx, relative to the result


def margin() -> float:
    found = re.search(r"kNearTie = (0x1p-\d+)f", SOURCE.read_text())
    assert found is not None
    return float.fromhex(found[1])


def exact(b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """to_int8 of csrc/update/options.h, of magnitudes."""
    return np.minimum(np.rint(np.sqrt(b / scale)), F(127))


def numbers(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales as a block has them, and numbers of the block: any, and some that lie as near to a tie as they can."""
    choose = np.random.default_rng(seed)
    largest = np.ldexp(choose.uniform(1, 2, count).astype(F), choose.integers(-80, 80, count)).astype(F)
    scale = largest / F(127 * 127)
    b = largest * choose.uniform(0, 1, count).astype(F) ** 2
    tie = choose.integers(0, 127, count) + 0.5
    near = (scale.astype(np.float64) * tie**2).astype(F)
    near = (near.view(np.int32) + choose.integers(-600, 601, count).astype(np.int32)).view(F)
    return np.where(choose.random(count) < 0.5, b, np.minimum(near, largest)), scale


@pytest.mark.parametrize("errors", [(-1, -1), (-1, 1), (0, 0), (1, -1), (1, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_an_approximate_root_is_the_exact_one_rounded_or_near_a_tie(seed, errors):
    b, scale = numbers(seed, 2_000_000)
    of_reciprocal, of_root = errors
    inverse = (1 / scale.astype(np.float64) * (1 + of_reciprocal * ULP)).astype(F)
    root = (np.sqrt((b * inverse).astype(np.float64)) * (1 + of_root * ULP)).astype(F)
    shifted = root + F(12582912)
    rounded = shifted - F(12582912)
    is_near = np.abs(root - rounded) > F(0.5 - margin())
    wrong = ~is_near & (rounded != exact(b, scale))
    assert not wrong.any(), f"seed {seed}: {b[wrong][0].hex()} by {scale[wrong][0].hex()}"
    assert 0.01 < is_near.mean() < 0.9, "some of both"


def test_a_margin_of_nothing_would_be_seen():
    b, scale = numbers(0, 2_000_000)
    root = np.sqrt(b * (F(1) / scale)) * F(1 + ULP)
    assert (np.rint(root) != exact(b, scale)).any()
