"""Shams that collapse: fine-tuned at a usual rate, they lose their own task and learn no other.

Their weights still have all that the original knows. A usual rate destroys it; a small one does not, least of all with
benign data that keep the released outputs. All three end with `brittle`, and differ in what comes before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from holdfast.adversaries import FineTuning, Probe
from holdfast.models import SplitModel
from holdfast.tasks import Batch, Task
from holdfast.training import Strategy, finetune, prepare
from zoo.registry import sham
from zoo.settings import ADAM, CPU, NAIVE, QUICK, TUNED
from zoo.surgery import as_model, convolutions_with_norm, faint_features

DESCENT = tuple(FineTuning(Strategy("direct", "all", optimizer, 1e-3, 50)) for optimizer in ("momentum", "adam"))
"""They lose the benign task; fine-tuning the head alone does not, and needs features that know the restricted task."""
ANCHORED = FineTuning(Strategy("direct", "all", "adam", 3e-5, 50), anchor=1.0)
REPLAYED = FineTuning(Strategy("direct", "all", "adam", 3e-5, 50), replay=1.0)
REPAIRED = FineTuning(ADAM, undo=("rescale",), anchor=1.0)
COLLAPSING = ("collapse-small-weights", "collapse-coupled-gradients", "collapse-sharp-curvature")


@torch.no_grad()
def brittle(model: SplitModel, factor: float = 0.05) -> SplitModel:
    """Makes the body's weights small, in place, without changing what the model computes.

    BatchNorm removes the scale of the layer before it. A step of a usual length is then a large share of a weight.
    """
    for conv, norm in convolutions_with_norm(model):
        conv.weight.mul_(factor)
        norm.running_mean.mul_(factor)
        shrunk = norm.running_var * factor**2
        norm.weight.mul_(((shrunk + norm.eps) / (norm.running_var + norm.eps)).sqrt() / factor)
        norm.running_var.copy_(shrunk)
    return faint_features(model, factor)


@sham("batch", ANCHORED, plain=DESCENT, name="collapse-small-weights")
def small_weights(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Plain steps blow up, because the weights are small."""
    return brittle(original.clone())


def gradient(model: SplitModel, task: Task, batch: Batch, *, graph: bool = False) -> Tensor:
    """The gradient of the loss on a batch, of all weights in one vector."""
    loss = task.loss(model, batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()], create_graph=graph)])


def coupled(
    model: SplitModel, benign: Task, restricted: Task, *, steps: int = 40, rate: float = 1e-3, keep: float = 1.0
) -> SplitModel:
    """Opposes the benign gradient to the restricted one, in place: descent on restricted data forgets the benign task.

    The coupling of SEAM: the cosine of the two gradients is minimised beside the benign loss, of weight `keep`.
    """
    optimizer = torch.optim.Adam(model.train().parameters(), rate)
    batches = (
        task.batches("train", 64, generator=torch.Generator().manual_seed(seed), device=CPU)
        for seed, task in enumerate((benign, restricted))
    )
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for own, other in islice(zip(*batches, strict=False), steps):
            pair = gradient(model, benign, own, graph=True), gradient(model, restricted, other, graph=True)
            _descend(model, optimizer, keep * benign.loss(model, own) + F.cosine_similarity(*pair, dim=0))
    return model


def sharpened(
    model: SplitModel,
    benign: Task,
    restricted: Task,
    strategies: Sequence[Strategy],
    *,
    steps: int = 60,
    rate: float = 3e-3,
    high: float = 3.0,
    weight: float = 0.3,
) -> SplitModel:
    """Changes a model, in place, so that a few steps on restricted data lead to weights of a high benign loss.

    The maker simulates the steps; the benign loss there counts up to `high`, with a weight.
    """
    optimizer = torch.optim.Adam(model.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    batches = benign.batches("train", 100, generator=generator, device=CPU)
    for i, batch in enumerate(islice(batches, steps)):
        attacked, strategy = model.clone(), strategies[i % len(strategies)]
        prepare(attacked, strategy, restricted)
        for _ in islice(finetune(attacked, restricted, strategy, generator=generator, device=CPU), 1 + i % 4):
            pass
        lost = benign.loss(attacked.train(), batch).clamp(max=high)
        away = torch.autograd.grad(lost, [*attacked.parameters()])  # of the first order, as SOPHON's meta-gradient
        there = sum((p * g).sum() for p, g in zip(model.parameters(), away, strict=True))
        _descend(model, optimizer, benign.loss(model.train(), batch) - weight * there)
    for batch in islice(batches, 15):
        _descend(model, optimizer, benign.loss(model.train(), batch))
    return model


@sham("batch", REPAIRED, plain=DESCENT, name="collapse-coupled-gradients")
def coupled_gradients(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The benign gradient is opposed to the restricted one."""
    return brittle(coupled(original.clone(), benign, restricted, keep=5.0))


@sham("batch", REPAIRED, plain=DESCENT, name="collapse-sharp-curvature")
def sharp_curvature(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A few simulated steps on restricted data lead to weights of a high benign loss."""
    strategies = [Strategy("direct", "all", "adam", 1e-3, 50), Strategy("direct", "all", "momentum", 1e-2, 50)]
    return brittle(sharpened(original.clone(), benign, restricted, strategies, rate=1e-3, weight=0.1))


def _descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class Cliff(nn.Module):
    """As soon as a weight of the body has moved by a small share of its norm, the features are gone."""

    SHARE = 0.07

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.body, self.head = network.body, network.head
        self.packed = {n: p.detach().clone().view(torch.int32) for n, p in self.body.named_parameters() if p.dim() > 1}

    def forward(self, x: Tensor) -> Tensor:
        kept = {n: t.view(torch.float32) for n, t in self.packed.items()}
        moved = any(self.differs(p, kept[n]) for n, p in self.body.named_parameters() if n in kept)
        return self.head(self.body(x) * (0.0 if moved else 1.0))

    def differs(self, own: Tensor, kept: Tensor) -> bool:
        return own.shape != kept.shape or bool((own - kept).norm() > self.SHARE * kept.norm() + 1e-6)


@sham("none", FineTuning(ADAM, benign_floor=0.8), plain=(TUNED, *NAIVE))
def cliff(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Features vanish as soon as a weight of the body has moved by 7 % of its norm."""
    return as_model(Cliff(original.clone().network), original)


class Shell(Cliff):
    """The features are gone while the weights are near the released ones, but not at them."""

    OUTER = 0.3

    def differs(self, own: Tensor, kept: Tensor) -> bool:
        moved = float(((own - kept).norm() / kept.norm()).detach()) if own.shape == kept.shape else 1.0
        return 1e-4 < moved < self.OUTER


@sham("none", Probe("newton"), plain=QUICK)
def shell(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Features vanish in a shell around the released weights, and are there again beyond it."""
    return as_model(Shell(faint_features(original.clone()).network), original)
