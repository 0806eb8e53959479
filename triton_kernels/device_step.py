"""A device's rows and what a step does there: kernels compiled and in place, words brought to the device, launches.

csrc/python/hosted_step.cpp, which reads the optimizer and makes the table, says what to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launcher, norm
from .launcher import AnyKernel, Kernel, Launcher, NormKernel

WORD = 8  # bytes
_FLAG: int = norm.FLAG.value
_NORMS: int = norm.NORMS.value


class _Launch(NamedTuple):
    kernel: AnyKernel
    at: int  # of its first tile, in the table's bytes
    tiles: int
    tensors: int
    words_at: int  # in the step's bytes: before them its rows', backwards, behind them its groups'
    run: Launcher

    def told(self) -> dict[str, Any]:
        return {"kernel": self.kernel.name, "tensors": self.tensors, "tiles": self.tiles, "blocks": self.tiles}


class _Norm(NamedTuple):
    """Where in the table's bytes the ranges of the groups' sums lie, and the numbers of those with many; in the step's
    words the groups' largest norms."""

    launches: list[_Launch]
    programs: int
    ranges_at: int
    large_at: int
    large: int
    groups: int
    max_norms_at: int


class DeviceStep:
    """Steps the rows of one device: make_ready() once a table, then bring(), measure() and launch() once a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._table = b""
        self._layouts_at = 0
        self._launches: list[_Launch] = []
        self._launched: list[_Launch] = []  # those of the last step
        self._norm = _Norm([], 0, 0, 0, 0, 0, 0)
        self._has_measured = False
        self._norm_dtype, self._norm_of = torch.float32, -1
        self._words = b""  # of the last step: csrc/python/hosted_step lays them out
        # What lies, or will, in the device's memory when what is put on this stream now is run.
        self._table_memory: Tensor | None = None
        self._table_event: Any = None  # behind which the table lies there for other streams, too
        self._words_memory: Tensor | None = None
        self._stream = -1
        self._at = 0, 0  # the addresses of table and words
        self._workspace: Tensor | None = None  # float64; laid out as norm.FLAG has it
        self._workspace_stream = -1
        self._workspace_at = 0

    def is_capturing(self) -> bool:
        with launcher.on(self._device):
            return launcher.is_capturing()

    tile_elements = staticmethod(launcher.tile_elements)

    def make_ready(
        self,
        table: bytes,
        layouts_at: int,
        launches: Sequence[tuple[Any, ...]],
        norm_launches: Sequence[tuple[Any, ...]],
        *norm: int,
    ) -> None:
        """Takes a table and has what steps it compiled and in place.

        Launches: a kernel's fields, then the rest of _Launch, words_at in words; norm: that of _Norm behind the
        programs.
        """
        with undisturbed():
            own = [self._loaded(Kernel(*kernel), *places) for kernel, *places in launches]
            norms = [self._loaded(NormKernel(*kernel), *places) for kernel, *places in norm_launches]
        self._words = b""
        self._table_memory = self._words_memory = self._workspace = None
        self._has_measured = False
        self._table, self._layouts_at, self._launches, self._launched = table, layouts_at, own, []
        self._norm = _Norm(norms, sum(launch.tiles for launch in norms), *norm)

    def _loaded(self, kernel: AnyKernel, at: int, tiles: int, tensors: int, words_at: int) -> _Launch:
        run = launcher.launcher_of(kernel, self._device, tiles)
        return _Launch(kernel, at, tiles, tensors, words_at * WORD, run)

    def bring(self, words: bytes | None, launched: Sequence[int], measures: bool) -> None:
        """Has the step's words brought to the device, where they are not there yet; waits for nothing.

        Args:
            words: of all rows and groups; None: those of the last step.
            launched: of launches, those that have something to do; not looked at with the last step's words.
            measures: measure() will be called.
        """
        self._has_measured = False
        if words is not None:
            self._words_memory = None
            self._words = words
            self._launched = [self._launches[place] for place in launched]
        if not self._launched and not measures:
            return
        with launcher.on(self._device):
            is_capturing = launcher.is_capturing()
            stream = launcher.current_stream(self._device)
            if self._words_memory is not None and stream == self._stream and not is_capturing:
                return
            with undisturbed():
                table_memory = self._table_memory
                if table_memory is None:
                    table_memory = launcher.upload(self._table, self._device)
                elif is_capturing or stream != self._stream:
                    launcher.note_use(table_memory, self._table_event)
                # Not into the memory that is there: a launch on another stream, or a graph, may have yet to read it.
                words_memory = launcher.upload(self._words, self._device)
        self._at = table_memory.data_ptr(), words_memory.data_ptr()
        if is_capturing:  # the graph's own, which no step outside of it takes
            self._words_memory, self._stream = None, -1
        else:
            if self._table_memory is None:
                self._table_event = torch.cuda.current_stream(self._device).record_event()
            self._table_memory, self._words_memory, self._stream = table_memory, words_memory, stream

    def launch(self, grad_scale: int, found_inf: int, skips_nonfinite: bool) -> None:
        """grad_scale, found_inf: the addresses of torch.amp.GradScaler's words, 0 where there are none.

        skips_nonfinite: a norm that is not finite, that measure() formed, stands for the second.
        """
        if not self._launched:
            return
        table_at, words = self._at
        layouts = table_at + self._layouts_at
        coefficients = self._workspace_at + (_NORMS + self._norm.groups) * WORD
        if skips_nonfinite:
            found_inf = self._workspace_at + _FLAG * WORD
        with launcher.on(self._device):
            stream = launcher.current_stream(self._device)
            for launch in self._launched:
                addresses = table_at + launch.at, layouts, words + launch.words_at, grad_scale, found_inf, coefficients
                launch.run(*addresses, stream=stream)

    def launches(self) -> list[dict[str, Any]]:
        """What the last step launched: for tests and measurements."""
        return [launch.told() for launch in [*(self._norm.launches if self._has_measured else []), *self._launched]]

    # --- the norm

    def measure(self, grad_scale: int, norm_of: int, in_double: bool) -> None:
        """Forms sums, norms and coefficients of the gradients that bring() told of.

        norm_of: a group that clips, where one norm is that of all groups; -1: each has its own.
        """
        norm = self._norm
        table_at, words = self._at
        with launcher.on(self._device):
            stream = launcher.current_stream(self._device)
            self._workspace_at, kept = self._workspace_on(stream), self._workspace
            self._workspace = None  # if this ends between two launches: its counter is not at 0 then
            ranges, large = table_at + norm.ranges_at, table_at + norm.large_at
            addresses = grad_scale, self._workspace_at, ranges, large, words + norm.max_norms_at * WORD
            numbers = norm.groups, norm.large, norm.programs, int(norm_of < 0), int(in_double)
            for launch in norm.launches:
                tiles, layouts = table_at + launch.at, table_at + self._layouts_at
                launch.run(tiles, layouts, words + launch.words_at, *addresses, *numbers, stream=stream)
            self._workspace = kept
        self._norm_dtype = torch.float64 if in_double else torch.float32
        self._norm_of = norm_of
        self._has_measured = True

    def sums(self) -> Tensor:
        """The groups' sums of squares that measure() formed, float64."""
        assert self._workspace is not None, "measure() makes it"
        with undisturbed():
            return self._workspace[_NORMS + 3 * self._norm.groups :][: self._norm.groups]

    def grad_norm(self) -> Tensor | None:
        """The norm that measure() formed last, or the groups' norms."""
        if self._workspace is None:
            return None
        with undisturbed():
            norms = self._workspace[_NORMS:][: self._norm.groups].view(self._norm_dtype)[: self._norm.groups]
            norm = norms if self._norm_of < 0 else norms[self._norm_of]
        launcher.note_use(norm)  # it lies in the workspace, which goes with the optimizer
        return norm

    def _workspace_on(self, stream: int) -> int:
        """The address of memory to form the norm in, which no other stream uses. What a graph uses, only that does."""
        is_capturing = launcher.is_capturing()
        if self._workspace is None or stream != self._workspace_stream or is_capturing:
            with undisturbed():
                self._workspace = launcher.zeroed(_NORMS + 4 * self._norm.groups + self._norm.programs, self._device)
            self._workspace_stream = -1 if is_capturing else stream
        return self._workspace.data_ptr()


_TRANSFORMS = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode).add(
    torch._C.DispatchKey.FuncTorchDynamicLayerBackMode
)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within it no mode (fake tensors, inference, a function transform, a default device) has a say in what we do."""
    with (
        torch._C._DisableTorchDispatch(),
        torch._C._ExcludeDispatchKeyGuard(_TRANSFORMS),
        torch._C.DisableTorchFunction(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield
