"""Which blocks of numbers stand in README.md and in docs/, and how they are written again. For report.py.

Each block is made from one results file, which its first line names. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.report import markdown as report_markdown
from bench.report import options, plots
from bench.report.provenance import provenance
from bench.report.run import RESULTS, ReportError, Run, has_suite, newest

ROOT = RESULTS.parent.parent
README, HOME, BENCHMARKS = "README.md", "docs/index.md", report_markdown.BENCHMARKS


@dataclass(frozen=True)
class Block:
    """What stands between two markers of a page.

    Attributes:
        name: in the markers.
        page: whose.
        suite: what a run must have for it.
        body: makes its Markdown from a run.
    """

    name: str
    page: str
    suite: str
    body: Callable[[Run], str]

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: begin -->"

    @property
    def end(self) -> str:
        return f"<!-- {self.name}: end -->"

    def markdown(self, run: Run) -> str:
        """With where the numbers come from, where all of them stand."""
        return self.body(run) if self.page != BENCHMARKS else f"{self.body(run)}\n\n{provenance(run)}"

    def text(self, run: Run) -> str:
        """All of it, markers included."""
        how = f"<!-- made by `python -m bench.report --write` from bench/results/{run['file']}: not edited by hand -->"
        return f"{self.begin}\n{how}\n\n{self.markdown(run)}\n\n{self.end}"

    def find(self, text: str) -> str:
        """The block in a page's text, markers included."""
        begin, end = self.begin, self.end
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ReportError(f"it must hold one line {begin} and, below it, one line {end}")
        return text[text.index(begin) : text.index(end) + len(end)]


GAIN = Block("gain", README, "step", report_markdown.gain)
HOME_GAIN = Block("home gain", HOME, "step", report_markdown.gain_at_home)
ONE_PASS = Block("one pass", README, options.SUITE, report_markdown.one_pass)
STEP = Block("numbers", BENCHMARKS, "step", report_markdown.numbers)
OPTIONS = Block("options numbers", BENCHMARKS, options.SUITE, options.markdown)
COST = Block("options cost", "docs/options.md", options.SUITE, options.cost)
SHARDED = Block("sharded numbers", BENCHMARKS, "sharded", report_markdown.sharded)
BLOCKS = (GAIN, HOME_GAIN, ONE_PASS, COST, STEP, OPTIONS, SHARDED)
TOLD = (STEP, OPTIONS, SHARDED)  # in the terminal: the others say the same in short


def blocks_of(run: Run, blocks: tuple[Block, ...] = TOLD) -> dict[Block, Run]:
    """The run, for each block that can be made of it."""
    found = {block: run for block in blocks if has_suite(run, block.suite)}
    if not found:
        raise ReportError(f"{run['file']} has no results that the report shows: `make bench` measures all suites")
    return found


def newest_blocks(folder: Path = RESULTS) -> dict[Block, Run]:
    """The newest run for each block that has one."""
    found: dict[Block, Run] = {}
    missing: ReportError | None = None
    for block in BLOCKS:
        try:
            found[block] = newest(block.suite, folder)
        except ReportError as error:
            missing = error
    if not found and missing is not None:
        raise missing
    return found


def results_named_in(block_text: str) -> str:
    """The results file that a block says it was made from."""
    named = re.search(r"bench/results/([\w.-]+\.json)", block_text)
    if named is None:
        raise ReportError("no file of bench/results is named in it: `python -m bench.report --write`")
    return named[1]


def write(blocks: dict[Block, Run], root: Path = ROOT) -> list[Path]:
    """Replaces the blocks of the pages below ``root``, and draws the pictures that they show.

    Returns the pictures' paths. Where a page cannot be read, or lacks a marker, nothing is written.
    """
    pages: dict[Path, str] = {}
    for block, run in blocks.items():
        if run["smoke"]:
            raise ReportError(f"{run['file']} is of a smoke run, whose numbers mean nothing: `make bench` first")
        page = root / block.page
        try:
            text = pages.get(page) or page.read_text(encoding="utf-8")
            pages[page] = text.replace(block.find(text), block.text(run))
        except OSError as error:
            raise ReportError(f"{page}: cannot be read ({error.strerror}): name the repository's folder") from None
        except ReportError as error:
            raise ReportError(f"{page}: {error}") from None
    drawn = plots.draw(blocks[STEP], root / plots.IMAGES) if STEP in blocks else []
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")
    return drawn
