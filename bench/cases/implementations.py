"""Who steps: wd_fused's backends, torch's implementations of SGD, other libraries'; each as its authors advise.

Used by the suites, by the stages of gpu_check and, for names and order, by the reports. No torch at import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.cases import HUGE, OPTIONS, RESNET50, Case

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Make = Callable[["list[Tensor]"], "Optimizer"]

OURS = "wd_fused"
TRITON = "wd_fused Triton"
FUSED = "torch fused=True"
FOREACH = "torch foreach=True"
LOOP = "torch foreach=False"
COMPILED = "torch.compile(step)"
OPTIMI = "optimi SGD"
FLASH = "FlashOptim FlashSGD"
APEX = "apex FusedSGD"
TE = "Transformer Engine FusedSGD"
# Not an optimizer: the fastest plain kernel that reads and writes what a step reads and writes (limit.py).
LIMIT = "streaming kernel"

OWN = (OURS, TRITON)
PEERS = (FUSED, FOREACH, LOOP, COMPILED, OPTIMI, FLASH, APEX, TE)
ORDER = (*OWN, *PEERS)

# Distributions whose versions a results file names, where they are installed.
PACKAGES = ("triton", "torch-optimi", "flashoptim", "apex", "transformer-engine")


class Absent(Exception):
    """An implementation cannot be measured here. The message says why, and what to install where that helps."""


def failure(error: Exception) -> str:
    """The reason why an implementation that fails is absent."""
    return f"fails here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


@dataclass(frozen=True)
class Implementation:
    """A way to step some parameters.

    Attributes:
        name: as the reports print it.
        makers: by configuration, a constructor from parameters. Where there are several, the one that is fastest on a
            case stands for the implementation there. A configuration that has no others may be called "".
        compiles: the step is compiled when it is first called, which takes long.
        writes_gradients: a step adds to the gradients: they are not to be those of the others.
        only: the names of the cases that it takes part in; None: all.
    """

    name: str
    makers: dict[str, Make] = field(hash=False)
    compiles: bool = False
    writes_gradients: bool = False
    only: frozenset[str] | None = None

    def why_not(self, case: Case) -> str | None:
        """Why it does not take part in a case, or None."""
        if len(case.shapes) > MOST_COMPILED and self.compiles:
            return f"compiling takes minutes above {MOST_COMPILED} tensors"
        if self.only is not None and case.name not in self.only:
            return "compiling takes half a minute: left out but for ResNet-50 and one large tensor (--full has it)"
        return None


# On two cores compiling takes 25 to 40 s for 161 tensors and 3 to 6 minutes for 1,000.
MOST_COMPILED = 300
COMPILED_CASES = frozenset(case.name for case in (RESNET50, HUGE))


def available(device: str, full: bool = False) -> tuple[dict[str, Implementation], dict[str, str]]:
    """What can be measured on a device ("cpu", "cuda"), in the order of ORDER, and why the others cannot, by name.

    Args:
        full: with the cases in which an implementation takes minutes to get ready.
    """
    found: dict[str, Implementation] = {}
    absent: dict[str, str] = {}
    for name in ORDER:
        try:
            found[name] = implementation_of(name, device, full)
        except Absent as reason:
            absent[name] = str(reason)
    return found, absent


def implementation_of(name: str, device: str, full: bool = False) -> Implementation:
    """One of them, with nothing imported for the others.

    Raises:
        Absent: it cannot be measured on this device.
    """
    return _BY_NAME[name](device, full)


def _wd_fused(name: str, device: str, full: bool) -> Implementation:
    from wd_fused import FusedSGD, backends
    from wd_fused.build import extension

    backend = {(OURS, "cpu"): "cpu", (OURS, "cuda"): "cuda", (TRITON, "cuda"): "triton"}.get((name, device))
    if backend is None:
        raise Absent("its kernels are for GPUs")
    extension.load()  # with it the Triton backend reads the optimizer's tensors in C++
    if (reason := backends.FUSED[backend].unavailable()) is not None:
        if backend == "cpu":  # a benchmark of wd_fused without it would be one of nothing
            raise RuntimeError(f'backend="cpu" is not available: {reason}')
        raise Absent(reason)
    return Implementation(name, {"": partial(FusedSGD, **OPTIONS, backend=backend)})


def _torch(name: str, device: str, full: bool) -> Implementation:
    import torch

    how = {FUSED: {"fused": True}, FOREACH: {"foreach": True}, LOOP: {"foreach": False}}[name]
    return Implementation(name, {"": partial(torch.optim.SGD, **OPTIONS, **how)})


def _compiled(name: str, device: str, full: bool) -> Implementation:
    """torch's tutorial compiles the step of the foreach implementation. lr stays a float: it does not change here."""
    import torch

    def make(params: list[Tensor]) -> Optimizer:
        optimizer = torch.optim.SGD(params, **OPTIONS, foreach=True)
        optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
        return optimizer

    return Implementation(name, {"": make}, compiles=True, only=None if full else COMPILED_CASES)


def _optimi(name: str, device: str, full: bool) -> Implementation:
    """The same work as the others: L2 decay, and no sum of what was rounded away."""
    optimi = _imported("optimi", "torch-optimi")
    same = partial(optimi.SGD, **OPTIONS, kahan_sum=False)
    if device == "cuda":
        return Implementation(name, {"triton=True": partial(same, triton=True)}, writes_gradients=True)
    makers = {"foreach=False": partial(same, foreach=False, triton=False), "foreach=True": partial(same, foreach=True)}
    return Implementation(name, makers, writes_gradients=True)


def _flash(name: str, device: str, full: bool) -> Implementation:
    """Momentum in float32 and no bits beside the parameters, so that it is the same step; its kernel is for GPUs."""
    flashoptim = _imported("flashoptim", "flashoptim")
    same = partial(flashoptim.FlashSGD, **OPTIONS, quantize=False, master_weight_bits=None)
    fused = device == "cuda"
    return Implementation(name, {f"fused={fused}": partial(same, fused=fused)})


def _apex(name: str, device: str, full: bool) -> Implementation:
    if device != "cuda":
        raise Absent("its kernels are for GPUs")
    optimizers = _imported("apex.optimizers", "apex")
    return Implementation(name, {"": partial(optimizers.FusedSGD, **OPTIONS)})


def _transformer_engine(name: str, device: str, full: bool) -> Implementation:
    if device != "cuda":
        raise Absent("its kernels are for GPUs")
    optimizers = _imported("transformer_engine.pytorch.optimizers", "transformer-engine")
    return Implementation(name, {"": partial(optimizers.FusedSGD, **OPTIONS)})


_BY_NAME: dict[str, Callable[[str, bool], Implementation]] = {
    name: partial(make, name)
    for names, make in (
        (OWN, _wd_fused),
        ((FUSED, FOREACH, LOOP), _torch),
        ((COMPILED,), _compiled),
        ((OPTIMI,), _optimi),
        ((FLASH,), _flash),
        ((APEX,), _apex),
        ((TE,), _transformer_engine),
    )
    for name in names
}


def _imported(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            raise Absent(f"not installed ({distribution})") from error
        raise Absent(f"cannot be imported ({error})") from error
    except Exception as error:  # whatever is wrong with it
        raise Absent(f"cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})") from error


def versions() -> dict[str, str]:
    """Of the other libraries, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
