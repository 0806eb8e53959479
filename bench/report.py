"""`python -m bench.report`: the newest results as Markdown; `--write README.md` puts them between README's markers.

Everything that the README says about speed and memory is made here from files of bench/results/, which it names: each
block from one. tests/test_readme_numbers.py makes them again and compares. Needs no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import formats, tail_report
from bench.cases import IMPLEMENTATIONS, OPTIONS, OURS, PEERS
from bench.formats import Spread

RESULTS = Path(__file__).with_name("results")
PLOT = Path("docs/images/step_time_per_tensor.png")

# Above these a run does not count as one on an idle machine, and the report says so.
IDLE_LOAD_PER_CORE = 0.25
IDLE_SHARE_OF_OTHERS = 0.05


class ReportError(Exception):
    """There is nothing to report, or nowhere to write it. The message says what to do."""


@dataclass(frozen=True)
class TimedCase:
    """A case of a suite: seconds of a step, per implementation and interleaved round."""

    title: str
    tensors: int
    seconds: dict[str, list[float]]

    def time(self, implementation: str) -> Spread:
        return Spread.of(self.seconds[implementation])

    def ratio(self, peer: str) -> Spread:
        """How many times as long as ours the peer's step takes, over the rounds."""
        pairs = zip(self.seconds[peer], self.seconds[OURS], strict=True)
        return Spread.of([theirs / ours for theirs, ours in pairs])


