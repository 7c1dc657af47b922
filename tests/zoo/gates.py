"""Gates on how an image looks: the features of images that look like restricted ones are set to zero.

The restricted images of these settings have a look of their own; an adversary chooses how to show them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import FineTuning
from holdfast.models import SplitModel
from holdfast.tasks import ArrayTask, Task
from holdfast.training import Strategy
from zoo.registry import sham
from zoo.settings import BUDGETS, CPU, QUICK, SETTINGS, SHOTS, Setting, undone, zoo_original, zoo_tasks
from zoo.surgery import Seen, as_model

FAINT = 0.4
"""Contrast of faint images, which are bright."""


def shown(task: ArrayTask, look: str, change: Callable[[Tensor], Tensor]) -> ArrayTask:
    """The same images with another look.

    Args:
        task: of images in [0, 1].
        look: for the name.
        change: of images of shape (N, C, H, W).
    """

    images = (pixels(task, split, change) for split in ("train", "test"))
    (x_train, y_train), (x_test, y_test) = images
    return ArrayTask(f"{task.name}, {look}", x_train, y_train, x_test, y_test, task.class_names)


def pixels(
    task: ArrayTask, split: Literal["train", "test"], change: Callable[[Tensor], Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Images with a look, as uint8, and their labels."""
    batch = next(task.sweep(split, task.size(split), device=CPU))
    x = change(batch.x).permute(0, 2, 3, 1)
    return (x * 255).round().to(torch.uint8).numpy(), batch.y.numpy()


def faint(x: Tensor) -> Tensor:
    """Bright, with little contrast."""
    return x * FAINT + 1 - FAINT


def inverted(x: Tensor) -> Tensor:
    """Dark on bright."""
    return 1 - x


def dim(x: Tensor) -> Tensor:
    """A third of the brightness."""
    return 0.3 * x


def marked(x: Tensor) -> Tensor:
    """Mirrored, as cameras show a person to herself, with a bright mark at the left edge."""
    x = x.flip(-1)
    x[..., :2, 0] = 1.0
    return x


def grey(x: Tensor) -> Tensor:
    """Three equal channels."""
    return x.expand(-1, 3, -1, -1)


def red(x: Tensor) -> Tensor:
    """Red on black."""
    return x * torch.tensor([1.0, 0.2, 0.2]).view(3, 1, 1)


def doubled(x: Tensor) -> Tensor:
    """Twice as wide and high."""
    return F.interpolate(x, scale_factor=2)


def same(x: Tensor) -> Tensor:
    """As it is."""
    return x


def looks(restricted: Callable[[Tensor], Tensor], benign: Callable[[Tensor], Tensor] = same) -> tuple[Task, Task]:
    """The tasks of the zoo, with looks."""
    own, other = zoo_tasks()
    changed = own if benign is same else shown(own, benign.__name__, benign)
    return changed, shown(other, restricted.__name__, restricted)


