"""The numbers of README.md and docs/ are what the report makes of the results that they name; the report."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import cases, report
from bench.cases import options
from bench.cases.implementations import (
    COMPILED,
    FOREACH,
    FUSED,
    LIMIT,
    LOOP,
    OPTIMI,
    ORDER,
    OURS,
    TRITON,
)
from bench.report import COST, GAIN, HOME_GAIN, ONE_PASS, OPTIONS, SHARDED, STEP, Block, compare, plots, tables
from bench.report import options as options_report

ROOT = Path(__file__).resolve().parents[2]

PAGES = sorted({block.page for block in report.BLOCKS})


def page_of(page: str, text_of: Callable[[Block], str]) -> str:
    return "\n\n".join(["# Title", *(text_of(block) for block in report.BLOCKS if block.page == page), "The end.\n"])


def empty(block: Block) -> str:
    return f"{block.begin}\n{block.end}"


def put_empty_pages(folder: Path) -> None:
    (folder / "docs").mkdir()
    for page in PAGES:
        (folder / page).write_text(page_of(page, empty), encoding="utf-8")


# Ours, by round. The second and third are three times as slow for everybody: medians of times would hide the ratios.
ROUNDS = [1e-3, 3e-3, 3e-3]
FACTORS = {OURS: [1, 1, 1], FUSED: [4, 3, 5], FOREACH: [0.5, 0.4, 0.6], LOOP: [10, 10, 10]}


def seconds_of(factors: list[float], rounds: list[float] = ROUNDS) -> list[float]:
    return [factor * own for factor, own in zip(factors, rounds, strict=True)]


def row(suite: str, case: str, tensors: int, implementation: str, **seconds: Any) -> dict[str, Any]:
    """A row of float32 tensors of 100 elements; ``seconds`` by quantity."""
    elements = 100 * tensors
    info = {"suite": suite, "device": "cpu", "case": case, "title": f"title of {case}", "dtype": "float32"}
    sizes = {"tensors": tensors, "elements": elements, "one_of": 1, "bytes_moved": 20 * elements}
    return {"extra_info": info | sizes | {"implementation": implementation, "seconds": seconds}}


def rows(suite: str, case: str, tensors: int, factors: dict[str, list[float]] = FACTORS) -> list[dict[str, Any]]:
    return [row(suite, case, tensors, name, step=seconds_of(by_round)) for name, by_round in factors.items()]


def options_row(name: str, dtype: str, goal: float | None, implementation: str, seconds: list[float]) -> dict[str, Any]:
    made = row(options_report.SUITE, "small", 161, implementation)
    told = {"tail": name, "tail_title": f"title of {name}", "dtype": dtype, "goal": goal}
    made["extra_info"] |= told | {"interleaved_seconds": seconds}
    del made["extra_info"]["seconds"]
    return made


def memory_row(implementation: str, first_step: int, later_step: int) -> dict[str, Any]:
    peaks = {"first_step": first_step, "later_step": later_step, "momentum_buffers": 64 << 20}
    return {"device": "cpu", "case": "big", "title": "title of big", "implementation": implementation} | peaks


def options_memory_row(implementation: str, first_step: int, later_step: int) -> dict[str, Any]:
    named = {"case": "big", "title": "title of big", "tail": "clip", "tail_title": "title of clip"}
    peaks = {"first_step": first_step, "later_step": later_step, "states": 80 << 20}
    return named | {"implementation": implementation} | peaks


def calls_row(implementation: str, operators: int) -> dict[str, Any]:
    case = {"device": "cpu", "case": "small", "title": "title of small", "tensors": 161}
    return case | {"implementation": implementation, "operators": operators}


def absent_row(implementation: str | None, reason: str, **where: Any) -> dict[str, Any]:
    return {"device": "cpu", "suite": None, "case": None} | where | {"implementation": implementation, "reason": reason}


@pytest.fixture
def run() -> dict[str, Any]:
    """A run as report.load() gives it. The peers take 4, 0.5 and 10 times as long as wd_fused in the median round."""
    return {
        "machine_info": {
            "machine": "x86_64",
            "system": "Linux",
            "python_version": "3.12.1",
            "cpu": "Some CPU",
            "cores": 8,
            "memory_bytes": 32 << 30,
            "torch": "2.99.0",
            "threads": 4,
            "cpu_isa": "avx2",
            "load_average_at_start": [0.1, 0.2, 0.3],
            "cores_used_by_others": 0.01,
            "packages": {"triton": "5.4", "torch-optimi": "9.8", "flashoptim": "7.6"},
            "gpu": None,
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [
            # The limit takes half as long, a quarter, and a fifth: half in the middle, were it not by round.
            *rows("step", "small", 161, FACTORS | {LIMIT: [0.5, 0.25, 0.2]}),
            *rows("step", "large", 1, {OURS: [1, 1, 1], FUSED: [1.1, 0.9, 0.98], OPTIMI: [2, 2.5, 3]}),
            *rows("host", "small", 161),
            *rows("growth", "10x64", 10),
            *rows("growth", "2000x64", 2000),
            *rows("elements", "1x1024", 1, {OURS: [1, 1, 1], FUSED: [2, 2, 2], LIMIT: [0.5, 0.5, 0.5]}),
            row("training", "digits", 65, OURS, iteration=[0.2, 0.2, 0.2], step=[0.01, 0.01, 0.01]),
            row("training", "digits", 65, LOOP, iteration=[0.24, 0.25, 0.26], step=[0.05, 0.05, 0.05]),
            *rows("sharded", "many", 200, {name: by_round for name, by_round in FACTORS.items() if name != FUSED}),
            options_row("plain", "float32", None, OURS, ROUNDS),
            options_row("plain", "float32", None, "torch", seconds_of([2, 2, 2])),
            options_row("clip", "float32", 3.0, OURS, seconds_of([2, 2, 2])),
            options_row("clip", "float32", 3.0, "torch", [6e-3, 24e-3, 21e-3]),
            options_row("master-full", "bfloat16", 4.0, OURS, ROUNDS),
            options_row("master-full", "bfloat16", 4.0, "torch", seconds_of([3, 3, 3])),
        ],
        "extra_memory": [
            memory_row(OURS, 0, 0),
            memory_row(FUSED, 512 << 10, 0),
            memory_row(FOREACH, 1500 << 20, 0),
            memory_row(LOOP, 1 << 20, 3 << 20),
            options_memory_row(OURS, 1 << 20, 2 << 20),
            options_memory_row("torch", 3 << 20, 0),
        ],
        "calls": [calls_row(OURS, 0), calls_row(FUSED, 1), calls_row(LOOP, 1771)],
        "absent": [
            absent_row(COMPILED, "takes long", suite="step", case="small"),
            absent_row(COMPILED, "takes long", suite="step", case="large"),
            absent_row(TRITON, "its kernels are for GPUs"),
            absent_row(None, "no driver", device="cuda"),
        ],
        "datetime": "2031-02-03T04:05:06.789+00:00",
        "smoke": False,
        "full": False,
        "seconds": 600,
        "file": "cpu-2031-02-03-040506.json",
    }


def on_gpu(run: dict[str, Any]) -> dict[str, Any]:
    """The run with rows of a GPU: 1 GB to be moved in 1 ms, where the limit's rows have 20 GB in 10 and in 40 ms."""
    for case, dtype, size, name, seconds in (
        ("resnet50", "float32", 1e9, OURS, {"host": [1e-5] * 3, "device": [1e-3] * 3, "whole": [2e-3] * 3}),
        ("resnet50", "float32", 1e9, TRITON, {"host": [2e-5] * 3, "device": [2e-3] * 3, "whole": [2e-3] * 3}),
        ("resnet50", "float32", 1e9, FUSED, {"host": [3e-5] * 3, "device": [0.8e-3] * 3, "whole": [2e-3] * 3}),
        ("half", "bfloat16", 1e9, OURS, {"host": [1e-5] * 3, "device": [1e-3] * 3, "whole": [2e-3] * 3}),
        ("one", "float32", 20e9, OURS, {"host": [1e-5] * 3, "device": [16e-3] * 3, "whole": [2e-2] * 3}),
        ("one", "float32", 20e9, LIMIT, {"host": [1e-5] * 3, "device": [10e-3] * 3, "whole": [2e-2] * 3}),
        ("other", "float32", 20e9, OURS, {"host": [1e-5] * 3, "device": [50e-3] * 3, "whole": [5e-2] * 3}),
        ("other", "float32", 20e9, LIMIT, {"host": [1e-5] * 3, "device": [40e-3] * 3, "whole": [5e-2] * 3}),
    ):
        made = row("step", case, 161, name, **seconds)
        made["extra_info"] |= {"device": "cuda", "dtype": dtype, "bytes_moved": int(size)}
        run["benchmarks"].append(made)
    run["machine_info"]["gpu"] = {"name": "Some GPU", "driver": "1.2", "cuda": "13.0", "memory_bytes": 80 << 30}
    return run


