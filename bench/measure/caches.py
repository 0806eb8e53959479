"""Fills the CPU's caches with something else, as forward and backward pass do between two steps. For measured.py."""

from __future__ import annotations

from pathlib import Path

import torch

CPUS = Path("/sys/devices/system/cpu")
# Where the kernel does not tell.
ASSUMED_BYTES = 64 << 20


def last_level_bytes(cpus: Path = CPUS) -> int:
    """Size of all last-level caches together."""
    sizes: dict[tuple[int, str], int] = {}
    for index in cpus.glob("cpu[0-9]*/cache/index*"):
        try:
            level, size, shared = (
                (index / name).read_text(encoding="ascii").strip() for name in ("level", "size", "shared_cpu_list")
            )
            sizes[int(level), shared] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or ASSUMED_BYTES


class Sweep:
    """Reads twice as much as the last-level caches hold, by all of torch's threads. What it leaves in the caches is
    clean: nothing has to be written back later."""

    def __init__(self) -> None:
        self._ones = torch.ones(2 * last_level_bytes() // 4)
        self._sum = torch.empty(())

    def __call__(self) -> None:
        torch.sum(self._ones, 0, out=self._sum)
