"""Stages "environment" and "build" of gpu_check: the machine, what it lacks, how the extension came to be, and whether
Triton can be used.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.stage import ROOT, Stage, main

PEERS = {"optimi": "torch-optimi", "apex": "apex", "transformer_engine": "transformer-engine"}
WANTED = {"triton": "triton", "pytest": "pytest"}


def command_output(*command: str, timeout: float = 30) -> str | None:
    """What a program prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=timeout, check=True, text=True, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in the toolkit that wd_fused builds with, or in a usual place."""
    if (path := shutil.which(name)) is not None:
        return path
    from wd_fused.build import toolchain

    home, _ = toolchain.cuda_home()
    folders = [] if home is None else [Path(home, "bin"), Path(home, "compute-sanitizer")]
    for pattern in ("usr/local/cuda*/bin", "usr/local/cuda*/compute-sanitizer", "opt/nvidia/nsight-compute/*"):
        folders += sorted(Path("/").glob(pattern), reverse=True)
    for folder in folders:
        if (path := shutil.which(name, path=str(folder))) is not None:
            return path
    return None


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The checkout's commit, and whether files that git knows have changes; None where git cannot tell."""
    changes = command_output("git", "status", "--porcelain", "--untracked-files=no")
    return {"id": command_output("git", "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def missing() -> list[str]:
    """What this machine lacks of all that the stages can use, each with what is then left out."""
    lacks = []
    for tool, purpose in {
        "compute-sanitizer": "memory checks are left out",
        "ncu": "the kernel's profile is left out",
        "nvcc": "the CUDA backend and the limit of the memory are left out",
    }.items():
        if cuda_tool(tool) is None:
            lacks.append(f"{tool}: not found; {purpose}")
    lacks += [f"{name}: not installed" for name, dist in WANTED.items() if version_of(dist) is None]
    lacks += [f"{name}: not installed, not compared with" for name, dist in PEERS.items() if version_of(dist) is None]
    return lacks


def driver() -> str | None:
    said = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said else None


def machine() -> dict[str, Any]:
    """The machine and its versions. Works without a GPU too."""
    described: dict[str, Any] = {
        "gpu": None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "driver": driver(),
        "triton": version_of("triton"),
    }
    try:
        import torch
    except ImportError:
        return described | {"torch": None}
    described |= {"torch": str(torch.__version__), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        described |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": total,
            "memory_free_bytes": free,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    return described


def build(stage: Stage) -> None:
    """Stage "build": the extension, built now if it is not there, Triton, and the environment report."""
    from wd_fused import backends
    from wd_fused.build import extension

    began = time.perf_counter()
    module = extension.load()
    status = extension.status()
    stage.data = {
        "found_in_seconds": round(time.perf_counter() - began, 2),
        "build_seconds": None if status.seconds is None else round(status.seconds, 2),
        "source": status.source,
        "reason": status.reason,
        "without_cuda_because": status.cuda,
        "architectures": None if module is None else module.cuda_architectures(),
        "why_not_on_this_gpu": None,
        "why_not_triton": backends.FUSED["triton"].unavailable(),
    }
    stage.save()
    if module is None:
        stage.failures.append(f"no extension: {status.reason}")
    elif status.cuda is not None and cuda_tool("nvcc") is not None:
        stage.failures.append(f"the extension has no CUDA part: {status.cuda}")
    elif status.cuda is None and (reason := module.why_not_cuda(0)) is not None:
        stage.data["why_not_on_this_gpu"] = reason
        stage.failures.append(f"the CUDA part does not run on this GPU: {reason}")
    if stage.data["why_not_triton"] is not None and version_of("triton") is not None:
        stage.failures.append(f"Triton is installed and cannot be used: {stage.data['why_not_triton']}")
    stage.save()
    done = subprocess.run(
        [sys.executable, "-m", "wd_fused"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", timeout=120, check=False,
    )  # fmt: skip
    stage.data["report"] = without_paths(done.stdout).splitlines()
    if done.returncode != 0:
        stage.failures.append(f"`python -m wd_fused` ended with {done.returncode}")


def without_paths(text: str) -> str:
    """A published file names no folder of the machine it was made on."""
    for folder, name in ((str(ROOT), "<checkout>"), (sys.prefix, "<python>"), (str(Path.home()), "~")):
        text = text.replace(folder, name) if len(folder) > 1 else text
    return text


if __name__ == "__main__":
    sys.exit(main("environment", build))
