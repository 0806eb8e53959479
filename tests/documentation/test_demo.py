"""The digits example as a user meets it: run in its own process, judged by its exit status and by what it leaves."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

for module in ("sklearn", "matplotlib", "rich", "tqdm"):
    pytest.importorskip(module, reason="the example needs the extra 'demo'")

from matplotlib.image import imread  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_digits.py"
PLOTS = [
    "clip_and_average.png",
    "decay_and_penalty.png",
    "fused_and_torch.png",
    "low_precision.png",
    "what_decays.png",
]
TERMINAL = {**os.environ, "COLUMNS": "80", "PYTHONUTF8": "1"}

# Put before the example in its own process: what it imports is changed before it starts.
RUN_EXAMPLE = f"""
import runpy
sys.argv[0] = {str(EXAMPLE)!r}
sys.path.insert(0, {str(EXAMPLE.parent)!r})
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""


class Demo(NamedTuple):
    folder: Path
    printed: str
    said_meanwhile: str
    results: dict[str, Any]


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, cwd=folder, env=TERMINAL, capture_output=True, encoding="utf-8", timeout=600)


def no_constant(name: str) -> None:
    raise AssertionError(f"results.json holds {name}, which is not JSON")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    done = run(EXAMPLE, "--quick", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (folder / "out" / "results.json").read_text(encoding="utf-8")
    return Demo(folder, done.stdout, done.stderr, json.loads(text, parse_constant=no_constant))


def test_writes_its_files_to_out_and_nowhere_else(demo: Demo) -> None:
    assert [path.name for path in demo.folder.iterdir()] == ["out"]
    assert sorted(path.name for path in (demo.folder / "out").iterdir()) == sorted([*PLOTS, "results.json"])


def test_without_a_terminal_each_part_is_named_as_it_begins(demo: Demo) -> None:
    begun = [line[:3] for line in demo.said_meanwhile.splitlines() if line.endswith(" epochs")]
    assert begun == ["(a)", "(b)", "(c)", "(d)", "(e)"]


def test_fused_sgd_has_the_bits_and_losses_of_torch(demo: Demo) -> None:
    bits = demo.results["bits"]
    assert bits["differing_elements"]["FusedSGD"] == 0
    assert bits["losses"]["FusedSGD"] == bits["losses"]["torch.optim.SGD"]
    assert bits["compared_elements"] > 2 * bits["parameters"] > 0  # parameters, momentum buffers, norm statistics
    assert "the same loss in every epoch, the same bits in all" in " ".join(demo.printed.split())


def test_every_optimizer_learns_and_is_timed(demo: Demo) -> None:
    bits = demo.results["bits"]
    assert list(bits["losses"]) == ["FusedSGD", "torch.optim.SGD", "torch.optim.SGD(fused=True)"]
    for name, losses in bits["losses"].items():
        assert len(losses) == demo.results["settings"]["epochs"] == 2
        assert losses[-1] < 0.5 * losses[0]
        assert bits["validation_accuracy"][name] > 0.8
        step = bits["step_microseconds"][name]
        assert 0 < step["lower"] <= step["median"] <= step["upper"]


def test_a_penalty_of_squares_trains_as_weight_decay_does(demo: Demo) -> None:
    penalty = demo.results["penalty"]
    assert max(penalty["difference_of_losses"]["float64"]) < 1e-12
    assert max(penalty["difference_of_losses"]["float32"]) < 1e-4
    apart = abs(penalty["losses"]["weight_decay = 2λ"][-1] - penalty["losses"]["neither"][-1])
    assert apart > max(
        penalty["difference_of_losses"]["float32"]
    )  # the decay itself shows; the comparison says something


def test_l1_leaves_more_small_weights_than_anything_else(demo: Demo) -> None:
    fractions = demo.results["penalty"]["small_weights_fraction"]
    l1 = fractions.pop("λ·Σ|w| in the loss")
    assert all(0 <= fraction < l1 <= 1 for fraction in fractions.values())
    for counts in demo.results["penalty"]["weight_histogram"].values():
        assert sum(counts) == sum(demo.results["penalty"]["weight_histogram"]["neither"]) > 10_000


def test_decay_shrinks_what_it_is_applied_to(demo: Demo) -> None:
    groups = demo.results["groups"]
    assert all(len(accuracies) == len(groups["seeds"]) == 2 for accuracies in groups["validation_accuracy"].values())
    nothing, everything, weights = (groups["norms"][scheme] for scheme in ("nothing", "everything", "weights only"))
    assert everything["weights"] < nothing["weights"] and weights["weights"] < nothing["weights"]
    for kind in ("biases", "norm-layer scales"):
        assert everything[kind] < weights[kind]


def test_one_pass_has_the_bits_of_clipping_stepping_and_averaging_in_sequence(demo: Demo) -> None:
    found = demo.results["options"]
    one_pass, in_sequence, reference = found["losses"]
    assert found["differing_elements"][one_pass] == 0 < found["compared_elements"]
    for values in (found["losses"], found["validation_accuracy"], found["average_accuracy"]):
        assert values[one_pass] == values[reference] and len(values[one_pass]) == 2
    assert found["losses"][in_sequence] == pytest.approx(found["losses"][one_pass], rel=0.2)  # apart by rounding
    assert "the same bits in all" in " ".join(demo.printed.split("(d)")[1].split())


def test_the_norm_is_that_of_float64_rounded_once_and_some_batches_are_clipped(demo: Demo) -> None:
    found = demo.results["options"]
    assert found["norm_error"]["FusedSGD"] <= 2**-24
    assert 0 < sum(norm > found["max_norm"] for norm in found["norms"]) <= len(found["norms"])


@pytest.mark.parametrize("name", ["perceptron", "transformer"])
def test_plain_bfloat16_stalls_and_nothing_else_does(demo: Demo, name: str) -> None:
    model = demo.results["low_precision"]["models"][name]
    learnt = {variant: losses[0] - losses[-1] for variant, losses in model["losses"].items()}
    float32, plain = learnt.pop("float32"), learnt.pop("bfloat16")
    assert 0 < plain < 0.75 * float32
    assert learnt and all(value == pytest.approx(float32, rel=0.05) for value in learnt.values())
    assert len(model["updates_lost"]) == model["epochs"] and all(0.5 < share < 1 for share in model["updates_lost"])


@pytest.mark.parametrize("name", ["perceptron", "transformer"])
def test_masters_have_the_bits_of_float32_training_on_the_same_gradients(demo: Demo, name: str) -> None:
    model = demo.results["low_precision"]["models"][name]
    assert model["masters"] == {
        variant: {"differing": 0, "compared": model["parameters"]} for variant in ("full masters", "split masters")
    }


def test_bytes_are_those_that_the_options_name(demo: Demo) -> None:
    counts = demo.results["low_precision"]["models"]["perceptron"]["bytes_an_element"]
    scales = counts["split, int8 momentum"].pop("momentum_scale")
    assert 4 / 128 <= scales < 1.1 * 4 / 128  # a last block may be a part of one
    assert counts == {
        "float32": {"parameter": 4, "momentum_buffer": 4},
        "bfloat16": {"parameter": 2, "momentum_buffer": 2},
        "full masters": {"parameter": 2, "momentum_buffer": 4, "master": 4},
        "split masters": {"parameter": 2, "momentum_buffer": 4, "remainder": 2},
        "split24 masters": {"parameter": 2, "momentum_buffer": 4, "remainder": 1},
        "split, int8 momentum": {"parameter": 2, "momentum_buffer": 1, "remainder": 2},
        "Kahan summation": {"parameter": 2, "momentum_buffer": 2, "compensation": 2},
        "stochastic rounding": {"parameter": 2, "momentum_buffer": 2},
    }


def test_it_ends_with_what_was_gained_and_where_the_pictures_are(demo: Demo) -> None:
    bits, step, share, _, pictures = demo.printed.rstrip().splitlines()[-5:]
    assert re.fullmatch(r"Bits: 0 of [\d,]+ elements differ from torch.optim.SGD's.", bits)
    assert re.fullmatch(r"Step: torch.optim.SGD takes [\d.]+ times as long as FusedSGD.", step)
    assert re.fullmatch(r"Share of an iteration: [\d.]+% with FusedSGD, [\d.]+% with torch.optim.SGD.", share)
    assert pictures.startswith("Plots and results.json are in out/.")


@pytest.mark.parametrize("name", PLOTS)
def test_plots_are_pictures_of_a_readable_size(demo: Demo, name: str) -> None:
    picture = imread(demo.folder / "out" / name)
    height, width, channels = picture.shape
    assert height >= 400 and width >= 1000 and channels in (3, 4)
    ink = (picture[..., :3].min(axis=-1) < 0.9).mean()
    assert 0.005 < ink < 0.9  # neither blank nor a block
    assert len({tuple(pixel) for pixel in picture[::4, ::4, :3].reshape(-1, 3)}) > 10


def test_a_picture_says_of_each_bar_what_the_table_says_of_it(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    report = importlib.import_module("digits_options_report")
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    report.draw_options(demo.results["options"], tmp_path / "unused.png")
    [figure] = figures
    bars = figure.axes[2]
    said = {
        label.get_text().split(",")[0]: note.get_text()
        for label, note in zip(bars.get_yticklabels(), bars.texts, strict=True)
    }
    differing = demo.results["options"]["differing_elements"]
    assert said["FusedSGD"].endswith("\n0 differ") and differing[report.ONE_PASS] == 0
    assert said["clip_grad_norm_"].endswith(f"\n{differing[report.IN_SEQUENCE]:,} differ")
    assert f"{demo.results['options']['compared_elements']:,} elements" in bars.get_title()


def test_the_tables_fit_a_terminal_of_80_columns_uncut(demo: Demo) -> None:
    assert max(len(line) for line in demo.printed.splitlines()) <= 80
    assert "…" not in demo.printed


def test_one_differing_bit_ends_it_with_status_1(tmp_path: Path) -> None:
    one_bit_off = """
import sys, torch, wd_fused
class OneBitOff(wd_fused.FusedSGD):
    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            first = self.param_groups[0]["params"][0].view(-1)[:1]
            first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
wd_fused.FusedSGD = OneBitOff
"""
    done = run("-c", one_bit_off + RUN_EXAMPLE, "--epochs", "1", "--seeds", "1", folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    said = {"bits": "FusedSGD differs from torch.optim.SGD", "options": "The one pass differs from torch's sequence"}
    for part, sentence in said.items():
        assert sentence in " ".join(done.stdout.split())
        assert next(iter(results[part]["differing_elements"].values())) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: 0 is not a positive number"),
        (["--seeds", "-1"], "argument --seeds: -1 is not a positive number"),
        (["--out", __file__], "name a folder that can be written"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(EXAMPLE.stem).main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
