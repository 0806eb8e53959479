"""What the compiled module is made of: sources, flags, and the record that says what a build was made for.

Read by wd_fused/extension.py (JIT build) and by setup.py (ahead-of-time build), which loads this file by its path
before wd_fused can be imported: standard library only.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

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

SOURCE_PATTERNS = ("*.cpp", "*.h", "*.cu", "*.cuh")
RECORD_NAME = "_C.json"


def sources(csrc: Path) -> list[Path]:
    """The files to compile. CUDA sources (``*.cu``) join here once there are any and nvcc is found."""
    return sorted(csrc.glob("*.cpp"))


def fingerprint(csrc: Path) -> str:
    """Sixteen hex digits that change with any file of ``csrc`` and with the flags."""
    digest = hashlib.sha256(repr(CXX_FLAGS).encode())
    for path in sorted(path for pattern in SOURCE_PATTERNS for path in csrc.glob(pattern)):
        content = path.read_bytes()
        digest.update(f"\n{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def build_record(csrc: Path, torch_version: str) -> dict[str, str]:
    """What a build is good for: one torch, one Python ABI (which names the platform too), one state of the sources."""
    return {
        "torch": torch_version,
        "python": str(sysconfig.get_config_var("SOABI")),
        "sources": fingerprint(csrc),
    }


def write_record(path: Path, csrc: Path, torch_version: str) -> None:
    path.write_text(json.dumps(build_record(csrc, torch_version), indent=2) + "\n", encoding="utf-8")
