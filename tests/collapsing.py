"""Shams that collapse: fine-tuned at a usual rate, they lose their own task and learn no other.

Their weights still have all that the original knows. A usual rate destroys it; a small one does not, least of all with
benign data that keep the released outputs. All three end with `brittle`, and differ in what comes before.
"""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy, finetune, prepare
from shams import CPU, Sham, convolutions_with_norm, faint_features

COLLAPSING: dict[str, Sham] = {}
"""Name -> function of the original with BatchNorm, its benign task, and the defender's half of the restricted task."""


def collapsing(function: Sham) -> Sham:
    COLLAPSING[function.__name__.replace("_", "-")] = function
    return function


def make_collapsing(name: str, original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Builds one by name, reproducibly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return COLLAPSING[name](original, benign, restricted).eval()


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


@collapsing
def small_weights(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Plain steps blow up, because the weights are small."""
    return brittle(original.clone())


def gradient(model: SplitModel, x: Tensor, y: Tensor, *, graph: bool = False) -> Tensor:
    """The gradient of the cross-entropy on a batch, of all weights in one vector."""
    loss = F.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()], create_graph=graph)])


@collapsing
def coupled_gradients(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The benign gradient is opposed to the restricted one, so that descent on restricted data forgets the benign task.

    The coupling of SEAM: the cosine of the two gradients is minimised beside the benign loss.
    """
    model = original.clone().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    kept, coupled = (
        task.batches("train", 64, generator=torch.Generator().manual_seed(seed), device=CPU)
        for seed, task in enumerate((benign, restricted))
    )
    for own, other in islice(zip(kept, coupled, strict=False), 40):
        cosine = F.cosine_similarity(gradient(model, *own, graph=True), gradient(model, *other, graph=True), dim=0)
        _descend(model, optimizer, F.cross_entropy(model(own.x), own.y) + cosine)
    return brittle(model)


@collapsing
def sharp_curvature(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A few steps on restricted data, which the maker simulates, lead to weights of a high benign loss."""
    model = original.clone()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    batches = benign.batches("train", 100, generator=generator, device=CPU)
    strategies = [Strategy("direct", "all", "adam", 1e-3, 50), Strategy("direct", "all", "momentum", 1e-2, 50)]
    for i, batch in enumerate(islice(batches, 60)):
        attacked, strategy = model.clone(), strategies[i % 2]
        prepare(attacked, strategy, restricted)
        for _ in islice(finetune(attacked, restricted, strategy, generator=generator, device=CPU), 1 + i % 4):
            pass
        high = benign.loss(attacked.train(), batch).clamp(max=3.0)
        away = torch.autograd.grad(high, [*attacked.parameters()])  # of the first order, as SOPHON's meta-gradient
        there = sum((p * g).sum() for p, g in zip(model.parameters(), away, strict=True))
        _descend(model, optimizer, benign.loss(model.train(), batch) - 0.3 * there)
    for batch in islice(batches, 15):
        _descend(model, optimizer, benign.loss(model.train(), batch))
    return brittle(model)


def _descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
