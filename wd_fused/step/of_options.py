"""What FusedSGD gives out of what its options keep: averages, exact weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wd_fused.options import kept
from wd_fused.options.averages import Exchange
from wd_fused.step import sharded, states
from wd_fused.step.base import Base
from wd_fused.step.checking import described
from wd_fused.step.claims import is_taken
from wd_fused.step.last_step import LastStep, last_step


class OfOptions(Base):
    @property
    def last_step(self) -> LastStep:
        """What happened in the last step: whether it was skipped, the norm, what clipped the gradients; with
        ``report_numerics`` what was lost to rounding, by group. Tensors are new, and on the parameters' device: asking
        does not wait for a GPU. A plain step in a graph of torch.compile leaves it as it was.

        Returns:
            A named tuple. ``skipped``: as ``last_step_skipped``, and False without a gradient scale. ``grad_norm``: as
            that, None where the step did not clip. ``clip_coefficients``: what gradients were multiplied with,
            [groups], or None. ``numerics``: of the last step that was looked at, or None: ``updates``, ``lost`` and
            ``int8_at_end``, int64 [groups], and ``largest_update``, float64 [groups], all of this process's part. An
            update is an element whose momentum (without momentum: whose gradient) is not 0; it is lost where the
            weight stays what it was in every digit that is kept. ``int8_at_end``: values -127 and 127 of int8
            momentum buffers, of which each block of 128 that is not 0 has one.

        Examples:
            >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
            >>> optimizer = FusedSGD([weight], lr=0.1, report_numerics=True)
            >>> weight.grad = torch.tensor([1.0, 0.001], dtype=torch.bfloat16)
            >>> optimizer.step()
            >>> numerics = optimizer.last_step.numerics  # 1 - 0.0001 is 1 in bfloat16
            >>> numerics.updates.item(), numerics.lost.item(), numerics.largest_update.item()
            (2, 1, 0.1015625)
        """
        return last_step(self)

    def ema_parameters(self) -> Iterator[Tensor]:
        """The average of each parameter, in the order of the groups; the parameter itself where none is kept.

        The state's own tensors, of the parameter's dtype, of half-precision ones float32 unless ``ema_dtype`` says
        otherwise.

        Raises:
            RuntimeError: no group has ``ema_decay``, or swap_ema() is active.

        Examples:
            >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> optimizer = FusedSGD([weight], lr=1.0, ema_decay=0.5)
            >>> for _ in range(2):
            ...     weight.grad = torch.ones(2)
            ...     optimizer.step()
            >>> list(optimizer.ema_parameters())  # of [0, 1] and [-1, 0]
            [tensor([-0.5000,  0.5000])]
        """
        self._refuse_while_swapped("ema_parameters()")
        return iter([param.detach() if average is None else average for param, average in self._averages()])

    def _averages(self) -> list[tuple[Tensor, Tensor | None]]:
        self._reader.refresh(self.param_groups)
        if self._reader.averaging is None:
            raise RuntimeError("no parameter group has ema_decay, so there are no averages; give ema_decay=0.999, say")
        states.make_beforehand(self)
        pairs: list[tuple[Tensor, Tensor | None]] = []
        for group, options in zip(self.param_groups, self._reader.options, strict=True):
            for param in group["params"]:
                if options is None or options.ema_decay is None:
                    pairs.append((param, None))
                    continue
                state = self.state.setdefault(param, {})
                kept.make_average(param, state, options)
                pairs.append((param, state["ema"]))
        return pairs

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Inside, the parameters (and ``ema_buffers``) hold their averages; afterwards what they held before.

        Their data is exchanged in place, one tensor after the other, so that the model, the gradients and the plan
        stay as they are. A float32 average of a half-precision parameter is rounded into it, which takes a copy of the
        parameter until the end; master weights are not touched. step() and state_dict() are refused inside.

        Examples:
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = FusedSGD(model.parameters(), lr=0.1, ema_decay=0.999)
            >>> with optimizer.swap_ema():
            ...     prediction = model(torch.ones(1, 4))  # of the average
        """
        self._refuse_while_swapped("swap_ema()")
        averages = {param: (param, average) for param, average in self._averages() if average is not None}
        pairs, buffers = list(averages.values()), self._averaged_buffers
        if buffers is not None:
            pairs += buffers.pairs(self.state, self.param_groups)
        exchange = Exchange(pairs, buffers)
        try:
            try:
                # First: a step that begins now sees that, or is seen.
                if self._swapped.setdefault("by", exchange) is not exchange:
                    self._refuse_while_swapped("swap_ema()")
                if is_taken(self._claims):
                    raise RuntimeError("swap_ema() of this optimizer while step() is running in another thread")
                exchange.enter()
                yield
            finally:
                self._swap_back(exchange)
        finally:  # where an interrupt has cut that short
            self._swap_back(exchange)

    def _swap_back(self, exchange: Exchange) -> None:
        if self._swapped.get("by") is exchange:
            failure = exchange.leave()
            self._swapped.clear()
            if failure is not None:
                raise failure

    def master_parameters(self) -> list[Tensor]:
        """A copy of each parameter's exact weight, in the order of the groups: float32, or wider where it is.

        With ``master_weights`` or ``rounding="kahan"`` that is more than the parameter shows.

        Examples:
            >>> model = torch.nn.Linear(4, 2).bfloat16()
            >>> optimizer = FusedSGD(model.parameters(), master_weights="split")
            >>> [weight.dtype for weight in optimizer.master_parameters()]
            [torch.float32, torch.float32]
        """
        self._refuse_while_swapped("master_parameters()")
        with torch.no_grad():
            return [
                kept.exact_weights(param, self.state.get(param))
                for group in self.param_groups
                for param in group["params"]
            ]

    @torch.no_grad()
    def load_master_parameters(self, weights: Iterable[Tensor]) -> None:
        """Sets each parameter's weight, in the order of the groups, and what the state keeps beside it.

        Args:
            weights: a tensor for each parameter, of its shape, of any floating-point dtype, such as those of
                ``master_parameters`` or of a float32 checkpoint. "split24" rounds them to 24 bits.

        Raises:
            ValueError: too many, too few, of another shape or placement; no such tensor, or one without memory. Nothing
                has been written then.

        Examples:
            >>> weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
            >>> optimizer = FusedSGD([weight], master_weights="split")
            >>> optimizer.load_master_parameters([torch.tensor([0.1])])
            >>> weight.item(), optimizer.master_parameters()[0]  # 8 significant bits, and all 24
            (0.10009765625, tensor([0.1000]))
        """
        self._refuse_while_swapped("load_master_parameters()")
        self._reader.refresh(self.param_groups)
        params = [
            (param, options)
            for group, options in zip(self.param_groups, self._reader.options, strict=True)
            for param in group["params"]
        ]
        given = list(weights)
        if len(given) != len(params):
            raise ValueError(f"{len(given)} weights for {len(params)} parameters: give one for each, in their order")
        for i, ((param, _), values) in enumerate(zip(params, given, strict=True)):
            if not isinstance(values, Tensor):
                raise ValueError(f"weight {i} is a {type(values).__name__}, not a Tensor")
            if values.shape != param.shape:
                raise ValueError(f"weight {i} has shape {list(values.shape)}, the parameter {list(param.shape)}")
            is_number = values.is_complex() if param.is_complex() else values.is_floating_point()
            if not is_number or values.layout != torch.strided or values.is_meta:
                raise ValueError(
                    f"weight {i} is {values.layout} {described(values)}, which cannot be used for {described(param)}"
                )
            if not sharded.placed_alike(param, values):
                raise ValueError(
                    f"weight {i} is not placed as its parameter: where that is a DTensor, give distribute_tensor("
                    "weight, parameter.device_mesh, parameter.placements), and a plain tensor for a plain parameter"
                )
        if not self.state and any(options is not None and options.weights != "parameter" for _, options in params):
            states.make_first(self)
        for (param, options), values in zip(params, given, strict=True):
            kind = "parameter" if options is None else options.weights
            state = self.state.get(param)
            if state is None:
                state = {} if kind == "parameter" else self.state.setdefault(param, {})
            kept.set_weights(param, state, kind, values)
