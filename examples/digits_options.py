"""Parts (d) and (e) of the digits example: clip and average in one pass; bfloat16. Called by train_digits.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from digits_training import Digits, Run, differing_elements, progress, spread, train_together, training_state
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from wd_fused import FusedSGD, weight_decay_param_groups

# ---- (d) clipping and an average, in one pass and in torch's sequence

LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-3
MAX_NORM = 1.0
EMA_DECAY = 0.98  # some 50 batches: two epochs

ONE_PASS, IN_SEQUENCE, NORM_IN_FLOAT64 = "FusedSGD, one pass", "torch, three calls", "torch, norm in float64"


class OptionsRun(Run):
    """A run whose step does more: it clips, steps, and keeps an average of the parameters."""

    def __init__(self, seed: int, epochs: int, optimizer_class: type[torch.optim.SGD], **options: Any) -> None:
        def make(model: nn.Module) -> torch.optim.SGD:
            groups = weight_decay_param_groups(model, WEIGHT_DECAY)
            return optimizer_class(groups, lr=LEARNING_RATE, momentum=MOMENTUM, **options)

        super().__init__(seed, epochs, make)
        self.norms: list[Tensor] = []  # of all gradients, before clipping, a step
        self.average_accuracies: list[float] = []

    def averages(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Everything that training has changed, and the average."""
        return training_state(self) | {f"average.{name}": tensor for name, tensor in self.averages().items()}


class OnePass(OptionsRun):
    optimizer: FusedSGD

    def __init__(self, seed: int, epochs: int) -> None:
        super().__init__(seed, epochs, FusedSGD, max_grad_norm=MAX_NORM, ema_decay=EMA_DECAY)

    def step(self) -> None:
        self.optimizer.step()
        self.norms.append(self.optimizer.grad_norm)

    def end_epoch(self, digits: Digits) -> None:
        super().end_epoch(digits)
        with self.optimizer.swap_ema():
            self.average_accuracies.append(self.accuracy(self.model, digits))

    def averages(self) -> dict[str, Tensor]:
        return {name: self.optimizer.state[p]["ema"] for name, p in self.model.named_parameters()}


class InSequence(OptionsRun):
    """torch's calls. ``norm_of``: computes and applies the clipping; its result is the norm."""

    def __init__(self, seed: int, epochs: int, clip: Callable[[list[nn.Parameter]], Tensor]) -> None:
        super().__init__(seed, epochs, torch.optim.SGD)
        self.clip = clip
        self.parameters = list(self.model.parameters())
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def step(self) -> None:
        self.norms.append(self.clip(self.parameters))
        self.optimizer.step()
        self.averaged.update_parameters(self.model)

    def end_epoch(self, digits: Digits) -> None:
        super().end_epoch(digits)
        self.average_accuracies.append(self.accuracy(self.averaged, digits))

    def averages(self) -> dict[str, Tensor]:
        return dict(self.averaged.module.named_parameters())


def clip_as_torch(parameters: list[nn.Parameter]) -> Tensor:
    return clip_grad_norm_(parameters, MAX_NORM, foreach=True)


