"""Triton's own launcher with our kernels, as far as the CUDA driver: a stand-in for that takes the launches down.

Run by pytest; needs no GPU, but Triton, and the C compiler that Triton calls.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import ctypes, sys
import torch

torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = lambda device=None: "a stand-in"
torch._C._cuda_getCurrentRawStream = lambda index: 0x5717

class Device:
    def __init__(self, device): pass
    def __enter__(self): return self
    def __exit__(self, *error): return False

torch.cuda.device = Device
torch.cuda.is_current_stream_capturing = lambda: False

from wd_fused import backends
assert backends.FUSED["triton"].unavailable() is None
from wd_fused.triton_kernels import launcher

driver = ctypes.CDLL(sys.argv[1])
last = (ctypes.c_uint64 * 8).in_dll(driver, "last")
launches, fails = ctypes.c_int.in_dll(driver, "launches"), ctypes.c_int.in_dll(driver, "fails")
gpu = torch.device("cuda", 0)
assert not launcher.INTERPRETED and launcher.current_stream(gpu) == 0x5717

for kernel in (launcher.KERNELS[0], launcher.KERNELS[-1]):
    before = launches.value
    # Neither small numbers, nor 1, nor multiples of 16 are a kernel of their own, and none is cut to 32 bits.
    for programs, addresses, stream in (
        (7, (0x7F1122334450, 0x7FFFFFFFFFFF, 2**62, 0, 0), 0x7F00DEAD0000),
        (2**31 - 1, (1, 16, 2**31, 2**32 + 1, 2**63 - 1), 0),
    ):
        launcher.launcher_of(kernel, gpu, programs)(*addresses, stream=stream)
        assert list(last) == [programs, 32 * 4, stream, *addresses], list(map(hex, last))
    assert launches.value == before + 2
assert launcher._loaded.cache_info().currsize == 2

fails.value = 1
try:
    launcher.launcher_of(launcher.KERNELS[0], gpu, 3)(1, 2, 3, 4, 5, stream=6)
except RuntimeError as error:
    assert "as the test wants it" in str(error), error
else:
    raise AssertionError("a launch that fails raises nothing")
fails.value = 0
launcher.launcher_of(launcher.KERNELS[0], gpu, 3)(1, 2, 3, 4, 5, stream=6)
assert list(last) == [3, 128, 6, 1, 2, 3, 4, 5]

# A kernel is loaded in the one mode in which the driver allows it in a capture, or beside one of this thread's.
mode, mode_at_load = (ctypes.c_int.in_dll(driver, name) for name in ("capture_mode", "capture_mode_at_load"))
assert (mode_at_load.value, mode.value) == (2, 0)
mode_at_load.value = -1
launcher.launcher_of(launcher.KERNELS[1], gpu, 3)(1, 2, 3, 4, 5, stream=6)
assert (mode_at_load.value, mode.value) == (2, 0)

assert launcher.why_not_on(gpu, torch.float32) is None
assert "it is on cpu" in launcher.why_not_on(torch.device("cpu"), torch.float32)
"""


def test_our_arguments_arrive_through_tritons_launcher(tmp_path: Path) -> None:
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("Triton is not installed")
    (package,) = triton.submodule_search_locations or ()
    library = tmp_path / "libcuda.so.1"
    include = Path(package) / "backends" / "nvidia" / "include"
    stub = ROOT / "tests" / "triton_on_stub" / "cuda_stub.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", f"-I{include}", "-o", library, stub], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT),
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),  # its launcher is linked with the library, wherever that is
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