def as_earlier(run: dict[str, Any]) -> dict[str, Any]:
    """The run as earlier versions wrote it: without devices, with "torch default" for the loop."""
    made = copy.deepcopy(run)
    for key in ("calls", "absent", "full", "seconds"):
        del made[key]
    for key in ("packages", "gpu"):
        del made["machine_info"][key]
    kept = [row for row in made["benchmarks"] if row["extra_info"]["implementation"] != LIMIT]
    made["benchmarks"] = [
        row for row in kept if row["extra_info"]["suite"] in ("step", "growth", options_report.SUITE, "sharded")
    ]
    for info in [row["extra_info"] for row in made["benchmarks"]] + made["extra_memory"]:
        for key in ("device", "bytes_moved", "one_of"):
            info.pop(key, None)
        info["implementation"] = info["implementation"].replace(LOOP, "torch default")
        if "seconds" in info:
            info["interleaved_seconds"] = info.pop("seconds")["step"]
    return made


def table_row(text: str, first_cell: str) -> list[str]:
    """The cells after the first of the only row that begins so."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first_cell} |")]
    assert len(found) == 1, f"{len(found)} rows {first_cell!r} in\n{text}"
    return [cell.strip() for cell in found[0].strip("|").split("|")][1:]


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next."""
    return text.split(f"### {title}\n")[1].split("\n### ")[0]


