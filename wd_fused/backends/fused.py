"""The fused backends: what this machine has of them, what they take, and how their plans are made."""

import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wd_fused.backends.plan import Numerics, Plan, Row
from wd_fused.build import extension


class Backend:
    """The C++ extension: its loops over CPU tensors ("cpu"), or what stands in its place on a GPU.

    Args:
        target: what the extension calls it.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self._is_known_to_be_there = False

    def unavailable(self) -> str | None:
        """Why this machine cannot use it, with the remedy; None if it can."""
        if self._is_known_to_be_there:  # asked for every parameter, and torch may ask the driver each time
            return None
        reason = self._missing()
        self._is_known_to_be_there = reason is None
        return reason

    def _missing(self) -> str | None:
        return None if extension.load() is not None else extension.status().reason

    def module(self) -> ModuleType:
        """The C++ extension, which reads a plan's tensors."""
        module = extension.load()
        assert module is not None, "asked for only after unavailable() said None"
        return module

    def refusal(self, tensor: Tensor) -> str | None:
        """Why it does not take this parameter or momentum buffer; None if it does."""
        if (reason := self.unavailable() or _why_not_its_type(tensor)) is not None:
            return reason
        answer: str | None = self.module().why_not_planned(tensor, self.target)
        return answer

    def surely_taken(self, params: list[Tensor], state: dict[Tensor, Any]) -> list[Any] | None:
        """In one pass in C++: the momentum buffer or None of each parameter that it takes for certain, without options;
        False where refusal() has to be asked. None: there is no such pass."""
        there = self.unavailable() is None and self._make_host() is None
        return self.module().surely_taken(params, state, self.target) if there else None

    def plan(
        self, rows: Sequence[Row], groups: list[list[Tensor]], state: dict[Tensor, Any], numerics: Numerics
    ) -> Plan:
        plan: Plan = self.module().StepPlan(list(rows), groups, state, numerics, self.target, self._make_host())
        return plan

    def sgd(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffers: list[Tensor | None],
        hyperparameters: dict[str, Any],
        numerics: Numerics,
    ) -> list[Tensor | None]:
        """One step without a plan; the momentum buffers, those that it made among them."""
        if hyperparameters["momentum"] == 0:
            self._sgd(params, grads, [], [], numerics=numerics, **hyperparameters)
            return momentum_buffers
        pairs = zip(params, momentum_buffers, strict=True)
        buffers = [torch.empty_like(param) if buffer is None else buffer for param, buffer in pairs]
        first_steps = [buffer is None for buffer in momentum_buffers]  # whose buffers are to be filled
        self._sgd(params, grads, buffers, first_steps, numerics=numerics, **hyperparameters)
        return [*buffers]

    def _sgd(self, *lists: list[Any], numerics: Numerics, **hyperparameters: Any) -> None:
        torch.ops.wd_fused.sgd_(*lists, **hyperparameters, opmath=numerics == "opmath")

    def _make_host(self) -> Any:
        """What launches for the extension, if not it itself."""
        return None


class CudaBackend(Backend):
    """The extension's CUDA kernels."""

    def _missing(self) -> str | None:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        if not torch.cuda.is_available():
            return (
                "torch finds no GPU that it can use (torch.cuda.is_available() is False: no NVIDIA GPU, or no driver)"
            )
        if (reason := super()._missing()) is not None:  # last: it may have to be built
            return reason
        if self.module().cuda_architectures() is None:
            return f"the C++ extension has no CUDA part: {extension.status().cuda}"
        return None


class TritonBackend(Backend):
    """The Triton kernels of triton_kernels: GPUs without a CUDA toolkit. The C++ extension reads the tensors."""

    def _missing(self) -> str | None:
        try:
            triton_kernels()
        except ImportError as error:
            missing = str(error.name).split(".")[0]
            remedy = "; pip install triton" if missing == "triton" else ""
            return f"its kernels cannot be imported: {error}{remedy}"
        if not torch.cuda.is_available():
            return "torch finds no GPU that it can use (torch.cuda.is_available() is False)"
        if (reason := super()._missing()) is not None:
            return (
                "it needs the CPU part of the C++ extension, which any C++ compiler builds, and that is not there: "
                f"{reason}"
            )
        return None

    def refusal(self, tensor: Tensor) -> str | None:
        return super().refusal(tensor) or triton_kernels().why_not_on(tensor.device, tensor.dtype)

    def _sgd(self, *lists: list[Any], numerics: Numerics, **hyperparameters: Any) -> None:
        self.module().hosted_sgd(*lists, **hyperparameters, numerics=numerics, make_host=self._make_host())

    def _make_host(self) -> Any:
        return triton_kernels().DeviceStep


@functools.cache
def triton_kernels() -> ModuleType:
    """wd_fused.triton_kernels, and Triton with it: in an installed package inside it, in a checkout beside it.

    Raises ImportError where they are not, or Triton is not.
    """
    searched: list[str] = sys.modules["wd_fused"].__path__  # type: ignore[assignment]
    searched.append(str(Path(__file__).resolve().parents[2]))
    try:
        return importlib.import_module("wd_fused.triton_kernels")
    finally:
        searched.pop()


def _why_not_its_type(tensor: Tensor) -> str | None:
    if _torch_function(type(tensor)) in _OWN_TORCH_FUNCTIONS:
        return None
    return f"it is a {type(tensor).__name__}, a tensor subclass with its own __torch_function__"


def _torch_function(tensor_type: type[Tensor]) -> object:
    function = tensor_type.__torch_function__
    return getattr(function, "__func__", function)  # a classmethod is bound anew for each subclass


_OWN_TORCH_FUNCTIONS = (_torch_function(Tensor), _torch_function(torch.nn.Parameter))
