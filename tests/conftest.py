"""Settings that every test shares: hypothesis profiles, and what a test may not leave changed. Read by pytest."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Threads that wait for each other do not spin: where several processes share the processors, as under pytest-xdist, a
# small operation takes ten times as long otherwise. Read when torch is imported, here and in processes of tests' own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import quick_interpreter
import torch
from hypothesis import HealthCheck, settings

from wd_fused import backends, extension

# Read when Triton's kernels are imported. Tests that compile them do so in processes of their own; those that need a
# GPU are run without this file.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_COMMON = {
    "deadline": None,
    "print_blob": True,  # a failure prints the line that reproduces it
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
settings.register_profile("fewest", max_examples=4, **_COMMON)
settings.register_profile("few", max_examples=10, **_COMMON)
settings.register_profile("default", max_examples=60, **_COMMON)
settings.register_profile("thorough", max_examples=1000, **_COMMON)
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
# For kernels that are interpreted, some milliseconds a tile.
_FEWER = {"default": "fewest", "few": "fewest", "thorough": "default"}
settings.load_profile(_PROFILE)


@pytest.fixture
def threads() -> Iterator[int]:
    """The number of torch's threads, put back after the test."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


# What steps CPU tensors in a test of behaviour that all backends share: the CPU backend; the Triton backend with its
# kernel interpreted, and the tensors read in Python or in C++.
FUSED_BACKENDS = {
    "cpu": "cpu",
    "triton on the CPU": "triton",
    "triton read in C++": "triton",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fused_backend" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("some_backends")
        metafunc.parametrize(
            "fused_backend", mark.args if mark else list(FUSED_BACKENDS), indirect=True, scope="module"
        )


def why_not_interpreted() -> str | None:
    """Why Triton's kernel is not interpreted in this process; None if it is."""
    if (reason := backends.FUSED["triton"].unavailable()) is not None:
        return reason
    return None if backends.triton_kernels().INTERPRETED else "TRITON_INTERPRET=1 is not set: there is a GPU to test on"


@pytest.fixture(scope="module")
def fused_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that takes CPU tensors, with backend="auto" and when it is asked for by that name."""
    name = FUSED_BACKENDS[request.param]
    module = extension.load()
    if name != "cpu" and module is not None and module.multiply_add_rule() != "fused":
        pytest.skip("torch's own code does not fuse multiply-adds in this process, as a GPU does")
    if name == "triton" and (reason := why_not_interpreted()) is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        if name == "triton":
            quick_interpreter.install(patch)
            if request.param == "triton on the CPU":
                patch.setattr(backends.TritonBackend, "module", lambda self: None)
            settings.load_profile(_FEWER.get(_PROFILE, _PROFILE))
        patch.setitem(backends.PREFERENCE, "cpu", (name,))
        yield name
        settings.load_profile(_PROFILE)
