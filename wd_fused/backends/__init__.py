"""Which backends there are, and which one a parameter gets.

A backend is named here and nowhere else; a step knows only the methods of a plan.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from wd_fused.backends.fused import Backend, CudaBackend, TritonBackend, triton_kernels
from wd_fused.backends.plan import NUMERICS, Numerics, Plan, Row

__all__ = ["NUMERICS", "Backend", "Numerics", "Plan", "Row", "triton_kernels"]

FUSED: dict[str, Backend] = {"cuda": CudaBackend("cuda"), "triton": TritonBackend("hosted"), "cpu": Backend("cpu")}
NAMES = ("auto", *FUSED, "torch")
# "auto": the fused backends that a device's parameters are offered to, in this order; then torch.
PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def available() -> dict[str, str | None]:
    """Every backend's name, with None where this machine can use it, else the reason and the remedy."""
    return {name: backend.unavailable() for name, backend in FUSED.items()} | {"torch": None}


def wanted(backend: str) -> str:
    """The backend to use for the argument ``backend``: "auto" gives way to the variable WD_FUSED_BACKEND.

    Raises ValueError for a name that does not exist and RuntimeError for a backend that this machine lacks.
    """
    source = f"backend={backend!r}"
    if backend == "auto" and "WD_FUSED_BACKEND" in os.environ:
        backend = os.environ["WD_FUSED_BACKEND"]
        source = f"the environment variable WD_FUSED_BACKEND={backend!r}"
    if backend not in NAMES:
        raise ValueError(f"Invalid {source}: choose one of {_listed(NAMES)}")
    if backend in FUSED and (reason := FUSED[backend].unavailable()) is not None:
        usable = [name for name, missing in available().items() if missing is None]
        raise RuntimeError(
            f"{source} cannot be used: {reason}. Usable here: {_listed(usable)}; "
            'backend="auto" takes the best of them for each parameter'
        )
    return backend


def checked_numerics(numerics: str, backend: str) -> Numerics:
    """``numerics`` if it is one; ValueError if not, or if the backend cannot honour it."""
    if numerics not in NUMERICS:
        raise ValueError(f"Invalid numerics={numerics!r}: choose one of {_listed(NUMERICS)}")
    if numerics == "opmath" and backend == "torch":
        raise ValueError(
            'numerics="opmath" needs a fused backend: torch\'s own code rounds every intermediate. '
            'Use numerics="torch" or another backend'
        )
    return numerics


def any_usable(device: torch.device, backend: str) -> bool:
    """Whether some fused backend may take parameters on ``device`` where ``backend`` is wanted."""
    return any(FUSED[name].unavailable() is None for name in _candidates(device, backend))


def choose(tensor: Tensor, backend: str) -> tuple[str, str]:
    """The backend that takes ``tensor`` where ``backend`` is wanted ("auto" or a name), and why that one."""
    if backend == "torch":
        return "torch", "it was asked for"
    candidates = _candidates(tensor.device, backend)
    reasons: list[str] = []
    for name in candidates:
        reason = FUSED[name].refusal(tensor)
        if reason is None and backend != "auto":
            return name, "it was asked for"
        if reason is None:
            return name, "; ".join([f"it is the {'next' if reasons else 'first'} choice for {tensor.device}", *reasons])
        reasons.append(f"{name}: {reason}" if len(candidates) > 1 else reason)
    return "torch", "; ".join(reasons) or f"it is on {tensor.device}, for which there is no fused backend"


def surely_taken(params: list[Tensor], state: dict[Tensor, Any], backend: str) -> tuple[str, list[Any]]:
    """The first choice for the parameters' device where ``backend`` is wanted, and which of them it surely takes: their
    momentum buffers, or None; False of those for which choose() has to be asked, and more."""
    names = _candidates(params[0].device, backend) if params else ()
    taken = FUSED[names[0]].surely_taken(params, state) if names else None
    return ("torch", [False] * len(params)) if taken is None else (names[0], taken)


def _candidates(device: torch.device, backend: str) -> tuple[str, ...]:
    if backend == "auto":
        return PREFERENCE.get(device.type, ())
    return () if backend == "torch" else (backend,)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
