"""PTX to C++ to a library: `python -m tests.simulated_gpu.translator PTX KERNEL OUT.so`. See ../README.md."""

from .compile import fingerprint, translate

__all__ = ["fingerprint", "translate"]
