"""The pictures of a run: bars against the peers, shares of the limit, time by number of tensors and of elements.

What a picture shows is plain data first (``Picture.shown``), whose digest is kept in the PNG: a test tells an old one.
report.py draws them; docs/benchmarks.md and README show them, 800 pixels wide. matplotlib is imported when something is
drawn. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases.implementations import (
    APEX,
    COMPILED,
    FLASH,
    FOREACH,
    FUSED,
    LIMIT,
    LOOP,
    OPTIMI,
    OURS,
    OWN,
    TE,
    TRITON,
)
from bench.report.formats import Spread, power_of_two, significant
from bench.report.run import (
    STEP_QUANTITIES,
    Limits,
    ReportError,
    Run,
    TimedCase,
    devices,
    in_order,
    timed_cases,
    told_cases,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = Path("docs/images")
WIDTH, DPI = 8.0, 200  # inches; GitHub shows 800 pixels of these 1,600, sharp on any screen

# An implementation has the same colour and marker everywhere. Okabe and Ito's colours, which the colour-blind tell
# apart, and three dark ones of Tol's.
COLOURS = {
    OURS: "#D55E00",
    TRITON: "#E69F00",
    FUSED: "#0072B2",
    FOREACH: "#56B4E9",
    LOOP: "#888888",
    COMPILED: "#009E73",
    OPTIMI: "#CC79A7",
    FLASH: "#332288",
    APEX: "#882255",
    TE: "#999933",
    LIMIT: "#000000",
}
MARKERS = dict(zip(COLOURS, "oPsDv^X<>dx", strict=True))


@dataclass(frozen=True)
class Picture:
    """A picture of a suite on a device.

    Attributes:
        name: of its file, without the device.
        suite, device: of what it shows.
        alt: what it shows, for those who do not see it.
        title: above the picture.
        shown: the numbers, as JSON has them.
        paint: draws them.
    """

    name: str
    suite: str
    device: str
    alt: str
    title: str
    shown: list[dict[str, Any]]
    paint: Callable[[list[dict[str, Any]]], Figure]

    @property
    def file(self) -> str:
        return f"{self.name}{'_gpu' if self.device == 'cuda' else ''}.png"

    @property
    def digest(self) -> str:
        """Names everything that the picture shows."""
        return hashlib.sha256(json.dumps([self.title, self.shown], sort_keys=True).encode()).hexdigest()


def pictures(run: Run) -> list[Picture]:
    """Those that the run has numbers for."""
    made = []
    for device in devices(run):
        machine = run["machine_info"]
        gpu = machine.get("gpu") or {}
        where = gpu.get("name", "GPU") if device == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
        host = STEP_QUANTITIES[device][0]
        last = STEP_QUANTITIES[device][-1]
        time = {"step": "Time of step()", "host": "Host's time of step()", "device": "Device's time of step()"}
        made += [
            Picture(
                "against_peers",
                "step",
                device,
                "How many times as long as wd_fused the others take, by model",
                f"{time[last]} against wd_fused: {where}",
                _against_peers(run, device),
                paint_bars,
            ),
            Picture(
                "share_of_limit",
                "step",
                device,
                "Share of the memory's speed that each implementation reaches, by case",
                f"Share of the limit that step() reaches: {where}",
                _shares(run, device),
                paint_shares,
            ),
            Picture(
                "time_by_tensors",
                "growth",
                device,
                "Time of a step over the number of tensors",
                f"{time[host]} over many small tensors: {where}",
                _lines(timed_cases(run, "growth", device), host, "tensors"),
                paint_by_tensors,
            ),
            Picture(
                "time_by_elements",
                "elements",
                device,
                "Time of a step over the number of elements of one tensor, with the limit",
                f"{time[last]} over one tensor: {where}",
                _lines(timed_cases(run, "elements", device), last, "elements"),
                paint_by_elements,
            ),
        ]
    return [picture for picture in made if picture.shown]


# The README's picture: models and optimizers, as many as are taken in at once.
GAIN_MODELS = {"resnet50": "ResNet-50", "vit_l_16": "ViT-L/16", "bert_large": "BERT-large", "llama_3_8b": "Llama-3-8B"}
GAIN_PEERS = (FUSED, LOOP, FOREACH, OPTIMI)


def readme_pictures(run: Run) -> list[Picture]:
    """What is gained, in one picture: many small tensors, and models."""
    small = [line for line in _lines(timed_cases(run, "growth"), "step", "tensors")]
    small = [line for line in small if line["implementation"] in (OURS, *GAIN_PEERS)]
    models = [
        {"title": GAIN_MODELS[case.name] + (f"\n(1/{case.one_of})" if case.one_of > 1 else ""), "ratios": ratios}
        for case in timed_cases(run, "step")
        if case.name in GAIN_MODELS
        and (ratios := {name: _spread(case.ratio(name)) for name in GAIN_PEERS if case.has(name, "step")})
    ]
    if not small or not models:
        return []
    machine = run["machine_info"]
    title = f"step() on a CPU: {machine['cpu']}, {machine['threads']} threads"
    alt = "Left: time of a step over the number of small tensors. Right: how many times as long others take, by model"
    return [Picture("gain", "step", "cpu", alt, title, [{"small": small, "models": models}], paint_gain)]


def draw(run: Run, folder: Path) -> list[Path]:
    """Draws the run's pictures into the folder; their paths."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ReportError("pictures need matplotlib: `pip install matplotlib`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with pyplot.rc_context(style):
        for picture in [*pictures(run), *readme_pictures(run)]:
            figure = picture.paint(picture.shown)
            figure.suptitle(textwrap.fill(picture.title, 90), fontsize=11)
            path = folder / picture.file
            figure.savefig(path, dpi=DPI, metadata={"Description": picture.digest, "Software": None})
            pyplot.close(figure)
            drawn.append(path)
    return drawn


# What is shown.


def _spread(spread: Spread, scale: float = 1.0) -> list[float]:
    """Median and quartiles, with the digits that a picture can show."""
    return [float(f"{value * scale:.5g}") for value in (spread.median, spread.low, spread.high)]


def is_model(case: TimedCase) -> bool:
    """The others are so many tensors of so many elements each, and named so: 161x8."""
    return case.tensors > 1 and re.match(r"\d+x", case.name) is None


def _against_peers(run: Run, device: str) -> list[dict[str, Any]]:
    """A group a model, a bar a peer."""
    quantity = STEP_QUANTITIES[device][-1]
    cases = timed_cases(run, "step", device)
    shown = []
    for case in [case for case in cases if is_model(case)] or cases:
        if case.has(case.ours, quantity):
            names = [name for name in in_order(case.seconds) if name not in (case.ours, LIMIT)]
            ratios = {name: _spread(case.ratio(name, quantity)) for name in names if case.has(name, quantity)}
            shown.append({"title": case.title, "ratios": ratios})
    return [group for group in shown if group["ratios"]]


def _shares(run: Run, device: str) -> list[dict[str, Any]]:
    limits = Limits(run, device)
    shown = []
    for case in told_cases(run, "step", device):
        shares = {name: limits.share(case, name) for name in in_order(case.seconds) if name != LIMIT}
        kept = {name: float(f"{share:.4g}") for name, share in shares.items() if share is not None}
        shown.append({"title": case.title, "shares": kept})
    return [row for row in shown if row["shares"]]


def _lines(cases: Sequence[TimedCase], quantity: str, size: str) -> list[dict[str, Any]]:
    """A line an implementation: sizes, and seconds of a step."""
    shown = []
    for name in in_order(name for case in cases for name in case.seconds):
        measured = [case for case in cases if case.has(name, quantity)]
        if measured:
            points = [[getattr(case, size), *_spread(case.time(name, quantity))] for case in measured]
            shown.append({"implementation": name, "points": points})
    return shown


# How it is drawn.


def paint_bars(shown: list[dict[str, Any]]) -> Figure:
    """Horizontal bars from 1 on a log axis, a group a model: to the right of 1 wd_fused is faster."""
    from matplotlib import pyplot

    names = in_order(name for group in shown for name in group["ratios"])
    bars = sum(len(group["ratios"]) for group in shown)
    figure, axes = pyplot.subplots(figsize=(WIDTH, 1.5 + 0.17 * bars + 0.16 * len(shown)), layout="constrained")
    at, centres = 0.0, []
    for group in shown:
        first = at
        for name in (name for name in names if name in group["ratios"]):
            ratio, low, high = group["ratios"][name]
            axes.barh(at, ratio - 1, left=1, height=0.86, color=COLOURS.get(name, "#555555"))
            axes.plot([low, high], [at, at], color="#222222", linewidth=0.8)
            faster = ratio < 1
            axes.annotate(
                f"{significant(ratio) if ratio >= 10 else f'{ratio:.2f}'}×",
                (min(ratio, low) if faster else max(ratio, high), at),
                xytext=(-3 if faster else 3, 0),
                textcoords="offset points",
                ha="right" if faster else "left",
                va="center",
                fontsize=8,
                fontweight="bold" if faster else "normal",
            )
            at += 1
        centres.append((first + at - 1) / 2)
        at += 0.9
    axes.axvline(1, color="#222222", linewidth=1.2)
    axes.set(xscale="log", xlabel="times as long as wd_fused (log axis; left of 1: faster than wd_fused)")
    values = [value for group in shown for ratio in group["ratios"].values() for value in ratio]
    axes.set_xlim(min(0.85, *values) / 1.45, max(2.0, *values) * 1.4)
    axes.set_yticks(centres, [wrapped(group["title"], 24) for group in shown])
    axes.set_ylim(at - 0.9, -0.9)
    axes.tick_params(axis="y", length=0)
    _plain_log_ticks(axes.xaxis)
    axes.grid(True, axis="x", color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    _legend(figure, names, "s", lines=False)
    return figure


def paint_gain(shown: list[dict[str, Any]]) -> Figure:
    """Left lines over the number of tensors, right four bars a model."""
    from matplotlib import pyplot

    [parts] = shown
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)  # between the left one's last tick and the right one's label
    _draw_lines(left, parts["small"])
    left.set_xlabel("tensors of 64 elements")
    left.set_ylabel("time of a step")
    _plain_log_ticks(left.xaxis)
    width = 0.8 / len(GAIN_PEERS)
    for at, model in enumerate(parts["models"]):
        for place, name in enumerate(GAIN_PEERS):
            if name in model["ratios"]:
                ratio = model["ratios"][name][0]
                x = at + (place - (len(GAIN_PEERS) - 1) / 2) * width
                right.bar(x, ratio, width * 0.92, color=COLOURS[name])
                right.annotate(
                    f"{ratio:.2f}" if ratio < 10 else significant(ratio),
                    (x, ratio),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    rotation=90,
                    fontsize=7,
                )
    right.axhline(1, color=COLOURS[OURS], linewidth=1.8)
    right.set_xticks(range(len(parts["models"])), [model["title"] for model in parts["models"]], fontsize=8.5)
    right.tick_params(axis="x", length=0)
    highest = max(ratio[0] for model in parts["models"] for ratio in model["ratios"].values())
    right.set(yscale="log", ylim=(0.8, highest * 2), ylabel="times as long as wd_fused")
    _plain_log_ticks(right.yaxis)
    _legend(figure, [OURS, *GAIN_PEERS], "s", lines=False, columns=5)
    return figure


