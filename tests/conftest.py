"""Settings that every test shares: hypothesis profiles, and what a test may not leave changed. Read by pytest."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Threads that wait for each other do not spin: where several processes share the processors, as under pytest-xdist, a
# small operation takes ten times as long otherwise. Read when torch is imported, here and in processes of tests' own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

from wd_fused import backends

_COMMON = {
    "deadline": None,
    "print_blob": True,  # a failure prints the line that reproduces it
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
settings.register_profile("fewest", max_examples=4, **_COMMON)
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


# What steps CPU tensors in a test of behaviour that all backends share.
FUSED_BACKENDS = {"cpu": "cpu"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fused_backend" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("some_backends")
        names = [name for name in FUSED_BACKENDS if mark is None or name in mark.args]
        metafunc.parametrize("fused_backend", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def fused_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that takes CPU tensors, with backend="auto" and when it is asked for by that name."""
    name = FUSED_BACKENDS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.PREFERENCE, "cpu", (name,))
        yield name
