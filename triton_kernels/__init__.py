"""The Triton twin of csrc/cuda: the same step with the same bits, and no compiler for CUDA. Installed as
wd_fused.triton_kernels. wd_fused/backends imports it, and Triton with it, once the "triton" backend is asked for.
"""

from .device_step import DeviceStep
from .launcher import why_not_on

__all__ = ["DeviceStep", "why_not_on"]
