"""A step over DTensors, as FSDP2's parameters are: what it costs before an element is touched. `make bench`.

One process stands for every rank: SGD communicates nothing, so that a rank's step is that of its own shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench import cases
from bench.cases.implementations import FOREACH, FUSED, LOOP, OURS, available
from bench.conftest import tell
from bench.measure.interleaved import Steps, Workload

CASE = cases.SHARDED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("implementation", (OURS, FUSED, FOREACH, LOOP))


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("this torch is built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workload(one_rank: None, request: pytest.FixtureRequest) -> Workload:
    """Of those implementations that can step DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    params = []
    for tensor in cases.parameters(CASE):
        assert tensor.grad is not None
        param = torch.nn.Parameter(distribute_tensor(tensor.detach(), mesh, [Shard(0)]))
        param.grad = distribute_tensor(tensor.grad, mesh, [Shard(0)])
        params.append(param)
    steps: Steps = {}
    found, _ = available("cpu")
    for name in (OURS, FUSED, FOREACH, LOOP):
        step: Callable[[], object] = found[name].makers[""](params).step
        try:
            step()
        except NotImplementedError:  # torch has no sharding rule for its fused operator
            continue
        steps[name] = step
    return Workload(CASE, steps, request.config.getoption("smoke"))


def test_sharded(benchmark: Any, smoke: bool, skip_absent: Any, workload: Workload, implementation: str) -> None:
    if implementation not in workload.steps:
        skip_absent("cpu", implementation, "sharded", None, "it has no rule for DTensors on a CPU")
    tell(benchmark, "sharded", "cpu", CASE, implementation, {"step": workload.seconds[implementation]})
    benchmark.pedantic(
        workload.steps[implementation],
        rounds=2 if smoke else 5,
        iterations=workload.iterations[implementation],
        warmup_rounds=1,
    )
