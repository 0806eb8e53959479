"""Where a run's numbers come from and what they leave out, in sentences. For the report. No torch."""

from __future__ import annotations

from bench.report import formats
from bench.report.run import Run, has_suite, infos, present_name

# Above these a run does not count as one on an idle machine, and the report says so.
IDLE_LOAD_PER_CORE = 0.25
IDLE_SHARE_OF_OTHERS = 0.05

# What docs/benchmarks.md is made of, as one would say that it is missing.
PARTS = {
    "step": "the models",
    "host": "the cost of a step beside its arithmetic",
    "training": "whole iterations of training",
    "growth": "the growth with the number of tensors",
    "elements": "the growth with the number of elements",
}


def provenance(run: Run) -> str:
    """Machine, date, versions, commit, how idle the machine was, the file."""
    machine, commit = run["machine_info"], run["commit_info"]
    state = ", with changes not committed" if commit["dirty"] else ""
    load_average, others = machine["load_average_at_start"][0], machine["cores_used_by_others"]
    busy = load_average > IDLE_LOAD_PER_CORE * machine["cores"] or (others or 0) > IDLE_SHARE_OF_OTHERS
    sentences = [
        f"Measured on {run['datetime'][:10]}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}; "
        f"{gpu(run)}torch {machine['torch']}, {triton(run)}Python {machine['python_version']}; "
        f"{machine['cpu_isa']} code of commit {commit['id'][:10]}{state}.",
        *compared_with(run),
        *sizes(run),
        f"Load average {load_average:.1f} at the start"
        + (f"; meanwhile other processes had {others:.0%} of the cores' time." if others is not None else "."),
    ]
    if busy:
        sentences.append("**The machine was not idle: believe the ratios only as far as their quartiles go.**")
    if run["smoke"]:
        sentences.append("**A smoke run: the numbers mean nothing.**")
    sentences.append(f"From bench/results/{run['file']}.")
    return " ".join(sentences)


def gpu(run: Run) -> str:
    found = run["machine_info"].get("gpu")
    if not found:
        return ""
    return f"{found['name']}, {found['memory_bytes'] / 2**30:.0f} GiB, driver {found['driver']}, CUDA {found['cuda']}; "


def triton(run: Run) -> str:
    version = (run["machine_info"].get("packages") or {}).get("triton")
    return f"Triton {version}, " if version else ""


def compared_with(run: Run) -> list[str]:
    """The other libraries that were there; torch and Triton stand with the machine."""
    packages = run["machine_info"].get("packages") or {}
    named = ", ".join(f"{name} {version}" for name, version in packages.items() if name != "triton")
    return [f"Compared with {named}."] if named else []


def sizes(run: Run) -> list[str]:
    """Whether the run was a full one, and what was cut to fit. Nothing of earlier files, which do not tell."""
    if "full" not in run:
        return []
    cut = len({info["case"] for info in infos(run) if info["one_of"] > 1})
    return [
        "A full run." if run["full"] else "Not a full run (`pytest bench --full`).",
        *([f"Cut to fit, as their titles say: {cut} {'case' if cut == 1 else 'cases'}."] if cut else []),
    ]


def absent(run: Run) -> list[str]:
    """A line for each reason why somebody was not measured: everywhere, or in the suites and cases that it names.
    In Markdown."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for row in run.get("absent", []):
        name = "everybody" if row["implementation"] is None else formats.as_code(present_name(row["implementation"]))
        places = where.setdefault((name, row["device"], row["reason"]), [])
        places += [part for part in (row.get("case") or row.get("suite"),) if part]
    devices = {"cpu": "CPU", "cuda": "GPU"}
    return [
        f"{name}, {devices.get(device, device)}: {reason}"
        + (f" ({', '.join(dict.fromkeys(places))})" if places else "")
        for (name, device, reason), places in where.items()
    ]


def not_measured(run: Run) -> list[str]:
    """Sentences about what a reader may look for and does not find in the run."""
    missing = [what for suite, what in PARTS.items() if not has_suite(run, suite)]
    sentences = [f"Not measured in this run: {', '.join(missing)}."] if missing else []
    if not any(info["device"] == "cuda" for info in infos(run)):
        sentences.append("Nothing was measured on a GPU.")
    return sentences
