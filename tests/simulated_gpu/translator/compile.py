"""A kernel's library: its C++ compiled, once for kernels that differ only in their names and their parameters' size."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from .ptx import find, parse
from .writer import Writer

FLAGS = (
    *("-std=c++17", "-O1", "-mfma", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno"),
    *("-fwrapv", "-fPIC", "-shared", "-w"),
)
RUNTIME = Path(__file__).parent.parent / "runtime"
HEADERS = ("thread.h", "halves.h", "arithmetic.h")


def fingerprint() -> str:
    """Changes with whatever a kernel's library depends on beside its PTX."""
    digest = hashlib.sha256(repr((FLAGS, _counts())).encode())
    for path in [*sorted(Path(__file__).parent.glob("*.py")), *(RUNTIME / name for name in HEADERS)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _counts() -> bool:
    return os.environ.get("SIMULATED_GPU_COUNT") == "1"


def body_key(text: str, name: str) -> str:
    """The same for kernels of a template that differ in the size of their parameters alone."""
    source = find(text, name)
    mangled = name.removeprefix("_Z")
    body = source.body.replace(mangled, "KERNEL")
    body = re.sub(r"\$L__BB\d+_", "$L__BB_", body)
    declared = [repr(variable).replace(mangled, "KERNEL") for variable in source.module if variable.name in source.body]
    layout = re.sub(r"\[\d+\]", "[]", source.header.replace(mangled, "KERNEL"))
    whole = "\n".join((fingerprint(), re.sub(r"[ \t]+", " ", body), *declared, layout))
    return hashlib.sha256(whole.encode()).hexdigest()[:24]


def translate(ptx: str, name: str, out: str) -> None:
    """Writes the library ``out``, and beside it OUT.facts: what differs between kernels that share one."""
    text = Path(ptx).read_text(encoding="utf-8")
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    library = target.parent / f"body-{body_key(text, name)}.so"
    kernel = parse(text, name)
    writer = Writer(kernel)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(writer.write(), library)
    facts = {"parameter_bytes": writer.layout.parameter_bytes, "max_threads": kernel.max_threads}
    _replace(target.with_suffix(".facts"), "".join(f"{key} {value}\n" for key, value in facts.items()))
    temporary = target.with_suffix(f".{os.getpid()}")
    os.link(library, temporary)
    temporary.replace(target)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _compile(code: str, library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    source = library.with_suffix(".cpp")
    source.write_text(code, encoding="utf-8")
    temporary = library.with_suffix(f".{os.getpid()}")
    command = [
        compiler,
        *FLAGS,
        *(["-DCOUNTING"] if _counts() else []),
        f"-I{RUNTIME}",
        str(source),
        "-o",
        str(temporary),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    temporary.replace(library)
