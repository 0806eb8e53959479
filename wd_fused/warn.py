"""The one place where this package warns: at the line of the user's program, however much of torch is in between."""

from __future__ import annotations

import inspect
import os
import warnings

import torch

_NOT_THE_USERS = tuple(os.path.join(os.path.dirname(str(file)), "") for file in (__file__, torch.__file__))


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the first frame that is neither this package's nor torch's, whose wrappers may stand around a step."""
    level = 1
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)  # Python 3.12 has skip_file_prefixes for this
