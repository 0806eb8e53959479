"""Tables and plots of the digits example, made from its results alone. Called by train_digits.py."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: the example runs where there is no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Okabe and Ito's colours, which can be told apart with any colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#777777"
OURS = "#D55E00"  # FusedSGD beside torch, as in the pictures of the benchmarks; torch is GREY, its fused=True BLUE

FUSED, TORCH, TORCH_FUSED = "FusedSGD", "torch.optim.SGD", "torch.optim.SGD(fused=True)"


def same_as_torch(results: dict[str, Any]) -> bool:
    """Whether FusedSGD kept its promise: every bit of the state and every epoch's loss as with torch.optim.SGD."""
    bits = results["bits"]
    return bool(bits["differing_elements"][FUSED] == 0 and bits["losses"][FUSED] == bits["losses"][TORCH])


# ---- tables


def print_tables(results: dict[str, Any], folder: Path, more: list[tuple[Table, list[str]]]) -> None:
    """``more``: tables of other modules, with their captions, to follow those of this one."""
    console = Console(highlight=False)
    settings, bits = results["settings"], results["bits"]
    console.print(
        f"\n{settings['training_images']:,} images to train on, {settings['validation_images']} to validate; "
        f"{bits['parameters']:,} parameters in {bits['tensors']} tensors; {settings['epochs']} epochs; "
        f"seed {settings['seed']}; torch {settings['torch']}, threads: {settings['threads']}"
    )
    for table, captions in (
        (bits_table(bits), bits_captions(results)),
        (penalty_table(results["penalty"]), penalty_captions(results["penalty"])),
        (groups_table(results["groups"]), groups_captions(results["groups"])),
        *more,
    ):
        console.print()
        console.print(table)
        for caption in captions:
            console.print(f"- {caption}")
    console.print()
    for line in gained(bits):
        console.print(line)
    console.print(f"\nPlots and results.json are in {escape(str(folder))}/. {results['seconds']:.0f} s in all.")


def gained(bits: dict[str, Any]) -> list[str]:
    """What (a) comes to, in three lines."""
    step = {name: times["median"] for name, times in bits["step_microseconds"].items()}
    iteration = {name: times["median"] for name, times in bits["iteration_microseconds"].items()}
    differing = bits["differing_elements"][FUSED]
    shares = (f"{step[name] / iteration[name]:.1%} with {name}" for name in (FUSED, TORCH))
    return [
        f"Bits: {differing:,} of {bits['compared_elements']:,} elements differ from torch.optim.SGD's.",
        f"Step: torch.optim.SGD takes {step[TORCH] / step[FUSED]:.1f} times as long as FusedSGD.",
        f"Share of an iteration: {', '.join(shares)}.",
    ]