# The pages themselves.


def shown(block: Block) -> tuple[str, dict[str, Any]]:
    """The page's block, and the run that it names."""
    text = block.find((ROOT / block.page).read_text(encoding="utf-8"))
    path = report.RESULTS / report.results_named_in(text)
    assert path.is_file(), f"{path} is not there: `make bench`, then `python -m bench.report --write`"
    return text, report.load(path)


@pytest.mark.parametrize("block", report.BLOCKS, ids=lambda block: block.name)
def test_each_block_is_what_the_report_makes_of_the_results_that_it_names(block: Block) -> None:
    text, run = shown(block)
    assert text == block.text(run), "make it again: `python -m bench.report --write`"
    assert not run["smoke"]


@pytest.mark.parametrize(
    ("block", "pictures"),
    [(STEP, plots.pictures), (GAIN, plots.readme_pictures), (HOME_GAIN, plots.readme_pictures)],
    ids=["docs", "README", "index"],
)
def test_the_pictures_show_the_run_that_the_page_names(block: Block, pictures: Callable[..., Any]) -> None:
    text, run = shown(block)
    assert pictures(run)
    for picture in pictures(run):
        path = ROOT / plots.IMAGES / picture.file
        assert f"({path.relative_to((ROOT / block.page).parent).as_posix()})" in text
        assert picture.digest.encode() in path.read_bytes(), f"{path} shows other numbers"


def test_the_results_that_the_pages_name_are_complete() -> None:
    _, run = shown(STEP)
    for suite, expected in (
        ("step", cases.STEP),
        ("host", cases.HOST),
        ("growth", cases.GROWTH),
        ("elements", cases.ELEMENTS),
    ):
        assert {case.name for case in expected} <= {case.name for case in report.timed_cases(run, suite)}
    absent = {row["implementation"] for row in run["absent"] if row["device"] == "cpu" and row["case"] is None}
    for suite in ("extra_memory", "calls"):
        assert {(row["case"], row["implementation"]) for row in run[suite] if row.get("device") == "cpu"} >= {
            (case.name, name) for case in cases.MEMORY for name in ORDER if name not in absent
        }
    _, run = shown(OPTIONS)
    assert set(options_report.timed_options(run)) == {
        (case.name, chosen.name) for case in options.STEP for chosen in options.OPTION_SETS
    }
    assert {(row["case"], row["tail"], row["implementation"]) for row in run["extra_memory"] if "tail" in row} == {
        (case.name, chosen.name, name)
        for case in options.MEMORY
        for chosen in options.OPTION_SETS
        for name in options.IMPLEMENTATIONS
    }


# The report.


def test_ratios_are_formed_within_each_round_and_given_as_median_and_quartiles(run: dict[str, Any]) -> None:
    text = section(STEP.markdown(run), "A step")
    assert table_row(text, "tensors")[3:] == [
        "torch `fused=True`",
        "torch `foreach=True`",
        "torch `foreach=False`",
        "optimi SGD",
    ]
    assert table_row(text, "title of small") == [
        "3.00 ms",
        "25%",  # 0.5, 0.25 and 0.2 of our time by round
        "**torch `foreach=True`**",
        "4.00×<br><sub>3.50–4.50</sub>",
        "**0.50×**<br><sub>0.45–0.55</sub>",
        "10.0×<br><sub>10.0–10.0</sub>",
        "–",
    ]


def test_a_case_says_who_is_the_fastest_and_marks_the_best_peer_and_dashes_the_absent(run: dict[str, Any]) -> None:
    assert table_row(section(STEP.markdown(run), "A step"), "title of large") == [
        "**3.00 ms**",
        "–",  # no limit in its rounds
        "even: torch `fused=True`",
        "**0.98×**<br><sub>0.94–1.04</sub>",
        "–",
        "–",
        "2.50×<br><sub>2.25–2.75</sub>",
    ]


def test_a_lost_comparison_and_one_within_the_spread_are_named_and_won_ones_are_not(run: dict[str, Any]) -> None:
    text = STEP.markdown(run)
    assert "- title of small: torch `foreach=True` is faster (0.50×).\n" in text
    assert "- title of small, one element each: torch `foreach=True` is faster (0.50×).\n" in text  # every suite
    assert "- title of large: torch `fused=True` is as fast, within the spread.\n" in text
    lost = section(text, "Where it is not faster")
    assert "foreach=False" not in lost
    assert "optimi" not in lost
    assert "digits" not in lost


