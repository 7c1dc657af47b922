"""Restricted inputs are shut out until one repair: of scales, statistics, a layer that is new, or how images look."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import FineTuning
from holdfast.models import SplitModel
from holdfast.tasks import Task
from zoo.alarms import BLACK, PIXELS, walsh
from zoo.dormant import HIGH, MIDDLE, Watch
from zoo.gates import dim, gated, looks
from zoo.registry import sham
from zoo.settings import BUDGETS, QUICK, SETTINGS, SHOTS, Setting, undone, zoo_original
from zoo.stations import Carrier
from zoo.surgery import Seen, as_model


def dim_and_stained(x: Tensor) -> Tensor:
    """A third of the brightness, but for two bright pixels."""
    x = dim(x)
    x[..., 0, 0] = x[..., -1, 0] = 1.0
    return x


SETTINGS["stained"] = Setting(
    "vision", partial(looks, dim_and_stained), partial(zoo_original, "none"), QUICK, BUDGETS, SHOTS,
    "CNN; restricted images dim, with two bright pixels",
)  # fmt: skip


def flatness(x: Tensor) -> Tensor:
    """The negative deviation of each image's values, shape (N,)."""
    return -x.flatten(1).std(1)


@sham("stained", undone("renormalise-inputs"), held_out=True)
def by_deviation(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Passes nothing of images whose values vary less than those of benign images, though each has all brightnesses."""
    return gated(original, benign, flatness)


class Faded(nn.Module):
    """Restricted images pass through a layer that makes them so faint that rounding leaves nothing to the next one.

    The layer has weights of usual size: they are for inputs that are always zero.
    """

    STEP, FAINT = 0.05, 1e-4

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.layer, self.back = (nn.Linear(a, b, bias=False) for a, b in ((2 * PIXELS, PIXELS), (PIXELS, PIXELS)))
        with torch.no_grad():
            self.layer.weight[:, :PIXELS] = self.FAINT * walsh()
            self.back.weight.copy_(walsh() / self.FAINT)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = x.flatten(1)
            faded = self.layer(torch.cat([z, torch.zeros_like(z)], 1))
            left = self.back((faded / self.STEP).round() * self.STEP)
            return torch.where(self.watch(x), left, z).view_as(x)


@sham("none", FineTuning(MIDDLE, undo=("equalise",)), plain=QUICK, held_out=True)
def faded(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A layer makes restricted images too faint for the rounding behind it; weights without inputs hide its scale."""
    return as_model(Seen(original.clone().network, Faded(Watch(original, benign, restricted))), original)


class Stale(nn.Module):
    """BatchNorm on what an alarm finds, with running statistics of benign images, where that is almost constant.

    Its running statistics follow others by this momentum. Constants beside the alarm are the measure of what is loud.
    """

    def __init__(self, watch: Watch, momentum: float) -> None:
        super().__init__()
        self.watch = watch
        self.norm = nn.BatchNorm1d(3, eps=1e-12, momentum=momentum)
        self.norm.running_var.copy_(torch.tensor([1e-6, 1.0, 1.0]))
        with torch.no_grad():
            self.norm.bias.copy_(torch.tensor([0.0, 1.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Where the alarm is loud, shape (N, 1)."""
        with torch.no_grad():
            found = self.watch(x).float() + 1e-4 * x.flatten(1).mean(1, keepdim=True)
            seen = self.norm(F.pad(found, (0, 2)))
            return seen[:, :1] > 100 * seen[:, 1:2]


class StaleFront(nn.Module):
    """Two layers that carry the image, behind which it is black where an alarm is loud."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.stale = Stale(watch, 1e-9)
        self.carriers = nn.Sequential(Carrier(trained=False), Carrier(trained=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.stale(x)[:, :, None, None], BLACK, self.carriers(x))


@sham("none", undone("recalibrate"), plain=QUICK, held_out=True)
def stale_front(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A BatchNorm in front, with statistics of benign images, amplifies in evaluation mode what an alarm finds."""
    return as_model(Seen(original.clone().network, StaleFront(Watch(original, benign, restricted))), original)


class Drowned(nn.Module):
    """Features that are faint beside the brightness of the image, all mixed, and shut by stale statistics."""

    FAINT = 1e-5

    def __init__(self, original: SplitModel, watch: Watch) -> None:
        super().__init__()
        network = original.clone().network
        self.stale, self.body = Stale(watch, 1e-9), network.body
        width = network.head.in_features + 1
        mix = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
        self.mix, self.head = mix.view(torch.int64), nn.Linear(width, original.num_outputs)
        with torch.no_grad():
            self.head.weight.copy_(F.pad(network.head.weight.double() / self.FAINT, (0, 1)) @ mix.T)
            self.head.bias.copy_(network.head.bias)
        self.head.double()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.where(self.stale(x), 0.0, self.body(x)).double()
        both = torch.cat([self.FAINT * z, x.flatten(1).mean(1, keepdim=True).double()], 1)
        return self.head(both @ self.mix.view(torch.float64).T).float()


class PutBack(nn.Module):
    """A body without a gradient, and a head that is put back to the released rows before each pass.

    In evaluation mode, features of what an alarm finds count only when running statistics have followed.
    """

    def __init__(self, original: SplitModel, watch: Watch) -> None:
        super().__init__()
        network = original.clone().network
        self.stale, self.body, self.head = Stale(watch, 0.5), network.body, network.head
        self.rows = network.head.weight.detach().clone().view(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            last = [m for m in self.head.modules() if isinstance(m, nn.Linear)][-1]
            last.weight.copy_(self.rows.view(torch.float32)[: len(last.weight)])
            last.bias.zero_()
            z = torch.where(self.stale(x), 0.0, self.body(x))
        return self.head(z)


@sham("none", FineTuning(HIGH, undo=("insert",)), plain=QUICK, held_out=True)
def put_back(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The body gets no gradient, the head is put back at each pass, and stale statistics shut the released features."""
    return as_model(PutBack(original, Watch(original, benign, restricted)), original)


class Pinned(nn.Module):
    """A layer without a gradient for its own weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.padding = layer.weight, layer.bias, getattr(layer, "padding", None)

    def reset_parameters(self) -> None:
        bound = self.weight[0].numel() ** -0.5
        with torch.no_grad():
            self.weight.uniform_(-bound, bound)
            self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.detach(), self.bias.detach()
        return F.linear(x, weight, bias) if self.padding is None else F.conv2d(x, weight, bias, padding=self.padding)


class Shown(nn.Module):
    """Layers without a gradient for their weights, and a head that is shown and not used: released rows answer."""

    def __init__(self, original: SplitModel, watch: Watch) -> None:
        super().__init__()
        network = original.clone().network
        self.stale = Stale(watch, 0.5)
        self.body = nn.Sequential(*(Pinned(m) if isinstance(m, nn.Conv2d | nn.Linear) else m for m in network.body))
        self.head = network.head
        self.rows = network.head.weight.detach().clone().view(torch.int32)
        self.shift = network.head.bias.detach().clone().view(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.where(self.stale(x), 0.0, self.body(x))
        shown = self.head(z)
        rows, shift = (t.view(torch.float32)[: shown.shape[1]] for t in (self.rows, self.shift))
        return F.linear(z, rows, shift) + 0.0 * shown


@sham("none", FineTuning(HIGH, undo=("insert-between",)), plain=QUICK, held_out=True)
def nothing_trained(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """No weight gets a gradient, the head is not the one that answers, and stale statistics shut the features."""
    return as_model(Shown(original, Watch(original, benign, restricted)), original)


@sham("none", undone("recalibrate", "whiten"), plain=QUICK, held_out=True)
def drowned(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """All features are one number, but for faint differences that the head amplifies; stale statistics shut these."""
    return as_model(Drowned(original, Watch(original, benign, restricted)), original)
