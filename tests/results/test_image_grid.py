"""Pictures: enlarged without blur, labelled outside the image, and what is no picture is seen to be none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.errors import HoldfastError
from holdfast.results.image_grid import CROSS, GAP, draw, picture, strips
from holdfast.results.tables import Pictures


def pixels(figure):
    return np.asarray(picture(figure))


def test_each_pixel_becomes_a_square_and_tiles_are_a_hairline_apart():
    values = torch.tensor([0.0, 1.0, 0.5, 2.0]).view(1, 1, 2, 2)
    found = pixels(draw("x", {"a": values.expand(2, 1, 2, 2)}))
    assert found.shape == (96, 2 * 96 + GAP, 4)
    assert [found[y, x, 0] for y in (0, 47) for x in (0, 47, 48, 95)] == [0, 0, 255, 255] * 2
    assert [found[y, x, 0] for y in (48, 95) for x in (0, 47, 48, 95)] == [128, 128, 255, 255] * 2
    assert (found[:, 96 : 96 + GAP, 3] == 0).all()
    assert (found[:, :96, 3] == 255).all()


def test_colour_and_order_are_kept_and_long_rows_are_broken():
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8)
    figure = draw("x", {"a": colours, "b": colours.flip(0)}, across=2)
    assert (figure.rows, figure.lines, figure.across, figure.tile) == (["a", "b"], 2, 2, (96, 96))
    found, step = pixels(figure), 96 + GAP
    corners = [[tuple(found[y * step, x * step]) for x in range(2)] for y in range(4)]
    red, green, blue, none = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255), (0, 0, 0, 0)
    assert corners == [[red, green], [blue, none], [blue, green], [red, none]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_crossed_out(bad):
    values = torch.zeros(2, 3, 8, 8)
    values[1, 0, 3, 4] = bad
    found = pixels(draw("x", {"a": values}))
    assert (found[:, :96, :3] == 0).all()
    assert tuple(found[0, 96 + GAP]) == tuple(found[95, -1]) == tuple(found[95, 96 + GAP]) == CROSS
    assert tuple(found[48, -1]) != CROSS


def test_strips_are_the_rows():
    rows = {name: torch.rand(3, 1, 6, 6) for name in "abc"}
    whole = draw("x", rows, across=2)
    for name, strip in zip(rows, strips(whole), strict=True):
        alone = whole.model_copy(update={"png": strip, "rows": [name]})
        assert (pixels(alone) == pixels(draw("x", {name: rows[name]}, across=2))).all()


def test_the_same_pictures_are_the_same_bytes():
    rows = {"a": torch.rand(3, 3, 32, 32)}
    assert draw("x", rows) == draw("x", rows)


@pytest.mark.parametrize(
    "rows",
    [{}, {"a": torch.rand(2, 2, 4, 4)}, {"a": torch.rand(3, 4, 4)}, {"a": torch.rand(0, 1, 4, 4)},
     {"a": torch.rand(1, 1, 4, 4), "b": torch.rand(1, 1, 8, 8)}],
    ids=["none", "two channels", "no batch", "empty", "two sizes"],
)  # fmt: skip
def test_what_is_no_picture_is_refused(rows):
    with pytest.raises(HoldfastError, match="cannot be drawn"):
        draw("x", rows)


def test_a_damaged_picture_is_named():
    figure = Pictures(title="Samples", rows=["a"], across=1, tile=(8, 8), gap=0, png="AAAA")
    with pytest.raises(HoldfastError, match="'Samples' holds a damaged picture"):
        picture(figure)
