"""Finds the compiled module: built ahead of time, else by a JIT build, else says why not and what to do about it.

Called by whatever needs a fused backend, at its first use. The build itself is torch.utils.cpp_extension.load; what is
here decides whether one is needed, lets one process build while others wait, and never leaves a half-written module.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import _appdirs

from wd_fused import build_config, toolchain
from wd_fused.warn import warn_user

_PACKAGE = Path(__file__).resolve().parent
_SEE = "`python -m wd_fused` shows what was found"
_NOT_BUILT = "not built ahead of time"
_REMEDY = "WD_FUSED_VERBOSE=1 shows the whole build, CXX chooses another compiler"
_CUDA_REMEDY = f"WD_FUSED_VERBOSE=1 tries again and {_REMEDY.removeprefix('WD_FUSED_VERBOSE=1 ')}"
_CUDA_FAILED = "the CUDA part could not be built"
_REMEMBER_FAILURE = 24 * 60 * 60  # seconds: what failed for a passing reason is tried again on another day


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


class _Unavailable(Exception):
    """The module cannot be had. The message says why, and what to do."""


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
            raise _Unavailable(
                f"{ahead_of_time}, and the sources (csrc) are not beside {_PACKAGE}: install wd_fused again"
            )
        return _just_in_time(csrc, ahead_of_time)
    except (_Unavailable, toolchain.MissingTool) as missing:
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
        raise _Unavailable(
            f"{why}, and WD_FUSED_JIT=0 forbids the JIT build; unset it, or build ahead of time "
            "(pip install --no-build-isolation)"
        )
    if sys.platform == "win32":
        raise _Unavailable("the compiled part builds on Linux and macOS only")
    torch_version = str(torch.__version__)
    gpus = toolchain.gpu_capabilities(torch.cuda)
    cache = _Cache(cache_root(), json.dumps(build_config.build_record(csrc, torch_version)), gpus)
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
        except (_Unavailable, toolchain.MissingTool) as error:
            without = f"{_CUDA_FAILED}: {error}"
            why += "; without its CUDA part, which could not be built"
    else:
        without = part
    found = cache.find((), lambda targets: targets is not None and (not gpus or cache.served(targets) > 0))
    if found is not None:
        return found.module, Status("jit", found.path, reason)
    found = _finished_or_built(csrc, cache.path(toolchain.described(compiler)), compiler, None, why)
    return found.module, Status("jit", found.path, reason, found.seconds, without)


def _with_cuda(csrc: Path, cache: _Cache, compiler: str, part: toolchain.CudaPart, why: str) -> _Found:
    """The module with this CUDA part. Other targets do as well, if nobody named these, and the same GPUs are served."""
    tools = toolchain.described(compiler) + toolchain.described(part.nvcc)
    if part.chosen_by != toolchain.NAMED:
        enough = cache.served(part.targets)
        found = cache.find((tools,), lambda targets: targets is not None and cache.served(targets) >= enough)
        if found is not None:
            return found
    return _finished_or_built(csrc, cache.path(tools, part.targets), compiler, part, why)


class _Found(NamedTuple):
    """A module of the cache: imported, with the targets of its CUDA part, and how long it took if it was built now."""

    module: ModuleType
    path: str
    targets: str | None
    seconds: float | None = None


class _Cache(NamedTuple):
    """The builds of one record (torch, Python, sources) in torch's extension cache, and the GPUs they are to serve.

    A build's folder is named after its record, its tools and its targets, so that a machine without some of the tools
    still finds what another one has built.
    """

    root: Path
    record: str
    gpus: list[toolchain.Capability]

    def path(self, *made_with: str) -> Path:
        name = "_".join(["wd_fused", _digest(self.record), *map(_digest, made_with)])
        return self.root / name / f"{name}.so"

    def served(self, targets: str) -> int:
        """How many of the GPUs code for ``targets`` runs on."""
        return sum(toolchain.covers(targets, gpu) for gpu in self.gpus)

    def find(self, made_with: tuple[str, ...], fits: Callable[[str | None], bool]) -> _Found | None:
        """The finished module with such a name whose targets fit; of several, the one that serves most of the GPUs."""
        folder = self.path(*made_with).parent.name
        finished = []
        for path in sorted(self.root.glob(f"{folder}_*/{folder}_*.so")):
            targets = _targets(path)
            if os.environ.get("WD_FUSED_CUDA") == "0" and targets is not None:
                continue
            if fits(targets):
                finished.append((-1 if targets is None else self.served(targets), path, targets))
        for _, path, targets in sorted(finished, key=lambda one: one[0], reverse=True):
            if (module := _load_finished(path)) is not None:
                return _Found(module, str(path), targets)
        return None


def _targets(path: Path) -> str | None:
    """The targets of a finished module's CUDA part, by the record beside it; None if it has no CUDA part."""
    targets = build_config.read_record(path).get("cuda")
    return None if targets is None else str(targets)


