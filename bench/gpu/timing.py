"""How long something takes on a GPU, told apart from how long the host takes to ask for it. Used by the GPU's stages.

Device time is taken between two CUDA events while the host is ahead: the GPU spins first, until all the work is queued.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.gpu.cases import DEVICE

# A GPU takes about this many launches before the host has to wait for it; more cannot be queued behind a spin.
QUEUE = 800
# In the name of the kernel that sweeps the L2, and of none that an optimizer launches.
SWEEP = "reduce_kernel"


class Timer:
    """Times actions on the current device and stream."""

    def __init__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._cycles_per_second = 1e9
        self._cycles_per_second = self._spin_rate()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 << 20
        self._sweep = torch.ones(2 * self.l2_bytes // 4, device=DEVICE)
        self._sum = torch.empty((), device=DEVICE)

    def _spin_rate(self) -> float:
        cycles = 20_000_000
        self._between(lambda: torch.cuda._sleep(cycles))  # wakes the GPU
        return cycles / self._between(lambda: torch.cuda._sleep(cycles))

    def _between(self, action: Callable[[], object]) -> float:
        self._begin.record()
        action()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3

    def spin(self, seconds: float) -> None:
        """Keeps the GPU busy for about as long, so that the host can get ahead."""
        torch.cuda._sleep(int(seconds * self._cycles_per_second))

    def sweep_l2(self) -> None:
        """Has the L2 hold something else than what is to be measured; clean, so that nothing need be written back."""
        torch.sum(self._sweep, 0, out=self._sum)

    def host_and_whole(self, action: Callable[[], object]) -> tuple[float, float]:
        """Seconds until `action` returns, and until the GPU is done with it. The GPU is idle before."""
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        action()
        returned = time.perf_counter_ns()
        torch.cuda.synchronize()
        return (returned - begin) * 1e-9, (time.perf_counter_ns() - begin) * 1e-9

    def device(self, action: Callable[[], object], host_seconds: float, count: int = 1, cold: bool = False) -> float:
        """Seconds that the GPU takes for `action`, one of `count` in a row; the host needs `host_seconds` for each."""
        if cold:
            self.sweep_l2()
        self.spin(min(1.5 * count * host_seconds + 3e-5, 0.1))

        def repeated() -> None:
            for _ in range(count):
                action()

        return self._between(repeated) / count
