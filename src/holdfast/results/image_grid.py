"""Draws pictures as a figure, and returns the images in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.results.tables import Pictures

TILE, GAP = 96, 2
"""Approximate pixels of a tile (pictures are enlarged by a whole number to stay sharp), and between two tiles."""

GROUND, CROSS = (128, 128, 128, 255), (200, 30, 30, 255)
"""Colours of a tile without a picture: visible on a light and on a dark page."""


def draw(
    title: str, rows: Mapping[str, Tensor], *, note: str = "", across: int | None = None, columns: Sequence[str] = ()
) -> Pictures:
    """Draws pictures in a grid.

    Args:
        title: heading of the figure.
        rows: pictures of shape (N, C, H, W) in [0, 1] by label, grey (C = 1) or in colour (C = 3), all of one size. One
            with a number that is not finite is drawn as a crossed-out tile.
        note: what is shown.
        across: tiles in a line; None: the length of the longest row.
        columns: label of each tile of a line.

    Raises:
        HoldfastError: if there is nothing to draw, or a shape is not that of pictures.

    Example:
        >>> figure = draw("Noise", {"grey": torch.rand(3, 1, 8, 8), "colour": torch.rand(2, 3, 8, 8)})
        >>> figure.rows, figure.across, figure.tile, picture(figure).size
        (['grey', 'colour'], 3, (96, 96), (292, 194))
    """
    shapes = {tuple(pictures.shape[2:]) for pictures in rows.values()}
    wrong = [label for label, p in rows.items() if p.dim() != 4 or p.shape[1] not in (1, 3) or not p.numel()]
    if wrong or len(shapes) != 1:
        shown = {label: tuple(pictures.shape) for label, pictures in rows.items()}
        raise HoldfastError(
            f"Figure {title!r}: {shown} cannot be drawn; expected pictures of shape (N, 1 or 3, H, W), of one size."
        )
    height, width = shapes.pop()
    scale = max(1, round(TILE / max(height, width)))
    size = width * scale, height * scale
    longest = max(map(len, rows.values()))
    across = min(across or longest, longest)
    lines = -(-longest // across)
    sheet = Image.new("RGBA", (across * (size[0] + GAP) - GAP, len(rows) * lines * (size[1] + GAP) - GAP))
    for r, pictures in enumerate(rows.values()):
        for i, values in enumerate(pictures.detach().cpu().float()):
            place = i % across * (size[0] + GAP), (r * lines + i // across) * (size[1] + GAP)
            sheet.paste(_tile(values, size), place)
    return Pictures(
        title=title, note=note, rows=list(rows), lines=lines, across=across, columns=list(columns), tile=size, gap=GAP,
        png=_encoded(sheet),
    )  # fmt: skip


def _tile(values: Tensor, size: tuple[int, int]) -> Image.Image:
    if not bool(values.isfinite().all()):
        tile = Image.new("RGBA", size, GROUND)
        right, bottom, pen = size[0] - 1, size[1] - 1, ImageDraw.Draw(tile)
        for ends in ((0, 0, right, bottom), (0, bottom, right, 0)):
            pen.line(ends, CROSS, max(1, min(size) // 24))
        return tile
    bytes_ = (values.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0)
    return Image.fromarray(bytes_.numpy()).convert("RGBA").resize(size, Image.Resampling.NEAREST)


def _encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def picture(figure: Pictures) -> Image.Image:
    """Returns the grid as an image.

    Raises:
        HoldfastError: if the result holds something other than a PNG.
    """
    try:
        image = Image.open(io.BytesIO(base64.b64decode(figure.png)), formats=["PNG"])
        image.load()
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise HoldfastError(f"Figure {figure.title!r} holds a damaged picture ({error}).") from error
    return image


def strips(figure: Pictures) -> list[str]:
    """Returns each row as a PNG in base64."""
    sheet = picture(figure)
    pitch = figure.lines * (figure.tile[1] + figure.gap)
    return [
        _encoded(sheet.crop((0, i * pitch, sheet.width, (i + 1) * pitch - figure.gap))) for i in range(len(figure.rows))
    ]