def _finished_or_built(csrc: Path, target: Path, compiler: str, part: toolchain.CudaPart | None, why: str) -> _Found:
    """The module at ``target`` in the cache, built first if it is not there, by one process at a time."""
    targets = None if part is None else part.targets

    def finished() -> _Found | None:
        module = _load_finished(target)
        return None if module is None else _Found(module, str(target), targets)

    try:
        if (found := finished()) is not None:
            return found
        path_with_ninja = toolchain.path_with_ninja()
        toolchain.require_python_headers()
        failure = target.parent / "failure.txt"
        if part is not None:
            failure = target.parent / f"failure_{_digest(toolchain.what_steers(part.nvcc))}.txt"
            if os.environ.get("WD_FUSED_VERBOSE") != "1" and (said := _remembered(failure)) is not None:
                raise _Unavailable(said)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(target.parent / "build.lock") as waited:
            if waited:
                if (found := finished()) is not None:
                    return found
                # Many processes often start together: what failed for the one that was waited for would fail here too.
                if (said := _remembered(failure)) is not None:
                    raise _Unavailable(said)
            failure.unlink(missing_ok=True)
            try:
                module, seconds = _build(csrc, target, compiler, path_with_ninja, part, why)
            except _Unavailable as error:
                failure.write_text(str(error), encoding="utf-8")
                raise
            return _Found(module, str(target), targets, seconds)
    except OSError as error:
        raise _Unavailable(
            f"cannot use the extension cache in {target.parent.parent} ({error}); "
            "set TORCH_EXTENSIONS_DIR to a folder that can be written"
        ) from error


def _remembered(failure: Path) -> str | None:
    """Why a build failed so lately that not every process is to repeat it: a CUDA part may take minutes."""
    try:
        recent = time.time() - failure.stat().st_mtime < _REMEMBER_FAILURE
        return failure.read_text(encoding="utf-8").strip("\0\n") or None if recent else None
    except (OSError, ValueError):
        return None