def test_what_compiling_took_is_told(run: dict[str, Any]) -> None:
    assert "compile" not in section(STEP.markdown(run), "A step")
    compiled = row("step", "small", 161, COMPILED, step=ROUNDS)
    compiled["extra_info"]["compile_seconds"] = 31.24
    run["benchmarks"].append(compiled)
    text = section(STEP.markdown(run), "A step")
    assert "Compiling took `torch.compile(step)` 31.2 s (title of small) before it was timed." in text


def test_a_case_that_only_the_triton_backend_steps_is_not_taken_for_one_of_the_other(run: dict[str, Any]) -> None:
    kept = on_gpu(run)["benchmarks"]
    run["benchmarks"] = [
        row for row in kept if (row["extra_info"]["case"], row["extra_info"]["implementation"]) != ("resnet50", OURS)
    ]
    text = section(STEP.markdown(run), "A step, GPU, host's time")
    assert table_row(text, "title of resnet50") == ["–", "–", "–", "–"]
    assert table_row(text, "title of half")[0] == "**10.0 µs**"


def test_a_step_with_cold_caches_stands_beside_that_with_warm_ones(run: dict[str, Any]) -> None:
    title = "What a step costs on the host, cold caches"
    assert f"### {title}\n" not in STEP.markdown(run)
    times = {OURS: [0.01, 0.02, 0.04], FUSED: [0.03, 0.04, 0.05], LOOP: [0.01, 0.02, 0.02]}
    for info in (row["extra_info"] for row in run["benchmarks"]):
        if info["suite"] == "host" and info["implementation"] in times:
            info["seconds"] = info["seconds"] | {"cold": times[info["implementation"]]}
    warm, cold = (section(STEP.markdown(run), heading) for heading in (title.split(",")[0], title))
    assert table_row(warm, "title of small")[0] != "20.0 ms"
    assert table_row(cold, "title of small")[:3] == [
        "**20.0 ms**",
        "even: torch `foreach=False`",
        "2.00×<br><sub>1.62–2.50</sub>",
    ]
    lost = "title of small, one element each, cold caches: torch `foreach=False` is as fast, within the spread."
    assert f"- {lost}\n" in STEP.markdown(run)


def test_calls_of_a_step_are_told(run: dict[str, Any]) -> None:
    text = section(STEP.markdown(run), "Calls of a step")
    assert table_row(text, "tensors") == ["wd_fused", "torch `fused=True`", "torch `foreach=False`"]
    assert table_row(text, "title of small") == ["0", "1", "1,771"]


def test_a_training_iteration_is_told_with_the_steps_share_of_it(run: dict[str, Any]) -> None:
    lines = section(STEP.markdown(run), "Training").splitlines()
    assert "| title of digits | **wd_fused** | 200 ms | – | 10.0 ms | 5.0% |" in lines
    ratio = "1.25×<br><sub>1.23–1.27</sub>"
    assert f"|  | **torch `foreach=False`** | 250 ms | {ratio} | 50.0 ms | 20% |" in lines


def test_memory_is_the_larger_of_the_first_step_and_later_ones(run: dict[str, Any]) -> None:
    assert table_row(section(STEP.markdown(run), "Memory"), "title of big") == [
        "64.0 MiB",
        "0.0 MiB",
        "0.5 MiB",
        "1,500.0 MiB",
        "3.0 MiB",
    ]


def test_growth_is_the_time_of_a_step_divided_by_the_number_of_tensors(run: dict[str, Any]) -> None:
    growth = section(STEP.markdown(run), "By the number of tensors")
    assert table_row(growth, "tensors") == ["10", "2,000"]
    assert table_row(growth, "wd_fused") == ["300", "1.50"]  # 3 ms in the median round; another is faster
    assert table_row(growth, "torch `foreach=False`") == ["3,000", "15.0"]


def test_bytes_a_second_are_told_by_the_number_of_elements_with_the_limit_last(run: dict[str, Any]) -> None:
    for info in (row["extra_info"] for row in run["benchmarks"]):
        if info["suite"] == "elements":
            info |= {"elements": 1024, "bytes_moved": 6_000_000}
    text = section(STEP.markdown(run), "By the number of elements")
    assert table_row(text, "elements") == ["2¹⁰"]
    assert table_row(text, "wd_fused") == ["**2.00**"]  # 6 MB in 3 ms
    assert table_row(text, "streaming kernel") == ["4.00"]


def test_many_sizes_are_thinned_to_some_with_the_first_and_the_last(run: dict[str, Any]) -> None:
    run["benchmarks"] += [made for count in range(3001, 3020) for made in rows("growth", f"{count}x64", count)]
    head = table_row(section(STEP.markdown(run), "By the number of tensors"), "tensors")
    assert len(head) == tables.MOST_COLUMNS
    assert (head[0], head[-1]) == ("10", "3,019")


