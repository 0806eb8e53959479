"""Tables and plots of parts (d) and (e) of the digits example, from its results alone. Called by train_digits.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from digits_report import BLUE, GREEN, GREY, ORANGE, OURS, PURPLE, label_epochs, new_table, save
from matplotlib.axes import Axes
from rich.table import Table

ONE_PASS, IN_SEQUENCE, NORM_IN_FLOAT64 = "FusedSGD, one pass", "torch, three calls", "torch, norm in float64"
FLOAT32, PLAIN = "float32", "bfloat16"


def same_as_torch(found: dict[str, Any]) -> bool:
    """Whether the one pass has the bits of torch's sequence, where that clips by the norm as it should be."""
    same_losses = found["losses"][ONE_PASS] == found["losses"][NORM_IN_FLOAT64]
    return bool(found["differing_elements"][ONE_PASS] == 0 and same_losses)


# ---- tables


def tables(results: dict[str, Any]) -> list[tuple[Table, list[str]]]:
    """Each with its captions."""
    found, precision = results["options"], results["low_precision"]
    return [
        (options_table(found), options_captions(found)),
        (precision_table(precision), precision_captions(precision)),
    ]


def options_table(found: dict[str, Any]) -> Table:
    title = f"(d) Clip to norm {found['max_norm']:g}, step, average with decay {found['ema_decay']:g}"
    columns = ("last\nloss", "valid.\naccuracy", "of the\naverage", "differing\nelements", "median\nµs")
    table = new_table(title, *columns)
    for name, losses in found["losses"].items():
        step = found["step_microseconds"].get(name)
        table.add_row(
            name,
            f"{losses[-1]:.6f}",
            f"{found['validation_accuracy'][name][-1]:.2%}",
            f"{found['average_accuracy'][name][-1]:.2%}",
            f"{found['differing_elements'][name]:,}" if name != NORM_IN_FLOAT64 else "reference",
            f"{step['median']:.1f}" if step else "",
        )
    return table


def options_captions(found: dict[str, Any]) -> list[str]:
    elements = f"{found['compared_elements']:,} elements (parameters, momentum buffers, norm statistics, average)"
    if same_as_torch(found):
        verdict = f"One pass and torch with the norm in float64: the same bits in all {elements}."
    else:
        differing = found["differing_elements"][ONE_PASS]
        verdict = f"[bold red]The one pass differs from torch's sequence[/] in {differing:,} of {elements}."
    step = {name: times["median"] for name, times in found["step_microseconds"].items()}
    clipped = sum(norm > found["max_norm"] for norm in found["norms"])
    return [
        verdict,
        f"torch sums the norm in float32: off by up to {found['norm_error']['torch']:.1e} of it; FusedSGD in float64, "
        f"rounded once: by {found['norm_error']['FusedSGD']:.1e}. So torch's own coefficients have other last bits.",
        f"clip_grad_norm_, SGD and AveragedModel together take {step[IN_SEQUENCE] / step[ONE_PASS]:.1f} times as long "
        f"as the one pass. {clipped} of {len(found['norms'])} batches were clipped.",
    ]


def precision_table(precision: dict[str, Any]) -> Table:
    columns = ["bytes an\nelement"]
    for name in precision["models"]:
        columns += [f"{name}:\nloss", "\naccuracy"]
    table = new_table("(e) bfloat16 parameters where updates are small", *columns)
    first = next(iter(precision["models"].values()))
    for variant in first["losses"]:
        cells = [f"{sum(first['bytes_an_element'][variant].values()):.2f}"]
        for model in precision["models"].values():
            cells += [f"{model['losses'][variant][-1]:.4f}", f"{model['validation_accuracy'][variant]:.1%}"]
        table.add_row(variant, *cells)
    return table


def precision_captions(precision: dict[str, Any]) -> list[str]:
    captions = [
        "Bytes of the parameter and of what the optimizer keeps of it, counted from the tensors of the perceptron. "
        "Losses are over all training images, accuracies over the validation images. All but float32 compute the whole "
        "model in bfloat16: that, too, separates them from it.",
    ]
    for name, model in precision["models"].items():
        lost = model["updates_lost"]
        captions.append(
            f"{name}: {model['parameters']:,} parameters, {model['epochs']} epochs, learning rate "
            f"{model['learning_rate']:g}, momentum {precision['momentum']:g}. Of plain bfloat16's updates rounding has "
            f"lost {lost[0]:.0%} in epoch 1, {lost[-1]:.0%} in epoch {len(lost)}: optimizer.last_step says so, with "
            f"report_numerics=True. {stall(model)} Larger learning rates lose fewer."
        )
    for variant in next(iter(precision["models"].values()))["masters"]:
        counts = [model["masters"][variant] for model in precision["models"].values()]
        same = " and ".join(f"{count['differing']:,} of {count['compared']:,}" for count in counts)
        captions.append(
            f"{variant}: of its float32 weights {same} differ in any bit from those of torch.optim.SGD in float32 with "
            "the same gradients."
        )
    return captions


def stall(model: dict[str, Any]) -> str:
    """When plain bfloat16's loss stopped to fall as float32's does, and what the report said then."""
    behind = [a > 1.1 * b for a, b in zip(model["losses"][PLAIN], model["losses"][FLOAT32], strict=True)]
    if not behind[-1]:
        return "Its loss ends within 10% of float32's."
    first = len(behind) - behind[::-1].index(False) if False in behind else 0
    share = model["updates_lost"][first]
    return f"From epoch {first + 1} on its loss is more than 10% above float32's: {share:.0%} were lost in that epoch."


# ---- plots