def cache_root() -> Path:
    """The folder that torch.utils.cpp_extension.load keeps its builds in.

    Found without importing torch.utils.cpp_extension, which needs setuptools, and logs a warning where there is a CUDA
    toolkit but no GPU: a finished build must load anywhere, and quietly.
    """
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named is not None:
        return Path(named).absolute()
    if torch.version.hip is not None:
        accelerator = "rocm" + torch.version.hip.replace(".", "")
    elif torch.version.cuda is not None:
        accelerator = "cu" + torch.version.cuda.replace(".", "")
    else:
        accelerator = "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    folder = _appdirs.user_cache_dir(appname="torch_extensions")  # type: ignore[no-untyped-call]
    return Path(os.path.realpath(folder)) / f"{python}_{accelerator}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _load_finished(path: Path) -> ModuleType | None:
    """Import a module of the cache; None if it is not there, or damaged, or does not load: then it is built again."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or build_config.damage(path, build_config.read_record(path)) is not None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    return module


@contextlib.contextmanager
def _one_process_at_a_time(path: Path) -> Iterator[bool]:
    """Hold the lock at ``path``; yields whether another process held it before.

    The kernel frees the lock when its holder dies, however it dies. Where the file system has no locks, go on without:
    a build has a folder of its own and is put in place by a rename, so the worst that can happen is that two are made.
    """
    import fcntl

    with open(path, "w") as file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            print("wd_fused: waiting for another process to build the C++ extension", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        try:
            yield waited
        finally:
            # Closing is not enough where a fork has left a copy of the descriptor in a child.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _build(
    csrc: Path, target: Path, compiler: str, path: str, part: toolchain.CudaPart | None, why: str
) -> tuple[ModuleType, float]:
    """Compile into a fresh folder, import the result, and rename it to ``target``. The caller holds the lock."""
    # Left by builds that were killed. Their compilers may still run, but write nothing into a new folder; and torch's
    # own lock file, which up to torch 2.13 blocks every later build when its owner is killed, goes with the old one.
    for leftover in target.parent.glob("build-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="build-", dir=target.parent))
    what, takes = "", "about a minute"
    if part is not None:
        what = f" and its CUDA part with nvcc {part.version} for {part.targets} ({part.chosen_by})"
        takes = "a minute or two"
    print(
        f"wd_fused: building its C++ extension with {compiler}{what} ({why}); takes {takes}, once",
        file=sys.stderr,
        flush=True,
    )
    started = time.perf_counter()
    try:
        module = _compile(csrc, target.stem, work, compiler, path, part)
        # Imported before it is put in place: what others find there is known to load. If it cannot be put there (the
        # folder was removed meanwhile), this process has it all the same, and the next one builds again.
        with contextlib.suppress(OSError):
            targets = None if part is None else part.targets
            record = build_config.write_record(work / target.name, csrc, str(torch.__version__), targets)
            for made in (record, work / target.name):
                _put_in_place(made, target.parent / made.name)
            module.__file__ = str(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = time.perf_counter() - started
    print(f"wd_fused: built in {seconds:.0f} s, kept in {target.parent}", file=sys.stderr, flush=True)
    return module, seconds


def _put_in_place(path: Path, target: Path) -> None:
    """Rename, when what is in the file is on the disk: after a crash of the machine the name would stand for zeros."""
    with open(path, "rb") as file, contextlib.suppress(OSError):  # there are file systems without fsync
        os.fsync(file.fileno())
    os.replace(path, target)


def _compile(
    csrc: Path, name: str, work: Path, compiler: str, path: str, part: toolchain.CudaPart | None
) -> ModuleType:
    """torch.utils.cpp_extension.load, with what goes wrong in it turned into a sentence."""
    verbose = os.environ.get("WD_FUSED_VERBOSE") == "1"
    targets = None if part is None else part.targets
    # On a machine with a CUDA toolkit and no GPU its import logs a warning, and a GPU is not needed to build.
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(level if verbose else logging.ERROR)
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        log.setLevel(level)
        raise _Unavailable(f"torch.utils.cpp_extension does not import ({error}); install setuptools") from error
    try:
        with (
            toolchain.environment(CXX=compiler, PATH=path),
            toolchain.torch_builds_with(part, cpp_extension),
        ):
            module: ModuleType = cpp_extension.load(
                name,
                [str(source) for source in build_config.sources(csrc, part is not None)],
                # As the shell has to read them: torch writes them into a file for ninja as they are.
                extra_cflags=[shlex.quote(flag) for flag in build_config.cxx_flags(targets)],
                extra_cuda_cflags=[shlex.quote(flag) for flag in build_config.nvcc_flags(targets)],
                extra_include_paths=[str(csrc)],
                build_directory=str(work),
                verbose=verbose,
                with_cuda=part is not None,
            )
            return module
    except ImportError as error:
        raise _Unavailable(f"the C++ extension was built but does not load ({error}); {_REMEDY}") from error
    except Exception as error:  # whatever it is, the training step goes on without the compiled part
        said = error.output.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        if part is None:
            failed = f"{compiler} could not build the C++ extension; {_REMEDY}"
        else:
            failed = f"nvcc {part.version} ({part.nvcc}) with {compiler} failed; {_CUDA_REMEDY}"
        raise _Unavailable(f"{failed}. It said:\n{_last_lines(said)}") from error
    finally:
        log.setLevel(level)


def _last_lines(output: str, count: int = 8) -> str:
    """The end of a build's output, without the command lines, thousands of characters each, that ninja repeats."""
    output = re.sub(r"^Error building extension '\w+': ", "", output)  # what torch puts before it
    lines = [line.rstrip() for line in output.splitlines()]
    kept = [
        line[:200]
        for before, line in zip(["", *lines], lines, strict=False)
        if line
        and not re.match(r"\[\d+/\d+\] |FAILED: |ninja: build stopped", line)
        and not before.startswith("FAILED: ")
    ]
    return "\n".join(f"    {line}" for line in kept[-count:])
