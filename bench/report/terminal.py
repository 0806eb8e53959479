"""The report in a terminal, by rich: the tables fitted to its width, who is the fastest in each row. No torch."""

from __future__ import annotations

import re
from typing import Literal

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from bench.report import tables as report_tables
from bench.report.pages import STEP, Block
from bench.report.provenance import absent, not_measured, provenance
from bench.report.run import Run
from bench.report.tables import Cell, Table

OURS_WINS, PEER_WINS, BEST_PEER = "bold green", "bold yellow", "underline"

# A column's first and other texts are wrapped to so many characters, where the terminal is narrow.
FIRST_COLUMN, WRAPPED = 20, 12
BORDER = 3  # with the padding, characters a column


def show(blocks: dict[Block, Run], console: Console) -> None:
    """Every block's tables; after the last one of a run where its numbers come from and what they leave out."""
    for block, run in blocks.items():
        if block == STEP:
            show_numbers(run, console)
        else:
            console.rule(f"{block.name}, {run['file']}")
            console.print(Markdown(block.body(run)))
    for run in {run["file"]: run for run in blocks.values()}.values():
        show_origin(run, console)


def show_numbers(run: Run, console: Console) -> None:
    for tables in report_tables.sections(run).values():
        for table in tables:
            show_table(table, console)
    show_items("Where wd_fused is not the faster one", report_tables.not_faster(run), console)


def show_origin(run: Run, console: Console) -> None:
    console.rule(run["file"])
    show_items("Absent", absent(run), console)
    for sentence in not_measured(run) if any(report_tables.sections(run).values()) else []:
        console.print(sentence)
    console.print(Markdown(provenance(run)))


def show_items(title: str, lines: list[str], console: Console) -> None:
    if lines:
        console.print(f"\n[bold]{title}[/]")
        console.print(Markdown("\n".join(f"- {line}" for line in lines)))


def show_table(table: Table, console: Console) -> None:
    """In parts where its columns do not fit side by side, each with the first column; details only where all fit."""
    console.print()
    room = console.width - 1
    details = sum(width_of(table, at, True) for at in range(len(table.head))) <= room
    for number, columns in enumerate(parts(table, room, details)):
        console.print(as_rich(table, columns, room, details, title=number == 0))
    console.print(Text(table.about, style="dim"))


def parts(table: Table, room: int, details: bool) -> list[list[int]]:
    """The columns that fit into ``room`` characters together, the first one in every part."""
    first = width_of(table, 0, details)
    made: list[list[int]] = [[0]]
    taken = first
    for at in range(1, len(table.head)):
        width = width_of(table, at, details)
        if taken + width > room and len(made[-1]) > 1:
            made.append([0])
            taken = first
        made[-1].append(at)
        taken += width
    return made


def width_of(table: Table, at: int, details: bool, wrapped: bool = True) -> int:
    """Characters that a column needs, with its border and padding, where its longer texts are ``wrapped`` or not."""
    texts = broken(table.head[at]).split("\n")
    for row in table.rows:
        cell = row[at]
        texts += cell.text.split() if wrapped and len(cell.text) > WRAPPED else [cell.text]
        texts += [cell.detail] if details else []
    return max(FIRST_COLUMN if at == 0 and wrapped else 0, *map(len, texts)) + BORDER


def widths_in(table: Table, columns: list[int], room: int, details: bool) -> list[int]:
    """What each column needs; what is left of ``room`` goes to those whose texts are wrapped, the first ones first."""
    widths = [width_of(table, at, details) for at in columns]
    left = max(0, room - sum(widths))
    for place, at in enumerate(columns):
        more = min(left, max(0, width_of(table, at, details, wrapped=False) - widths[place]))
        widths[place] += more
        left -= more
    return widths


def broken(name: str) -> str:
    """A heading in lines as short as they can be read: torch, foreach=, False."""
    return re.sub(r" |(?<==)|(?=\.compile)|(?=\()", "\n", name)


def as_rich(table: Table, columns: list[int], room: int, details: bool, title: bool) -> RichTable:
    made = RichTable(title=escape(table.title) if title else None, title_justify="left", title_style="bold")
    widths = [width - BORDER for width in widths_in(table, columns, room, details)]
    for at, width in zip(columns, widths, strict=True):
        justify: Literal["left", "right"] = "left" if at == 0 else "right"
        made.add_column(Text(broken(table.head[at])), justify=justify, vertical="middle", overflow="fold", width=width)
    before = ""
    for row in table.rows:
        cells = [as_text(row[at], details) for at in columns]
        if row[0].text == before:
            cells[0] = Text()  # said in the row above
        before = row[0].text
        made.add_row(*cells)
    return made


def as_text(cell: Cell, details: bool) -> Text:
    style = (PEER_WINS if cell.best_peer else OURS_WINS) if cell.fastest else BEST_PEER if cell.best_peer else ""
    made = Text.assemble((cell.text, style))
    return made.append(f"\n{cell.detail}", style="dim") if details and cell.detail else made