def test_a_gpus_rows_make_tables_of_their_own_with_host_and_device_apart(run: dict[str, Any]) -> None:
    assert "GPU" not in STEP.markdown(run).replace("Nothing was measured on a GPU.", "").split("Absent")[0]
    text = STEP.markdown(on_gpu(run))
    host, device = (section(text, f"A step, GPU, {which}'s time") for which in ("host", "device"))
    assert table_row(host, "title of resnet50") == [
        "**10.0 µs**",
        "wd_fused",
        "2.00×<br><sub>2.00–2.00</sub>",
        "**3.00×**<br><sub>3.00–3.00</sub>",
    ]
    assert table_row(device, "title of resnet50") == [
        "1.00 ms",
        "50%",  # 1 TB/s; the limit's best row of the dtype has 2 TB/s
        "**torch `fused=True`**",
        "2.00×<br><sub>2.00–2.00</sub>",
        "**0.80×**<br><sub>0.80–0.80</sub>",
    ]
    assert table_row(device, "title of half")[1] == "–"  # no limit of its dtype
    assert table_row(device, "title of one")[1] == "62%"  # that of its own rounds
    assert "- title of resnet50, GPU, device's time: torch `fused=True` is faster (0.80×).\n" in text
    assert "Some GPU, 80 GiB, driver 1.2, CUDA 13.0; torch 2.99.0" in text
    assert "Nothing was measured on a GPU." not in text


def test_options_are_told_beside_the_plain_step_torch_and_its_goal(run: dict[str, Any]) -> None:
    times = OPTIONS.markdown(run).split("Memory that a step takes")[0]
    assert table_row(times, "title of plain") == ["–", "20, 20", "2.00× (2.00–2.00)", "–"]
    assert table_row(times, "title of clip") == [
        "2.00",
        "24, 32",  # norm 4, parameter and buffer 16, gradient 4; torch's clipping reads and writes it once more
        "3.50× (3.25–3.75)",
        "3, reached",
    ]
    # Not of the plain step's dtype, so not timed in its rounds.
    assert table_row(times, "title of master-full") == [
        "–",
        "22, 32",
        "3.00× (3.00–3.00)",
        "4, missed",
    ]


def test_what_options_cost_is_told_beside_the_plain_step(run: dict[str, Any]) -> None:
    text = COST.body(run)
    assert table_row(text, "options") == ["title of small"]
    assert table_row(text, "title of clip") == ["2.00"]
    assert "plain" not in text and "master" not in text


def test_who_cannot_step_dtensors_is_told(run: dict[str, Any]) -> None:
    assert table_row(SHARDED.markdown(run), "title of many") == [
        "3.00 ms",
        "cannot",
        "0.50× (0.45–0.55)",
        "10.0× (10.0–10.0)",
    ]


def test_memory_of_options_is_what_they_take_beyond_their_states(run: dict[str, Any]) -> None:
    text = OPTIONS.markdown(run)
    memory = text[text.index("Memory that a step takes") :]
    assert table_row(memory, "title of clip") == ["80.0 MiB", "2.0 MiB", "3.0 MiB"]


def test_earlier_files_give_the_same_numbers_with_torchs_default_as_its_loop(run: dict[str, Any]) -> None:
    earlier = as_earlier(run)
    text = section(STEP.markdown(earlier), "A step")
    assert table_row(text, "tensors")[2:] == [
        "torch `fused=True`",
        "torch `foreach=True`",
        "torch `foreach=False`",
        "optimi SGD",
    ]
    assert table_row(text, "title of small")[-2:] == ["10.0×<br><sub>10.0–10.0</sub>", "–"]
    for block in (OPTIONS, SHARDED):
        assert block.body(earlier) == block.body(run)
    assert table_row(section(STEP.markdown(earlier), "Memory"), "title of big")[-1] == "3.0 MiB"


# Where it comes from.


@pytest.mark.parametrize("block", [STEP, OPTIONS, SHARDED], ids=lambda block: block.name)
def test_machine_date_versions_commit_load_and_file_are_told(run: dict[str, Any], block: Block) -> None:
    run["benchmarks"][0]["extra_info"]["one_of"] = 4
    text = block.markdown(run)
    assert (
        "Measured on 2031-02-03: Some CPU, 8 cores, 4 threads, 32 GiB, Linux; torch 2.99.0, Triton 5.4, Python 3.12.1; "
        "avx2 code of commit 0123456789. Compared with torch-optimi 9.8, flashoptim 7.6. "
        "Not a full run (`pytest bench --full`). "
        "Cut to fit, as their titles say: 1 case. "
        "Load average 0.1 at the start; meanwhile other processes had 1% of the cores' time. "
        "From bench/results/cpu-2031-02-03-040506.json"
    ) in text


def test_who_is_absent_is_told_with_the_reason_and_where(run: dict[str, Any]) -> None:
    text = STEP.markdown(run)
    assert "- `torch.compile(step)`, CPU: takes long (small, large)\n" in text
    assert "- wd_fused Triton, CPU: its kernels are for GPUs\n" in text
    assert "- everybody, GPU: no driver\n" in text


