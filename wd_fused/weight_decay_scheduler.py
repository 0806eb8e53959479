"""A schedule of weight decay: any of torch.optim.lr_scheduler, which is given weight_decay for the learning rate.

Called by training scripts, for FusedSGD or any other optimizer whose groups have ``weight_decay``.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler

from wd_fused.options.hyperparameters import number_fault, spelled


class WeightDecayScheduler:
    """Schedules ``weight_decay`` by any scheduler of torch.optim.lr_scheduler, whose formulas these are.

    Examples:
        >>> from torch.optim.lr_scheduler import LinearLR
        >>> optimizer = FusedSGD(torch.nn.Linear(4, 2).parameters(), lr=0.1, weight_decay=0.5)
        >>> scheduler = WeightDecayScheduler(optimizer, lambda o: LinearLR(o, 1.0, end_factor=0.0, total_iters=2))
        >>> for epoch in range(3):
        ...     print(optimizer.param_groups[0]["weight_decay"])
        ...     optimizer.step()
        ...     scheduler.step()
        0.5
        0.25
        0.0

    A group whose weight decay is 0 at construction is left alone. ``decoupled_weight_decay=True`` of FusedSGD follows,
    a number there does not. A Tensor is filled in place, and a CUDA graph that has captured the step follows.

    Args:
        optimizer: any whose groups have ``weight_decay``: numbers, or floating-point Tensors of one element.
        make: is given an optimizer with as many groups, their ``lr`` the weight decay, and returns a scheduler of it:
            ``functools.partial(CosineAnnealingLR, T_max=90, eta_min=1e-4)``. That is ``scheduler.scheduler`` then. To
            resume, give it no ``last_epoch`` but call load_state_dict().

    Raises:
        TypeError: not an optimizer.
        ValueError: a group without weight_decay; a scheduler of another optimizer; as step(). Nothing is written then.
    """

    def __init__(self, optimizer: Optimizer, make: Callable[[Optimizer], LRScheduler]) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        self.optimizer = optimizer
        self._last = [math.nan] * len(optimizer.param_groups)
        self._filled: dict[int, tuple[Tensor, int]] = {}  # the Tensors by id(), as they were after the last step
        present = self._present()
        self._stand_in = SGD(
            {"params": torch.zeros(0, device="cpu"), "lr": value, "scheduled": value != 0} for value in present
        )
        self.scheduler = make(self._stand_in)
        if getattr(self.scheduler, "optimizer", None) is not self._stand_in:
            raise ValueError("make must return a scheduler of the optimizer it is given: lambda o: LinearLR(o)")
        self._quieten()
        self._write(present)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Sets ``weight_decay`` for the next epoch, or step. Takes what torch's takes, as ReduceLROnPlateau a metric.

        It goes on from what the groups have, whoever has set that, as torch's schedulers do with ``lr``.

        Raises:
            ValueError: a weight decay that would be negative, infinite or NaN; groups that share a Tensor and need
                different ones; groups added or removed. None has changed then; torch's scheduler may have counted.
        """
        present = self._present()
        for group, value in zip(self._stand_in.param_groups, present, strict=True):
            group["lr"] = value
        self.scheduler.step(*args, **kwargs)
        self._write(present)

    def get_last_weight_decay(self) -> list[float]:
        """The weight decay of each group, as the last step has set it."""
        return list(self._last)

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer, whose own state_dict a checkpoint needs, too."""
        return {
            "schedule": _kind(self.scheduler),
            "last_weight_decay": list(self._last),
            "stand_in": self._stand_in.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what state_dict() gave. The groups stay as they are: load the optimizer's state_dict, before or after.

        Raises:
            ValueError: it is another schedule's, or has more or fewer groups. Nothing has changed then.
        """
        saved = state_dict.get("schedule"), len(state_dict.get("last_weight_decay", ()))
        own = _kind(self.scheduler), len(self._last)
        if saved != own:
            raise ValueError(f"the state is of {saved[0]} over {saved[1]} groups, the schedule {own[0]} over {own[1]}")
        state = copy.deepcopy(dict(state_dict))  # torch's schedulers take things out of it
        self._stand_in.load_state_dict(state["stand_in"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._last, self._filled = state["last_weight_decay"], {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_filled": {}})
        self._quieten()

    def _quieten(self) -> None:
        """Has the stand-in step once: torch's scheduler warns, at its first step, where its optimizer has not."""
        ConstantLR(self._stand_in, factor=1.0)  # has steps noticed, which a copy has forgotten
        self._stand_in.step()

    def _present(self) -> list[float]:
        """What the groups have; of a Tensor that we have filled what it was rounded from. A GPU is not waited for: what
        ``.data`` has changed there is not seen."""
        groups, present = self.optimizer.param_groups, []
        if len(groups) != len(self._last):
            raise ValueError(
                f"the optimizer has {len(groups)} groups, its schedule {len(self._last)}: make a new "
                "WeightDecayScheduler after add_param_group()"
            )
        for g, (group, last) in enumerate(zip(groups, self._last, strict=True)):
            value: Any = group.get("weight_decay")
            fault = number_fault(value)
            if isinstance(value, Tensor) and (not value.is_floating_point() or value.is_inference()):
                fault = "use a floating-point Tensor, made outside of torch.inference_mode()"
            if fault is not None:
                raise ValueError(f"group {g}: weight_decay={spelled(value)} cannot be scheduled: {fault}")
            if isinstance(value, Tensor):
                filled = not value.is_cpu and self._filled.get(id(value), (value, -1))[1] == value._version
                rounded = torch.tensor(last, dtype=value.dtype, device="cpu")  # as it was when the state was saved
                value = last if filled or rounded.item() == value.item() else value.item()
            present.append(float(value))
        return present

    def _write(self, present: list[float]) -> None:
        """The stand-in's values, checked, into the groups that are scheduled."""
        groups, made = self.optimizer.param_groups, self._stand_in.param_groups
        scheduled = [g for g, group in enumerate(made) if group["scheduled"]]
        values, of_tensors = list(present), dict[int, float]()
        for g in scheduled:
            value, there = made[g]["lr"], groups[g]["weight_decay"]
            fault = number_fault(value)
            if fault is None:
                # LinearLR misses an end of 0 by a rounding.
                values[g] = value = 0.0 if -1e-9 * present[g] < value < 0 else float(value)
                most = torch.finfo(there.dtype if isinstance(there, Tensor) else torch.float64).max
                if not 0 <= value <= most:
                    fault = f"it must be 0 or more, and at most {most:g}"
                elif isinstance(there, Tensor) and (other := of_tensors.setdefault(id(there), value)) != value:
                    fault = f"a group with the same Tensor needs {other}: give each a Tensor of its own"
            if fault is not None:
                raise ValueError(f"group {g}: weight_decay would be {spelled(value)}: {fault}")
        for g in scheduled:
            if isinstance(groups[g]["weight_decay"], Tensor):
                groups[g]["weight_decay"].detach().fill_(values[g])
            else:
                groups[g]["weight_decay"] = values[g]
        tensors = [value for group in groups if isinstance(value := group["weight_decay"], Tensor)]
        self._last, self._filled = values, {id(tensor): (tensor, tensor._version) for tensor in tensors}


def _kind(scheduler: Any) -> str:
    """LinearLR, or SequentialLR(LinearLR, CosineAnnealingLR)."""
    name, parts = type(scheduler).__name__, getattr(scheduler, "_schedulers", ())
    return f"{name}({', '.join(map(_kind, parts))})" if parts else name
