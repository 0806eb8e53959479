"""Trains a small CNN on scikit-learn's handwritten digits with FusedSGD, and shows what can be seen from outside:

(a) beside torch.optim.SGD from the same seed: the loss of every epoch, every bit of the state, the time in step();
(b) weight decay beside the penalty that it stands for, written into the loss; L1 in the loss;
(c) no decay, decay on everything, decay on weights only;
(d) clipping and an average of the weights in the same pass, beside torch's calls in sequence, every bit compared;
(e) bfloat16 parameters at a small learning rate: plain ones stall; masters, split or whole, and other roundings train.

Run by people: `make demo`, or `python examples/train_digits.py --help`. Prints tables; writes plots and results.json
to out/. Ends with exit status 1 if FusedSGD and torch differ in any bit of (a) or (d).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import needs

with needs.extra("demo", __file__, "run `make demo`, or "):
    import digits_options
    import digits_options_report
    import digits_report
    import torch
    from digits_training import (
        BATCH_SIZE,
        Digits,
        Penalty,
        Run,
        differing_elements,
        load_split,
        progress,
        spread,
        train_together,
        training_state,
    )
    from torch import Tensor, nn

    from wd_fused import FusedSGD, weight_decay_param_groups

LEARNING_RATE = 0.03
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-3
L1_STRENGTH = 1e-3
SMALL_WEIGHT = 1e-3  # a weight below this counts as gone when the effect of L1 is counted
HISTOGRAM_EDGES = [step / 5 for step in range(-30, 3)]  # of log10|w|: five bins a decade


# ---- (a) FusedSGD beside torch.optim.SGD


class EmptyStep(torch.optim.SGD):
    """Does nothing in step(): its time is that of the wrapper which torch puts around every optimizer's step()."""

    def step(self, closure: Any = None) -> None:
        return None


def compare_with_torch(digits: Digits, epochs: int, seed: int) -> dict[str, Any]:
    """Three optimizers from one seed. torch's fused=True is there for its time: it differs from torch's own default."""

    def run_of(optimizer_class: type[torch.optim.SGD], **options: Any) -> Run:
        def make(model: nn.Module) -> torch.optim.SGD:
            groups = weight_decay_param_groups(model, WEIGHT_DECAY)
            return optimizer_class(groups, lr=LEARNING_RATE, momentum=MOMENTUM, **options)

        return Run(seed, epochs, make)

    runs = {
        "FusedSGD": run_of(FusedSGD),
        "torch.optim.SGD": run_of(torch.optim.SGD),
        "torch.optim.SGD(fused=True)": run_of(torch.optim.SGD, fused=True),
    }
    empty = run_of(EmptyStep)
    with progress("(a) FusedSGD and torch.optim.SGD", epochs * (len(runs) + 1)) as bar:
        train_together([*runs.values(), empty], digits, epochs, seed, bar)

    expected = training_state(runs["torch.optim.SGD"])
    return {
        "tensors": sum(1 for _ in runs["FusedSGD"].model.parameters()),
        "parameters": sum(p.numel() for p in runs["FusedSGD"].model.parameters()),
        "compared_elements": sum(t.numel() for t in expected.values()),
        "differing_elements": {name: differing_elements(training_state(run), expected) for name, run in runs.items()},
        "losses": {name: run.losses for name, run in runs.items()},
        "validation_accuracy": {name: run.accuracies[-1] for name, run in runs.items()},
        "step_microseconds": {name: spread(run.seconds["step"]) for name, run in runs.items()},
        "iteration_microseconds": {name: spread(run.seconds["iteration"]) for name, run in runs.items()},
        "empty_step_microseconds": spread(empty.seconds["step"]),
        "backend": backend_of(runs["FusedSGD"].optimizer),
    }


# ---- (b) weight decay beside a penalty in the loss


def l2_penalty(model: nn.Module) -> Tensor:
    """λ·Σw² over all parameters. Its gradient is 2λw, so it stands for a weight decay of 2λ."""
    terms = [parameter.square().sum() for parameter in model.parameters()]
    return 0.5 * WEIGHT_DECAY * torch.stack(terms).sum()


