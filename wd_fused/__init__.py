"""SGD with weight decay in one fused pass, with the bits of torch.optim.SGD."""

from wd_fused import functional, operators
from wd_fused.in_backward import step_in_backward
from wd_fused.param_groups import weight_decay_param_groups
from wd_fused.sgd import FusedSGD
from wd_fused.weight_decay_scheduler import WeightDecayScheduler

__version__ = "0.1.0"
__all__ = [
    "FusedSGD",
    "WeightDecayScheduler",
    "__version__",
    "functional",
    "step_in_backward",
    "weight_decay_param_groups",
]

operators.load_when_asked_for()
