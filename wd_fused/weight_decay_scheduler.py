"""Schedules of weight decay, as torch.optim.lr_scheduler has them of the learning rate.

Called by training scripts, for FusedSGD or any other optimizer whose groups have ``weight_decay``.
"""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from wd_fused.options.hyperparameters import number_fault, spelled

Function = Callable[[int], float]


class WeightDecayScheduler:
    """weight_decay = initial_weight_decay · factor, at construction and after each step(): the base of the others.

    A subclass has factor(), which a number of steps is given.
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        _check_epoch(last_epoch, -1)
        for g, group in enumerate(optimizer.param_groups):
            if last_epoch >= 0 and "initial_weight_decay" not in group:
                raise ValueError(
                    f"last_epoch={last_epoch} goes on with a schedule, and group {g} has no initial_weight_decay: load "
                    "the optimizer's state_dict first, or leave last_epoch out"
                )
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        self.step()

    def factor(self, epoch: int) -> float:
        """What each group's initial weight decay is multiplied by after ``epoch`` steps, which is 0 or more."""
        raise NotImplementedError

    def _factors(self, epoch: int) -> list[float]:
        """The same, a group."""
        return [self.factor(epoch)] * len(self.optimizer.param_groups)

    def step(self) -> None:
        """Sets the groups' ``weight_decay`` for the next epoch, or step: call it when you call the lr scheduler's.

        A Tensor is filled in place, so that a CUDA graph that has captured the optimizer's step follows the schedule;
        a decoupled weight decay of FusedSGD cannot be captured as a Tensor.

        Raises:
            ValueError: a group without weight_decay, or one whose would be negative, infinite or NaN. Nothing has
                changed then.

        Examples:
            >>> optimizer = torch.optim.SGD(torch.nn.Linear(4, 2).parameters(), weight_decay=0.5)
            >>> scheduler = LambdaWeightDecay(optimizer, lambda epoch: 1 + epoch)
            >>> scheduler.step()
            >>> optimizer.param_groups[0]["weight_decay"]
            1.0
        """
        groups, epoch = self.optimizer.param_groups, self.last_epoch + 1
        initial = [_initial(g, group) for g, group in enumerate(groups)]
        values = [
            _product(g, *numbers, epoch) for g, numbers in enumerate(zip(initial, self._factors(epoch), strict=True))
        ]
        tensors: dict[int, float] = {}
        for g, (group, value) in enumerate(zip(groups, values, strict=True)):
            there = group["weight_decay"]
            if isinstance(there, Tensor) and tensors.setdefault(id(there), value) != value:
                raise ValueError(
                    f"group {g} has its weight_decay in the same Tensor as another group, which needs "
                    f"{tensors[id(there)]} where this one needs {value}: give each a Tensor of its own"
                )
        for group, start, value in zip(groups, initial, values, strict=True):
            group["initial_weight_decay"] = start
            if isinstance(group["weight_decay"], Tensor):
                group["weight_decay"].detach().fill_(value)
            else:
                group["weight_decay"] = value
        self.last_epoch = epoch
        self._last_weight_decay = values

    def get_last_weight_decay(self) -> list[float]:
        """The weight decay of each group, as the last step has set it.

        Examples:
            >>> optimizer = torch.optim.SGD(torch.nn.Linear(4, 2).parameters(), weight_decay=0.5)
            >>> ConstantWeightDecay(optimizer, factor=0.5, total_iters=10).get_last_weight_decay()
            [0.25]
        """
        return list(self._last_weight_decay)

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer, in whose state_dict the groups' ``initial_weight_decay`` is.

        Examples:
            >>> optimizer = torch.optim.SGD(torch.nn.Linear(4, 2).parameters(), weight_decay=0.5)
            >>> LinearWeightDecay(optimizer, 1.0, 0.0, total_iters=10).state_dict()["last_epoch"]
            0
        """
        return {name: value for name, value in self.__dict__.items() if name != "optimizer"}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what state_dict() gave. As torch's: the groups stay as they are; load the optimizer's state_dict, too.

        Raises:
            ValueError: it was not saved by a schedule of this kind. Nothing has changed then.

        Examples:
            >>> optimizer = torch.optim.SGD(torch.nn.Linear(4, 2).parameters(), weight_decay=0.5)
            >>> scheduler = LinearWeightDecay(optimizer, 1.0, 0.0, total_iters=10)
            >>> scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": 4})
            >>> scheduler.step()
            >>> scheduler.get_last_weight_decay()
            [0.25]
        """
        own = self.state_dict()
        if state_dict.keys() != own.keys():
            raise ValueError(
                f"the saved state has {', '.join(map(str, state_dict))}, and {type(self).__name__} needs "
                f"{', '.join(own)}: was it saved by another scheduler?"
            )
        _check_epoch(state_dict["last_epoch"], 0)
        self._load(dict(state_dict))

    def _load(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class LambdaWeightDecay(WeightDecayScheduler):
    """Any schedule: weight_decay = initial_weight_decay · f(epoch), as LambdaLR of torch.optim.lr_scheduler.

    epoch is the number of step() calls: 0 at construction. The initial value is ``group["initial_weight_decay"]``, a
    float: the group's weight decay as the first step finds it, so that a group that is added later follows as well.
    Groups without decay (0) stay so. ``decoupled_weight_decay=True`` of FusedSGD decouples ``weight_decay``, which is
    scheduled; a number given there is not touched.

    Examples:
        >>> optimizer = FusedSGD(torch.nn.Linear(4, 2).parameters(), lr=0.1, weight_decay=0.5)
        >>> scheduler = LambdaWeightDecay(optimizer, lambda epoch: 0.5**epoch)
        >>> for _ in range(2):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["weight_decay"]
        0.125

    Args:
        optimizer: any of torch.optim, or derived from such a one, whose groups have ``weight_decay``: numbers or
            Tensors of one element, which are filled in place.
        weight_decay_lambda: a function that is given the epoch, an int, and gives a factor; or a list of them, one for
            each group.
        last_epoch: that of the schedule to go on with, whose ``initial_weight_decay`` the groups have; -1 begins one.
            Default: -1.

    Raises:
        TypeError: not an optimizer.
        ValueError: a group without weight_decay, not a function for each group, or a weight decay that would be
            negative, infinite or NaN. Nothing has been written then.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weight_decay_lambda: Function | Sequence[Function],
        last_epoch: int = -1,
    ) -> None:
        self._lambdas = weight_decay_lambda if callable(weight_decay_lambda) else list(weight_decay_lambda)
        super().__init__(optimizer, last_epoch)

    def _factors(self, epoch: int) -> list[float]:
        groups = len(self.optimizer.param_groups)
        if callable(self._lambdas):
            return [self._lambdas(epoch)] * groups
        if len(self._lambdas) != groups:
            raise ValueError(
                f"{len(self._lambdas)} functions for {groups} parameter groups: give one for each, or one for all"
            )
        return [function(epoch) for function in self._lambdas]

    def _functions(self) -> list[Function]:
        return [self._lambdas] if callable(self._lambdas) else self._lambdas

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the functions. Of one that is an object of a class, its attributes, as LambdaLR.

        Examples:
            >>> optimizer = torch.optim.SGD(torch.nn.Linear(4, 2).parameters(), weight_decay=0.5)
            >>> LambdaWeightDecay(optimizer, lambda epoch: 0.5**epoch).state_dict()["weight_decay_lambdas"]
            [None]
        """
        state = super().state_dict()
        del state["_lambdas"]
        state["weight_decay_lambdas"] = [
            None if isinstance(each, types.FunctionType) else dict(getattr(each, "__dict__", {}))
            for each in self._functions()
        ]
        return state

    def _load(self, state: dict[str, Any]) -> None:
        saved, functions = state.pop("weight_decay_lambdas"), self._functions()
        if len(saved) != len(functions):
            raise ValueError(f"the saved state has {len(saved)} functions, this schedule {len(functions)}")
        for function, attributes in zip(functions, saved, strict=True):
            if attributes:
                function.__dict__.update(attributes)
        super()._load(state)


class ConstantWeightDecay(WeightDecayScheduler):
    """Another weight decay at first: initial_weight_decay · factor for ``total_iters`` epochs, then the initial one.

    As ConstantLR of torch.optim.lr_scheduler; epochs, groups, Tensors and errors as in LambdaWeightDecay.

    Examples:
        >>> optimizer = FusedSGD(torch.nn.Linear(4, 2).parameters(), lr=0.1, weight_decay=0.5)
        >>> scheduler = ConstantWeightDecay(optimizer, factor=0.0, total_iters=2)  # none for two epochs
        >>> for epoch in range(3):
        ...     print(optimizer.param_groups[0]["weight_decay"])
        ...     optimizer.step()
        ...     scheduler.step()
        0.0
        0.0
        0.5

    Args:
        optimizer: as in LambdaWeightDecay.
        factor: what the initial weight decay is multiplied by; 0 or more.
        total_iters: for how many epochs, or steps; 1 or more.
        last_epoch: as in LambdaWeightDecay. Default: -1.

    Raises:
        TypeError, ValueError: as LambdaWeightDecay; a factor or a number of epochs that is out of range.
    """

    def __init__(self, optimizer: Optimizer, factor: float, total_iters: int, last_epoch: int = -1) -> None:
        self._factor = _checked_factor("factor", factor)
        self.total_iters = _checked_iters(total_iters)
        super().__init__(optimizer, last_epoch)

    def factor(self, epoch: int) -> float:
        return self._factor if epoch < self.total_iters else 1.0


class _Ramp(WeightDecayScheduler):
    """From one factor to another."""

    def __init__(
        self, optimizer: Optimizer, start_factor: float, end_factor: float, total_iters: int, last_epoch: int = -1
    ) -> None:
        self.start_factor = _checked_factor("start_factor", start_factor)
        self.end_factor = _checked_factor("end_factor", end_factor)
        self.total_iters = _checked_iters(total_iters)
        super().__init__(optimizer, last_epoch)


class LinearWeightDecay(_Ramp):
    """A straight line: initial_weight_decay · (start + (end − start) · min(epoch / total_iters, 1)).

    As LinearLR of torch.optim.lr_scheduler; epochs, groups, Tensors and errors as in LambdaWeightDecay.

    Examples:
        >>> optimizer = FusedSGD(torch.nn.Linear(4, 2).parameters(), lr=0.1, weight_decay=0.5)
        >>> scheduler = LinearWeightDecay(optimizer, start_factor=1.0, end_factor=0.0, total_iters=2)
        >>> for epoch in range(3):
        ...     print(optimizer.param_groups[0]["weight_decay"])
        ...     optimizer.step()
        ...     scheduler.step()
        0.5
        0.25
        0.0

    Args:
        optimizer: as in LambdaWeightDecay.
        start_factor: start, what the initial weight decay is multiplied by in epoch 0; 0 or more, and 1 for itself.
        end_factor: end, the same from epoch ``total_iters`` on.
        total_iters: how many epochs, or steps, it takes; 1 or more.
        last_epoch: as in LambdaWeightDecay. Default: -1.

    Raises:
        TypeError, ValueError: as LambdaWeightDecay; a factor or a number of epochs that is out of range.
    """

    def factor(self, epoch: int) -> float:
        if epoch >= self.total_iters:
            return self.end_factor
        return self.start_factor + (self.end_factor - self.start_factor) * epoch / self.total_iters


class CosineWeightDecay(_Ramp):
    """Half a cosine: initial_weight_decay · (end + (start − end) · (1 + cos(π · min(epoch / total_iters, 1))) / 2).

    The cosine of SGDR (Loshchilov and Hutter, arXiv:1608.03983, equation 5), as CosineAnnealingLR of
    torch.optim.lr_scheduler has it, but that it stays at its end. DINO (Caron et al., arXiv:2104.14294) lets weight
    decay grow so, from 0.04 to 0.4: weight_decay=0.04, start_factor=1, end_factor=10. Epochs, groups, Tensors and
    errors as in LambdaWeightDecay.

    Examples:
        >>> optimizer = FusedSGD(torch.nn.Linear(4, 2).parameters(), lr=0.1, weight_decay=0.5)
        >>> scheduler = CosineWeightDecay(optimizer, start_factor=1.0, end_factor=2.0, total_iters=2)
        >>> for epoch in range(3):
        ...     print(round(optimizer.param_groups[0]["weight_decay"], 6))
        ...     optimizer.step()
        ...     scheduler.step()
        0.5
        0.75
        1.0

    Args:
        optimizer: as in LambdaWeightDecay.
        start_factor: start, what the initial weight decay is multiplied by in epoch 0; 0 or more, and 1 for itself.
        end_factor: end, the same from epoch ``total_iters`` on.
        total_iters: how many epochs, or steps, it takes; 1 or more.
        last_epoch: as in LambdaWeightDecay. Default: -1.

    Raises:
        TypeError, ValueError: as LambdaWeightDecay; a factor or a number of epochs that is out of range.
    """

    def factor(self, epoch: int) -> float:
        if epoch >= self.total_iters:
            return self.end_factor
        cosine = math.cos(math.pi * epoch / self.total_iters)
        return self.end_factor + (self.start_factor - self.end_factor) * (1 + cosine) / 2


def _check_epoch(epoch: Any, least: int) -> None:
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < least:
        raise ValueError(f"Invalid last_epoch={epoch!r}: use a whole number >= {least}")


def _checked_iters(total_iters: Any) -> int:
    if not isinstance(total_iters, int) or isinstance(total_iters, bool) or total_iters < 1:
        raise ValueError(f"Invalid total_iters={total_iters!r}: use a whole number of epochs or steps, 1 or more")
    return total_iters


def _checked_factor(name: str, factor: Any) -> float:
    if number_fault(factor) is None and 0 <= (number := float(factor)) < math.inf:
        return number
    raise ValueError(f"Invalid {name}={spelled(factor)}: use a number >= 0, 1 for the initial weight decay")


def _initial(g: int, group: Mapping[str, Any]) -> float:
    """A group's initial weight decay; its weight decay, where there is none yet."""
    if "weight_decay" not in group:
        raise ValueError(f"group {g} of the optimizer has no weight_decay that could be scheduled")
    for name in ("weight_decay", "initial_weight_decay"):
        if name in group and (fault := number_fault(group[name])) is not None:
            raise ValueError(f"group {g}: {name}={spelled(group[name])}: {fault}")
    return float(group.get("initial_weight_decay", group["weight_decay"]))


def _product(g: int, initial: float, factor: Any, epoch: int) -> float:
    fault = number_fault(factor)
    if fault is None and 0 <= (value := initial * float(factor)) < math.inf:
        return value
    raise ValueError(
        f"group {g}: the factor {spelled(factor)} of epoch {epoch} makes no weight_decay of {initial}: "
        f"{fault or 'the product must be 0 or more, and finite'}"
    )
