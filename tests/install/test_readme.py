"""The install commands of README.md and docs/getting-started.md, on a Debian that has nothing yet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = {"apt-get", "cd", "."}
BROUGHT_BY = {"git": "git", "make": "make", "g++": "g++", "python3-dev": "python3", "python3-venv": "python3 -m venv"}


def commands(page: str) -> list[str]:
    """Those that stand indented, up to the report of the environment; one a line, or several with &&."""
    lines = re.findall(r"^    (\S.*?)(?:\s+#.*)?$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    told = [command.strip() for line in lines for command in line.split("&&")]
    return told[: told.index("python -m wd_fused") + 1]


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_every_program_of_the_install_commands_is_there_when_it_is_needed(page: str) -> None:
    there = set(DEBIAN)
    for command in commands(page):
        program = "python3 -m venv" if command.startswith("python3 -m venv") else command.split()[0]
        assert program in there, f"{command}: a Debian has no {program} by then"
        if command.startswith("apt-get install"):
            there |= {BROUGHT_BY[package] for package in command.split()[2:]}
        elif program == "python3 -m venv":
            folder = command.split()[-1]
        elif command.startswith(". "):
            assert command == f". {folder}/bin/activate"
            there |= {"python", "pip"}  # the system's own pip is another package, and refuses to install
    assert {"g++", "pip"} <= there