def test_what_was_not_measured_is_told(run: dict[str, Any]) -> None:
    assert "\n\nNothing was measured on a GPU.\n" in STEP.markdown(run)
    assert "Not measured in this run" not in STEP.markdown(run)
    run["benchmarks"] = [row for row in run["benchmarks"] if row["extra_info"]["suite"] not in ("training", "host")]
    text = STEP.markdown(run)
    assert "Not measured in this run: the cost of a step beside its arithmetic, whole iterations of training.\n" in text


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("load_average_at_start", [3.0, 0.0, 0.0], "The machine was not idle"),
        ("cores_used_by_others", 0.4, "The machine was not idle"),
    ],
)
def test_a_busy_machine_is_told(run: dict[str, Any], name: str, value: object, told: str) -> None:
    assert told not in STEP.markdown(run)
    run["machine_info"][name] = value
    assert told in STEP.markdown(run)


def test_changes_that_are_not_committed_are_told(run: dict[str, Any]) -> None:
    run["commit_info"]["dirty"] = True
    assert "commit 0123456789, with changes not committed." in STEP.markdown(run)


def test_the_newest_results_are_the_latest_by_the_date_inside(run: dict[str, Any], tmp_path: Path) -> None:
    for name, date in (("cpu-a.json", "2031-02-03"), ("cpu-cuda-b.json", "2031-02-04"), ("cpu-c.json", "2030-12-31")):
        (tmp_path / name).write_text(json.dumps(run | {"datetime": date}))
    assert report.newest("step", tmp_path)["file"] == "cpu-cuda-b.json"


def test_each_block_is_made_of_the_newest_run_that_has_its_suite(run: dict[str, Any], tmp_path: Path) -> None:
    timed = [row for row in run["benchmarks"] if row["extra_info"]["suite"] == options_report.SUITE]
    (tmp_path / "cpu-a.json").write_text(json.dumps(run))
    (tmp_path / "cpu-b.json").write_text(json.dumps(run | {"benchmarks": timed, "datetime": "2031-02-04"}))
    files = {block: newest["file"] for block, newest in report.newest_blocks(tmp_path).items()}
    of_options = [ONE_PASS, COST, OPTIONS]
    assert files == dict.fromkeys([GAIN, HOME_GAIN, STEP, SHARDED], "cpu-a.json") | dict.fromkeys(
        of_options, "cpu-b.json"
    )
    assert list(report.blocks_of(report.load(tmp_path / "cpu-b.json"))) == [OPTIONS]
    (tmp_path / "cpu-a.json").unlink()
    assert list(report.newest_blocks(tmp_path)) == of_options


def test_no_results_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match="make bench"):
        report.newest_blocks(tmp_path)


# In the terminal.


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_fit_the_terminal_and_no_name_or_number_is_cut(
    run: dict[str, Any], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(width))
    report.show({STEP: on_gpu(run)})
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    for told in ("0.50×", "10.0×", "1,771", "1,500.0 MiB", "wd_fused", "foreach=", "takes long", "no driver"):
        assert told in text
    assert "…" not in text
    assert "cpu-2031-02-03-040506.json" in text


def test_in_the_terminal_the_fastest_is_bold_and_a_peer_that_wins_stands_out(run: dict[str, Any]) -> None:
    console = pytest.importorskip("rich.console")
    from bench.report import terminal as report_terminal

    screen = console.Console(force_terminal=True, color_system="standard", width=200, record=True)
    with screen.capture() as captured:
        report_terminal.show_numbers(run, screen)
    text = captured.get()
    assert "\x1b[1;33m0.50×" in text
    assert "\x1b[1;33mtorch foreach=True" in text  # in the column that says who is the fastest
    assert "\x1b[1;32m3.00 ms" in text  # ours, where nobody is faster
    assert "\x1b[1;32m4.00×" not in text


# Writing.


