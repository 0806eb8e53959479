"""Clipping by the norm of the step before, beside clipping by the norm itself: how far apart on handwritten digits.

Trains the same CNN by torch's clip_grad_norm_ and by step_in_backward(max_lagged_grad_norm=...), for several seeds.
Run as `python examples/lagged_clipping.py`; needs the extra "demo".
"""

from __future__ import annotations

import argparse
import itertools
from statistics import median, quantiles

import needs

with needs.extra("demo", __file__):
    import torch
    from digits_training import Digits, build_model, load_split
    from torch import nn
    from torch.nn.functional import cross_entropy

    from wd_fused import FusedSGD, step_in_backward

LIMIT, LEARNING_RATE, MOMENTUM = 1.0, 0.1, 0.9


def train(digits: Digits, seed: int, epochs: int, limit: float | None, lags: bool) -> tuple[list[float], float, float]:
    """The norm of each step's gradients, the last epoch's mean loss, the accuracy on the validation images."""
    model, norms = build_model(seed), []
    optimizer = FusedSGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    handle = step_in_backward(model, optimizer, max_lagged_grad_norm=limit) if lags else None
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        losses = []
        for images, labels in digits.batches(generator):
            loss = cross_entropy(model(images), labels)
            loss.backward()
            if handle is None:
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), torch.inf if limit is None else limit)))
            optimizer.step()
            if handle is not None:
                norms.append(float(handle.grad_norm))
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    predicted = model(digits.validation_images).argmax(dim=1)
    return norms, sum(losses) / len(losses), (predicted == digits.validation_labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    chosen = parser.parse_args()
    digits, ratios = load_split(), []
    rules = {
        "not clipped": (None, False),
        "by the norm itself": (LIMIT, False),
        "by that of the step before": (LIMIT, True),
    }
    results: dict[str, list[tuple[float, float]]] = {rule: [] for rule in rules}
    for seed in range(chosen.seeds):
        for rule, (limit, lags) in rules.items():
            norms, loss, accuracy = train(digits, seed, chosen.epochs, limit, lags)
            results[rule].append((loss, accuracy))
            if lags:
                exact = [min(1.0, LIMIT / (norm + 1e-6)) for norm in norms]
                ratios += [used / own for used, own in itertools.pairwise(exact)]
    print(f"clipped                      last loss  accuracy  (medians of {chosen.seeds} seeds)")
    for rule, found in results.items():
        loss, accuracy = (median(each) for each in zip(*found, strict=True))
        print(f"{rule:<28} {loss:9.4f}  {accuracy:7.1%}")
    tenths = quantiles(ratios, n=20, method="inclusive")
    same = sum(ratio == 1 for ratio in ratios) / len(ratios)
    print(
        f"its coefficient to the exact one: the same in {same:.0%} of the steps, from {tenths[0]:.2f} to "
        f"{tenths[-1]:.2f} times in nine of ten, {max(ratios):.1f} times at most"
    )


if __name__ == "__main__":
    main()