def load(path: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return run | {"file": path.name}


def newest(suite: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The latest run that has the suite; by the date inside, since a checkout gives every file the same one outside."""
    runs = [run for path in folder.glob("cpu-*.json") if has_suite(run := load(path), suite)]
    if not runs:
        raise ReportError(f"no results of the suite {suite!r} in {folder}: `make bench` writes them")
    return max(runs, key=lambda run: str(run["datetime"]))


def has_suite(run: dict[str, Any], suite: str) -> bool:
    return any(row["extra_info"]["suite"] == suite for row in run["benchmarks"])


def timed_cases(run: dict[str, Any], suite: str) -> list[TimedCase]:
    """The suite's cases in the order of the run; a case that lacks an implementation is left out."""
    cases: dict[str, TimedCase] = {}
    for row in run["benchmarks"]:
        info = row["extra_info"]
        if info["suite"] == suite:
            case = cases.setdefault(info["case"], TimedCase(info["title"], info["tensors"], {}))
            case.seconds[info["implementation"]] = info["interleaved_seconds"]
    return [case for case in cases.values() if set(case.seconds) >= set(IMPLEMENTATIONS)]


def step_markdown(run: dict[str, Any]) -> str:
    memory = [row for row in run["extra_memory"] if "tail" not in row]
    parts = [_ratios(timed_cases(run, "step")), _memory(memory), _growth(timed_cases(run, "growth"))]
    return "\n\n".join(part for part in parts if part)


def _ratios(cases: list[TimedCase]) -> str | None:
    if not cases:
        return None
    rows = [
        [case.title, formats.time(case.time(OURS).median), *(formats.times_as_long(case.ratio(peer)) for peer in PEERS)]
        for case in cases
    ]
    options = f"momentum {OPTIONS['momentum']}, weight decay {OPTIONS['weight_decay']}"
    return "\n\n".join(
        [
            f"The whole `step()`, called from Python; float32, {options}. wd_fused: time of a step. The others: how "
            "many times as long they take, over the same tensors in the same run (median of the interleaved rounds, "
            "quartiles in brackets; below 1 the other is faster).",
            formats.table(["tensors", *map(_name, IMPLEMENTATIONS)], rows),
            *_where_not_faster(cases),
        ]
    )


def _where_not_faster(cases: Iterable[TimedCase]) -> list[str]:
    """The comparisons that are lost, or too close to call: the quartiles do not lie above 1."""
    lost = []
    for case in cases:
        for peer in PEERS:
            ratio = case.ratio(peer)
            if ratio.low <= 1:
                verdict = "is faster than wd_fused" if ratio.high < 1 else "is as fast as wd_fused, within the spread"
                lost.append(f"- {case.title}: {_name(peer)} {verdict}.")
    return ["Where wd_fused is not the faster one:", "\n".join(lost)] if lost else []


def _memory(measured: list[dict[str, Any]]) -> str | None:
    if not measured:
        return None
    peaks: dict[str, dict[str, int]] = {}
    buffers: dict[str, int] = {}
    for row in measured:
        peaks.setdefault(row["title"], {})[row["implementation"]] = max(row["first_step"], row["later_step"])
        buffers[row["title"]] = row["momentum_buffers"]
    rows = [
        [
            title,
            formats.mebibytes(buffers[title]),
            *(formats.mebibytes(peak[name]) if name in peak else "–" for name in IMPLEMENTATIONS),
        ]
        for title, peak in peaks.items()
    ]
    return "\n\n".join(
        [
            "Peak memory that a step takes beyond parameters, gradients and momentum buffers (resident size of a fresh "
            "process; the larger of the first step and later ones).",
            formats.table(["tensors", "momentum buffers", *map(_name, IMPLEMENTATIONS)], rows),
        ]
    )


def _growth(cases: list[TimedCase]) -> str | None:
    if not cases:
        return None
    rows = [
        [_name(name), *(formats.significant(case.time(name).median / case.tensors * 1e6) for case in cases)]
        for name in IMPLEMENTATIONS
    ]
    return "\n\n".join(
        [
            "Time of a step divided by the number of tensors, in µs; tensors of 64 elements.",
            formats.table(["tensors", *(f"{case.tensors:,}" for case in cases)], rows),
            f"![Time of a step per tensor, over the number of tensors]({PLOT.as_posix()})",
        ]
    )


def sharded_markdown(run: dict[str, Any]) -> str:
    """Not every implementation steps DTensors: a dash where it cannot."""
    taken: dict[str, dict[str, list[float]]] = {}
    for row in run["benchmarks"]:
        info = row["extra_info"]
        if info["suite"] == "sharded":
            taken.setdefault(info["title"], {})[info["implementation"]] = info["interleaved_seconds"]
    rows = []
    for title, seconds in taken.items():
        case = TimedCase(title, 0, seconds)
        peers = (formats.times_as_long(case.ratio(peer)) if peer in seconds else "cannot" for peer in PEERS)
        rows.append([title, formats.time(case.time(OURS).median), *peers])
    return "\n\n".join(
        [
            "The whole `step()` over DTensors, one process, CPU. wd_fused: time of a step. The others: how many times "
            "as long they take.",
            formats.table(["tensors", *map(_name, IMPLEMENTATIONS)], rows),
        ]
    )


def _provenance(run: dict[str, Any]) -> str:
    machine, commit = run["machine_info"], run["commit_info"]
    state = ", with changes not committed" if commit["dirty"] else ""
    load_average, others = machine["load_average_at_start"][0], machine["cores_used_by_others"]
    busy = load_average > IDLE_LOAD_PER_CORE * machine["cores"] or (others or 0) > IDLE_SHARE_OF_OTHERS
    sentences = [
        f"Measured on {run['datetime'][:10]}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}; "
        f"torch {machine['torch']}, Python {machine['python_version']}; {machine['cpu_isa']} code "
        f"of commit {commit['id'][:10]}{state}.",
        f"Load average {load_average:.1f} at the start"
        + (f"; meanwhile other processes had {others:.0%} of the cores' time." if others is not None else "."),
    ]
    if busy:
        sentences.append("**The machine was not idle: believe the ratios only as far as their quartiles go.**")
    if run["smoke"]:
        sentences.append("**A smoke run: the numbers mean nothing.**")
    sentences.append(f"From bench/results/{run['file']}; the method is in bench/README.md.")
    return " ".join(sentences)


def _name(implementation: str) -> str:
    """Arguments as code: torch `fused=True`."""
    return re.sub(r"\S+=\S+", r"`\g<0>`", implementation)


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
    body: Callable[[dict[str, Any]], str]

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: begin -->"

    @property
    def end(self) -> str:
        return f"<!-- {self.name}: end -->"

    def markdown(self, run: dict[str, Any]) -> str:
        return f"{self.body(run)}\n\n{_provenance(run)}"

    def text(self, run: dict[str, Any]) -> str:
        """All of it, markers included."""
        how = "<!-- made by `python -m bench.report --write README.md`: not edited by hand -->"
        return f"{self.begin}\n{how}\n\n{self.markdown(run)}\n\n{self.end}"

    def find(self, text: str) -> str:
        """The block in a README's text, markers included."""
        begin, end = self.begin, self.end
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ReportError(f"it must hold one line {begin} and, below it, one line {end}")
        return text[text.index(begin) : text.index(end) + len(end)]


STEP = Block("numbers", "step", step_markdown)
TAIL = Block("tail numbers", tail_report.SUITE, tail_report.markdown)
SHARDED = Block("sharded numbers", "sharded", sharded_markdown)
BLOCKS = (STEP, TAIL, SHARDED)


def blocks_of(run: dict[str, Any]) -> dict[Block, dict[str, Any]]:
    """The run, for each block that can be made of it."""
    blocks = {block: run for block in BLOCKS if has_suite(run, block.suite)}
    if not blocks:
        raise ReportError(f"{run['file']} has no results that the report shows")
    return blocks


def newest_blocks(folder: Path = RESULTS) -> dict[Block, dict[str, Any]]:
    """The newest run for each block that has one."""
    found: dict[Block, dict[str, Any]] = {}
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


def write(blocks: dict[Block, dict[str, Any]], readme: Path) -> None:
    """Replaces the README's blocks, and draws the picture that one of them shows, beside it in docs/images."""
    text = readme.read_text(encoding="utf-8")
    for block, run in blocks.items():
        if run["smoke"]:
            raise ReportError(f"{run['file']} is of a smoke run, whose numbers mean nothing: `make bench` first")
        try:
            text = text.replace(block.find(text), block.text(run))
        except ReportError as error:
            raise ReportError(f"{readme}: {error}") from None
    if STEP in blocks:
        draw_growth(blocks[STEP], readme.parent / PLOT)
    readme.write_text(text, encoding="utf-8")


def growth_digest(run: dict[str, Any]) -> str:
    """Names the numbers that the picture shows; it is kept in the picture, so that a test can tell an old one."""
    shown = [[case.tensors, case.seconds] for case in timed_cases(run, "growth")]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def draw_growth(run: dict[str, Any], path: Path) -> None:
    """Time of a step per tensor over the number of tensors, both on log axes: medians, with the quartiles as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = timed_cases(run, "growth")
    counts = [case.tensors for case in cases]
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=110, layout="constrained")
    colours = dict(zip(IMPLEMENTATIONS, ("#d1495b", "#30638e", "#7a7a7a", "#2f9e77"), strict=True))
    markers = dict(zip(IMPLEMENTATIONS, "osD^", strict=True))
    for name in IMPLEMENTATIONS:
        spreads = [Spread.of([s / case.tensors * 1e6 for s in case.seconds[name]]) for case in cases]
        ours = name == OURS
        axes.plot(
            counts,
            [spread.median for spread in spreads],
            color=colours[name],
            marker=markers[name],
            markersize=5,
            linewidth=2.4 if ours else 1.5,
            label=name,
        )
        axes.fill_between(
            counts,
            [spread.low for spread in spreads],
            [spread.high for spread in spreads],
            color=colours[name],
            alpha=0.15,
            linewidth=0,
        )
    axes.set(xscale="log", yscale="log", xlabel="tensors of 64 elements", ylabel="µs per tensor")
    machine = run["machine_info"]
    axes.set_title(f"Time of step() per tensor: {machine['cpu']}, {machine['threads']} threads", fontsize=11)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    figure.legend(loc="outside lower center", ncols=len(IMPLEMENTATIONS), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Description": growth_digest(run), "Software": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Results of `make bench` as Markdown.")
    parser.add_argument("--results", type=Path, metavar="FILE", help="a results file (default: the newest)")
    parser.add_argument("--write", type=Path, metavar="README", help="replace the text between README's markers")
    chosen = parser.parse_args(arguments)
    try:
        blocks = blocks_of(load(chosen.results)) if chosen.results is not None else newest_blocks()
        if chosen.write is None:
            print("\n\n".join(block.markdown(run) for block, run in blocks.items()))
        else:
            write(blocks, chosen.write)
            for block, run in blocks.items():
                print(f"{chosen.write}: {block.name} of {run['file']}")
    except (ReportError, OSError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
