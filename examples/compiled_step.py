"""torch.compile around a model, around step(), and around a whole training step, each beside torch.optim.SGD.

Run as `python examples/compiled_step.py [BACKEND]`, where BACKEND is one of torch.compile's, "inductor" if none is
given, which needs a C++ compiler. Ends with exit status 1 if a step differs from torch.optim.SGD's in any bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import needs

with needs.extra("", __file__):
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import cross_entropy

    from wd_fused import FusedSGD

STEPS = 6


def build(optimizer_class: Any, **arguments: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return model, optimizer_class(model.parameters(), momentum=0.9, weight_decay=5e-4, **arguments)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, 64, generator=generator), torch.randint(10, (32,), generator=generator)) for _ in range(STEPS)
    ]


def steps_agree(make_step: Callable[[torch.optim.Optimizer], Callable[[], object]], forward: Any) -> bool:
    """Trains with FusedSGD, stepped by what ``make_step`` makes of it; torch.optim.SGD has the same gradients."""
    (model, ours), (copied, theirs) = (
        build(FusedSGD, lr=torch.tensor(0.1)),
        build(torch.optim.SGD, lr=torch.tensor(0.1)),
    )
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in (ours, theirs)]
    run, step = forward(model), make_step(ours)
    for images, labels in batches():
        model.zero_grad()
        cross_entropy(run(images), labels).backward()
        for param, twin in zip(model.parameters(), copied.parameters(), strict=True):
            twin.grad = None if param.grad is None else param.grad.clone()
        step()
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
    return all(map(torch.equal, model.parameters(), copied.parameters()))


def train_whole_step_in_one_graph(backend: str) -> float | None:
    """The last loss; None where this torch cannot trace backward()."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return None
    model, optimizer = build(FusedSGD, lr=torch.tensor(0.1))

    def train(images: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        model.zero_grad()  # the optimizer's own is a break in torch's graphs
        return loss.detach()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(train, backend=backend, fullgraph=True)
        return [float(compiled(images, labels)) for images, labels in batches()][-1]


def main(backend: str) -> bool:
    """Whether every step has torch's bits."""

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend=backend)

    agree = {
        "a compiled model, an eager step": steps_agree(lambda optimizer: optimizer.step, compiled),
        "an eager model, a compiled step": steps_agree(
            lambda optimizer: torch.compile(optimizer.step, backend=backend), lambda model: model
        ),
    }
    for what, same in agree.items():
        print(f"{what}: {'the bits of torch.optim.SGD' if same else 'DIFFERENT from torch.optim.SGD'}")
    loss = train_whole_step_in_one_graph(backend)
    if loss is None:
        print("forward, backward and step in one graph: not with this torch")
    else:
        print(f"forward, backward and step in one graph: loss {loss:.4f}")
    return all(agree.values())


if __name__ == "__main__":
    raise SystemExit(not main(sys.argv[1] if len(sys.argv) > 1 else "inductor"))
