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
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import _appdirs

from wd_fused import build_config, toolchain

_PACKAGE = Path(__file__).resolve().parent
_NOT_BUILT = "not built ahead of time"
_REMEDY = "WD_FUSED_VERBOSE=1 shows the whole build, CXX chooses another compiler"


@dataclass(frozen=True)
class Status:
    """Where the compiled module came from.

    Attributes:
        source: ``"ahead-of-time"``, ``"jit"`` or ``"none"``.
        path: the module's file, or None.
        reason: where ``source`` is ``"none"``, why, and what to do about it; where it is ``"jit"``, why the module that
            was built ahead of time is not used, if there is one.
        seconds: how long the JIT build took, if this process built it.
    """

    source: str
    path: str | None = None
    reason: str | None = None
    seconds: float | None = None


class _Unavailable(Exception):
    """The module cannot be had. The message says why, and what to do."""


_lock = threading.Lock()
_found: tuple[ModuleType | None, Status] | None = None


def load() -> ModuleType | None:
    """The compiled module ``_C``, or None; importing it registers ``torch.ops.wd_fused``.

    The answer is found once a process. If it is None, the first call says why in one RuntimeWarning.
    """
    first, module = _load()
    if first and module is None:
        warnings.warn(
            "wd_fused runs without its compiled part, and torch's own code does the step "
            f"(`python -m wd_fused` shows what was found): {status().reason}",
            RuntimeWarning,
            stacklevel=_users_stacklevel(),
        )
    return module


def module_if_loaded() -> ModuleType | None:
    """The compiled module if :func:`load` has found it; never looks for it."""
    return None if _found is None else _found[0]


def status() -> Status:
    """Where :func:`load` finds the module, or why it finds none. Looks for it if nobody has; never warns."""
    _load()
    assert _found is not None
    return _found[1]


def _users_stacklevel() -> int:
    """The stack level, seen from the caller, of the first frame that is neither this package's nor torch's."""
    ours = (str(_PACKAGE) + os.sep, str(Path(torch.__file__).parent) + os.sep)
    level = 1
    frame = inspect.currentframe()
    while frame is not None and (frame := frame.f_back) is not None and frame.f_code.co_filename.startswith(ours):
        level += 1
    return level


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
        csrc = next((folder for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if folder.is_dir()), None)
        ahead_of_time = _ahead_of_time(csrc)
        if isinstance(ahead_of_time, ModuleType):
            return ahead_of_time, Status("ahead-of-time", ahead_of_time.__file__)
        if csrc is None:
            raise _Unavailable(
                f"{ahead_of_time}, and the sources (csrc) are not beside {_PACKAGE}: install wd_fused again"
            )
        return _just_in_time(csrc, ahead_of_time)
    except (_Unavailable, toolchain.MissingTool) as missing:
        return None, Status("none", reason=str(missing))


def _ahead_of_time(csrc: Path | None) -> ModuleType | str:
    """The module that setup.py built, or why it is not used.

    A module built against another torch may crash the process when it is imported: the record beside it is read first.
    """
    paths = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := _PACKAGE / f"_C{suffix}").is_file()]
    if not paths:
        return _NOT_BUILT
    try:
        built_for = json.loads((_PACKAGE / build_config.RECORD_NAME).read_text(encoding="utf-8"))
        torch_then, python_then, sources_then = (str(built_for[key]) for key in ("torch", "python", "sources"))
    except (OSError, ValueError, KeyError, TypeError):
        return f"{paths[0].name} has no record of what it was built for"
    torch_now = str(torch.__version__)
    if torch_then != torch_now:
        return f"the module built ahead of time is for torch {torch_then}, this is {torch_now}"
    if csrc is not None:
        now = build_config.build_record(csrc, torch_now)
        if python_then != now["python"]:
            return f"the module built ahead of time is for {python_then}, this is {now['python']}"
        if sources_then != now["sources"]:
            return "csrc has changed since the module was built ahead of time"
    try:
        return importlib.import_module("wd_fused._C")
    except ImportError as error:
        return f"the module built ahead of time does not load ({error})"


