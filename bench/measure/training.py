"""Whole iterations of training small real models, by each implementation: what a faster step is worth there.

On scikit-learn's handwritten digits. Each implementation trains a copy of its own, in rounds interleaved like those of
the other suites. Used by test_training.py.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.implementations import ORDER, OWN, available, failure
from bench.gpu import cases as gpu_cases
from bench.measure import interleaved

BATCH = 64
ITERATIONS = 3  # of a round
ROUNDS = 15


class Block(nn.Module):
    """Two convolutions beside the identity, or beside a projection where the width or the size changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.beside = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = inputs == width and stride == 1
        self.identity = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.beside(images) + self.identity(images))


def resnet20() -> nn.Module:
    """For images of 8 x 8: three stages of three blocks, as He et al. have them for small images."""
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [Block(inputs, width, 1 if inputs == width else 2) for inputs, width in itertools.pairwise(widths)]
    stem = (nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def perceptron() -> nn.Module:
    """Two hidden layers of 2,048: more parameters for each sample's arithmetic than a convolutional network has."""
    hidden = (nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(2048, 10))


def batches(place: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the 1,797 digits, again and again: images (64, 1, 8, 8) between 0 and 1, labels (64,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1).split(BATCH)
    labels = torch.from_numpy(digits.target).split(BATCH)
    return itertools.cycle([(i.to(place), t.to(place)) for i, t in zip(images, labels, strict=True) if len(i) == BATCH])


class Trainer:
    """A model of its own, and how long its iterations and their steps take."""

    def __init__(self, model: nn.Module, make: Any, place: str, device: str) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = make(list(self.model.parameters()))
        self._batches = batches(place)
        self._device = device

    def iterations(self, count: int) -> tuple[float, float]:
        """Seconds of an iteration, and of the step in it (on a GPU of the host's part)."""
        stepping = 0
        self._wait()
        begin = time.perf_counter_ns()
        for images, labels in itertools.islice(self._batches, count):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(images), labels).backward()
            before = time.perf_counter_ns()
            self.optimizer.step()
            stepping += time.perf_counter_ns() - before
        self._wait()
        return (time.perf_counter_ns() - begin) * 1e-9 / count, stepping * 1e-9 / count

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


class Training:
    """Measured rounds of everybody's training.

    Attributes:
        parameters: of the model.
        seconds: by implementation and quantity ("iteration", "step"), one per round.
        absent: why the others take no part.
    """

    def __init__(self, make_model: Callable[[], nn.Module], device: str, names: Collection[str], smoke: bool) -> None:
        torch.manual_seed(0)
        place = gpu_cases.DEVICE if device == "cuda" else device
        model = make_model().to(place)
        self.parameters = list(model.parameters())
        found, absent = available(device)
        self.absent = {name: reason for name, reason in absent.items() if name in names}
        self.trainers: dict[str, Trainer] = {}
        for name in ORDER:
            if name not in found or name not in names:
                continue
            try:
                made = Trainer(model, next(iter(found[name].makers.values())), place, device)
                made.iterations(2 if smoke else 5)
            except Exception as error:
                if name in OWN:
                    raise
                self.absent[name] = failure(error)
                continue
            self.trainers[name] = made
        count = 1 if smoke else ITERATIONS
        samples = interleaved.interleave(
            self.trainers, 2 if smoke else ROUNDS, lambda name: self.trainers[name].iterations(count)
        )
        self.seconds = {
            name: {"iteration": [sample[0] for sample in own], "step": [sample[1] for sample in own]}
            for name, own in samples.items()
        }
