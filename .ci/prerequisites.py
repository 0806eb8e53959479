"""What `make` needs of a machine, looked for before it fetches gigabytes: `python3 .ci/prerequisites.py .venv`.

Exits with 1 and names all that is missing. Standard library only, and Python 3.6 can run it, to be told that it is old.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = 6  # GB of disk


def missing(venv):
    """What is not here, each with the package of Debian that brings it, or None."""
    python = "python{}.{}".format(*sys.version_info)
    if sys.version_info < (3, 10):  # noqa: UP036
        yield f"Python 3.10 or later: {sys.executable} is {python}; `PYTHON=python3.12 make ...` takes another", None
        return
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        yield f"no virtual environments: {sys.executable} lacks its modules venv and ensurepip", f"{python}-venv"
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "wd_fused" / "build" / "toolchain.py")
    toolchain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toolchain)
    compiler = None if os.environ.get("CXX") else "g++"
    for require, package in ((toolchain.cxx_compiler, compiler), (toolchain.require_python_headers, f"{python}-dev")):
        try:
            require()
        except toolchain.MissingTool as error:
            yield str(error), package
    existing = next(folder for folder in [Path(venv).absolute(), *Path(venv).absolute().parents] if folder.is_dir())
    gigabytes = shutil.disk_usage(existing).free / 1e9
    if gigabytes < NEEDED and str(existing) != os.path.abspath(venv):  # what exists may hold all of it already
        yield f"no {NEEDED} GB of disk for {venv}, but {gigabytes:.1f}; `VENV=folder make ...` puts it elsewhere", None


def main(venv):
    found = list(missing(venv))
    if not found:
        return 0
    print("make needs what this machine lacks; nothing was fetched yet:", file=sys.stderr)
    for what, _ in found:
        print(f"  {what}", file=sys.stderr)
    packages = [package for _, package in found if package is not None]
    if packages:
        print(f"Debian, Ubuntu: apt-get install {' '.join(packages)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
