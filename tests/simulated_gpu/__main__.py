"""Runs a script, a module or pytest on the simulated GPU:

    python -m tests.simulated_gpu script.py arguments...
    python -m tests.simulated_gpu -m pytest tests/gpu -n 2

Builds what has changed of it, and starts Python anew with its libraries in the place of CUDA's. Where it
cannot be built, pytest runs all the same, and skips with the reason; anything else is an error.
"""

from __future__ import annotations

import os
import sys

from . import build, control


def main(arguments: list[str]) -> None:
    if not arguments or arguments == ["-m"]:
        sys.exit(__doc__)
    tests = arguments[:2] == ["-m", "pytest"]
    try:
        environment = build.environment()
    except build.Unavailable as reason:
        if not tests:
            sys.exit(f"the simulated GPU cannot be built: {reason}")
        environment = {control.WHY_NOT: str(reason)}
    if tests:
        command = ["-m", "pytest", "-p", "tests.simulated_gpu.plugin", *arguments[2:]]
    else:
        command = ["-m", "tests.simulated_gpu.inside", *arguments]
    os.execve(sys.executable, [sys.executable, *command], os.environ | environment)


if __name__ == "__main__":
    main(sys.argv[1:])
