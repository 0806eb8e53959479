"""The report as Markdown: what docs/benchmarks.md has, and the README in short. For pages.py. No torch."""

from __future__ import annotations

from bench.cases.implementations import FOREACH, FUSED, LOOP, OURS
from bench.report import formats, options, plots
from bench.report import tables as report_tables
from bench.report.plots import Picture
from bench.report.provenance import absent, not_measured
from bench.report.run import ReportError, Run, TimedCase, in_order, timed_cases
from bench.report.tables import Cell, Table

# Of DTensors it is told who cannot step them.
TORCH = (OURS, FUSED, FOREACH, LOOP)

BENCHMARKS = "docs/benchmarks.md"  # as the README links it


def numbers(run: Run) -> str:
    """Every table of the suites but options and DTensors; below each suite's the pictures of it, or what is lost."""
    pictures = plots.pictures(run)
    parts = []
    lost = items("### Where it is not faster", report_tables.not_faster(run))
    for (suite, device), tables in report_tables.sections(run).items():
        for made in tables:
            parts += [f"### {made.title}", made.about, table(made)]
        parts += [image(picture) for picture in pictures if (picture.suite, picture.device) == (suite, device)]
        if suite == "step":
            parts += lost
            lost = []
    return "\n\n".join([*parts, *lost, *items("Absent:", absent(run)), *not_measured(run)])


def table(made: Table) -> str:
    return formats.table(
        [formats.as_code(name) for name in made.head], [[cell(one) for one in row] for row in made.rows]
    )


def cell(one: Cell) -> str:
    text = formats.as_code(one.text)
    if one.fastest or one.best_peer:
        text = f"**{text}**"
    return f"{text}<br><sub>{one.detail}</sub>" if one.detail else text


def items(heading: str, lines: list[str]) -> list[str]:
    return [heading, "\n".join(f"- {line}" for line in lines)] if lines else []


def image(picture: Picture) -> str:
    """As docs/benchmarks.md links it."""
    return f"![{picture.alt}]({plots.IMAGES.relative_to('docs').as_posix()}/{picture.file})"


def sharded(run: Run) -> str:
    """Not every implementation steps DTensors: who cannot is told."""
    cases = timed_cases(run, "sharded")
    names = in_order([*TORCH, *report_tables.implementations_in(cases)])
    rows = []
    for case in cases:
        peers = (formats.times_as_long(case.ratio(name)) if case.has(name, "step") else "cannot" for name in names[1:])
        rows.append([case.title, formats.time(case.time(names[0]).median), *peers])
    return "\n\n".join(
        [
            "The whole `step()` over DTensors, one process, CPU. wd_fused: time of a step. "
            f"{report_tables.meaning(names)}",
            formats.table(["tensors", *map(formats.as_code, names)], rows),
        ]
    )


# The README: sentences, no tables.


def gain(run: Run) -> str:
    """A step of a model, a step of many small tensors, a whole iteration; the picture; where it is even."""
    lines = []
    for suite, quantity, name, what in (
        ("step", "step", "resnet50", "**A step of ResNet-50**"),
        ("step", "step", "161x8", "**A step of 161 small tensors**"),
        ("training", "iteration", "digits", "**A whole training iteration** of a small ResNet"),
    ):
        for case in timed_cases(run, suite):
            if case.name == name and case.has(case.ours, quantity):
                time = formats.time(case.time(str(case.ours), quantity).median)
                lines.append(f"- {what} takes {time}. {longer(case, quantity)}")
    pictures = [f"![{one.alt}]({(plots.IMAGES / one.file).as_posix()})" for one in plots.readme_pictures(run)]
    return "\n\n".join(["\n".join(lines), *pictures, even(run), measured(run)])


def gain_at_home(run: Run) -> str:
    """The same for the site's first page, which lies in docs/."""
    return gain(run).replace("(docs/", "(")


def longer(case: TimedCase, quantity: str) -> str:
    """How many times as long torch takes, in words."""
    told = [
        f"{words} takes {formats.number(case.ratio(name, quantity))} times as long"
        for name, words in ((LOOP, "torch's default"), (FUSED, f"{formats.as_code(FUSED)}"))
        if case.has(name, quantity)
    ]
    return f"{'; '.join(told)}."


def even(run: Run) -> str:
    """In how many of the cases somebody is as fast, or faster."""
    lost, told = len(report_tables.not_faster(run)), sum(1 for _ in report_tables.comparisons(run))
    if not lost:
        return f"wd_fused is the fastest in each of the {told} comparisons."
    return f"Another is as fast, or faster, in [{lost} of {told} comparisons]({BENCHMARKS}#where-it-is-not-faster)."


def measured(run: Run) -> str:
    machine = run["machine_info"]
    gpu = [sentence for sentence in not_measured(run) if "GPU" in sentence]
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {run['datetime'][:10]}"
    return " ".join([f"Measured on {where}: [all tables, and the method]({BENCHMARKS}).", *gpu])


def one_pass(run: Run) -> str:
    """What clipping and averaging in the step's own pass gain."""
    for (case, name), timed in options.timed_options(run).items():
        if (case, name) == ("resnet50", "clip-ema"):
            ratio = formats.number(timed.against_torch())
            return f"To clip, step and average ResNet-50 by torch's functions in sequence takes {ratio} times as long."
    raise ReportError(f"{run['file']} has no row of clipping and averaging over ResNet-50: `make bench-full` has")
