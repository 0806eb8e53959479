"""The report as Markdown: README's section "How fast", and its table of DTensors. For report_readme.py. No torch."""

from __future__ import annotations

from bench import formats, plots, report_tables
from bench.implementations import FOREACH, FUSED, LOOP, OURS
from bench.plots import Picture
from bench.report_provenance import absent, not_measured
from bench.report_run import Run, in_order, timed_cases
from bench.report_tables import Cell, Table

# Of DTensors it is told who cannot step them.
TORCH = (OURS, FUSED, FOREACH, LOOP)


def numbers(run: Run) -> str:
    """Every table of the suites but tails and DTensors; below each suite's the pictures of it, or what is lost."""
    pictures = plots.pictures(run)
    parts = []
    lost = items("Where wd_fused is not the faster one:", report_tables.not_faster(run))
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
    return f"![{picture.alt}]({plots.IMAGES.as_posix()}/{picture.file})"


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
            "The whole `step()` over DTensors, one process, CPU. wd_fused: time of a step. The others: how many times "
            "as long they take.",
            formats.table(["tensors", *map(formats.as_code, names)], rows),
        ]
    )