def new_table(title: str, *columns: str) -> Table:
    """Narrow enough for a terminal of 80 columns: headers break where they say so, and cells do not."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def bits_table(bits: dict[str, Any]) -> Table:
    title = "(a) FusedSGD and torch.optim.SGD from one seed"
    table = new_table(
        title, "last\nloss", "valid.\naccuracy", "differing\nelements", "step(), µs\nmedian", "\nquartiles"
    )
    for name, row_name in ((FUSED, FUSED), (TORCH, TORCH), (TORCH_FUSED, "  with fused=True")):
        step = bits["step_microseconds"][name]
        table.add_row(
            row_name,
            f"{bits['losses'][name][-1]:.6f}",
            f"{bits['validation_accuracy'][name]:.2%}",
            f"{bits['differing_elements'][name]:,}" if name != TORCH else "reference",
            f"{step['median']:.1f}",
            f"{step['lower']:.1f} to {step['upper']:.1f}",
        )
    return table


def bits_captions(results: dict[str, Any]) -> list[str]:
    bits = results["bits"]
    step = {name: times["median"] for name, times in bits["step_microseconds"].items()}
    elements = f"{bits['compared_elements']:,} elements (parameters, momentum buffers, norm statistics)"
    if same_as_torch(results):
        verdict = f"FusedSGD and torch.optim.SGD: the same loss in every epoch, the same bits in all {elements}."
    else:
        differing = bits["differing_elements"][FUSED]
        verdict = f"[bold red]FusedSGD differs from torch.optim.SGD[/] in {differing:,} of {elements}."
    return [
        verdict,
        f"torch's step() takes {step[TORCH] / step[FUSED]:.1f} times as long as FusedSGD's, "
        f"with fused=True {step[TORCH_FUSED] / step[FUSED]:.1f} times.",
        f"A step() that does nothing takes {bits['empty_step_microseconds']['median']:.1f} µs here: what torch wraps "
        "around every step(), with the caches as backward leaves them. It is in both of torch's times; FusedSGD "
        "enters it only where a hook or a profiler would notice.",
        f"FusedSGD's backend: {escape(bits['backend'])}.",
    ]


def penalty_table(penalty: dict[str, Any]) -> Table:
    title = f"(b) Decay and penalties: λ = {penalty['l2_strength']:g} for w², {penalty['l1_strength']:g} for |w|"
    small = f"|w| <\n{penalty['small_weight']:g}"
    times = ("extra µs:\npenalty", "\nbackward", "\nstep()")
    table = new_table(title, "last\nloss", "valid.\naccuracy", small, *times)
    for name, losses in penalty["losses"].items():
        extra = penalty["extra_microseconds"].get(name)
        table.add_row(
            name,
            f"{losses[-1]:.6f}",
            f"{penalty['validation_accuracy'][name]:.2%}",
            f"{penalty['small_weights_fraction'][name]:.1%}",
            *([f"{round(extra[phase]):+d}" for phase in ("penalty", "backward", "step")] if extra else []),
        )
    return table


def penalty_captions(penalty: dict[str, Any]) -> list[str]:
    largest = {dtype: max(values) for dtype, values in penalty["difference_of_losses"].items()}
    extra = penalty["extra_microseconds"]
    on_penalty = extra["λ·Σw² in the loss"]["penalty"] + extra["λ·Σw² in the loss"]["backward"]
    no_more_work = [extra["weight_decay = 2λ"]["backward"]]
    no_more_work += [extra[name]["step"] for name in ("λ·Σw² in the loss", "λ·Σ|w| in the loss")]
    return [
        "Losses are cross-entropy, without the penalty. Times are a batch's, beyond those of the first row.",
        f"weight_decay = 2λ and λ·Σw²: the losses of an epoch differ by {largest['float32']:.1e} at most; the same "
        f"training in float64, by {largest['float64']:.1e}.",
        f"Autograd spends {on_penalty:.0f} µs a batch on λ·Σw²; weight_decay adds "
        f"{round(extra['weight_decay = 2λ']['step']):+d} µs to step().",
        "The backward pass of weight_decay = 2λ and step() of the penalties do the same work as in the first row: "
        f"their {', '.join(f'{round(time):+d}' for time in no_more_work)} µs show how large the noise is.",
    ]


def groups_table(groups: dict[str, Any]) -> Table:
    columns = ("validation, %:\nmean ± dev.", "\nlowest to highest", "norm of\nweights", "\nbiases", "norm\nscales")
    table = new_table(f"(c) What should decay: {len(groups['seeds'])} seeds", *columns)
    for scheme, accuracies in groups["validation_accuracy"].items():
        table.add_row(
            scheme,
            f"{100 * mean(accuracies):.2f} ± {100 * deviation(accuracies):.2f}",
            f"{100 * min(accuracies):.2f} to {100 * max(accuracies):.2f}",
            *(f"{norm:.2f}" for norm in groups["norms"][scheme].values()),
        )
    return table


def groups_captions(groups: dict[str, Any]) -> list[str]:
    accuracies = groups["validation_accuracy"].values()
    means = [mean(of_scheme) for of_scheme in accuracies]
    between_means = max(means) - min(means)
    between_seeds = max(max(of_scheme) - min(of_scheme) for of_scheme in accuracies)
    verdict = "within the spread between seeds: they rank nothing" if between_means <= between_seeds else "more"
    return [
        f"The means differ by {100 * between_means:.2f} points at most, seeds of one row by up to "
        f"{100 * between_seeds:.2f}: {verdict}. "
        f"One validation image is {100 / groups['validation_images']:.2f} points.",
        "What each row does to the parameters is in their norms (means over seeds).",
    ]


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


# ---- plots


def draw_plots(results: dict[str, Any], folder: Path) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11})
    draw_bits(results, folder / "fused_and_torch.png")
    draw_penalty(results["penalty"], folder / "decay_and_penalty.png")
    draw_groups(results["groups"], folder / "what_decays.png")


def draw_bits(results: dict[str, Any], path: Path) -> None:
    bits = results["bits"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    epochs = range(1, len(bits["losses"][FUSED]) + 1)
    left.plot(epochs, bits["losses"][TORCH], color=GREY, linewidth=6, alpha=0.5, label=TORCH)
    left.plot(epochs, bits["losses"][FUSED], color=OURS, marker="o", markersize=3, label=FUSED)
    label_losses(left, f"{bits['differing_elements'][FUSED]:,} of {bits['compared_elements']:,} elements differ")

    step = {"torch, an empty step()": bits["empty_step_microseconds"]}
    step |= {name: bits["step_microseconds"][name] for name in (TORCH_FUSED, TORCH, FUSED)}
    medians = [s["median"] for s in step.values()]
    whiskers = [[s["median"] - s["lower"] for s in step.values()], [s["upper"] - s["median"] for s in step.values()]]
    colors = ["#CCCCCC", BLUE, GREY, OURS]
    right.barh(list(step), medians, xerr=whiskers, color=colors, error_kw={"ecolor": "black", "capsize": 3})
    for row, s in enumerate(step.values()):
        right.annotate(f"{s['median']:.0f} µs", (s["upper"], row), (6, 0), textcoords="offset points", va="center")
    right.set_xlim(0, 1.18 * max(s["upper"] for s in step.values()))
    right.set_xlabel("time of a step (µs): median and quartiles")
    right.set_title(f"step() on {bits['parameters']:,} parameters in {bits['tensors']} tensors")
    save(figure, path)


def draw_penalty(penalty: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    plain, decay, l2, l1 = penalty["losses"]
    epochs = range(1, len(penalty["losses"][plain]) + 1)

    curves = axes[0, 0]
    curves.plot(epochs, penalty["losses"][plain], color=GREY, label=plain)
    curves.plot(epochs, penalty["losses"][l2], color=ORANGE, linewidth=6, alpha=0.5, label=l2)
    curves.plot(epochs, penalty["losses"][decay], color=BLUE, marker="o", markersize=3, label=decay)
    curves.plot(epochs, penalty["losses"][l1], color=PURPLE, linestyle="--", label=l1)
    label_losses(curves, "Weight decay and λ·Σw² train alike")

    rounding = axes[0, 1]
    for (dtype, values), color in zip(penalty["difference_of_losses"].items(), (BLUE, GREEN), strict=True):
        # Two runs may agree exactly in an epoch; a logarithmic axis has no place for 0, so those points are left out.
        shown = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value > 0]
        rounding.plot(*zip(*shown, strict=True), color=color, marker="o", markersize=4, label=dtype)
    rounding.set_yscale("log")
    label_epochs(rounding, "difference of their losses (nats; 0 not shown)", "What separates the two is rounding")

    draw_extra_time(axes[1, 0], penalty, [decay, l2, l1])
    draw_histogram(axes[1, 1], penalty, {plain: GREY, l2: ORANGE, l1: PURPLE})
    save(figure, path)


def draw_extra_time(axes: Axes, penalty: dict[str, Any], names: list[str]) -> None:
    phases = {"penalty": ("penalty, forward", ORANGE), "backward": ("its backward", PURPLE), "step": ("step()", BLUE)}
    for offset, (phase, (label, color)) in zip((-0.26, 0.0, 0.26), phases.items(), strict=True):
        values = [penalty["extra_microseconds"][name][phase] for name in names]
        bars = axes.bar([i + offset for i in range(len(names))], values, width=0.24, color=color, label=label)
        axes.bar_label(bars, fmt=lambda value: f"{round(value)}", padding=2, fontsize=9)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.margins(y=0.12)
    axes.set_ylabel("extra time a batch (µs), median")
    axes.set_title("What each adds to the time of a batch")
    axes.legend(frameon=False)


def draw_histogram(axes: Axes, penalty: dict[str, Any], colors: dict[str, str]) -> None:
    edges = [10**exponent for exponent in penalty["histogram_edges_log10"]]
    for name, color in colors.items():
        fraction = penalty["small_weights_fraction"][name]
        label = f"{name}: {fraction:.1%} below {penalty['small_weight']:g}"
        axes.stairs(penalty["weight_histogram"][name], edges, color=color, linewidth=2, label=label)
    axes.axvline(penalty["small_weight"], color="black", linewidth=0.8, linestyle=":", ymax=0.72)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.35 * max(max(penalty["weight_histogram"][name]) for name in colors))  # room for the legend
    axes.set_xlabel("|w|: five bins a decade, the first with all below it")
    axes.set_ylabel("number of weights")
    axes.set_title("L1 in the loss makes weights vanish")
    axes.legend(frameon=False, loc="upper left")


def draw_groups(groups: dict[str, Any], path: Path) -> None:
    kinds = list(groups["norms"][next(iter(groups["norms"]))])
    figure, axes = plt.subplots(1, 4, figsize=(12, 4.2), layout="constrained", width_ratios=[2.2, 1, 1, 1])
    schemes = list(groups["validation_accuracy"])
    colors = [GREY, ORANGE, BLUE]
    for i, (scheme, color) in enumerate(zip(schemes, colors, strict=True)):
        accuracies = [100 * a for a in groups["validation_accuracy"][scheme]]
        across = [i + 0.24 * (j / max(1, len(accuracies) - 1) - 0.5) for j in range(len(accuracies))]
        axes[0].scatter(across, accuracies, color=color, s=36, alpha=0.8, edgecolor="white", zorder=3)
        axes[0].hlines(mean(accuracies), i - 0.28, i + 0.28, color="black", linewidth=1.5)
    axes[0].set_xticks(range(len(schemes)), schemes)
    axes[0].set_xlabel("what decays")
    axes[0].set_xlim(-0.5, len(schemes) - 0.5)
    axes[0].set_ylabel("validation accuracy (%)")
    axes[0].set_title(f"{len(groups['seeds'])} seeds (dots) and their mean (line)")
    axes[1].set_ylabel("Euclidean norm, mean over seeds")
    for axis, kind in zip(axes[1:], kinds, strict=True):
        bars = axis.bar(range(len(schemes)), [groups["norms"][scheme][kind] for scheme in schemes], color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
        axis.set_xticks(range(len(schemes)), ["nothing", "all", "weights"])
        axis.set_xlabel("what decays")
        axis.margins(y=0.1)
        axis.set_title(kind)
    save(figure, path)


def label_losses(axes: Axes, title: str) -> None:
    axes.set_yscale("log")
    label_epochs(axes, "training cross-entropy (nats an image)", title)


def label_epochs(axes: Axes, ylabel: str, title: str) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
