"""The process that __main__.py starts: runs a script or a module as Python does, with torch's operators in place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from . import control
from .start import start


def main(arguments: list[str]) -> None:
    start()
    named = arguments[0] == "-m"
    sys.argv = arguments[1:] if named else arguments
    try:
        if named:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        control.finish()
        if faults := control.take_faults():
            sys.exit(f"the simulated GPU has found:\n{faults}")


if __name__ == "__main__":
    main(sys.argv[1:])