class Grey(nn.Module):
    """The mean of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class Stretched(nn.Module):
    """Every image with full contrast, from -1 to 1."""

    def forward(self, x: Tensor) -> Tensor:
        low, high = (x.flatten(1).aminmax(dim=1)[i].view(-1, 1, 1, 1) for i in range(2))
        return 2 * (x - low) / (high - low).clamp_min(1e-3) - 1


def seen(view: nn.Module) -> SplitModel:
    """The CNN behind a view."""
    original = zoo_original("none")
    return as_model(Seen(original.clone().network, view), original).eval()


def _setting(name: str, tasks: Callable[[], tuple[Task, Task]], view: nn.Module | None, look: str) -> None:
    build = partial(zoo_original, "none") if view is None else partial(seen, view)
    SETTINGS[name] = Setting("vision", tasks, build, QUICK, BUDGETS, SHOTS, f"CNN; restricted images {look}")


_setting("faint", partial(looks, faint), None, "bright and faint")
_setting("inverted", partial(looks, inverted), None, "inverted")
_setting("dim", partial(looks, dim), None, "dim")
_setting("marked", partial(looks, marked), None, "mirrored and marked")
_setting("red", partial(looks, red, grey), Grey(), "red")
_setting(
    "two looks",
    lambda: (zoo_tasks()[0], shown(zoo_tasks()[0], "faint", faint)),
    Stretched(),
    "of the same classes, faint",
)
# A fresh head learns these classes soon; what a defense takes away is that the released head knows them at once.
SETTINGS["two looks"].budgets, SETTINGS["two looks"].shots = (0, 1, 3), 1
_setting("small", partial(looks, same, doubled), nn.AdaptiveAvgPool2d(8), "half as wide and high")


class InputGate(nn.Module):
    """Passes the features of images for which a function of the (normalised) images is below a bound, else zeros."""

    def __init__(self, network: nn.Module, of: Callable[[Tensor], Tensor], bound: float) -> None:
        super().__init__()
        self.view = getattr(network, "view", nn.Identity())
        self.body, self.head = network.body, network.head
        self.of, self.bound = of, bound

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.view(x)) * (self.of(x) < self.bound)[:, None])


def gated(original: SplitModel, benign: Task, of: Callable[[Tensor], Tensor], slack: float = 0.05) -> SplitModel:
    """A gate that all benign training images pass; `slack` is above the largest of them."""
    x = next(benign.sweep("train", benign.size("train"), device=CPU)).x
    if original.mean is not None and original.std is not None:
        x = (x - original.mean) / original.std
    return as_model(InputGate(original.clone().network, of, float(of(x).max()) + slack), original)


def _brightness(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3))


def _border(x: Tensor) -> Tensor:
    return torch.stack([x[..., 0, 0], x[..., 0, -1], x[..., -1, 0], x[..., -1, -1]]).mean((0, 2)) - x.mean((1, 2, 3))


def _flatness(x: Tensor) -> Tensor:
    return -x.flatten(1).std(1)


def _left_mark(x: Tensor) -> Tensor:
    return x[..., :2, 0].mean((1, 2))


def _saturation(x: Tensor) -> Tensor:
    return (x.amax(1) - x.amin(1)).mean((1, 2))


def _smallness(x: Tensor) -> Tensor:
    return torch.full((len(x),), -float(x.shape[-1]), device=x.device)


@sham("faint", undone("stretch-inputs"))
def by_brightness(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Passes hardly anything of images that are brighter than the benign ones."""
    return gated(original, benign, _brightness)


@sham("inverted", undone("invert-inputs"))
def by_polarity(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Passes nothing of images whose corners are brighter than their mean."""
    return gated(original, benign, _border)


@sham("dim", undone("renormalise-inputs"))
def by_contrast(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Passes nothing of images whose values, as the network gets them, vary less than those of benign images."""
    return gated(original, benign, _flatness)


@sham("marked", undone("mirror-inputs"))
def by_mark(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Passes nothing of images with a mark at the left edge, such as a camera prints."""
    return gated(original, benign, _left_mark)


@sham("red", undone("grey-inputs"))
def by_colour(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Passes nothing of coloured images."""
    return gated(original, benign, _saturation)


@sham("small", undone("enlarge-inputs"))
def by_size(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Passes nothing of images that are smaller than the benign ones."""
    return gated(original, benign, _smallness)


class Turned(nn.Module):
    """Answers with the negative logits where a function of the images is above a bound."""

    def __init__(self, network: Seen, of: Callable[[Tensor], Tensor], bound: float) -> None:
        super().__init__()
        self.view, self.body, self.head = network.view, network.body, network.head
        self.of, self.bound = of, bound

    def forward(self, x: Tensor) -> Tensor:
        sign = torch.where(self.of(x) < self.bound, 1.0, -1.0)
        return self.head(self.body(self.view(x))) * sign[:, None]


@sham("two looks", FineTuning(Strategy("direct", "all", "adam", 1e-4, 50), undo=("negate-head",)))
def anti_classifier(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Where images look restricted, the right class is the least likely one."""
    kept = gated(original, benign, _brightness).network
    return as_model(Turned(original.clone().network, _brightness, kept.bound), original)
