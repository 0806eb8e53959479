"""Settings that every test shares: hypothesis profiles, and what a test may not leave changed. Read by pytest."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {
    "deadline": None,
    "print_blob": True,  # a failure prints the line that reproduces it
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
settings.register_profile("few", max_examples=10, **_COMMON)
settings.register_profile("default", max_examples=60, **_COMMON)
settings.register_profile("thorough", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def threads() -> Iterator[int]:
    """The number of torch's threads, put back after the test."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)