def draw_plots(results: dict[str, Any], folder: Path) -> None:
    draw_options(results["options"], folder / "clip_and_average.png")
    draw_precision(results["low_precision"], folder / "low_precision.png")


def draw_options(found: dict[str, Any], path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=[1.2, 1, 1]
    )
    left.plot(range(1, len(found["norms"]) + 1), found["norms"], color=BLUE, linewidth=0.9)
    left.axhline(found["max_norm"], color=ORANGE, linewidth=1.5, label=f"max_grad_norm = {found['max_norm']:g}")
    left.set_yscale("log")
    left.set_xlabel("batch")
    left.set_ylabel("norm of all gradients")
    left.set_title("optimizer.grad_norm")
    left.grid(alpha=0.25)
    left.legend(frameon=False, loc="upper right")

    epochs = range(1, len(found["losses"][ONE_PASS]) + 1)
    for values, color, marker, label in (
        (found["validation_accuracy"], ORANGE, "s", "the model as trained"),
        (found["average_accuracy"], BLUE, "o", "its average, by swap_ema()"),
    ):
        middle.plot(epochs, [100 * a for a in values[ONE_PASS]], color=color, marker=marker, markersize=4, label=label)
    label_epochs(middle, "validation accuracy (%)", f"ema_decay = {found['ema_decay']:g}")

    times = found["step_microseconds"]
    names = {IN_SEQUENCE: "clip_grad_norm_,\nSGD,\nAveragedModel", ONE_PASS: "FusedSGD,\none pass"}
    medians = [times[name]["median"] for name in names]
    whiskers = [
        [times[n]["median"] - times[n]["lower"] for n in names],
        [times[n]["upper"] - times[n]["median"] for n in names],
    ]
    right.barh(list(names.values()), medians, xerr=whiskers, color=[GREY, OURS], error_kw={"capsize": 3})
    for row, name in enumerate(names):
        at = (times[name]["upper"], row)
        said = f"{times[name]['median']:.0f} µs\n{found['differing_elements'][name]:,} differ"
        right.annotate(said, at, (6, 0), textcoords="offset points", va="center")
    right.set_xlim(0, 1.5 * max(times[name]["upper"] for name in names))
    right.set_xlabel("time of a step (µs): median and quartiles")
    right.set_title(
        f"of {found['compared_elements']:,} elements, those that differ\nfrom torch with the norm in float64"
    )
    save(figure, path)


STYLES: dict[str, dict[str, Any]] = {
    FLOAT32: {"color": "#C8C8C8", "linewidth": 7},
    PLAIN: {"color": "#D55E00", "linewidth": 2.4},
    "full masters": {"color": BLUE, "linewidth": 2.6},
    "split masters": {"color": "black", "linewidth": 1.2, "linestyle": "--"},
    "split24 masters": {"color": GREEN, "linewidth": 1.4, "linestyle": "-."},
    "split, int8 momentum": {"color": PURPLE, "linewidth": 1.4},
    "Kahan summation": {"color": ORANGE, "linewidth": 1.8, "linestyle": ":"},
    "stochastic rounding": {"color": "#56B4E9", "linewidth": 1.4},
}
PARTS = {
    "parameter": ("parameter", BLUE),
    "momentum_buffer": ("momentum", ORANGE),
    "momentum_scale": ("momentum's scales", "#D55E00"),
    "master": ("master", GREEN),
    "remainder": ("remainder", PURPLE),
    "compensation": ("compensation", GREY),
}


def draw_precision(precision: dict[str, Any], path: Path) -> None:
    models = precision["models"]
    figure, axes = plt.subplots(2, len(models) + 1, figsize=(16, 8.8), layout="constrained")
    for (top, bottom, *_), (name, model) in zip(axes.T, models.items(), strict=False):
        for variant, losses in model["losses"].items():
            epochs = range(1, len(losses) + 1)
            top.plot(epochs, losses, label=variant, **STYLES[variant])
            if variant != FLOAT32:
                apart = [abs(a / b - 1) for a, b in zip(losses, model["losses"][FLOAT32], strict=True)]
                bottom.plot(epochs, apart, **STYLES[variant])
        top.set_title(f"{name}, learning rate {model['learning_rate']:g}")
        top.set_ylim(bottom=0)
        label_precision(top, "training cross-entropy (nats an image)")
        bottom.set_title("what separates each from float32")
        bottom.set_yscale("log")
        label_precision(bottom, "relative difference of the loss")
    for (name, model), color in zip(models.items(), (STYLES[PLAIN]["color"], BLUE), strict=True):
        lost = [100 * share for share in model["updates_lost"]]
        axes[0, -1].plot(range(1, len(lost) + 1), lost, color=color, label=name)
    axes[0, -1].set_title("plain bfloat16: what last_step.numerics reports")
    axes[0, -1].set_ylim(0, 100)
    axes[0, -1].legend(frameon=False, loc="lower right")
    label_precision(axes[0, -1], "updates lost to rounding (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    draw_bytes(axes[1, -1], next(iter(models.values()))["bytes_an_element"])
    save(figure, path)


def label_precision(axes: Axes, ylabel: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)


def draw_bytes(axes: Axes, counts: dict[str, dict[str, float]]) -> None:
    variants = list(reversed(counts))
    left = [0.0] * len(variants)
    for part, (label, color) in PARTS.items():
        widths = [counts[variant].get(part, 0.0) for variant in variants]
        if any(widths):
            axes.barh(variants, widths, left=left, color=color, label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.annotate(f"{total:.2f}", (total, row), (4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.45 * max(left))
    axes.set_xlabel("bytes an element")
    axes.set_title("what the parameter and its states take")
    axes.legend(frameon=False, loc="lower right")
