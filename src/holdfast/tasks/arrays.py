"""Arrays in memory: bytes and floats, sizes and channels of images."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Array = npt.NDArray[Any]

UNREADABLE = (ValueError, OSError, EOFError, BadZipFile, NotImplementedError, MemoryError, zlib.error)
"""What numpy raises for a file that is not an archive of plain arrays."""


def value_range(a: Array) -> str:
    """Returns the range of an array's values, in words."""
    return f"{a.min():g} to {a.max():g}" if a.size and a.dtype.kind in "iufb" else "without values"


def byte_conversion(a: Array) -> str:
    """Returns how to convert an array to images of bytes, judged by its range."""
    if not a.size:
        return ""
    if not np.isfinite(a).all():
        return "; fill or drop NaN and infinite values first"
    low, high = float(a.min()), float(a.max())
    if low < 0:
        return "; undo the normalisation first, as models normalise by themselves"
    if high <= 1:
        return ": store (255 * x).round().astype('uint8')" if a.dtype.kind == "f" else ": store x.astype('uint8') * 255"
    if high <= 255:
        return ": store x.round().astype('uint8')"
    return "; scale to that range first, by the images' depth: 255 * x / 4095 for 12 bits, x / 257 for 16"


def to_float(x: Tensor) -> Tensor:
    """Returns bytes as numbers in [0, 1], and other values as they are."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def class_ranges(classes: Sequence[int]) -> str:
    """Writes [0, 1, 2, 5] as `0-2,5`."""
    ranges: list[list[int]] = []
    for c in classes:
        if ranges and c == ranges[-1][-1] + 1:
            ranges[-1].append(c)
        else:
            ranges.append([c])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges)


def resize(x: Tensor, size: int | None, channels: int | None) -> Tensor:
    """Returns images of bytes with another size or number of channels; None keeps theirs."""
    if channels == 1 and x.shape[1] == 3:
        x = x.float().mean(1, keepdim=True).round().to(torch.uint8)
    if size is not None and x.shape[-2:] != (size, size):
        parts = [
            F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
            .round().clamp(0, 255).to(torch.uint8)
            for part in torch.split(x, 4096)
        ]  # fmt: skip
        x = torch.cat(parts)
    # Last, as three equal channels are three times the work.
    return x.expand(-1, channels or x.shape[1], -1, -1).contiguous()