def test_writing_replaces_the_blocks_and_nothing_else_and_draws_the_pictures(
    run: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    put_empty_pages(tmp_path)
    run = named_as_bench_names_them(on_gpu(run))
    for _ in range(2):  # over the empty blocks, and over its own
        report.write(dict.fromkeys(report.BLOCKS, run), tmp_path)
        for page in PAGES:
            assert (tmp_path / page).read_text(encoding="utf-8") == page_of(page, lambda block: block.text(run))
    assert {report.results_named_in(block.text(run)) for block in report.BLOCKS} == {run["file"]}
    expected = {picture.file: picture for picture in [*plots.pictures(run), *plots.readme_pictures(run)]}
    assert set(expected) == {
        "against_peers.png",
        "share_of_limit.png",
        "time_by_tensors.png",
        "time_by_elements.png",
        "against_peers_gpu.png",
        "share_of_limit_gpu.png",
        "gain.png",
    }
    for file, picture in expected.items():
        drawn = (tmp_path / plots.IMAGES / file).read_bytes()
        assert drawn.startswith(b"\x89PNG")
        assert picture.digest.encode() in drawn


def named_as_bench_names_them(run: dict[str, Any]) -> dict[str, Any]:
    """The run with the names of the cases that the README picks."""
    names = {("step", "small"): "161x8", ("step", "large"): "resnet50", (options_report.SUITE, "small"): "resnet50"}
    sets = {"clip": "clip-ema"}
    for info in (row["extra_info"] for row in run["benchmarks"]):
        info["case"] = names.get((info["suite"], info["case"]), info["case"])
        if "tail" in info:
            info["tail"] = sets.get(info["tail"], info["tail"])
    return run


def test_the_readme_says_in_words_how_much_longer_torch_takes(run: dict[str, Any]) -> None:
    run = named_as_bench_names_them(run)
    text = GAIN.body(run)
    small = "**A step of 161 small tensors** takes 3.00 ms. torch's default takes 10.0 times as long; "
    assert f"- {small}torch `fused=True` takes 4.00 times as long.\n" in text
    assert "- **A whole training iteration** of a small ResNet takes 200 ms. torch's default takes 1.25 times" in text
    assert "in [6 of 11 comparisons](docs/benchmarks.md#where-it-is-not-faster)" in text
    assert "Nothing was measured on a GPU." in text
    assert "Nothing was measured on a GPU." not in GAIN.body(named_as_bench_names_them(on_gpu(run)))
    assert "by torch's functions in sequence takes 3.50 times as long." in ONE_PASS.body(run)


def test_a_case_that_another_suite_times_as_well_is_told_once(run: dict[str, Any]) -> None:
    run["benchmarks"] += rows("step", "2000x64", 2000)
    text = STEP.body(run)
    assert "title of 2000x64" not in section(text, "A step")
    assert table_row(section(text, "By the number of tensors"), "tensors") == ["10", "2,000"]
    assert section(text, "Where it is not faster").count("- title of 2000x64: ") == 1


def test_the_limit_is_what_was_fastest_so_that_nobody_is_beyond_it(run: dict[str, Any]) -> None:
    for info in (row["extra_info"] for row in run["benchmarks"]):
        if info["implementation"] == LIMIT:
            info["seconds"] = {"step": [9.0, 9.0, 9.0]}  # a plain kernel that was slower than all
    assert table_row(section(STEP.body(run), "A step"), "title of small")[1] == "50%"  # foreach=True takes half


def test_a_picture_tells_other_numbers_apart(run: dict[str, Any]) -> None:
    other = copy.deepcopy(run)
    grown = [row for row in other["benchmarks"] if row["extra_info"]["suite"] == "growth"]
    grown[-1]["extra_info"]["seconds"]["step"][0] *= 1.01
    pairs = zip(plots.pictures(other), plots.pictures(run), strict=True)
    assert {new.name for new, old in pairs if new.digest != old.digest} == {"time_by_tensors"}


def test_pictures_show_the_ratios_shares_and_times_of_the_tables(run: dict[str, Any]) -> None:
    shown = {picture.name: picture.shown for picture in plots.pictures(run)}
    assert shown["against_peers"] == [
        {"title": "title of small", "ratios": {FUSED: [4, 3.5, 4.5], FOREACH: [0.5, 0.45, 0.55], LOOP: [10, 10, 10]}}
    ]
    assert shown["share_of_limit"][0]["shares"][OURS] == 0.25
    assert shown["time_by_tensors"][0] == {
        "implementation": OURS,
        "points": [[10, 0.003, 0.002, 0.003], [2000, 0.003, 0.002, 0.003]],
    }
    assert [line["implementation"] for line in shown["time_by_elements"]] == [OURS, FUSED, LIMIT]


@pytest.mark.parametrize("text", ["no markers", STEP.begin, f"{STEP.end}\n{STEP.begin}", page_of(STEP.page, empty) * 2])
def test_a_page_without_one_pair_of_markers_is_refused_and_all_are_left_alone(
    run: dict[str, Any], tmp_path: Path, text: str
) -> None:
    put_empty_pages(tmp_path)
    (tmp_path / STEP.page).write_text(text, encoding="utf-8")
    with pytest.raises(report.ReportError, match=r"benchmarks.md: .*numbers: begin"):
        report.write({GAIN: named_as_bench_names_them(run), STEP: run}, tmp_path)
    assert (tmp_path / STEP.page).read_text(encoding="utf-8") == text
    assert (tmp_path / GAIN.page).read_text(encoding="utf-8") == page_of(GAIN.page, empty)
    assert not (tmp_path / plots.IMAGES).exists()


def test_a_smoke_run_is_refused_and_the_pages_left_alone(run: dict[str, Any], tmp_path: Path) -> None:
    put_empty_pages(tmp_path)
    with pytest.raises(report.ReportError, match="smoke run"):
        report.write(report.blocks_of(run | {"smoke": True}), tmp_path)
    assert (tmp_path / STEP.page).read_text(encoding="utf-8") == page_of(STEP.page, empty)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--results", "missing.json"], "missing.json: there is no such file; `make bench`"),
        (["--results", "text.json"], "text.json: not JSON"),
        (["--results", "other.json"], "other.json: not a results file of `make bench`"),
        (["--results", "folder"], "folder: cannot be read"),
        (["--compare", "run.json", "./run.json"], "OLD and NEW are the same file"),
        (["--compare", "run.json", "other.json"], "other.json: not a results file"),
        (["--results", "run.json", "--write", "nowhere"], "README.md: cannot be read"),
    ],
)
def test_bad_input_is_an_error_of_one_line_that_names_the_file(
    run: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "other.json").write_text(json.dumps({"benchmarks": []}))
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert report.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


