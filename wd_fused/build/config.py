"""What the compiled module is made of: sources, flags, and the record that says what a build was made for.

Read by wd_fused/build/extension.py (JIT build) and by setup.py (ahead-of-time build), which loads this file by its path
before wd_fused can be imported: standard library only.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path
from typing import Any

# No -std here: torch's headers ask for C++17 or C++20, depending on the torch, and torch's own build helpers pass what
# they need. -ffp-contract=off because the sources write every fma out; -fopenmp because at::parallel_for is a header
# that is serial without it. The linker does not get it: the OpenMP runtime is the one torch has loaded, not a second.
CXX_FLAGS = (
    "-O3",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
)

# For nvcc, beside those that torch's build helpers pass. --fmad=false for the reason that -ffp-contract=off has above;
# --threads=0 compiles for several targets at once, which ninja, seeing one file, cannot.
NVCC_FLAGS = ("-O3", "--fmad=false", "-Xcompiler=-fvisibility=hidden", "--threads=0")

SOURCE_PATTERNS = ("**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh")
RECORD_NAME = "_C.json"


def sources(csrc: Path, cuda: bool) -> list[Path]:
    """The files to compile, those that take longest first: ninja starts them in this order."""
    return [*(sorted(csrc.rglob("*.cu")) if cuda else []), *sorted(csrc.rglob("*.cpp"))]


def cxx_flags(targets: str | None) -> list[str]:
    """Flags for the C++ compiler. ``targets`` are the CUDA part's, None in a build without it."""
    return [*CXX_FLAGS, *_defines(targets)]


def nvcc_flags(targets: str | None) -> list[str]:
    """Flags for nvcc. The targets are given to torch's build helpers, which make nvcc's options of them."""
    return [*NVCC_FLAGS, *_defines(targets)]


def _defines(targets: str | None) -> list[str]:
    return [] if targets is None else ["-DWD_FUSED_CUDA", f'-DWD_FUSED_CUDA_ARCHS="{targets}"']


def fingerprint(csrc: Path) -> str:
    """Sixteen hex digits that change with any file of ``csrc`` and with the flags."""
    digest = hashlib.sha256(repr((CXX_FLAGS, NVCC_FLAGS)).encode())
    for path in sorted(path for pattern in SOURCE_PATTERNS for path in csrc.glob(pattern)):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(csrc)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def build_record(csrc: Path, torch_version: str) -> dict[str, str]:
    """What a build is good for: one torch, one Python ABI (which names the platform too), one state of the sources."""
    return {
        "torch": torch_version,
        "python": str(sysconfig.get_config_var("SOABI")),
        "sources": fingerprint(csrc),
    }


def write_record(
    module: Path, csrc: Path, torch_version: str, targets: str | None = None, without: str | None = None
) -> Path:
    """Write beside a module what it is good for, the ``targets`` of its CUDA part, or why it is ``without`` one, and
    what its file holds. Returns the record's path."""
    content = module.read_bytes()
    record = build_record(csrc, torch_version) | {
        "cuda": targets,
        "without_cuda": without,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    path = module.with_name(RECORD_NAME)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def read_record(module: Path) -> dict[str, Any]:
    """What the record beside a module says; nothing where there is none, or what is there is none."""
    try:
        record = json.loads(module.with_name(RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def damage(module: Path, record: dict[str, Any]) -> str | None:
    """How the module's file differs from the one that was recorded, or None.

    To load a file that was cut short, or in which a crash of the machine left zeros, kills the process. (To read and
    hash 14 MB, the module with a CUDA part for five targets, takes 10 ms, 40 where the processor has no instructions
    for it; to import torch, one or two seconds.)
    """
    try:
        content = module.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if len(content) != record.get("size"):
        return f"has {len(content):,} bytes, not the {record.get('size')} that were built"
    if hashlib.sha256(content).hexdigest() != record.get("sha256"):
        return "holds other bytes than were built"
    return None
