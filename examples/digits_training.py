"""The data, the model and the training loop of the digits example. Called by train_digits.py."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

BATCH_SIZE = 64
SPLIT_SEED = 0  # the split stays the same whatever --seed is, so that accuracies of two runs can be compared

MakeOptimizer = Callable[[nn.Module], torch.optim.SGD]
Penalty = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) float32 between 0 and 1, labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.train_labels), generator=generator).split(BATCH_SIZE):
            yield self.train_images[rows], self.train_labels[rows]


def load_split() -> Digits:
    """1,797 images: three quarters for training, a quarter for validation, each digit in the same proportion."""
    data = load_digits()
    parts = train_test_split(
        data.images / 16.0, data.target, test_size=0.25, stratify=data.target, random_state=SPLIT_SEED
    )
    train_images, validation_images = (torch.tensor(part, dtype=torch.float32).unsqueeze(1) for part in parts[:2])
    train_labels, validation_labels = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return Digits(train_images, train_labels, validation_images, validation_labels)


def build_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 12, kernel_size=3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, kernel_size=3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 4 * 4, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )


class Run:
    """One model in training. It is handed its batches from outside, so that several runs can take turns."""

    def __init__(
        self,
        seed: int,
        epochs: int,
        make_optimizer: MakeOptimizer,
        penalty: Penalty | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = build_model(seed).to(dtype)
        self.optimizer = make_optimizer(self.model)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.penalty = penalty
        self.dtype = dtype
        self.loss_sum, self.images_seen = 0.0, 0
        self.losses: list[float] = []  # mean cross-entropy of each epoch, without the penalty
        self.accuracies: list[float] = []  # on the validation images, after each epoch
        # Of each batch. The iteration is all of them and the forward pass.
        self.seconds: dict[str, list[float]] = {"penalty": [], "backward": [], "step": [], "iteration": []}

    def train_batch(self, images: Tensor, labels: Tensor) -> None:
        before = time.perf_counter()
        self.optimizer.zero_grad()
        data_loss = cross_entropy(self.model(images.to(self.dtype)), labels)
        start = time.perf_counter()
        loss = data_loss if self.penalty is None else data_loss + self.penalty(self.model)
        after_penalty = time.perf_counter()
        loss.backward()
        after_backward = time.perf_counter()
        self.step()
        after_step = time.perf_counter()

        self.seconds["penalty"].append(after_penalty - start)
        self.seconds["backward"].append(after_backward - after_penalty)
        self.seconds["step"].append(after_step - after_backward)
        self.seconds["iteration"].append(after_step - before)
        self.loss_sum += data_loss.item() * len(labels)
        self.images_seen += len(labels)

    def step(self) -> None:
        self.optimizer.step()

    def end_epoch(self, digits: Digits) -> None:
        self.scheduler.step()
        self.losses.append(self.loss_sum / self.images_seen)
        self.loss_sum, self.images_seen = 0.0, 0
        self.accuracies.append(self.accuracy(self.model, digits))

    def accuracy(self, model: nn.Module, digits: Digits) -> float:
        """On the validation images."""
        model.eval()
        with torch.no_grad():
            predicted = model(digits.validation_images.to(self.dtype)).argmax(dim=1)
        model.train()
        return (predicted == digits.validation_labels).double().mean().item()


def train_together(runs: list[Run], digits: Digits, epochs: int, seed: int, bar: tqdm[Any]) -> None:
    """Trains all runs on the same batches in the same order. They take turns at every batch, in a new random order
    each time: whatever else the machine does, and whatever a run leaves in the caches for the next, falls on all of
    them alike, so their times can be compared."""
    generator = torch.Generator().manual_seed(seed)
    turns = random.Random(seed)
    for _ in range(epochs):
        for images, labels in digits.batches(generator):
            for run in turns.sample(runs, len(runs)):
                run.train_batch(images, labels)
        for run in runs:
            run.end_epoch(digits)
        bar.update(len(runs))
        bar.set_postfix(loss=f"{runs[0].losses[-1]:.4f}", validation=f"{runs[0].accuracies[-1]:.1%}")


def progress(title: str, epochs: int) -> tqdm[Any]:
    """A bar on a terminal, and a line without one."""
    if not sys.stderr.isatty():
        print(f"{title}: {epochs} epochs", file=sys.stderr, flush=True)
    return tqdm(total=epochs, desc=title, unit="epoch", disable=None, leave=False)  # disable=None: only on a terminal


# ---- what runs have come to


def training_state(run: Run) -> dict[str, Tensor]:
    """Everything that training has changed: parameters, running statistics of the norm layers, momentum buffers."""
    state = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    for name, parameter in run.model.named_parameters():
        state[f"momentum_buffer.{name}"] = run.optimizer.state[parameter]["momentum_buffer"]
    return state


def differing_elements(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    """Counts elements whose bits differ: unlike ==, this tells -0.0 from 0.0 and finds a NaN equal to itself."""
    assert actual.keys() == expected.keys()
    as_integers = {torch.float32: torch.int32, torch.float64: torch.int64, torch.int64: torch.int64}
    return sum(
        int((actual[name].view(as_integers[t.dtype]) != t.view(as_integers[t.dtype])).sum())
        for name, t in expected.items()
    )


def spread(seconds: list[float]) -> dict[str, float]:
    """In microseconds: the median and the two quartiles. Other processes disturb some steps, but seldom most."""
    lower, middle, upper = quantiles([1e6 * s for s in seconds], n=4, method="inclusive")
    return {"median": middle, "lower": lower, "upper": upper}
