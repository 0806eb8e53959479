"""Runs single kernels, from PTX text, on the executor alone: without torch, without CUDA's libraries."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import translator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "simulated_gpu"
SOURCES = [
    HERE / "kernel_harness.cpp",
    *(HERE / "runtime" / f"{name}.cpp" for name in ("executor", "accesses", "collectives", "block_races", "fibers")),
    HERE / "runtime" / "kernel_cache.cpp",
]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


class Fault(Exception):
    pass


class Race(Fault):
    pass


@dataclass(frozen=True)
class Range:
    begin: int
    end: int
    writes: bool


class _Touched(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_uint64), ("end", ctypes.c_uint64), ("writes", ctypes.c_bool)]


@cache
def _library() -> ctypes.CDLL:
    digest = hashlib.sha256()
    for path in [*SOURCES, *sorted((HERE / "runtime").glob("*.h"))]:
        digest.update(path.read_bytes())
    target = CACHE / f"harness-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-pthread", f"-I{HERE}"]
        subprocess.run([str(COMPILER), *flags, *map(str, SOURCES), "-o", str(temporary), "-ldl"], check=True)
        temporary.replace(target)
    os.environ["SIMULATED_GPU_PYTHON"] = sys.executable
    os.environ["SIMULATED_GPU_KERNELS"] = str(CACHE / f"kernels-{translator.fingerprint()}")
    os.environ["SIMULATED_GPU_ROOT"] = str(ROOT)
    library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    library.harness_allocate.restype = ctypes.c_uint64
    library.harness_allocate.argtypes = [ctypes.c_uint64, ctypes.c_int]
    library.harness_free.argtypes = [ctypes.c_uint64]
    library.harness_run.restype = ctypes.c_char_p
    library.harness_counts.restype = ctypes.c_char_p
    return library


class Memory:
    """Of a device; as bytes."""

    def __init__(self, contents: bytes, device: int = 0) -> None:
        self.bytes = len(contents)
        self.address = _library().harness_allocate(len(contents), device)
        ctypes.memmove(self.address, contents, len(contents))

    def read(self) -> bytes:
        return ctypes.string_at(self.address, self.bytes)

    def free(self) -> None:
        _library().harness_free(self.address)


def launch(
    ptx: Path,
    name: str,
    parameters: bytes,
    grid: Sequence[int] = (1,),
    block: Sequence[int] = (1,),
    shared: int = 0,
    device: int = 0,
    seed: int = 0,
) -> list[Range]:
    """What it touched. Raises what is wrong with it."""
    library = _library()
    shape = (ctypes.c_uint * 6)(*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3])
    touched = (_Touched * 4096)()
    count = ctypes.c_uint(len(touched))
    said = library.harness_run(
        str(ptx).encode(), name.encode(), shape, shared, parameters, device, ctypes.c_uint64(seed), touched,
        ctypes.byref(count)
    ).decode()  # fmt: skip
    if said.startswith("race: "):
        raise Race(said.removeprefix("race: "))
    if said:
        raise (RuntimeError if said.startswith("error: ") else Fault)(said.removeprefix("error: "))
    assert count.value <= len(touched)
    return [Range(each.begin, each.end, each.writes) for each in touched[: count.value]]


def counts() -> dict[str, int]:
    """Of the last launch, where SIMULATED_GPU_COUNT=1."""
    return json.loads(_library().harness_counts() or b"{}")
