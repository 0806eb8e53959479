"""A device's rows and what a step does there: their table, the words that change, the launches.

Two callers read the optimizer and say what to do: csrc/module.cpp where the C++ extension is there, else plan.py.
Rows with a tail, and the norm: tail_step.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import launcher
from .launcher import Launcher
from .table import PlannedLaunch, Table, TableRow, table

WORD = 8  # bytes


class DeviceStep:
    """Steps the rows of one device: make_ready() once a table, then bring() and launch() once a step."""

    def __init__(self, device: torch.device, numerics: str) -> None:
        self._device = device
        self._numerics = numerics
        self._table = Table(torch.empty(0, dtype=torch.int64, device="cpu"), 0, [])
        self._launches: list[tuple[PlannedLaunch, Launcher]] = []
        self._launched: list[tuple[PlannedLaunch, Launcher]] = []  # those of the last step
        self._words = bytearray()  # of the last step: a word a row, then the groups'
        # What lies, or will, in the device's memory when what is put on this stream now is run.
        self._table_memory: Tensor | None = None
        self._table_event: Any = None  # behind which the table lies there for other streams, too
        self._words_memory: Tensor | None = None
        self._stream = -1
        self._at = 0, 0, 0  # the addresses of table, layouts and words

    def is_capturing(self) -> bool:
        with launcher.on(self._device):
            return launcher.is_capturing()

    def make_ready(self, rows: Sequence[Sequence[Any]]) -> None:
        """Takes rows, TableRow's fields of each, and has what steps them compiled and in place."""
        with undisturbed():
            made = self._table_of([TableRow(*row) for row in rows])
            launches = self._loaded(made.launches)
        self._words = bytearray()
        self._table_memory = self._words_memory = None
        self._table, self._launches, self._launched = made, launches, []

    def _table_of(self, rows: Sequence[TableRow]) -> Table:
        return table(rows, self._numerics)

    def _loaded(self, launches: Sequence[PlannedLaunch]) -> list[tuple[PlannedLaunch, Launcher]]:
        return [(launch, launcher.launcher_of(launch.kernel, self._device, launch.tiles)) for launch in launches]

    def bring(self, words: bytes | None) -> None:
        """Has the step's words brought to the device, where they are not there yet; waits for nothing.

        words: of all rows and groups; None: those of the last step.
        """
        assert words is not None or self._words, "make_ready() has forgotten them"
        if words is not None and words != self._words:
            self._words_memory = None
            row_words = memoryview(words).cast("q")
            self._launched = [launch for launch in self._launches if any(row_words[r] for r in launch[0].rows)]
            self._words = bytearray(words)
        if not self._needs_words():
            return
        with launcher.on(self._device):
            is_capturing = launcher.is_capturing()
            stream = launcher.current_stream(self._device)
            if self._words_memory is not None and stream == self._stream and not is_capturing:
                return
            with undisturbed():
                table_memory = self._table_memory
                if table_memory is None:
                    table_memory = launcher.upload(self._table.words, self._device)
                elif is_capturing or stream != self._stream:
                    launcher.note_use(table_memory, self._table_event)
                # Not into the memory that is there: a launch on another stream, or a graph, may have yet to read it.
                host = torch.frombuffer(self._words, dtype=torch.int64)
                words_memory = launcher.upload(host, self._device)
        begin = table_memory.data_ptr()
        self._at = begin, begin + self._table.layouts_at * WORD, words_memory.data_ptr()
        if is_capturing:  # the graph's own, which no step outside of it takes
            self._words_memory, self._stream = None, -1
        else:
            if self._table_memory is None:
                self._table_event = launcher.event(self._device)
            self._table_memory, self._words_memory, self._stream = table_memory, words_memory, stream

    def _needs_words(self) -> bool:
        return bool(self._launched)

    def launch(self, grad_scale: int, found_inf: int) -> None:
        """grad_scale, found_inf: the addresses of torch.amp.GradScaler's words, 0 where there are none."""
        if not self._launched:
            return
        table_at, layouts, words = self._at
        with launcher.on(self._device):
            stream = launcher.current_stream(self._device)
            for launch, run in self._launched:
                run(table_at + launch.at * WORD, layouts, words, grad_scale, found_inf, stream=stream)

    def launches(self) -> list[dict[str, Any]]:
        """What the last step launched: for tests and measurements."""
        return [
            {"kernel": launch.kernel.name, "tensors": len(launch.rows), "tiles": launch.tiles, "blocks": launch.tiles}
            for launch, _ in self._launched
        ]


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
