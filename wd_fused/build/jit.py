"""JIT builds: one of several processes builds, none finds a half-written module, and what is there is used again.

The build itself is torch.utils.cpp_extension.load, in its cache of extensions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import _appdirs

from wd_fused.build import config as build_config
from wd_fused.build import toolchain

_REMEDY = "WD_FUSED_VERBOSE=1 shows the whole build, CXX chooses another compiler"
_CUDA_REMEDY = f"WD_FUSED_VERBOSE=1 tries again and {_REMEDY.removeprefix('WD_FUSED_VERBOSE=1 ')}"
_REMEMBER_FAILURE = 24 * 60 * 60  # seconds: what failed for a passing reason is tried again on another day


class Unavailable(Exception):
    """The module cannot be had. The message says why, and what to do."""


class Found(NamedTuple):
    """A module of the cache: imported, with the targets of its CUDA part, and how long it took if it was built now."""

    module: ModuleType
    path: str
    targets: str | None
    seconds: float | None = None


class Cache(NamedTuple):
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

    def find(self, made_with: tuple[str, ...], fits: Callable[[str | None], bool]) -> Found | None:
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
                return Found(module, str(path), targets)
        return None


def _targets(path: Path) -> str | None:
    """The targets of a finished module's CUDA part, by the record beside it; None if it has no CUDA part."""
    targets = build_config.read_record(path).get("cuda")
    return None if targets is None else str(targets)


def finished_or_built(csrc: Path, target: Path, compiler: str, part: toolchain.CudaPart | None, why: str) -> Found:
    """The module at ``target`` in the cache, built first if it is not there, by one process at a time."""
    targets = None if part is None else part.targets

    def finished() -> Found | None:
        module = _load_finished(target)
        return None if module is None else Found(module, str(target), targets)

    try:
        if (found := finished()) is not None:
            return found
        path_with_ninja = toolchain.path_with_ninja()
        toolchain.require_python_headers()
        failure = target.parent / "failure.txt"
        if part is not None:
            failure = target.parent / f"failure_{_digest(toolchain.what_steers(part.nvcc))}.txt"
            if os.environ.get("WD_FUSED_VERBOSE") != "1" and (said := _remembered(failure)) is not None:
                raise Unavailable(said)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(target.parent / "build.lock") as waited:
            if waited:
                if (found := finished()) is not None:
                    return found
                # Many processes often start together: what failed for the one that was waited for would fail here too.
                if (said := _remembered(failure)) is not None:
                    raise Unavailable(said)
            failure.unlink(missing_ok=True)
            try:
                module, seconds = _build(csrc, target, compiler, path_with_ninja, part, why)
            except Unavailable as error:
                failure.write_text(str(error), encoding="utf-8")
                raise
            return Found(module, str(target), targets, seconds)
    except OSError as error:
        raise Unavailable(
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
    what, takes = "", "a minute or two"
    if part is not None:
        what = f" and its CUDA part with nvcc {part.version} for {part.targets} ({part.chosen_by})"
        takes = "some minutes (WD_FUSED_CUDA=0 leaves the CUDA part out)"
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
        raise Unavailable(f"torch.utils.cpp_extension does not import ({error}); install setuptools") from error
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
        raise Unavailable(f"the C++ extension was built but does not load ({error}); {_REMEDY}") from error
    except Exception as error:  # whatever it is, the training step goes on without the compiled part
        said = error.output.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        if part is None:
            failed = f"{compiler} could not build the C++ extension; {_REMEDY}"
        else:
            failed = f"nvcc {part.version} ({part.nvcc}) with {compiler} failed; {_CUDA_REMEDY}"
        raise Unavailable(f"{failed}. It said:\n{_last_lines(said)}") from error
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