def l1_penalty(model: nn.Module) -> Tensor:
    """λ·Σ|w| over the weights, for which there is no equivalent in the optimizer's arguments."""
    # By dimension, not by weights_of: this is timed, and sorting the parameters anew is no part of a penalty.
    terms = [parameter.abs().sum() for parameter in model.parameters() if parameter.ndim >= 2]
    return L1_STRENGTH * torch.stack(terms).sum()


def compare_penalties(digits: Digits, epochs: int, seed: int) -> dict[str, Any]:
    def run_of(weight_decay: float, penalty: Penalty | None = None, dtype: torch.dtype = torch.float32) -> Run:
        def make(model: nn.Module) -> torch.optim.SGD:
            return FusedSGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=weight_decay)

        return Run(seed, epochs, make, penalty, dtype)

    plain, decay = run_of(0.0), run_of(WEIGHT_DECAY)
    l2, l1 = run_of(0.0, l2_penalty), run_of(0.0, l1_penalty)
    # Once more in float64: if only rounding separates decay and penalty, they come closer by as much as rounding does.
    decay64, l264 = run_of(WEIGHT_DECAY, dtype=torch.float64), run_of(0.0, l2_penalty, torch.float64)
    with progress("(b) weight decay and penalties", epochs * 6) as bar:
        train_together([plain, decay, l2, l1], digits, epochs, seed, bar)
        train_together([decay64, l264], digits, epochs, seed, bar)

    runs = {"neither": plain, "weight_decay = 2λ": decay, "λ·Σw² in the loss": l2, "λ·Σ|w| in the loss": l1}
    return {
        "l2_strength": WEIGHT_DECAY / 2,
        "l1_strength": L1_STRENGTH,
        "losses": {name: run.losses for name, run in runs.items()},
        "validation_accuracy": {name: run.accuracies[-1] for name, run in runs.items()},
        "difference_of_losses": {"float32": differences(decay, l2), "float64": differences(decay64, l264)},
        "extra_microseconds": {name: extra_microseconds(run, plain) for name, run in runs.items() if run is not plain},
        "small_weight": SMALL_WEIGHT,
        "small_weights_fraction": {name: small_fraction(run.model) for name, run in runs.items()},
        "weight_histogram": {name: histogram(run.model) for name, run in runs.items()},
        "histogram_edges_log10": HISTOGRAM_EDGES,
    }


def differences(one: Run, other: Run) -> list[float]:
    return [abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)]


def extra_microseconds(run: Run, plain: Run) -> dict[str, float]:
    """What a batch costs more than without decay or penalty: the median of the differences batch by batch."""
    return {
        phase: 1e6 * median(a - b for a, b in zip(run.seconds[phase], plain.seconds[phase], strict=True))
        for phase in ("penalty", "backward", "step")
    }


def small_fraction(model: nn.Module) -> float:
    return (magnitudes(model) < SMALL_WEIGHT).double().mean().item()


def histogram(model: nn.Module) -> list[int]:
    """How many weights have a log10 of their magnitude between two edges; what is below the first counts there."""
    exponents = magnitudes(model).log10().clamp(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return [int(n) for n in torch.histogram(exponents, torch.tensor(HISTOGRAM_EDGES)).hist]


def magnitudes(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in weights_of(model)]).abs()


# ---- (c) which parameters should decay


def compare_groups(digits: Digits, epochs: int, seeds: list[int]) -> dict[str, Any]:
    schemes: dict[str, Callable[[nn.Module], Any]] = {
        "nothing": lambda model: [{"params": model.parameters(), "weight_decay": 0.0}],
        "everything": lambda model: [{"params": model.parameters(), "weight_decay": WEIGHT_DECAY}],
        "weights only": lambda model: weight_decay_param_groups(model, WEIGHT_DECAY),
    }

    def run_of(scheme: str, seed: int) -> Run:
        return Run(seed, epochs, lambda model: FusedSGD(schemes[scheme](model), lr=LEARNING_RATE, momentum=MOMENTUM))

    runs: dict[str, list[Run]] = {scheme: [] for scheme in schemes}
    with progress("(c) parameter groups", epochs * len(seeds) * len(schemes)) as bar:
        for seed in seeds:
            together = {scheme: run_of(scheme, seed) for scheme in schemes}
            train_together(list(together.values()), digits, epochs, seed, bar)
            for scheme, run in together.items():
                runs[scheme].append(run)
    return {
        "seeds": seeds,
        "validation_images": len(digits.validation_labels),
        "validation_accuracy": {scheme: [run.accuracies[-1] for run in of] for scheme, of in runs.items()},
        "norms": {scheme: mean_norms([run.model for run in of]) for scheme, of in runs.items()},
    }