def _just_in_time(csrc: Path, why: str) -> tuple[ModuleType, Status]:
    """The module from torch's extension cache, built first if it is not there."""
    reason = None if why == _NOT_BUILT else why
    if os.environ.get("WD_FUSED_JIT") == "0":
        raise _Unavailable(
            f"{why}, and WD_FUSED_JIT=0 forbids the JIT build; unset it, or build ahead of time "
            "(pip install --no-build-isolation)"
        )
    if sys.platform == "win32":
        raise _Unavailable("the compiled part builds on Linux and macOS only")
    root = cache_root()
    # Two parts to the name, so that a machine without a compiler still finds what an earlier one built.
    prefix = "wd_fused_" + _digest(json.dumps(build_config.build_record(csrc, str(torch.__version__))))
    try:
        try:
            compiler = toolchain.cxx_compiler()
        except toolchain.MissingTool:
            for path in sorted(root.glob(f"{prefix}_*/{prefix}_*.so")):
                if (module := _load_finished(path)) is not None:
                    return module, Status("jit", str(path), reason)
            raise
        name = f"{prefix}_{_digest(toolchain.output_of(compiler, '--version') or '')}"
        target = root / name / f"{name}.so"
        if (module := _load_finished(target)) is not None:
            return module, Status("jit", str(target), reason)
        ninja = toolchain.ninja()
        toolchain.require_python_headers()
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(target.parent / "build.lock") as waited:
            failure = target.parent / "failure.txt"
            if waited:
                if (module := _load_finished(target)) is not None:
                    return module, Status("jit", str(target), reason)
                # Many processes often start together: what failed for the one that was waited for would fail here too.
                if failure.is_file():
                    raise _Unavailable(failure.read_text(encoding="utf-8"))
            failure.unlink(missing_ok=True)
            try:
                module, seconds = _build(csrc, target, compiler, ninja, why)
            except _Unavailable as error:
                failure.write_text(str(error), encoding="utf-8")
                raise
            return module, Status("jit", str(target), reason, seconds)
    except OSError as error:
        raise _Unavailable(
            f"cannot use the extension cache in {root} ({error}); "
            "set TORCH_EXTENSIONS_DIR to a folder that can be written"
        ) from error


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
    """Import a module of the cache; None if there is none or it does not load (it is built again then)."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
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


def _build(csrc: Path, target: Path, compiler: str, ninja: str, why: str) -> tuple[ModuleType, float]:
    """Compile into a fresh folder, import the result, and rename it to ``target``. The caller holds the lock."""
    # Left by builds that were killed. Their compilers may still run, but write nothing into a new folder; and torch's
    # own lock file, which up to torch 2.13 blocks every later build when its owner is killed, goes with the old one.
    for leftover in target.parent.glob("build-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="build-", dir=target.parent))
    verbose = os.environ.get("WD_FUSED_VERBOSE") == "1"
    print(
        f"wd_fused: building its C++ extension with {compiler} ({why}); takes about a minute, once",
        file=sys.stderr,
        flush=True,
    )
    started = time.perf_counter()
    try:
        module = _compile(csrc, target.stem, work, compiler, ninja, verbose)
        # Imported before it is put in place: what others find there is known to load. If it cannot be put there (the
        # folder was removed meanwhile), this process has it all the same, and the next one builds again.
        with contextlib.suppress(OSError):
            os.replace(work / target.name, target)
            module.__file__ = str(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = time.perf_counter() - started
    print(f"wd_fused: built in {seconds:.0f} s, kept in {target.parent}", file=sys.stderr, flush=True)
    return module, seconds


def _compile(csrc: Path, name: str, work: Path, compiler: str, ninja: str, verbose: bool) -> ModuleType:
    """torch.utils.cpp_extension.load, with what goes wrong in it turned into a sentence."""
    # On a machine with a CUDA toolkit and no GPU its import logs a warning that has nothing to do with a C++ build.
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(level if verbose else logging.ERROR)
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        log.setLevel(level)
        raise _Unavailable(f"torch.utils.cpp_extension does not import ({error}); install setuptools") from error
    path = os.pathsep.join([os.path.dirname(ninja), os.environ.get("PATH", os.defpath)])
    try:
        with _environment(CXX=compiler, PATH=path):
            module: ModuleType = cpp_extension.load(
                name,
                [str(source) for source in build_config.sources(csrc)],
                extra_cflags=list(build_config.CXX_FLAGS),
                extra_include_paths=[str(csrc)],
                build_directory=str(work),
                verbose=verbose,
                with_cuda=False,
            )
            return module
    except ImportError as error:
        raise _Unavailable(f"the C++ extension was built but does not load ({error}); {_REMEDY}") from error
    except Exception as error:  # whatever it is, the training step goes on without the compiled part
        said = error.output.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise _Unavailable(
            f"{compiler} could not build the C++ extension; {_REMEDY}. It said:\n{_last_lines(said)}"
        ) from error
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables for a while: torch's build helper takes the compiler and ninja from there only."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