def paint_shares(shown: list[dict[str, Any]]) -> Figure:
    """A row a case, a mark an implementation; ours is larger, and below the others, so that none hides another."""
    from matplotlib import pyplot

    names = in_order(name for row in shown for name in row["shares"])
    figure, axes = pyplot.subplots(figsize=(WIDTH, 1.6 + 0.42 * len(shown)), layout="constrained")
    for at, row in enumerate(shown):
        axes.axhline(at, color="#e2e2e2", linewidth=0.8, zorder=0)
        for name in (name for name in names if name in row["shares"]):
            ours = name in OWN
            axes.plot(
                100 * row["shares"][name],
                at,
                marker=MARKERS.get(name, "."),
                markersize=10 if ours else 6,
                color=COLOURS.get(name, "#555555"),
                markeredgecolor="white",
                markeredgewidth=0.7,
                linestyle="none",
                clip_on=False,
            )
    axes.axvline(100, color=COLOURS[LIMIT], linewidth=1.2, linestyle="--")
    most = max(share for row in shown for share in row["shares"].values())
    axes.set(
        xlim=(-2, max(105, 100 * most + 3)), xlabel="% of the fastest in the same rounds, plain kernels among them"
    )
    axes.set_yticks(range(len(shown)), [wrapped(row["title"], 32) for row in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    _legend(figure, names, lines=False)
    return figure


def paint_by_tensors(shown: list[dict[str, Any]]) -> Figure:
    figure, axes = _paint_lines(shown)
    axes.set(xlabel="tensors of 64 elements")
    _plain_log_ticks(axes.xaxis)
    return figure


def paint_by_elements(shown: list[dict[str, Any]]) -> Figure:
    figure, axes = _paint_lines(shown)
    axes.set(xlabel="elements of one tensor")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: power_of_two(round(value)))
    return figure


def _paint_lines(shown: list[dict[str, Any]]) -> tuple[Figure, Axes]:
    """Seconds over sizes, both on log axes: medians, with the quartiles as a band."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(WIDTH, 4.8), layout="constrained")
    _draw_lines(axes, shown)
    axes.set(ylabel="time of a step")
    _legend(figure, [line["implementation"] for line in shown])
    return figure, axes


def _draw_lines(axes: Axes, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        name = line["implementation"]
        sizes, medians, lows, highs = zip(*line["points"], strict=True)
        ours = name == OURS
        axes.plot(
            sizes,
            medians,
            color=COLOURS.get(name, "#555555"),
            marker=MARKERS.get(name, "."),
            markersize=5,
            linewidth=2.6 if ours else 1.4,
            linestyle="--" if name == LIMIT else "-",
            zorder=3 if ours else 2,
        )
        axes.fill_between(sizes, lows, highs, color=COLOURS.get(name, "#555555"), alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_formatter(lambda value, _: _time(value))
    axes.grid(True, which="major", color="#e2e2e2", linewidth=0.8)


def wrapped(title: str, width: int) -> str:
    """In lines of so many characters, a number and its unit in the same one."""
    return textwrap.fill(
        re.sub(r"(\d) ([MG] elements|tensors)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), title), width
    )


def _time(seconds: float) -> str:
    unit, scale = next((one for one in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if seconds * one[1] >= 0.999), ("ns", 1e9))
    return f"{seconds * scale:,.0f} {unit}"


def _plain_log_ticks(axis: Any) -> None:
    """0.5, 1, 2, 5, 10, 100 without exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, names: list[str], marker: str | None = None, lines: bool = True, columns: int = 4) -> None:
    """Below the picture, in rows of at most so many."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=COLOURS.get(name, "#555555"),
            marker=marker or MARKERS.get(name, "."),
            markersize=8 if marker else 6,
            linestyle="none" if not lines else "--" if name == LIMIT else "-",
            label=name,
        )
        for name in names
    ]
    columns = min(columns, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, columnspacing=1.2)
