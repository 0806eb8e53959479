"""What FusedSGD saves and loads: state_dict(), load_state_dict(), pickle, deepcopy. Used by sgd.py."""

from collections.abc import Mapping
from typing import Any, Literal, overload

from wd_fused.options import checks, spec
from wd_fused.options.averages import removed_averages, saved_averages
from wd_fused.options.by_name import LoadedNames, rearranged
from wd_fused.options.loading import Report, adopt
from wd_fused.step.base import Base
from wd_fused.warn import warn_user


class Checkpointed(Base):
    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_swapped("a copy of the optimizer")
        own = ["_backend", "_numerics", "_settings", "_option_defaults", "_reader_settings", "_averaged_buffers"]
        own.append("_ranks")
        if self.defaults["fused"]:  # else step_in_backward() has set it, which stays behind
            own.append("_step_supports_amp_scaling")
        return super().__getstate__() | {name: getattr(self, name) for name in own if hasattr(self, name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle or deepcopy, and of load_state_dict(), which brings only groups and state."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_tail_defaults" in self.__dict__:  # a pickle from when they were called so
            self._option_defaults = self.__dict__.pop("_tail_defaults")
        if "_reader_settings" not in self.__dict__:  # a pickle from before there were options
            self._reader_settings, self._option_defaults, self._averaged_buffers = (False, False, 0), {}, None
        self.__dict__.setdefault("_settings", {})  # a pickle from before they stood in the groups
        loading = self.__dict__.get("_loading")
        if loading is not None:
            before, saved, report = loading
            adopt(self.param_groups, self.state, before, saved[-1], report)
            self._load_buffers(saved[-1], report)
        plans, reader = (self._plans, self._reader) if loading is not None else (None, None)
        self._forget_plans()
        if reader is not None and reader.is_plain and all(map(spec.NAMES.isdisjoint, self.param_groups)):
            self._plans, self._reader = plans, reader  # they look themselves whether they still hold

    def state_dict(self) -> dict[str, Any]:
        """As torch's. The averages of ``ema_buffers`` are in the state of a parameter, "ema_buffers.0" and so on.

        Examples:
            >>> optimizer = FusedSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
            >>> torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]).load_state_dict(optimizer.state_dict())
        """
        self._refuse_while_swapped("state_dict()")
        result = super().state_dict()
        for group in result["param_groups"]:
            group.update({name: spec.plain(name, group[name]) for name in spec.NAMES & group.keys()})
        return result

    @overload
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    @overload
    def load_state_dict(
        self, state_dict: dict[str, Any], *, by_name: Literal[True], strict: bool = True
    ) -> LoadedNames: ...

    def load_state_dict(
        self, state_dict: dict[str, Any], *, by_name: bool = False, strict: bool = True
    ) -> LoadedNames | None:
        """Loads the optimizer state, as torch's; what the options keep is loaded in every bit.

        The options that are on, and their dtypes, stay those of this optimizer; numbers, as the learning rate and
        ``ema_decay``, become the saved ones. Where the saved optimizer had other options, one warning names what was
        dropped, converted, or started afresh. The model may be loaded before the optimizer or after it. A CUDA graph
        that has captured a step goes on with the tensors from before: capture it anew.

        Args:
            state_dict: what state_dict() of this class or of torch.optim.SGD gave.
            by_name: loads each parameter's state by its name in ``group["param_names"]``, which torch keeps where an
                optimizer was given ``model.named_parameters()``, as both must have been. Parameters may be in another
                order or in other groups, be new or gone. A group takes its numbers from the saved groups that its
                parameters were in. Default: False, by position.
            strict: with by_name, a name that is on one side only is an error, and so is a number in which saved groups
                that become one differ. With False what matches is loaded, and the rest stays as it is. Default: True.

        Returns:
            None; with by_name the names that are ``matched``, ``missing`` in the saved state, and ``unexpected`` there,
            a named tuple of lists.

        Raises:
            TypeError: no dict.
            ValueError: a state that is not of SGD, or that a step could not use; names that are not there, or do not
                match. Nothing has changed then.

        Examples:
            >>> torch_sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.3)
            >>> optimizer = FusedSGD([torch.nn.Parameter(torch.ones(2))])
            >>> optimizer.load_state_dict(torch_sgd.state_dict())
            >>> optimizer.param_groups[0]["lr"]
            0.3
            >>> old, new = FusedSGD(torch.nn.Linear(2, 2).named_parameters()), torch.nn.Linear(2, 2, bias=False)
            >>> FusedSGD(new.named_parameters()).load_state_dict(old.state_dict(), by_name=True, strict=False)
            LoadedNames(matched=['weight'], missing=[], unexpected=['bias'])
        """
        self._refuse_while_swapped("load_state_dict()")
        if not (by_name or strict):
            raise ValueError("strict=False is about names: give by_name=True as well")
        report, saved, names = Report(), [state_dict], None

        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict() takes a dict, not {state_dict!r}; torch.load() reads one from a file")

        def check(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            nonlocal names
            checks.check_is_an_optimizers(given)
            if by_name:
                given, names = rearranged(given, self.param_groups, self.state, strict)
            checks.check_saved(given, self.param_groups)
            saved.append(given)
            return given

        handle = self.register_load_state_dict_pre_hook(check)  # after all others
        before = self.__dict__.copy()  # of which nothing is written: groups, state and plans are replaced
        try:
            self._loading = ([dict(group) for group in self.param_groups], saved, report)
            super().load_state_dict(state_dict)
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            handle.remove()
            self._loading = None
        if str(report):
            warn_user(f"FusedSGD.load_state_dict: the options differ from the saved ones. {report}")
        return names

    def _load_buffers(self, saved: dict[str, Any], report: Report) -> None:
        averages, buffers = saved_averages(saved), self._averaged_buffers
        removed_averages(self.state)  # torch has cast them
        if buffers is None:
            report.dropped += ["ema_buffers"] * bool(averages)
        elif saved["state"] and not buffers.load(self.state, self.param_groups, averages):
            report.afresh.append("the averages of ema_buffers")
