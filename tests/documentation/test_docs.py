"""README and docs/: short enough, no dead link, every name, variable and option told, and every snippet runs."""

from __future__ import annotations

import importlib.util
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import wd_fused

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Read by the code, but set by no user: of the tests' stand-ins.
NO_USERS = {"WD_FUSED_CUDA_ON_CPU", "WD_FUSED_TEST_ALONE"}


def words_of(text: str) -> list[str]:
    return re.findall(r"\S*\w\S*", text)


def prose(page: Path) -> str:
    """As a reader sees it: without comments and code blocks."""
    text = re.sub(r"<!--.*?-->|^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


# The README.


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(words_of(README.read_text(encoding="utf-8"))) <= 900
    assert len(re.findall(r"^\|[-| :]+\|$", README.read_text(encoding="utf-8"), re.MULTILINE)) <= 2


def test_no_sentence_of_the_readme_is_longer_than_thirty_words() -> None:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose(README))
    paragraphs = [part for part in re.split(r"\n\s*\n|\n- |\n\||\n#", text) if "·" not in part]
    sentences = [one for part in paragraphs for one in re.split(r"(?<=[.:;!?])\s", part)]
    assert [one for one in sentences if len(words_of(one)) > 30] == []


def test_the_readme_has_no_words_of_the_machine_room() -> None:
    assert re.findall(r"\b(?:tails?|rows?|walkers?|plans?|tiles?)\b", prose(README), re.IGNORECASE) == []


# Links.


def anchors(page: Path) -> set[str]:
    """Those that GitHub and mkdocs make of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_of_a_page_is_dead(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.is_file() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def test_every_page_of_docs_is_in_the_sites_navigation() -> None:
    named = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


# What must be told.


def test_every_public_name_is_in_the_api_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert [name for name in wd_fused.__all__ if f"wd_fused.{name}" not in text] == []


def test_every_environment_variable_is_documented() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "wd_fused").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")]
    read = {
        name for path in sources for name in re.findall(r'"(WD_FUSED_[A-Z_]+)"', path.read_text(encoding="utf-8"))
    } - NO_USERS
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    macros = {name for name in read if name == "WD_FUSED_CUDA_ARCHS"}
    assert read - macros >= {"WD_FUSED_BACKEND", "WD_FUSED_JIT", "WD_FUSED_VERBOSE", "WD_FUSED_CUDA"}
    assert [name for name in sorted(read - macros) if f"`{name}" not in text] == []


def test_every_make_target_that_a_page_names_is_one_that_make_lists() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([\w-]+) +\S", listed, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None and targets == {*phony[1].split()}
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z][a-z-]+)[`,\n ]", code_of(page))}
    assert named <= targets


def code_of(page: Path) -> str:
    """What stands in backticks and indented blocks."""
    text = page.read_text(encoding="utf-8")
    return "\n".join([*re.findall(r"`[^`\n]+`", text), *re.findall(r"^    (.*)$", text, re.MULTILINE)]) + "\n"


# Snippets.


class Snippet(NamedTuple):
    page: Path
    number: int
    code: str
    before: tuple[str, ...]  # what a reader has run by then

    @property
    def missing(self) -> str | None:
        if self.code.startswith("# needs a GPU") and not torch.cuda.is_available():
            return "no GPU"
        imported = re.findall(r"^(?:import|from) (\w+)", self.code, re.MULTILINE)
        absent = [name for name in imported if importlib.util.find_spec(name) is None]
        return f"{absent[0]} is not installed: `make integrations` runs it" if absent else None


def snippets() -> Iterator[Snippet]:
    """In docs/use-with.md each needs the first one only; elsewhere all that stand above it."""
    for page in PAGES:
        codes = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for number, code in enumerate(codes):
            before = codes[:1] * (number > 0) if page.name == "use-with.md" else codes[:number]
            yield Snippet(page, number, code, tuple(before))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_a_snippet_is_cut_by_the_site(page: Path) -> None:
    """Beside the navigation, on a screen of 1,280 pixels, there is room for 88 characters."""
    codes = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert [line for code in codes for line in code.splitlines() if len(line) > 88] == []


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As torchrun sets it for one process; in a folder of its own, since frameworks write where they are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("snippet", [pytest.param(one, id=f"{one.page.stem}-{one.number}") for one in snippets()])
def test_a_snippet_runs(snippet: Snippet, in_one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if snippet.missing is not None:
        pytest.skip(snippet.missing)
    if "init_process_group" not in snippet.code:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
            monkeypatch.delenv(name)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "snippet"}
    for code in (*snippet.before, snippet.code):
        exec(compile(code, f"{snippet.page.name}, snippet {snippet.number}", "exec"), names)
