"""Finds the compiled module: built ahead of time, else by a JIT build, else says why not and what to do about it.

Called by whatever needs a fused backend, at its first use. jit.py keeps and makes the JIT builds.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from wd_fused.build import config as build_config
from wd_fused.build import toolchain
from wd_fused.build.jit import Cache, Found, Unavailable, cache_root, finished_or_built
from wd_fused.warn import warn_user

_PACKAGE = Path(__file__).resolve().parents[1]
_SEE = "`python -m wd_fused` shows what was found"
_NOT_BUILT = "not built ahead of time"
_CUDA_FAILED = "the CUDA part could not be built"


@dataclass(frozen=True)
class Status:
    """Where the compiled module came from.

    Attributes:
        source: ``"ahead-of-time"``, ``"jit"`` or ``"none"``.
        path: the module's file, or None.
        reason: where ``source`` is ``"none"``, why, and what to do about it; where it is ``"jit"``, why the module that
            was built ahead of time is not used, if there is one.
        seconds: how long the JIT build took, if this process built it.
        cuda: None if the module has its CUDA part, else why it has none, and what to do about it.
    """

    source: str
    path: str | None = None
    reason: str | None = None
    seconds: float | None = None
    cuda: str | None = None


_lock = threading.Lock()
_found: tuple[ModuleType | None, Status] | None = None


def load() -> ModuleType | None:
    """The compiled module ``_C``, or None; importing it registers ``torch.ops.wd_fused``.

    The answer is found once a process. If it is None, the first call says why in one RuntimeWarning; so it does where
    torch has a GPU and the module's CUDA part failed to build.
    """
    first, module = _load()
    if not first:
        return module
    found = status()
    message = None
    if module is None:
        message = (
            f"wd_fused runs without its compiled part, and torch's own code does the step ({_SEE}): {found.reason}"
        )
    elif found.cuda is not None and found.cuda.startswith(_CUDA_FAILED) and torch.cuda.is_available():
        message = f"wd_fused runs without its CUDA part ({_SEE}): {found.cuda}"
    if message is not None:
        warn_user(message, RuntimeWarning)
    return module


def module_if_loaded() -> ModuleType | None:
    """The compiled module if :func:`load` has found it; never looks for it."""
    return None if _found is None else _found[0]


def status() -> Status:
    """Where :func:`load` finds the module, or why it finds none. Looks for it if nobody has; never warns."""
    _load()
    assert _found is not None
    return _found[1]


def _load() -> tuple[bool, ModuleType | None]:
    """Whether this is the first time in this process, and the module."""
    global _found
    with _lock:
        first = _found is None
        if _found is None:
            _found = find()
        return first, _found[0]


def find(csrc: Path | None = None) -> tuple[ModuleType | None, Status]:
    """What :func:`load` does, without remembering it. With ``csrc``, those sources alone, by JIT (for tests)."""
    try:
        if csrc is not None:
            return _just_in_time(csrc, "asked for")
        csrc = sources()
        ahead_of_time = _ahead_of_time(csrc)
        if isinstance(ahead_of_time, ModuleType):
            path = str(ahead_of_time.__file__)
            return ahead_of_time, Status("ahead-of-time", path, cuda=_without_cuda(Path(path)))
        if csrc is None:
            raise Unavailable(
                f"{ahead_of_time}, and the sources (csrc) are not beside {_PACKAGE}: install wd_fused again"
            )
        return _just_in_time(csrc, ahead_of_time)
    except (Unavailable, toolchain.MissingTool) as missing:
        return None, Status("none", reason=str(missing), cuda=str(missing))


def sources() -> Path | None:
    """The folder of the C++ and CUDA sources: inside the package once installed, beside it in a checkout."""
    return next((folder for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if folder.is_dir()), None)


def _ahead_of_time(csrc: Path | None) -> ModuleType | str:
    """The module that setup.py built, or why it is not used.

    A module that was built against another torch, or is damaged, may crash the process that imports it: the record
    beside it is read first.
    """
    paths = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := _PACKAGE / f"_C{suffix}").is_file()]
    if not paths:
        return _NOT_BUILT
    record = build_config.read_record(paths[0])
    if not {"torch", "python", "sources", "size", "sha256"} <= record.keys():
        return f"{paths[0].name} has no record of what it was built for"
    torch_now = str(torch.__version__)
    if record["torch"] != torch_now:
        return f"the module built ahead of time is for torch {record['torch']}, this is {torch_now}"
    if csrc is not None:
        now = build_config.build_record(csrc, torch_now)
        if record["python"] != now["python"]:
            return f"the module built ahead of time is for {record['python']}, this is {now['python']}"
        if record["sources"] != now["sources"]:
            return "csrc has changed since the module was built ahead of time"
    if (damage := build_config.damage(paths[0], record)) is not None:
        return f"the module built ahead of time is damaged: {paths[0]} {damage}; install wd_fused again"
    try:
        return importlib.import_module("wd_fused._C")
    except ImportError as error:
        return f"the module built ahead of time does not load ({error})"


def _without_cuda(path: Path) -> str | None:
    """Why the module that was built ahead of time has no CUDA part, as its record says; None if it has one."""
    record = build_config.read_record(path)
    if record.get("cuda") is not None:
        return None
    reason = record.get("without_cuda") or "its record does not say why"
    return f"the module was built ahead of time without it ({reason}); after that, install wd_fused again"


def _just_in_time(csrc: Path, why: str) -> tuple[ModuleType, Status]:
    """The module from torch's extension cache, built first if it is not there.

    With its CUDA part where that can be built, else the CPU part alone. What another machine has put into the cache
    counts too: one without a compiler, or without nvcc, takes what was built for its torch and its GPUs.
    """
    reason = None if why == _NOT_BUILT else why
    if os.environ.get("WD_FUSED_JIT") == "0":
        raise Unavailable(
            f"{why}, and WD_FUSED_JIT=0 forbids the JIT build; unset it, or build ahead of time "
            "(pip install --no-build-isolation)"
        )
    if sys.platform == "win32":
        raise Unavailable("the compiled part builds on Linux and macOS only")
    torch_version = str(torch.__version__)
    gpus = toolchain.gpu_capabilities(torch.cuda)
    cache = Cache(cache_root(), json.dumps(build_config.build_record(csrc, torch_version)), gpus)
    part = toolchain.cuda_part(csrc, torch_version, torch.version.cuda, gpus)
    try:
        compiler = toolchain.cxx_compiler()
    except toolchain.MissingTool as missing:
        if (found := cache.find((), lambda targets: True)) is None:
            raise
        without = part if isinstance(part, str) else str(missing)
        return found.module, Status("jit", found.path, reason, cuda=None if found.targets else without)
    if isinstance(part, toolchain.CudaPart):
        try:
            found = _with_cuda(csrc, cache, compiler, part, why)
            return found.module, Status("jit", found.path, reason, found.seconds)
        except (Unavailable, toolchain.MissingTool) as error:
            without = f"{_CUDA_FAILED}: {error}"
            why += "; without its CUDA part, which could not be built"
    else:
        without = part
    found = cache.find((), lambda targets: targets is not None and (not gpus or cache.served(targets) > 0))
    if found is not None:
        return found.module, Status("jit", found.path, reason)
    found = finished_or_built(csrc, cache.path(toolchain.described(compiler)), compiler, None, why)
    return found.module, Status("jit", found.path, reason, found.seconds, without)


def _with_cuda(csrc: Path, cache: Cache, compiler: str, part: toolchain.CudaPart, why: str) -> Found:
    """The module with this CUDA part. Other targets do as well, if nobody named these, and the same GPUs are served."""
    tools = toolchain.described(compiler) + toolchain.described(part.nvcc)
    if part.chosen_by != toolchain.NAMED:
        enough = cache.served(part.targets)
        found = cache.find((tools,), lambda targets: targets is not None and cache.served(targets) >= enough)
        if found is not None:
            return found
    return finished_or_built(csrc, cache.path(tools, part.targets), compiler, part, why)
