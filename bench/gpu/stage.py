"""What the stages of `python -m bench.gpu.check` share. Each is a process: `python -m bench.gpu_NAME --out FILE`.

A stage writes its results as it goes along, so that one which is stopped for want of time leaves what it had. No torch
at import.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Stage:
    """The results of a stage, and where they go.

    Attributes:
        data: what the stage found; JSON.
        failures: sentences that say what is wrong. Any makes the stage one that failed.
        quick: whether only a look is wanted, at small cases.
        given: the data of earlier stages, by name.
        folder: where a stage may leave files for later ones.
    """

    def __init__(self, path: Path, quick: bool, given: dict[str, Any]) -> None:
        self.data: dict[str, Any] = {}
        self.failures: list[str] = []
        self.quick = quick
        self.given = given
        self.folder = path.parent
        self._path = path

    def save(self) -> None:
        text = json.dumps({"data": self.data, "failures": self.failures})
        temporary = self._path.with_suffix(".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._path)


def main(name: str, run: Callable[[Stage], None], needs_gpu: bool = True) -> int:
    """The main program of a stage: 0, or 1 if it found failures. What it raises is the stage's error."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.gpu_{name}", description=f"The stage {name} of gpu_check.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the results go, as JSON")
    parser.add_argument("--given", type=Path, metavar="FILE", help="data of earlier stages, by name, as JSON")
    parser.add_argument("--quick", action="store_true", help="small cases only")
    chosen = parser.parse_args()
    if needs_gpu and (reason := why_no_gpu()) is not None:
        parser.exit(2, f"{parser.prog}: {reason}\n")
    given = {} if chosen.given is None else json.loads(chosen.given.read_text(encoding="utf-8"))
    stage = Stage(chosen.out, chosen.quick, given)
    run(stage)
    stage.save()
    return 1 if stage.failures else 0


def why_no_gpu() -> str | None:
    """Why the GPU's checks cannot run in this process, or None."""
    try:
        import torch
    except ImportError as error:
        return f"this Python has no torch ({error})"
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch finds no GPU that it can use (torch.cuda.is_available() is False)"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, as they stand in a results file."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return {"median": _short(median), "low": _short(low), "high": _short(high), "count": len(values)}


def ratio_of_rounds(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as long as ours theirs takes, formed within each interleaved round."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def as_text(results: dict[str, Any]) -> str:
    """JSON for people to read in the repository: indented, each short list or dict of plain values on one line."""
    text = json.dumps(results, indent=1)
    flat = re.compile(r"\[[^][{}]*\]|\{[^][{}]*\}")

    def joined(found: re.Match[str]) -> str:
        line = re.sub(r"\n\s*", " ", found[0])
        line = line.replace("[ ", "[").replace(" ]", "]").replace("{ ", "{").replace(" }", "}")
        return line if len(line) <= 240 else found[0]

    return flat.sub(joined, text) + "\n"
