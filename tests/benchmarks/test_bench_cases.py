"""What the benchmarks compare: the cases, who takes part, and the kernels that are the limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import cases
from bench.cases import implementations
from bench.cases.implementations import COMPILED, FUSED, OPTIMI, ORDER, OURS, Absent, Implementation
from bench.cases.lineup import Lineup
from bench.measure import caches, interleaved, limit, measured


def test_a_case_that_must_not_be_cut_is_absent_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.many(2, 1000)
    monkeypatch.setattr(measured, "free_memory", lambda device: 4 * case.bytes_held)
    found = measured.measure(case, "cpu", (OURS,), smoke=True, full=False, uncut=True)
    assert found.case is case and set(found.seconds[OURS]) == {"step"}
    monkeypatch.setattr(measured, "free_memory", lambda device: 4 * case.bytes_held - 4)
    with pytest.raises(Absent, match="take more than 25% of the free memory"):
        measured.measure(case, "cpu", (OURS,), smoke=True, full=False, uncut=True)
    found = measured.measure(case, "cpu", (OURS,), smoke=True, full=False, cold=True)
    assert found.case.one_of == 2 and set(found.seconds[OURS]) == {"step", "cold"}


def test_models_have_as_many_parameters_as_their_authors_say() -> None:
    counted = {case.name: (len(case.shapes), case.elements) for case in cases.MODELS}
    assert counted["resnet50"] == (161, 25_557_032)
    assert counted["bert_large"] == (398, 336_226_108)
    assert counted["llama_3_8b"] == (291, 8_030_261_248)
    assert all(count > 100 for count, _ in counted.values())


def test_the_sweep_is_larger_than_all_last_level_caches_together(tmp_path: Path) -> None:
    for cpu in range(4):
        for level, size, shared in ((1, 32, f"{cpu}"), (2, 1024, f"{cpu}"), (3, 16384, "0-1" if cpu < 2 else "2-3")):
            index = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
            index.mkdir(parents=True)
            for name, text in (("level", level), ("size", f"{size}K"), ("shared_cpu_list", shared)):
                (index / name).write_text(f"{text}\n")
    assert caches.last_level_bytes(tmp_path) == 2 * 16384 * 1024
    assert caches.last_level_bytes(tmp_path / "nothing") == caches.ASSUMED_BYTES
    sweep = caches.Sweep()
    assert sweep._ones.nbytes == 2 * caches.last_level_bytes()
    sweep()
    assert sweep._sum == sweep._ones.numel()  # every element was read


def test_each_cold_step_comes_after_a_sweep() -> None:
    called: list[str] = []
    steps = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = interleaved.cold(steps, 5, lambda: called.append("sweep"))
    assert {name: len(own) for name, own in seconds.items()} == {"a": 5, "b": 5}
    assert called[::2] == ["sweep"] * 10 and sorted(called[1::2]) == ["a"] * 5 + ["b"] * 5


def test_a_case_that_is_too_large_keeps_its_tensors_and_says_what_is_left_of_each() -> None:
    case = next(case for case in cases.MODELS if case.name == "llama_3_8b")
    smaller = cases.fitted(case, 1 << 27, 1 << 40)
    assert len(smaller.shapes) == 291 and smaller.one_of == 64
    assert case.elements // 64 - 291 <= smaller.elements <= case.elements // 64 + 291
    assert smaller.elements <= 1 << 27 < 2 * smaller.elements
    assert smaller.title == "Llama-3-8B's 291 tensors, each 1/64 of it, 125 M elements"
    by_memory = cases.fitted(case, None, 12 << 30)
    assert by_memory.bytes_held <= 12 << 30 < 2 * by_memory.bytes_held
    assert cases.fitted(case, None, 1 << 40) is case
    assert cases.fitted(cases.HUGE, 1 << 20, 1 << 40).shapes == ((1 << 20,),)
    bare = cases.bare(case)
    assert bare.shapes == ((1,),) * 291 and bare.title == "Llama-3-8B's 291 tensors"


def test_parameters_and_gradients_are_filled_to_their_ends() -> None:
    case = cases.Case("some", "some", ((3, 5), (1 << 20,), (7,), (0,), ((1 << 20) + 3,)), dtype="bfloat16")
    for param in cases.parameters(case):
        for tensor in (param.detach(), param.grad):
            assert tensor is not None and tensor.dtype == torch.bfloat16
            assert bool(((tensor.abs() <= 1) & tensor.isfinite()).all())
            assert tensor.numel() == 0 or float((tensor == 0).float().mean()) < 0.2


def test_who_cannot_be_measured_has_a_reason() -> None:
    found, absent = implementations.available("cpu")
    assert [*found, *absent] and {*found, *absent} == set(ORDER) and not set(found) & set(absent)
    assert all(absent.values())
    assert OURS in found and "GPU" in absent[implementations.APEX]


def test_a_peer_that_fails_is_absent_with_its_error_and_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(params: object) -> torch.optim.Optimizer:
        raise ValueError("not today\nand not tomorrow")

    found, _ = implementations.available("cpu")
    monkeypatch.setattr("bench.cases.lineup.available", lambda device, full: ({**found, FUSED: broken}, {}))
    broken = Implementation(FUSED, {"": refuse})
    lineup = Lineup(cases.many(2, 3), "cpu", (OURS, FUSED))
    assert list(lineup.steps) == [OURS]
    assert lineup.absent == {FUSED: "fails here (ValueError: not today)"}
    monkeypatch.setattr(
        "bench.cases.lineup.available", lambda device, full: ({OURS: Implementation(OURS, {"": refuse})}, {})
    )
    with pytest.raises(ValueError, match="not today"):
        Lineup(cases.many(2, 3), "cpu", (OURS,))


def test_the_fastest_configuration_stands_for_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    class Slow(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            time.sleep(0.02)

    makers = {"slow": lambda params: Slow(params, lr=0.1), "fast": lambda params: torch.optim.SGD(params, lr=0.1)}
    several = Implementation(FUSED, makers)
    monkeypatch.setattr("bench.cases.lineup.available", lambda device, full: ({FUSED: several}, {}))
    lineup = Lineup(cases.many(2, 3), "cpu", (FUSED,))
    assert lineup.info[FUSED] == {"configuration": "fast"}


def test_compiling_for_minutes_is_left_out_with_the_reason() -> None:
    implementation = implementations.available("cpu")[0][COMPILED]
    assert implementation.why_not(cases.RESNET50) is None
    assert "half a minute" in str(implementation.why_not(cases.many(161, 8)))
    assert "minutes" in str(implementations.available("cpu", full=True)[0][COMPILED].why_not(cases.many(1_000, 64)))


def test_everybody_steps_the_same_tensors() -> None:
    case = cases.Case("two", "two", ((40,), (3, 7)))
    lineup = Lineup(case, "cpu", tuple(name for name in ORDER if name != COMPILED))
    addresses = [param.data_ptr() for param in lineup.params]
    for name, optimizer in lineup.optimizers.items():
        params = optimizer.param_groups[0]["params"]
        assert [param.data_ptr() for param in params] == addresses, name
        gradients = [param.grad.data_ptr() for param in params]
        assert (gradients == [param.grad.data_ptr() for param in lineup.params]) == (name != OPTIMI), name
        before = [param.detach().clone() for param in lineup.params]
        lineup.steps[name]()
        assert not any(torch.equal(a, b) for a, b in zip(before, lineup.params, strict=True)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_limits_kernels_read_and_write_every_byte_and_change_none(dtype: torch.dtype) -> None:
    try:
        kernels = limit.kernels("cpu")
    except Absent as reason:
        pytest.skip(str(reason))
    assert kernels.usable()
    lengths = (0, 1, 3, 100, 16_385, 200_001)
    generator = torch.Generator().manual_seed(1)

    def operand(shift: int) -> list[torch.Tensor]:
        """Tensors that begin ``shift`` elements behind an aligned address."""
        made = [torch.randint(0, 64, (n + shift,), generator=generator, dtype=torch.int16) for n in lengths]
        return [tensor.to(dtype)[shift:] for tensor in made]

    def memory(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.clone().view(torch.int16) for tensor in tensors]

    for variant in kernels.usable():
        for shifts in ((0, 0, 0), (1, 0, 3), (3, 5, 3), (0, 1, 0)):  # an even number: some go back and forth by turns
            p, g, b = (operand(shift) for shift in shifts)
            before = [memory(one) for one in (p, g, b)]
            kernels.bind(variant, p, g, b)()
            kernels.bind(variant, p, g, b)()
            for one, was in zip((p, g, b), before, strict=True):
                assert all(torch.equal(a, c) for a, c in zip(memory(one), was, strict=True)), kernels.names[variant]
            # With every bit of g let through it is or-ed into p and b: a byte that is left out is seen.
            kernels.bind(variant, p, g, b, mask=2**64 - 1)()
            for one, was in ((p, before[0]), (b, before[2])):
                expected = [a | c for a, c in zip(was, before[1], strict=True)]
                assert all(torch.equal(a, c) for a, c in zip(memory(one), expected, strict=True)), kernels.names[
                    variant
                ]
