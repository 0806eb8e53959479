"""No step reads or writes beside a CPU tensor: memory that nobody may touch begins where the tensor ends, or ends where
it begins. On a GPU the simulated one looks each access up.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = mmap.PAGESIZE
SIZES = (*range(1, 70), 127, 128, 129, 255, 257, 511, 1_023, 1_025, 4_097, 16_385)


def guarded(values: Any, at_end: bool) -> Any:
    """The same numbers beside a page without access."""
    import torch

    pages = -(-values.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = PAGE + (pages * PAGE - values.nbytes if at_end else 0)
    tensor = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    for page in (0, pages + 1):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page * PAGE), ctypes.c_size_t(PAGE), 0) != 0:
            raise OSError("mprotect")
    return tensor.copy_(values).view(values.shape)


def step_beside_guards(dtype_name: str) -> None:
    import torch

    from wd_fused import FusedSGD

    dtype = getattr(torch, dtype_name)
    options: list[dict[str, Any]] = [{}, {"momentum": 0.9, "nesterov": True}, {"max_grad_norm": 1.0, "momentum": 0.9}]
    if dtype == torch.bfloat16:
        options += [{"master_weights": "split", "momentum": 0.9}, {"rounding": "stochastic"}]
    for chosen in options:
        for at_end in (True, False):
            params = [torch.nn.Parameter(guarded(torch.randn(size).to(dtype), at_end)) for size in SIZES]
            optimizer = FusedSGD(params, lr=0.1, weight_decay=0.01, **chosen, backend="cpu")
            for param in params:
                param.grad = guarded(torch.ones_like(param), at_end)
                if "momentum" in chosen:
                    optimizer.state[param]["momentum_buffer"] = guarded(torch.ones_like(param), at_end)
            for _ in range(2):
                optimizer.step()
    if len(sys.argv) > 2:  # the guards are there
        ctypes.memset(params[-1].data_ptr() - 1, 0, 1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_no_step_touches_memory_beside_its_tensors(dtype: str) -> None:
    done = subprocess.run([sys.executable, __file__, dtype], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_access_beside_a_tensor_is_seen() -> None:
    done = subprocess.run([sys.executable, __file__, "float32", "beyond"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -11


if __name__ == "__main__":
    step_beside_guards(sys.argv[1])
