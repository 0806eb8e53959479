"""Settings that every test shares: hypothesis profiles, and what a test may not leave changed. Read by pytest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Threads that wait for each other do not spin: where several processes share the processors, as under pytest-xdist, a
# small operation takes ten times as long otherwise. Read when torch is imported, here and in processes of tests' own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import strategies
import torch
from hypothesis import HealthCheck, settings

from wd_fused import backends

HERE = Path(__file__).parent
_COMMON = {
    "deadline": None,
    "print_blob": True,  # a failure prints the line that reproduces it
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
settings.register_profile("fewest", max_examples=4, **_COMMON)
settings.register_profile("few", max_examples=10, **_COMMON)
settings.register_profile("default", max_examples=60, **_COMMON)
settings.register_profile("thorough", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fewest" if torch.cuda.is_available() else "default"))


@pytest.fixture
def threads() -> Iterator[int]:
    """The number of torch's threads, put back after the test."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


# What steps the tensors of strategies.DEVICE in a test of behaviour that all backends share: in a plain run the CPU's,
# over tensors on the CPU; on the simulated GPU, a GPU's over its own.
ON_A_GPU = torch.cuda.is_available()
FUSED_BACKENDS = ("cuda", "triton") if ON_A_GPU else ("cpu",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fused_backend" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("some_backends")
        names = [name for name in FUSED_BACKENDS if mark is None or name in mark.args]
        metafunc.parametrize("fused_backend", names, indirect=True, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU, of tests/bits those that step by its backends; the others are a plain run's."""

    def is_anothers(item: pytest.Item) -> bool:
        chosen = item.callspec.params.get("fused_backend") if hasattr(item, "callspec") else None
        return ON_A_GPU and (HERE / "bits") in item.path.parents and chosen not in FUSED_BACKENDS

    config.hook.pytest_deselected(items=[item for item in items if is_anothers(item)])
    items[:] = [item for item in items if not is_anothers(item)]


@pytest.fixture(scope="module")
def fused_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that takes tensors of strategies.DEVICE, with backend="auto" and when it is asked for."""
    name = str(request.param)
    if ON_A_GPU and (reason := backends.FUSED[name].unavailable()) is not None:
        pytest.skip(f"{name}: {reason}")
    device = torch.device("cuda" if ON_A_GPU else "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "DEVICE", device)
        patch.setitem(backends.PREFERENCE, device.type, (name,))
        yield name
