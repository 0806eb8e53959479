"""`python -m integrations.report`: the newest results as a table; `--write docs/proof.md` puts it into the page.

integrations/test_page.py makes the page again and compares. Needs no torch and no framework.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
NAMES = {"lightning": "Lightning", "accelerate": "Accelerate", "transformers": "Transformers", "timm": "timm"}
BLOCK = re.compile(r"(<!-- results: begin -->\n).*?(<!-- results: end -->)", re.DOTALL)


class ReportError(Exception):
    """There is nothing to report, or nowhere to write it. The message says what to do."""


def newest() -> Path:
    """The latest run of all frameworks; the names of the files are their dates."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if {row["framework"] for row in rows_of(path)} == {*NAMES}]
    if not paths:
        raise ReportError(f"no results of all frameworks in {RESULTS}: `make integrations` writes them")
    return paths[-1]


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def table(path: Path) -> str:
    """The runs of a test with several settings are one row."""
    run = json.loads(path.read_text(encoding="utf-8"))
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in run["rows"]:
        grouped.setdefault((row["framework"], row["version"], row["what"]), []).append(row)
    lines = ["| framework | version | what was run | result |", "| --- | --- | --- | --- |"]
    for framework, name in NAMES.items():
        for (distribution, version, what), rows in grouped.items():
            if distribution == framework:
                lines.append(f"| {name} | {version} | {what} | {result(rows)} |")
    system = f"{run['system']} {run['machine']}, Python {run['python']}, torch {run['torch']}"
    lines.append("")
    lines.append(
        f"{len(run['rows'])} tests in {run['seconds']:.0f} seconds on the CPU, {run['datetime'][:10]}; {system}; "
        f"commit {run['commit']}. From integrations/results/{path.name}."
    )
    return "\n".join(lines)


def result(rows: list[dict[str, Any]]) -> str:
    parts = []
    for outcome in ("passed", "failed", "skipped"):
        count = sum(row["outcome"] == outcome for row in rows)
        if count == len(rows) == 1:
            parts.append(outcome)
        elif count:
            parts.append(f"{count} {outcome}")
    equal, near = (sum(row[key] for row in rows) for key in ("equal_elements", "near_elements"))
    parts += [f"the same bits in {equal:,} elements"] * (equal > 0)
    parts += [f"{near:,} elements near"] * (near > 0)
    return ", ".join(parts)


def filled(page: str, path: Path) -> str:
    if "<!-- results: begin -->" not in page:
        raise ReportError("the page has no line <!-- results: begin -->: the table goes between it and its end")
    return BLOCK.sub(lambda block: f"{block[1]}{table(path)}\n{block[2]}", page)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m integrations.report", description="the frameworks' results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    parser.add_argument("results", type=Path, nargs="?", help="a file of integrations/results; else the newest")
    given = parser.parse_args(arguments)
    try:
        path = given.results or newest()
        if given.write is None:
            print(table(path))
        else:
            given.write.write_text(filled(given.write.read_text(encoding="utf-8"), path), encoding="utf-8")
    except (ReportError, OSError) as error:
        print(f"integrations.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
