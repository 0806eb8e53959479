"""One step of an optimizer at a time, whatever becomes of those that began. Used by the step.

A step lays a claim: an object that is the local variable ``claim`` of its frame, and a key of the optimizer's dict. An
interrupt may come before any line that would take it away again, and in a forked process the other threads of its
parent are not there: so a claim counts as long as its frame runs, and no longer.
"""

import sys
from collections.abc import Iterator
from types import FrameType


def is_taken(claims: dict[object, None], own: object = None) -> bool:
    """Whether somebody is in a step who came before ``own``. Claims without anybody are removed."""
    alive = list(_alive())
    for earlier in list(claims):
        if earlier is own:
            break
        if any(earlier is one for one in alive):
            return True
        claims.pop(earlier, None)
    return False


def _alive() -> Iterator[object]:
    """The claims of all frames that run, in all threads."""
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            if "claim" in frame.f_code.co_varnames:  # not in this file
                yield frame.f_locals.get("claim")
            frame = frame.f_back
