"""`python -m bench.report`: the newest results of `make bench`, as tables in the terminal.

`--markdown` prints them as Markdown, `--write` puts them between the markers of README.md and docs/ and draws
their pictures, `--plots FOLDER` draws pictures, `--compare OLD NEW` sets two runs side by side. Everything that
these pages say about speed and memory is made here from files of bench/results/, which they name.
tests/benchmarks/test_readme_numbers.py makes it again and compares. No torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import compare, plots
from bench.report import markdown as report_markdown
from bench.report.pages import (
    BLOCKS,
    COST,
    GAIN,
    HOME_GAIN,
    ONE_PASS,
    OPTIONS,
    ROOT,
    SHARDED,
    STEP,
    TOLD,
    Block,
    blocks_of,
    newest_blocks,
    results_named_in,
    write,
)
from bench.report.run import RESULTS, ReportError, Run, load, newest, timed_cases

__all__ = (
    "BLOCKS",
    "COST",
    "GAIN",
    "HOME_GAIN",
    "ONE_PASS",
    "OPTIONS",
    "RESULTS",
    "ROOT",
    "SHARDED",
    "STEP",
    "Block",
    "ReportError",
    "blocks_of",
    "load",
    "newest",
    "newest_blocks",
    "results_named_in",
    "timed_cases",
    "write",
)


def show(blocks: dict[Block, Run]) -> None:
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        raise ReportError("tables in the terminal need rich: `pip install rich`, or --markdown") from None
    from bench.report import terminal as report_terminal

    report_terminal.show(blocks, Console())


def show_comparison(old: Path, new: Path, markdown: bool) -> None:
    if old.resolve() == new.resolve():
        raise ReportError(f"{old}: OLD and NEW are the same file: name two of bench/results")
    found = compare.compare(load(old), load(new))
    made, lists = compare.table(found), compare.lists(found)
    if markdown:
        differing = report_markdown.items("The runs differ:", found.differences)
        others = [part for heading, lines in lists.items() for part in report_markdown.items(f"{heading}:", lines)]
        print("\n\n".join([*differing, made.about, report_markdown.table(made), *others]))
        return
    from rich.console import Console

    from bench.report import terminal as report_terminal

    console = Console()
    report_terminal.show_items("The runs differ", found.differences, console)
    report_terminal.show_table(made, console)
    for heading, lines in lists.items():
        report_terminal.show_items(heading, lines, console)


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="What `make bench` measured.")
    parser.add_argument("--results", type=Path, metavar="FILE", help="a results file (default: the newest)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    how = "write README.md and docs/ again, in this folder (default: the repository)"
    parser.add_argument("--write", type=Path, metavar="FOLDER", nargs="?", const=ROOT, help=how)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the pictures into a folder")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="compare two results files")
    return parser.parse_args(arguments)


def report(chosen: argparse.Namespace) -> None:
    if chosen.compare is not None:
        old, new = chosen.compare
        show_comparison(old, new, chosen.markdown)
        return
    if chosen.results is not None:
        blocks = blocks_of(load(chosen.results), BLOCKS if chosen.write is not None else TOLD)
    else:
        blocks = newest_blocks() if chosen.write is not None else blocks_of(newest())
    if chosen.write is not None:
        drawn = write(blocks, chosen.write)
        print("\n".join(f"{block.page}: {block.name} of {run['file']}" for block, run in blocks.items()))
        print("\n".join(map(str, drawn)))
    if chosen.plots is not None:
        if STEP not in blocks:
            raise ReportError("pictures are of the suites step, growth and elements: `make bench` measures them")
        print("\n".join(map(str, plots.draw(blocks[STEP], chosen.plots))))
    if chosen.markdown:
        print("\n\n".join(block.markdown(run) for block, run in blocks.items()))
    elif chosen.write is None and chosen.plots is None:
        show(blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        report(arguments_of(arguments))
    except (ReportError, OSError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1
    return 0
