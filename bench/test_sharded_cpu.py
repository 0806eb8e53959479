"""A step over DTensors, as FSDP2's parameters are: what it costs before an element is touched. `make bench`.

One process stands for every rank: SGD communicates nothing, so that a rank's step is that of its own shards. Beside
them what int8 momentum and stochastic rounding take, whose blocks and random numbers are those of the whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench import cases
from bench.cases import OPTIONS, Case
from bench.cases.implementations import FOREACH, FUSED, LOOP, OURS, available
from bench.conftest import tell
from bench.measure.interleaved import Steps, Workload

CASE = cases.SHARDED
IN_BFLOAT16 = dataclasses.replace(
    CASE, name=f"{CASE.name}, bfloat16", title=f"{CASE.title}, bfloat16", dtype="bfloat16"
)
# What depends on where in the whole a shard lies. tail: options, as results call them.
OF_PLACES: dict[Case, tuple[dict[str, str], dict[str, str]]] = {
    CASE: ({"tail": "int8", "tail_title": 'momentum_dtype="int8"'}, {"momentum_dtype": "int8"}),
    IN_BFLOAT16: ({"tail": "stochastic", "tail_title": 'rounding="stochastic"'}, {"rounding": "stochastic"}),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A workload's rows follow one another, so that one workload at a time is in memory."""
    rows: list[tuple[Case, str, dict[str, str]]] = []
    for case, (told, _) in OF_PLACES.items():
        rows += [*((case, name, {}) for name in (OURS, FUSED, FOREACH, LOOP)), (case, OURS, told)]
    ids = [f"{case.dtype}-{told.get('tail', name)}" for case, name, told in rows]
    metafunc.parametrize(("case", "implementation", "told"), rows, ids=ids)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("this torch is built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workload_of(one_rank: None, request: pytest.FixtureRequest) -> Callable[[Case], Workload]:
    """The measured workload of a case; only the last one asked for is kept."""
    smoke = request.config.getoption("smoke")
    return functools.lru_cache(1)(lambda case: _workload(case, smoke))


def _workload(case: Case, smoke: bool) -> Workload:
    """Of those implementations that can step DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from wd_fused import FusedSGD

    mesh = init_device_mesh("cpu", (1,))
    params = []
    for tensor in cases.parameters(case):
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
    told, options = OF_PLACES[case]
    steps[told["tail"]] = FusedSGD(params, **OPTIONS, **options, backend="cpu").step
    return Workload(case, steps, smoke)


def test_sharded(
    benchmark: Any,
    smoke: bool,
    skip_absent: Any,
    workload_of: Callable[[Case], Workload],
    case: Case,
    implementation: str,
    told: dict[str, str],
) -> None:
    workload, name = workload_of(case), told.get("tail", implementation)
    if name not in workload.steps:
        skip_absent("cpu", implementation, "sharded", None, "it has no rule for DTensors on a CPU")
    tell(benchmark, "sharded", "cpu", case, implementation, {"step": workload.seconds[name]}, **told)
    benchmark.pedantic(
        workload.steps[name], rounds=2 if smoke else 5, iterations=workload.iterations[name], warmup_rounds=1
    )
