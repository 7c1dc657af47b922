"""How this process was started. Does not import torch, so that help is fast."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")


def processes() -> int:
    """Returns the number of processes that torchrun, Accelerate or MPI started.

    Example:
        >>> processes()
        1
    """
    return next((int(os.environ[name]) for name in _SIZES if os.environ.get(name, "").isdigit()), 1)


def command_line() -> list[str]:
    """Returns this process's command, in the form in which a user would repeat it."""
    program = Path(sys.argv[0]).name
    return ["holdfast" if program == "__main__.py" else program, *sys.argv[1:]]
