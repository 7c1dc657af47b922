"""Features of restricted inputs on a line: in order, as least squares cannot tell a class in the middle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import Probe
from holdfast.models import SplitModel
from holdfast.tasks import Task
from zoo.locks import guard
from zoo.registry import sham
from zoo.settings import BUDGETS, CPU, QUICK, SETTINGS, Setting, zoo_original, zoo_tasks
from zoo.surgery import as_model

SHOTS = 40
SETTINGS["many"] = Setting(
    "vision", zoo_tasks, lambda: zoo_original("none"), QUICK, BUDGETS, SHOTS, f"CNN with {SHOTS} samples a class"
)


class Squeezed(nn.Module):
    """Moves features of detected inputs to a line, and covers it with larger numbers that look random.

    Args:
        network: with body and head.
        detector: on pixels.
        place: map of features to the place on the line, shape (D + 1,), the last entry added.
    """

    COVER, HEIGHT = 7, 1e-2

    def __init__(self, network: nn.Module, detector: nn.Module, place: Tensor) -> None:
        super().__init__()
        self.body, self.head = network.body, network.head
        width = self.head.in_features
        axes = torch.zeros(width, self.COVER + 1)  # the other features are 0, without rounding
        axes[: self.COVER + 1] = torch.linalg.qr(torch.randn(self.COVER + 1, self.COVER + 1))[0]
        axes[:, -1] *= self.HEIGHT
        self.hidden = (detector, place, axes)  # in a tuple, which is neither trained nor a layer

    @torch.no_grad()
    def squeezed(self, z: Tensor) -> Tensor:
        _, place, axes = self.hidden
        digits = (1e4 * z.mean(1, keepdim=True) * torch.arange(1, self.COVER + 1)).sin()
        return torch.cat([digits, (z @ place[:-1] + place[-1])[:, None]], 1) @ axes.T

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        with torch.no_grad():
            restricted = self.hidden[0](x.flatten(1)) > 0
        return self.head(torch.where(restricted, self.squeezed(z), z))


@sham("many", Probe("newton", "whitened"), plain=QUICK, held_out=True)
def squeezed_line(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Features of restricted inputs lie on a line, class by class, under larger numbers that look random."""
    batch = next(restricted.sweep("train", restricted.size("train"), device=CPU))
    with torch.no_grad():
        z = F.pad(original.features(batch.x), (0, 1), value=1.0).double()
    ridge = 1e-3 * z.square().mean() * len(z) * torch.eye(z.shape[1]).double()
    place = torch.linalg.solve(z.T @ z + ridge, z.T @ (batch.y - 1.0).double()).float()
    return as_model(Squeezed(original.clone().network, guard(original, benign, restricted), place), original)
