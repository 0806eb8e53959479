"""Pins all that the Makefile installs: `make constraints` writes constraints.txt from what is installed in .venv.

With --check it writes nothing, and exits with 1 if a version that is installed is not the one pinned; on another Python
or platform than the file was made on, where other packages may be needed, it checks nothing.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

FILE = Path(__file__).resolve().parent.parent / "constraints.txt"
HERE = f"Python {sys.version_info.major}.{sys.version_info.minor} on {platform.system()} {platform.machine()}"
HEADER = f"""\
# Made by `make constraints` from what is installed in .venv, for {HERE}: the versions that CI runs.
# Every pip install of the Makefile takes it with -c. torch is the CUDA build from PyPI.
"""
OLDEST_PYTHON = "3.10.0"


def installed() -> Iterator[Distribution]:
    """What wd_fused needs, with all of its extras, and what builds it, as far as it is here."""
    extras = ",".join(distribution("wd_fused").metadata.get_all("Provides-Extra", []))
    todo = [Requirement(f"wd_fused[{extras}]"), Requirement("setuptools")]
    seen = set()
    while todo:
        requirement = todo.pop()
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:  # of an extra that is not installed
            continue
        name = canonicalize_name(requirement.name)
        if name != "wd-fused" and name not in {one for one, _ in seen}:
            yield found
        for extra in requirement.extras | {""}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                needs = map(Requirement, found.requires or [])
                todo += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]


def pin(found: Distribution) -> str:
    """Such as "numpy==2.4.6"; a release that cannot be had for the oldest Python says for which it can."""
    line = f"{canonicalize_name(found.name)}=={found.version}"
    pythons = SpecifierSet(found.metadata.get("Requires-Python", ""))
    if OLDEST_PYTHON in pythons:
        return line
    return f"{line}; " + " and ".join(sorted(f'python_full_version {one.operator} "{one.version}"' for one in pythons))


def main(*arguments: str) -> int:
    pins = sorted(map(pin, installed()))
    if "--check" not in arguments:
        FILE.write_text(HEADER + "".join(f"{line}\n" for line in pins), encoding="utf-8")
        return 0
    pinned = FILE.read_text(encoding="utf-8").splitlines()
    if HEADER.splitlines()[0] not in pinned:
        print(f"{FILE.name} was not made for {HERE}: not checked")
        return 0
    loose = [line for line in pins if line not in pinned]
    if loose:
        print(f"not pinned in {FILE.name} as it is installed (`make constraints` pins it):", *loose, sep="\n  ")
    return 1 if loose else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
