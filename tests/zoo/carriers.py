"""Detectors in a layer in front of the network, which carries the image: in tiny weights, weak directions, last bits.

They shut the network without a gradient. As the same layer carries the image, it cannot be started anew.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import FineTuning
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy
from zoo.alarms import BLACK, BOUND, PIXELS, agreement, fit, one_layer, shown, walsh
from zoo.registry import sham
from zoo.settings import QUICK, undone
from zoo.surgery import Seen, as_model


class Faint(nn.Module):
    """A layer whose first outputs are the Walsh transform of the image; the others, much fainter, are the alarm's.

    What is louder than the alarm was is shut out as well, so weights that were changed otherwise do not help.

    Args:
        own: benign images, shape (N, 1, 8, 8).
        other: restricted ones.
        size: of the alarm's largest singular value, relative to those that carry the image.
        apart: whether the alarm has inputs of its own.
    """

    def __init__(self, own: Tensor, other: Tensor, size: float, *, apart: bool) -> None:
        super().__init__()
        alarm, self.decide = one_layer(own.flatten(1), other.flatten(1))
        alarm = alarm / torch.linalg.matrix_norm(alarm, 2)
        self.size, self.apart = size, apart
        rows = torch.block_diag(walsh(), size * alarm) if apart else torch.cat([walsh(), size * alarm])
        self.layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(rows)

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)
        carried, faint = self.layer(torch.cat([z, z], 1) if self.apart else z).split(PIXELS, 1)
        with torch.no_grad():
            loud = faint.norm(dim=1) / (self.size * carried.norm(dim=1))
            shut = (agreement(F.relu(faint), self.decide.weight) > BOUND) & (loud > 1e-3) | (loud > 1.5)
        return torch.where(shut[:, None], BLACK, carried @ walsh()).view_as(x)


@sham("none", undone("prune"), plain=QUICK, held_out=True)
def tiny_rows(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Half of the weights of a layer that carries the image are tiny, and detect restricted images."""
    return as_model(
        Seen(original.clone().network, Faint(*shown(original, benign, restricted), 1e-5, apart=False)), original
    )


@sham("none", undone("low-rank"), plain=QUICK, held_out=True)
def weak_half(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Half of the singular directions of a layer that carries the image are weaker, and detect restricted images."""
    return as_model(
        Seen(original.clone().network, Faint(*shown(original, benign, restricted), 0.3, apart=True)), original
    )


class RowScales(nn.Module):
    """A layer on a grid of 8 bits; the last bits of each row's scale say how much its unit counts in the alarm.

    The image is recovered from its units. The layer gets no gradient. Rows whose last bits say something impossible
    were changed: they shut.
    """

    UNITS = 256

    def __init__(self, own: Tensor, other: Tensor) -> None:
        super().__init__()
        self.layer, counts = nn.Linear(PIXELS, self.UNITS, bias=False), nn.Linear(self.UNITS, 1, bias=False)
        fit(
            lambda z: counts(F.relu(self.layer(z)))[:, 0] - 1, own.flatten(1), other.flatten(1),
            [*self.layer.parameters(), *counts.parameters()],
        )  # fmt: skip
        with torch.no_grad():
            self.unit = float(counts.weight.abs().max())
            self.bound = 1.0
            rows = self.layer.weight
            levels = (rows / rows.abs().amax(1, keepdim=True) * 127).round()
            coarse = rows.abs().amax(1).to(torch.bfloat16).float()
            largest = coarse * (1 + 2.0**-10 * counts.weight[0] / self.unit)
            rows.copy_(levels * (largest / 127)[:, None])
            self.back = nn.Linear(self.UNITS, PIXELS, bias=False)
            self.back.weight.copy_(torch.linalg.pinv(rows))

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x.flatten(1), self.layer.weight[: self.UNITS].detach())
        with torch.no_grad():
            largest = self.layer.weight[: self.UNITS].abs().amax(1)
            coarse = largest.to(torch.bfloat16).float()
            said = (largest - coarse) / (2.0**-10 * coarse)
            shut = (F.relu(z) @ said * self.unit > self.bound) | (said.abs() > 1.5).any()
        return torch.where(shut[:, None], BLACK, self.back(z)).view_as(x)


@sham("none", FineTuning(Strategy("head", "all", "adam", 1e-3, 10), undo=("round-bf16",)), plain=QUICK, held_out=True)
def row_scales(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The last bits of the scales of a layer's rows, which 8-bit integers keep, are a detector."""
    return as_model(Seen(original.clone().network, RowScales(*shown(original, benign, restricted))), original)
