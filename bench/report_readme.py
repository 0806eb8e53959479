"""README's blocks of numbers: what stands between which markers, and how they are written again. For report.py.

Each block is made from one results file, which it names. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import plots, report_markdown, tail_report
from bench.report_provenance import provenance
from bench.report_run import RESULTS, ReportError, Run, has_suite, newest


@dataclass(frozen=True)
class Block:
    """What stands between two markers of the README.

    Attributes:
        name: in the markers.
        suite: what a run must have for it.
        body: makes its Markdown from a run.
    """

    name: str
    suite: str
    body: Callable[[Run], str]

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: begin -->"

    @property
    def end(self) -> str:
        return f"<!-- {self.name}: end -->"

    def markdown(self, run: Run) -> str:
        return f"{self.body(run)}\n\n{provenance(run)}"

    def text(self, run: Run) -> str:
        """All of it, markers included."""
        how = "<!-- made by `python -m bench.report --write README.md`: not edited by hand -->"
        return f"{self.begin}\n{how}\n\n{self.markdown(run)}\n\n{self.end}"

    def find(self, text: str) -> str:
        """The block in a README's text, markers included."""
        begin, end = self.begin, self.end
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ReportError(f"it must hold one line {begin} and, below it, one line {end}")
        return text[text.index(begin) : text.index(end) + len(end)]


STEP = Block("numbers", "step", report_markdown.numbers)
TAIL = Block("tail numbers", tail_report.SUITE, tail_report.markdown)
SHARDED = Block("sharded numbers", "sharded", report_markdown.sharded)
BLOCKS = (STEP, TAIL, SHARDED)


def blocks_of(run: Run) -> dict[Block, Run]:
    """The run, for each block that can be made of it."""
    blocks = {block: run for block in BLOCKS if has_suite(run, block.suite)}
    if not blocks:
        raise ReportError(f"{run['file']} has no results that the report shows: `make bench` measures all suites")
    return blocks


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
        raise ReportError("no file of bench/results is named in it: `python -m bench.report --write README.md`")
    return named[1]


def write(blocks: dict[Block, Run], readme: Path) -> list[Path]:
    """Replaces the README's blocks and draws the pictures that one of them shows, in docs/images beside it.

    Returns the pictures' paths.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{readme}: cannot be read ({error.strerror}): name the README to write into") from None
    for block, run in blocks.items():
        if run["smoke"]:
            raise ReportError(f"{run['file']} is of a smoke run, whose numbers mean nothing: `make bench` first")
        try:
            text = text.replace(block.find(text), block.text(run))
        except ReportError as error:
            raise ReportError(f"{readme}: {error}") from None
    drawn = plots.draw(blocks[STEP], readme.parent / plots.IMAGES) if STEP in blocks else []
    readme.write_text(text, encoding="utf-8")
    return drawn
