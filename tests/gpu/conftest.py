"""What every test here shares: the marks, the reasons to skip, the backend under test, and a GPU left as it was found.
Read by pytest.

`make gpu-check` runs this folder with --confcutdir, so that it needs nothing but torch and pytest.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import gpu_support
import pytest

from wd_fused import backends

# What a test runs over, unless its mark gpu_backend says otherwise. The Triton backend's tests bear the mark triton, so
# that gpu_check can run them in a process of their own.
GPU_BACKENDS = ("cuda", "triton")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu_backend(*names): what to run over: cuda, triton")
    config.addinivalue_line("markers", "triton: steps by the Triton backend")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "gpu_backend" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("gpu_backend")
        chosen = GPU_BACKENDS if mark is None else mark.args
        marks = {name: () if name == "cuda" else pytest.mark.triton for name in chosen}
        metafunc.parametrize("gpu_backend", [pytest.param(n, marks=m) for n, m in marks.items()], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":  # this hook sees the tests of all folders
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.parent.name == "gpu" and (reason := gpu_support.why_skipped()) is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def gpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend that steps what is on the GPU: with backend="auto", and by gpu_support.fused()."""
    name = request.param
    if (reason := gpu_support.why_not_usable(name)) is not None:
        pytest.skip(f"{name}: {reason}")
    monkeypatch.setitem(backends.PREFERENCE, gpu_support.DEVICE.type, (name,))
    return str(name)


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
