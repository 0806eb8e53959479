"""Finds the programs that a build needs, and says in one sentence what is missing and how to get it.

Called by wd_fused/extension.py, by the environment report, and by setup.py, which loads this file by its path before
wd_fused can be imported: standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


class MissingTool(Exception):
    """Something that a build needs is not on this machine. The message says what, and what to do."""


def output_of(*command: str) -> str | None:
    """What a program prints, standard error included; None if it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def cxx_compiler() -> str:
    """Path of the C++ compiler: ``$CXX`` where it is set, else the first of c++, g++ and clang++ on PATH."""
    named = os.environ.get("CXX", "").strip()
    if named:
        path = shutil.which(named)
        if path is None:
            # torch's build helper passes CXX on as one word, so "ccache g++" cannot work either.
            raise MissingTool(
                f"no C++ compiler: CXX is {named!r}, which is not a program here; "
                "set CXX to the path of one program, without arguments, or unset it"
            )
        return path
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return path
    raise MissingTool(
        "no C++ compiler: neither c++, g++ nor clang++ is on PATH; install one (Debian, Ubuntu: apt-get install g++; "
        "Fedora: dnf install gcc-c++; conda: conda install gxx) or set CXX to its path"
    )


def ninja() -> str:
    """Path of ninja: on PATH, else where pip puts it, since a virtual environment need not be activated to be used."""
    folders = [sysconfig.get_path("scripts"), sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))]
    path = shutil.which("ninja") or shutil.which("ninja", path=os.pathsep.join(folders))
    if path is None:
        raise MissingTool(f"no ninja, which torch builds C++ extensions with: {sys.executable} -m pip install ninja")
    return path


def require_python_headers() -> None:
    """Python.h, which a Linux distribution packages apart from the interpreter."""
    folder = sysconfig.get_path("include", "nt" if sys.platform == "win32" else "posix_prefix")
    if not os.path.isfile(os.path.join(folder, "Python.h")):
        raise MissingTool(
            f"no Python headers: {folder} holds no Python.h; install them "
            "(Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel)"
        )


def nvcc() -> str | None:
    """Path of nvcc as the user would start it, or None."""
    return shutil.which("nvcc")


def cuda_home() -> tuple[str | None, str]:
    """The CUDA toolkit's folder, or None, and how it was found, or what was tried.

    torch takes the folder above nvcc's, which is wrong where nvcc on PATH is a script that calls the real one. Here a
    folder is believed only if it holds ``include/cuda_runtime.h``, and nvcc itself is asked where it is.
    """
    candidates = [(variable, os.environ.get(variable)) for variable in ("CUDA_HOME", "CUDA_PATH")]
    path = nvcc()
    if path is not None:
        said = re.search(r"^#\$ TOP=(.+)$", output_of(path, "--dryrun", "-x", "cu", os.devnull) or "", re.MULTILINE)
        candidates.append(("nvcc --dryrun", said.group(1).strip() if said else None))
        candidates.append(("nvcc on PATH", str(Path(path).resolve().parent.parent)))
    candidates.append(("the usual place", "/usr/local/cuda"))
    tried = []
    for how, folder in candidates:
        if not folder:
            continue
        folder = os.path.realpath(folder)
        if os.path.isfile(os.path.join(folder, "include", "cuda_runtime.h")):
            return folder, how
        tried.append(f"{folder} ({how})")
    return None, "no include/cuda_runtime.h in " + ", ".join(tried)