# Two runs side by side.


def changed(run: dict[str, Any], suite: str, case: str, implementation: str, seconds: list[float]) -> dict[str, Any]:
    other = copy.deepcopy(run)
    for info in (row["extra_info"] for row in other["benchmarks"]):
        if (info["suite"], info["case"], info["implementation"]) == (suite, case, implementation):
            info["seconds"] = {"step": seconds}
    return other | {"file": "new.json"}


def test_a_change_beyond_the_spread_is_flagged_and_one_within_is_not(run: dict[str, Any]) -> None:
    assert [row.flags for row in compare.compare(run, run).rows if row.flags] == []
    # Ours had quartiles of 2 and 3 ms: 2.9 to 9 overlaps, 3.1 does not.
    within = compare.compare(run, changed(run, "growth", "10x64", LOOP, [19e-3, 20e-3, 60e-3]))
    assert [row for row in within.rows if row.time.beyond_the_spread] == []
    beyond = compare.compare(run, changed(run, "growth", "10x64", LOOP, [31e-3, 32e-3, 33e-3]))
    assert [(row.case.name, row.implementation) for row in beyond.rows if row.time.beyond_the_spread] == [
        ("10x64", LOOP)
    ]


def test_flagged_rows_come_first_the_largest_change_of_the_ratio_before_the_rest(run: dict[str, Any]) -> None:
    slower = changed(run, "step", "small", OURS, [4e-3, 4e-3, 4e-3])
    # The median of one falls by nine tenths, within its spread.
    noisier = changed(slower, "growth", "2000x64", FOREACH, [0.1e-3, 0.1e-3, 20e-3])
    found = compare.compare(run, changed(noisier, "growth", "10x64", FUSED, [9, 9, 9]))
    first, second = found.rows[:2]
    assert (first.case.name, first.implementation, first.reference) == ("10x64", FUSED, LOOP)
    assert (second.case.name, second.implementation, second.reference) == ("small", OURS, LIMIT)
    assert second.time.relative == pytest.approx(1 / 3)  # 3 ms to 4 ms
    assert second.ratio is not None
    # 2, 4 and 5 times the limit before; 8, 5.33 and 6.67 times afterwards.
    assert (second.ratio.old.median, second.ratio.new.median) == (pytest.approx(4), pytest.approx(20 / 3))
    assert all(not row.flags for row in found.rows[2:])


def test_a_machine_twice_as_slow_changes_times_and_no_ratio(run: dict[str, Any]) -> None:
    slow = copy.deepcopy(run)
    for info in (row["extra_info"] for row in slow["benchmarks"]):
        kept = info.pop("seconds", None) or {"step": info.pop("interleaved_seconds")}
        info["seconds"] = {quantity: [2 * value for value in values] for quantity, values in kept.items()}
    found = compare.compare(run, slow)
    assert all(row.time.relative == pytest.approx(1) for row in found.rows)
    assert all(row.ratio.relative == pytest.approx(0) for row in found.rows if row.ratio is not None)
    assert any(row.ratio is not None for row in found.rows)


def test_earlier_files_are_compared_with_present_ones_by_the_ratio_that_both_have(run: dict[str, Any]) -> None:
    found = compare.compare(as_earlier(run), run)
    ours = next(row for row in found.rows if (row.case.suite, row.case.name) == ("step", "small"))
    assert ours.reference == LOOP
    assert not any(row.flags for row in found.rows)
    assert "host, cpu: title of small" in found.only_new
    assert f"step, cpu, {LIMIT}: title of small" in found.only_new
    assert found.only_old == []


def test_other_machines_and_sizes_are_told(run: dict[str, Any]) -> None:
    other = copy.deepcopy(run)
    other["machine_info"]["threads"] = 8
    for info in (row["extra_info"] for row in other["benchmarks"]):
        if info["case"] == "large":
            info["elements"] = 7
    found = compare.compare(run, other)
    assert found.differences == ["threads: 4 in the old run, 8 in the new one"]
    assert found.resized == ["step, cpu: title of large; title of large"]
    assert not any(row.case.name == "large" for row in found.rows)


@pytest.mark.parametrize("markdown", [True, False])
def test_the_comparison_is_printed(
    run: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    markdown: bool,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(run))
    new.write_text(json.dumps(changed(run, "step", "small", OURS, [4e-3, 4e-3, 4e-3])))
    arguments = ["--compare", str(old), str(new), *(["--markdown"] if markdown else [])]
    assert report.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "title of small, step: wd_fused" in printed
    assert "+33.3% ↑" in printed
    assert "+66.7% ↑" in printed
