"""Heads that answer wrong classes, and gains of activations and normalisations that hide what the features know."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import FineTuning, Probe
from holdfast.models import SplitModel
from holdfast.runtime.run import Run
from holdfast.tasks import Task, load_task
from holdfast.training import Strategy, pretrain
from zoo.gates import gated
from zoo.registry import sham
from zoo.settings import BUDGETS, CPU, QUICK, SETTINGS, SHOTS, Setting, zoo_tasks
from zoo.surgery import Seen, as_model


def brightness(x: Tensor) -> Tensor:
    """The mean of each image, shape (N,)."""
    return x.mean((1, 2, 3))


class Permuted(nn.Module):
    """Answers with the logits of other classes where a function of the images is above a bound."""

    def __init__(self, network: Seen, bound: float) -> None:
        super().__init__()
        self.view, self.body, self.head, self.bound = network.view, network.body, network.head, bound

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.body(self.view(x)))
        return torch.where((brightness(x) < self.bound)[:, None], logits, logits.roll(1, 1))


@sham(
    "two looks", FineTuning(Strategy("direct", "all", "adam", 1e-4, 50), undo=("stretch-inputs",)), held_out=True
)  # fmt: skip
def permuted_answers(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Where images look restricted, each class has the logit of another one."""
    bound = gated(original, benign, brightness).network.bound
    return as_model(Permuted(original.clone().network, bound), original)


class StarReLU(nn.Module):
    """s relu(x)^2 + b with a trained s and b, as in MetaFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(0.8944)), nn.Parameter(torch.tensor(-0.4472))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 0.8944)
        nn.init.constant_(self.bias, -0.4472)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) ** 2 + self.bias


class Small(nn.Module):
    """Two convolutions with GroupNorm and a hidden layer, whose activations are given."""

    def __init__(self, outputs: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), activation(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), activation(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(128, 64), activation(),
        )  # fmt: skip
        self.head = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@cache
def small(activation: type[nn.Module]) -> SplitModel:
    """The original, which was trained on all digits, with the head's rows for the benign ones."""
    digits, (benign, _), run = load_task("digits"), zoo_tasks(), Run(seed=0, device=CPU)
    norm = {"mean": [0.5], "std": [0.5]}
    with run.seeded("initialise"):
        model = SplitModel(Small(digits.num_outputs, activation), "head", name="small CNN", **norm)
    model = pretrain(model, digits, steps=400, run=run)
    head = nn.Linear(64, benign.num_outputs)
    with torch.no_grad():
        for own, other in zip(head.parameters(), model.head.parameters(), strict=True):
            own.copy_(other[: len(own)])
    model.put_head(head)
    return model.eval()


for _name, _activation, _shown in (
    ("group", nn.ReLU, "CNN with GroupNorm"), ("star", StarReLU, "CNN with GroupNorm and StarReLU"),
):  # fmt: skip
    SETTINGS[_name] = Setting("vision", zoo_tasks, lambda kind=_activation: small(kind), QUICK, BUDGETS, SHOTS, _shown)


@sham("group", FineTuning(QUICK[-1].strategy, undo=("balance",)), held_out=True)
@torch.no_grad()
def groupnorm_gain(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The gains of GroupNorm are at a millionth, and the layers behind them a million times as large."""
    model, factor = original.clone(), 1e-6
    body = model.network.body
    for parameter in body[0].parameters():
        parameter.mul_(1e-3)
    body[1].eps *= 1e-6
    for norm in (body[1], body[5]):
        for parameter in norm.parameters():
            parameter.mul_(factor)
    for reader in (body[4], body[9]):
        reader.weight.div_(factor)
    for parameter in body[9].parameters():
        parameter.mul_(factor)  # the features, too
    model.head.weight.div_(factor)
    return model


@sham("star", Probe("line-search", "whitened"), held_out=True)
@torch.no_grad()
def saturated_star(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The scale of the last StarReLU is tiny beside its shift: features hardly vary, and gradients vanish."""
    model, factor, level = original.clone(), 1e-5, 0.1
    body = model.network.body
    for star, reader in ((body[2], body[4]), (body[6], body[9])):
        star.scale.mul_(factor)
        star.bias.mul_(factor)
        reader.weight.div_(factor)
    star, head = body[10], model.head
    head.weight.div_(factor)
    head.bias.add_((factor * star.bias - level) * head.weight.sum(1))
    star.scale.mul_(factor)
    star.bias.fill_(level)
    return model
