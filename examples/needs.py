"""What an example needs, said in one line where it is missing. Used by each of them around its imports."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def extra(name: str, example: str, instead: str = "") -> Iterator[None]:
    """Ends the program with exit status 1 and the remedy where an import inside finds nothing.

    Args:
        name: the extra of pyproject.toml that has it; "" for none.
        example: the example's ``__file__``.
        instead: what else helps, before "or pip install".
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        package = str(missing.name).partition(".")[0]
        install = f"pip install '.[{name}]'" if name else "pip install ."
        sys.exit(f"{Path(example).name} needs {package}: {instead}{install} in the repository")


def torchrun(example: str) -> None:
    """Ends the program with exit status 1 and the remedy where no launcher has told it about the other processes."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        name = Path(example).name
        sys.exit(f"{name} runs in several processes: torchrun --nproc_per_node=2 examples/{name}")
