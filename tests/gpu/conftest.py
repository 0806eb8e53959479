"""What every test here shares: the mark, the reason to skip, and a GPU left as it was found. Read by pytest.

`make gpu-check` runs this folder with --confcutdir, so that it needs nothing but torch and pytest.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import gpu_support
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":  # this hook sees the tests of all folders
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.parent.name == "gpu" and (reason := gpu_support.why_skipped()) is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def clean_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Waits for the GPU after each test: what a kernel broke is that test's, and breaks the GPU for all that follow."""
    yield
    try:
        gpu_support.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the GPU cannot be used any more after {request.node.nodeid}: {error}", returncode=4)


@pytest.fixture
def much_memory() -> Iterator[None]:
    """Gives back what a test has taken, for the next one that needs much."""
    gpu_support.empty_cache()
    yield
    gc.collect()
    gpu_support.empty_cache()
