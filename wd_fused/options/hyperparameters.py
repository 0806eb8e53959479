"""The numbers of a parameter group: what can be read as one, and what float32 cannot hold. Whatever float() takes is
a number, but text: Python's and NumPy's, fractions, arrays and Tensors of one element. Asked at loading and before
a step: by the other files here, step/ and functional.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NUMBERS = ("lr", "momentum", "dampening", "weight_decay")


def number_fault(value: Any) -> str | None:
    """Why no number can be read from it, or None: Python's and NumPy's can, and a Tensor of one element."""
    if isinstance(value, Tensor):  # a GPU is not waited for
        if value.numel() == 1 and not value.is_complex() and not value.is_meta:
            return None
        return f"a {value.dtype} Tensor of shape {list(value.shape)} on {value.device} is not one real number"
    try:
        math.ldexp(value, 0)  # as C converts it: not from text
    except OverflowError:
        return "it does not fit into a float"
    except (TypeError, ValueError):
        return f"a {type(value).__name__} is not a number"
    return None


def spelled(value: Any) -> str:
    """As somebody would write it, but for hundreds of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return repr(value)


def check_number(name: str, value: Any) -> None:
    """Raises TypeError, or RuntimeError for a number that is too large, with its name."""
    if not isinstance(value, float) and (fault := number_fault(value)) is not None:
        raise (RuntimeError if "fit" in fault else TypeError)(f"{name}={spelled(value)}: {fault}")


def on_host(name: str, value: Any) -> float:
    """A number that the host must know, with its name for an error: where it lies on a GPU, that is waited for."""
    if isinstance(value, Tensor) and value.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} is a Tensor on {value.device}, which decoupled weight decay reads on the host: that cannot be "
            "captured in a CUDA graph; give a number, or a Tensor on the CPU"
        )
    return float(value)


def check_float32(name: str, value: float, given: Any) -> None:
    """Raises RuntimeError for a number that float32 cannot hold, as torch's operators do."""
    if torch.finfo(torch.float32).max < abs(value) < math.inf:
        raise RuntimeError(f"{name}={spelled(given)} cannot be converted to float32 without overflow")


def check_group(group: Mapping[str, Any], has_float32: bool) -> None:
    """Raises for a group's numbers that torch's code or the reference would fail on in the middle of a step.

    has_float32: a parameter is stepped in float32.
    """
    for name in NUMBERS:
        value = group[name]
        check_number(name, value)
        if has_float32 and not (isinstance(value, Tensor) and not value.is_cpu):
            check_float32(name, 1 - float(value) if name == "dampening" else float(value), value)


# As torch's operators take them


def number(value: Any) -> Any:
    """A Python number, or a Tensor without dimensions."""
    if isinstance(value, Tensor):
        return value if value.dim() == 0 else value.reshape(())
    return value if _is_plain(value) else float(value)


def dampening(value: Any) -> Any:
    """A Python number with the same 1 - dampening, which torch forms in the type of what was given: that may round."""
    return value if _is_plain(value) else 1 - float(1 - value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
