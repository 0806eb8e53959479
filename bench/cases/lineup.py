"""Everybody over the same tensors: each implementation's optimizer of a case on a device. For the suites and stages.

All step the same parameters with the same gradients and, as far as they have torch's states, the same momentum
buffers, so that none is luckier than another with its pages or its place in the caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench import cases
from bench.cases import Case
from bench.cases.implementations import LIMIT, ORDER, OWN, Absent, Implementation, available, failure
from bench.gpu import cases as gpu_cases
from bench.measure import limit

# How often each configuration of an implementation that has several is timed before one is chosen.
TRIALS = 2


class Lineup:
    """A case's tensors on a device, and who steps them.

    Attributes:
        optimizers: by implementation.
        steps: by implementation, and by LIMIT where it is asked for: does it once.
        info: by implementation, what else a row is to tell: compile_seconds, configuration, kernel.
        absent: why the others take no part.
    """

    def __init__(self, case: Case, device: str, names: Collection[str] = ORDER, full: bool = False) -> None:
        """``names``: who is to take part, LIMIT among them or not; ``full`` as implementations.available() has it."""
        self.case = case
        self.device = device
        self.params = cases.parameters(case, gpu_cases.DEVICE if device == "cuda" else device)
        self.buffers = [torch.zeros_like(param) for param in self.params]
        self.optimizers: dict[str, Optimizer] = {}
        self.steps: dict[str, Callable[[], object]] = {}
        self.info: dict[str, dict[str, Any]] = {}
        self.absent: dict[str, str] = {}
        found, absent = available(device, full)
        for name in ORDER:
            if name not in names:
                continue
            implementation = found.get(name)
            reason = absent[name] if implementation is None else implementation.why_not(case)
            if implementation is None or reason is not None:
                self.absent[name] = str(reason)
                continue
            try:
                self.add(name, implementation)
            except Exception as error:  # a peer that fails is listed, ours are no peers
                if name in OWN:
                    raise
                self.absent[name] = failure(error)
        if LIMIT in names:
            try:
                kernel, self.steps[LIMIT] = limit.fastest(case, device, self.params, self.gradients(), self.buffers)
                self.info[LIMIT] = {"kernel": kernel}
            except Absent as reason:
                self.absent[LIMIT] = str(reason)

    def gradients(self) -> list[Tensor]:
        return [param.grad for param in self.params if param.grad is not None]

    def add(self, name: str, implementation: Implementation) -> None:
        """The optimizer of the configuration that is fastest here, after some steps."""
        info: dict[str, Any] = {}
        tried: dict[str, tuple[float, Optimizer]] = {}
        for configuration, make in implementation.makers.items():
            optimizer = make(self._tensors_for(implementation))
            self._share_states(optimizer)
            begin = time.perf_counter()
            optimizer.step()
            optimizer.step()
            self.synchronize()
            if implementation.compiles:
                info["compile_seconds"] = round(time.perf_counter() - begin, 1)
            alone = len(implementation.makers) == 1
            tried[configuration] = 0.0 if alone else min(self._taken(optimizer) for _ in range(TRIALS)), optimizer
        fastest = min(tried, key=lambda configuration: tried[configuration][0])
        self.optimizers[name] = tried[fastest][1]
        self.steps[name] = self.optimizers[name].step
        self.info[name] = info | ({"configuration": fastest} if fastest else {})

    def _tensors_for(self, implementation: Implementation) -> list[Tensor]:
        """The parameters, or where it writes gradients others over the same memory, with gradients of their own."""
        if not implementation.writes_gradients:
            return self.params
        own = [param.detach().requires_grad_() for param in self.params]
        for param, gradient in zip(own, self.gradients(), strict=True):
            param.grad = gradient.clone()
        return own

    def _share_states(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, torch.optim.SGD):
            params = [param for group in optimizer.param_groups for param in group["params"]]
            for param, buffer in zip(params, self.buffers, strict=True):
                optimizer.state[param]["momentum_buffer"] = buffer

    def _taken(self, optimizer: Optimizer) -> float:
        begin = time.perf_counter()
        optimizer.step()
        self.synchronize()
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