def clip_by_exact_norm(parameters: list[nn.Parameter], norms_of_torch: list[Tensor]) -> Tensor:
    """Clips by the norm computed in float64 and rounded once; notes the norm that torch computes in float32."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms_of_torch.append(torch.nn.utils.get_total_norm(gradients, foreach=True))
    norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
    clip_grads_with_norm_(parameters, MAX_NORM, norm.float(), foreach=True)
    return norm


def compare_options(digits: Digits, epochs: int, seed: int) -> dict[str, Any]:
    """Three runs from one seed. The third clips by the norm as it should be, which torch rounds differently."""
    norms_of_torch: list[Tensor] = []
    runs: dict[str, OptionsRun] = {
        ONE_PASS: OnePass(seed, epochs),
        IN_SEQUENCE: InSequence(seed, epochs, clip_as_torch),
        NORM_IN_FLOAT64: InSequence(seed, epochs, partial(clip_by_exact_norm, norms_of_torch=norms_of_torch)),
    }
    with progress("(d) clipping and averaging in one pass", epochs * len(runs)) as bar:
        train_together(list(runs.values()), digits, epochs, seed, bar)

    expected = runs[NORM_IN_FLOAT64].state()
    exact = torch.stack(runs[NORM_IN_FLOAT64].norms)
    norms = torch.stack(runs[ONE_PASS].norms)
    return {
        "learning_rate": LEARNING_RATE,
        "max_norm": MAX_NORM,
        "ema_decay": EMA_DECAY,
        "compared_elements": sum(tensor.numel() for tensor in expected.values()),
        "differing_elements": {name: differing_elements(run.state(), expected) for name, run in runs.items()},
        "losses": {name: run.losses for name, run in runs.items()},
        "validation_accuracy": {name: run.accuracies for name, run in runs.items()},
        "average_accuracy": {name: run.average_accuracies for name, run in runs.items()},
        "step_microseconds": {name: spread(runs[name].seconds["step"]) for name in (ONE_PASS, IN_SEQUENCE)},
        "norms": norms.tolist(),
        # Over the same gradients, if the first and the third run have the same bits.
        "norm_error": {
            "FusedSGD": float((norms.double() / exact - 1).abs().max()),
            "torch": float((torch.stack(norms_of_torch).double() / exact - 1).abs().max()),
        },
    }


# ---- (e) bfloat16 parameters

BFLOAT16 = torch.bfloat16
FLOAT32, PLAIN, FULL, SPLIT = "float32", "bfloat16", "full masters", "split masters"
VARIANTS: dict[str, dict[str, Any]] = {
    FLOAT32: {},
    PLAIN: {"report_numerics": True},  # which changes nothing
    FULL: {"master_weights": "full"},
    SPLIT: {"master_weights": "split"},
    "split24 masters": {"master_weights": "split24"},
    "split, int8 momentum": {"master_weights": "split", "momentum_dtype": torch.int8},
    "Kahan summation": {"rounding": "kahan"},
    "stochastic rounding": {"rounding": "stochastic"},
}


def perceptron() -> nn.Module:
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


class Transformer(nn.Module):
    """One block over an image's eight rows."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.embed(images.squeeze(1)) + self.position
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(self.before_attention(hidden)).chunk(3, dim=-1)
        )
        hidden = hidden + self.attended(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        hidden = hidden + self.down(gelu(self.up(self.before_perceptron(hidden))))
        return self.head(self.norm(hidden).flatten(1))


@dataclass(frozen=True)
class Regime:
    """A model and a training in which updates are small beside the weights.

    Attributes:
        epochs: for each epoch of the other parts.
    """

    build: Callable[[], nn.Module]
    learning_rate: float
    epochs: int


REGIMES = {"perceptron": Regime(perceptron, 2e-3, 6), "transformer": Regime(Transformer, 3e-4, 3)}


class Shadow:
    """float32 weights that torch.optim.SGD steps with a model's gradients: what masters must be."""

    def __init__(self, parameters: list[nn.Parameter], learning_rate: float) -> None:
        self.of = parameters
        self.weights = [p.detach().float().requires_grad_() for p in parameters]
        self.optimizer = torch.optim.SGD(self.weights, lr=learning_rate, momentum=MOMENTUM)

    def step(self) -> None:
        for weight, p in zip(self.weights, self.of, strict=True):
            weight.grad = None if p.grad is None else p.grad.float()
        self.optimizer.step()

    def compare(self, masters: list[Tensor]) -> dict[str, int]:
        expected = {str(i): weight.detach() for i, weight in enumerate(self.weights)}
        differing = differing_elements({str(i): master for i, master in enumerate(masters)}, expected)
        return {"differing": differing, "compared": sum(weight.numel() for weight in self.weights)}


@dataclass
class LowPrecisionRun:
    """A model in training, all of it in one dtype; the loss is computed in float32."""

    model: nn.Module
    dtype: torch.dtype
    optimizer: FusedSGD
    shadow: Shadow | None = None
    losses: list[float] = field(default_factory=list)  # over all training images, after each epoch
    updates: int = 0  # of this epoch, by the optimizer's report
    lost: int = 0
    shares_lost: list[float] = field(default_factory=list)  # of each epoch's updates, those that rounding has lost

    def train_batch(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(images, labels).backward()
        if self.shadow is not None:
            self.shadow.step()
        self.optimizer.step()
        if (numerics := self.optimizer.last_step.numerics) is not None:
            self.updates += int(numerics.updates.sum())
            self.lost += int(numerics.lost.sum())

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.model(images.to(self.dtype)).float(), labels)

    @torch.no_grad()
    def end_epoch(self, digits: Digits) -> None:
        self.losses.append(self.loss(digits.train_images, digits.train_labels).item())
        if self.updates:
            self.shares_lost.append(self.lost / self.updates)
            self.updates = self.lost = 0

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        predicted = self.model(digits.validation_images.to(self.dtype)).argmax(dim=1)
        return (predicted == digits.validation_labels).double().mean().item()


def low_precision_run(regime: Regime, variant: str, seed: int) -> LowPrecisionRun:
    """Every variant starts from the same weights, those that bfloat16 can hold."""
    torch.manual_seed(seed)
    dtype = torch.float32 if variant == FLOAT32 else BFLOAT16
    model = regime.build().to(BFLOAT16).to(dtype)
    optimizer = FusedSGD(model.parameters(), lr=regime.learning_rate, momentum=MOMENTUM, **VARIANTS[variant])
    has_exact_masters = variant in (FULL, SPLIT)
    shadow = Shadow(list(model.parameters()), regime.learning_rate) if has_exact_masters else None
    return LowPrecisionRun(model, dtype, optimizer, shadow)


def compare_low_precision(digits: Digits, epochs: int, seed: int) -> dict[str, Any]:
    total = sum(regime.epochs for regime in REGIMES.values()) * epochs * len(VARIANTS)
    with progress("(e) bfloat16 parameters", total) as bar:
        models = {name: train_variants(regime, digits, epochs, seed, bar) for name, regime in REGIMES.items()}
    return {"momentum": MOMENTUM, "models": models}


def train_variants(regime: Regime, digits: Digits, epochs: int, seed: int, bar: tqdm[Any]) -> dict[str, Any]:
    """Trains all variants of a model on the same batches in the same order."""
    runs = {variant: low_precision_run(regime, variant, seed) for variant in VARIANTS}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(regime.epochs * epochs):
        for images, labels in digits.batches(generator):
            for run in runs.values():
                run.train_batch(images, labels)
        for run in runs.values():
            run.end_epoch(digits)
        bar.update(len(runs))
    return {
        "learning_rate": regime.learning_rate,
        "epochs": regime.epochs * epochs,
        "parameters": sum(p.numel() for p in runs[FLOAT32].model.parameters()),
        "losses": {variant: run.losses for variant, run in runs.items()},
        "validation_accuracy": {variant: run.accuracy(digits) for variant, run in runs.items()},
        "bytes_an_element": {variant: bytes_an_element(run) for variant, run in runs.items()},
        "updates_lost": runs[PLAIN].shares_lost,
        "masters": {
            variant: run.shadow.compare(masters_of(run.optimizer))
            for variant, run in runs.items()
            if run.shadow is not None
        },
    }


def masters_of(optimizer: FusedSGD) -> list[Tensor]:
    return list(optimizer.master_parameters())


def bytes_an_element(run: LowPrecisionRun) -> dict[str, float]:
    """Of the parameter and of each entry of its state, over all parameters."""
    counts: dict[str, int] = {}
    for p in run.model.parameters():
        for name, tensor in {"parameter": p, **run.optimizer.state[p]}.items():
            counts[name] = counts.get(name, 0) + tensor.nbytes
    elements = sum(p.numel() for p in run.model.parameters())
    return {name: count / elements for name, count in counts.items()}
