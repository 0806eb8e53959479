"""The Triton twin of csrc/: the same step with the same bits, and no compiler for CUDA. Installed as
wd_fused.triton_kernels. wd_fused/backends.py imports it, and Triton with it, once the "triton" backend is asked for.
"""

from .device_step import DeviceStep
from .launcher import INTERPRETED
from .plan import StepPlan, why_not_planned
from .tail_plan import TailPlan

__all__ = ["INTERPRETED", "DeviceStep", "StepPlan", "TailPlan", "why_not_planned"]
