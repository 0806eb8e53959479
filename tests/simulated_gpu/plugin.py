"""A plugin of pytest: tests run on the simulated GPU, each with a seed of its own, and whatever goes wrong on it
is the fault of the test that asked for it.

SIMULATED_GPU_SEED=N repeats a run; each test's seed is made of it and the test's name.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import control
from .control import WHY_NOT
from .start import start

SEED = "SIMULATED_GPU_SEED"
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(SEED, str(random.SystemRandom().randrange(2**32)))  # the workers of xdist inherit it
    if WHY_NOT not in os.environ:
        start()


def pytest_report_header() -> str:
    if WHY_NOT in os.environ:
        return f"simulated GPU: not built: {os.environ[WHY_NOT]}"
    return f"simulated GPU: {SEED}={os.environ[SEED]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := os.environ.get(WHY_NOT):
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"the simulated GPU was not built: {reason}"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    if WHY_NOT not in os.environ:
        control.set_seed(int(os.environ[SEED]) ^ zlib.crc32(item.nodeid.encode()))
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    if WHY_NOT in os.environ:
        return
    import torch  # after tests/conftest.py

    for device in reversed(range(torch.cuda.device_count())):
        torch.cuda.set_stream(torch.cuda.default_stream(device))  # where a capture fails, torch leaves its own
    faults = ""
    if (left := control.take_last_error()) and item.path.parent != HERE:  # CUDA's own functions leave them there
        faults = f"error {left} is left for whoever asks cudaGetLastError() next: torch's next check\n"
    control.finish()
    control.take_last_error()
    if faults := faults + control.take_faults():
        control.reset()
        item.add_report_section("call", "simulated GPU", faults)
        if outcome.excinfo is None:
            outcome.force_exception(pytest.fail.Exception(f"on the simulated GPU:\n{faults}", pytrace=False))