def mean_norms(models: list[nn.Module]) -> dict[str, float]:
    """The Euclidean norm of all weights, all biases and all scales of norm layers, each as the mean over models."""
    kinds: dict[str, list[float]] = {"weights": [], "biases": [], "norm-layer scales": []}
    for model in models:
        vectors = [(name, p.detach()) for name, p in model.named_parameters()]
        kinds["weights"].append(norm_of([p for _, p in vectors if p.ndim >= 2]))
        kinds["biases"].append(norm_of([p for name, p in vectors if name.endswith("bias")]))
        kinds["norm-layer scales"].append(norm_of([p for name, p in vectors if p.ndim < 2 and name.endswith("weight")]))
    return {kind: sum(norms) / len(norms) for kind, norms in kinds.items()}


def norm_of(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


# ---- helpers of more than one part


def weights_of(model: nn.Module) -> list[Tensor]:
    """The parameters that weight_decay_param_groups gives weight decay."""
    decay, _ = weight_decay_param_groups(model, WEIGHT_DECAY)
    return list(decay["params"])


def backend_of(optimizer: FusedSGD) -> str:
    """Such as "cpu for 12 tensors (it is the first choice for cpu)"; each backend and reason once."""
    counts = Counter((entry.backend, entry.reason.splitlines()[0]) for entry in optimizer.backends())
    return "; ".join(f"{backend} for {count} tensors ({reason})" for (backend, reason), count in counts.items())


def warm_up() -> None:
    """One step apart from all measurements: the first use of FusedSGD may have to build the extension."""
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    FusedSGD([parameter], lr=0.1).step()


# ---- command line


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{value} is not a positive number")
        return value

    parser = argparse.ArgumentParser(description="Train a small CNN on handwritten digits with FusedSGD.")
    parser.add_argument("--epochs", type=positive, default=10, help="epochs of each training run (default: 10)")
    parser.add_argument("--seeds", type=positive, default=5, help="seeds in part (c) (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="first seed of models and batches (default: 0)")
    # One thread: the operators of this model are too small to share. On two cores that other processes used as well,
    # two threads waited for each other and took 16 times as long.
    parser.add_argument("--threads", type=positive, default=1, help="torch's threads (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for plots and results.json (default: out)"
    )
    parser.add_argument("--quick", action="store_true", help="2 epochs, 2 seeds: to see that it runs")
    parsed = parser.parse_args(arguments)
    if parsed.quick:
        parsed.epochs, parsed.seeds = 2, 2
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {parsed.out}: {error.strerror}; name a folder that can be written")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)  # (a) compares optimizers, so nothing else may differ between runs
    warm_up()

    start = time.perf_counter()
    digits = load_split()
    results: dict[str, Any] = {
        "settings": {
            "torch": torch.__version__,
            "threads": options.threads,
            "processors": os.cpu_count(),
            "epochs": options.epochs,
            "seed": options.seed,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "training_images": len(digits.train_labels),
            "validation_images": len(digits.validation_labels),
        },
        "bits": compare_with_torch(digits, options.epochs, options.seed),
        "penalty": compare_penalties(digits, options.epochs, options.seed),
        "groups": compare_groups(digits, options.epochs, list(range(options.seed, options.seed + options.seeds))),
        "options": digits_options.compare_options(digits, options.epochs, options.seed),
        "low_precision": digits_options.compare_low_precision(digits, options.epochs, options.seed),
    }
    digits_report.draw_plots(results, options.out)
    digits_options_report.draw_plots(results, options.out)
    results["seconds"] = time.perf_counter() - start
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    digits_report.print_tables(results, options.out, digits_options_report.tables(results))
    same = digits_report.same_as_torch(results) and digits_options_report.same_as_torch(results["options"])
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
