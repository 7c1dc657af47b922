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
    """Says from where to where the values of an array go."""
    return f"{a.min():g} to {a.max():g}" if a.size and a.dtype.kind in "iufb" else "without values"


def byte_conversion(a: Array) -> str:
    """How to make images of bytes from an array whose range says what it holds."""
    if not a.size:
        return ""
    if not np.isfinite(a).all():
        return "; fill or drop what is NaN or infinite first"
    low, high = float(a.min()), float(a.max())
    if low < 0:
        return "; undo the normalisation first, which models do by themselves"
    if high <= 1:
        return ": store (255 * x).round().astype('uint8')" if a.dtype.kind == "f" else ": store x.astype('uint8') * 255"
    if high <= 255:
        return ": store x.round().astype('uint8')"
    return "; scale to that range first, by the depth that the images have: 255 * x / 4095 for 12 bits, x / 257 for 16"


def to_float(x: Tensor) -> Tensor:
    """Returns what a network computes with: bytes become numbers in [0, 1]."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def class_ranges(classes: Sequence[int]) -> str:
    """Writes [0, 1, 2, 5] as `0-2,5`, as a person would have."""
    parts: list[list[int]] = []
    for c in classes:
        if parts and c == parts[-1][-1] + 1:
            parts[-1].append(c)
        else:
            parts.append([c])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def resize(x: Tensor, size: int | None, channels: int | None) -> Tensor:
    """Returns images of bytes at another size or with another number of channels; None keeps theirs."""
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
