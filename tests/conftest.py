"""Settings that every test shares: hypothesis profiles, and what a test may not leave changed. Read by pytest."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from cuda_on_cpu_backend import CudaOnCpu
from hypothesis import HealthCheck, settings

from wd_fused import backends, extension

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


# What steps CPU tensors in a test of behaviour that all backends share: the CPU backend, and the CUDA backend with its
# kernel compiled for the CPU.
FUSED_BACKENDS = {"cpu": "cpu", "cuda on the CPU": "cuda"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fused_backend" in metafunc.fixturenames:
        alone = metafunc.definition.get_closest_marker("cpu_backend") is not None
        metafunc.parametrize("fused_backend", ["cpu"] if alone else list(FUSED_BACKENDS), indirect=True, scope="module")


@pytest.fixture(scope="module")
def fused_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that takes CPU tensors, with backend="auto" and when it is asked for by that name."""
    name = FUSED_BACKENDS[request.param]
    module = extension.load()
    if name == "cuda" and module is not None and module.multiply_add_rule() != "fused":
        pytest.skip("torch's own code does not fuse multiply-adds in this process, as a GPU does")
    with pytest.MonkeyPatch.context() as patch:
        if name == "cuda":
            patch.setitem(backends.FUSED, "cuda", CudaOnCpu())
            patch.setitem(backends.PREFERENCE, "cpu", ("cuda",))
        yield name
