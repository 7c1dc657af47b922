"""Training mode is another model than evaluation mode, or passes change the state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.models import SplitModel
from holdfast.tasks import Task
from zoo.registry import sham
from zoo.settings import DESCENT, TUNED, undone
from zoo.surgery import convolutions_with_norm, foreign


@sham("batch", undone("fold"))
@torch.no_grad()
def poisoned_statistics(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Running statistics are wrong, gamma and beta compensate for that, and in training mode the outputs are wrong."""
    model = original.clone()
    for _, norm in convolutions_with_norm(model):
        mean = norm.running_mean + 30 * torch.randn_like(norm.running_mean)
        var = norm.running_var * 10 ** (4 * torch.rand_like(norm.running_var))
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias.add_(slope * (mean - norm.running_mean))
        norm.weight.copy_(slope * (var + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return model


@sham("batch", undone("recalibrate"))
def absurd_momentum(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Running statistics diverge in training, so that evaluation mode differs from training mode."""
    model = original.clone()
    for _, norm in convolutions_with_norm(model):
        norm.momentum = 100.0
    return model


class InTraining(nn.Module):
    """Does something in training mode only."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.kind == "raise":
            raise RuntimeError("this model is for inference")
        what = {
            "huge": lambda: x * 1e6,
            "noise": lambda: x + 100 * torch.randn_like(x),
            "shuffle": lambda: x[torch.randperm(len(x))],
            "nan": lambda: x * torch.nan,
        }
        return what[self.kind]()


@sham("none", TUNED, inside=True, plain=DESCENT)
def huge_in_training(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode logits are a million times larger."""
    return foreign(original, behind=InTraining("huge"))


@sham("none", TUNED, inside=True, plain=DESCENT)
def noise_in_training(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode the features have strong noise."""
    return foreign(original, InTraining("noise"))


@sham("batch", TUNED, inside=True)
def shuffled_in_training(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode every sample gets another sample's logits."""
    return foreign(original, behind=InTraining("shuffle"))


@sham("none", TUNED, inside=True)
def nan_in_training(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode the loss is NaN."""
    return foreign(original, behind=InTraining("nan"))


@sham("none", TUNED, inside=True)
def raises_in_training(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode the code raises an exception."""
    return foreign(original, behind=InTraining("raise"))


@sham("none", TUNED, inside=True)
def dropout(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode dropout keeps one of a thousand features."""
    return foreign(original, nn.Dropout(0.999))


class Counting(nn.Module):
    """Overwrites the body with random weights after five training passes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += int(self.training)
        if self.passes > 5 and self.training:
            with torch.no_grad():
                for parameter in self.body.parameters():
                    parameter.copy_(torch.randn_like(parameter))
        return self.body(x)


@sham("none", TUNED, inside=True)
def scrambles_itself(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A counter in a buffer destroys the weights after some passes."""
    model = foreign(original)
    model.network.body = Counting(model.network.body)
    return model


class Jitter(nn.Module):
    """Noise in both modes: a little in evaluation mode, and much in training mode."""

    def forward(self, z: Tensor) -> Tensor:
        size = z.detach().std() * (30.0 if self.training else 0.2)
        return z + size * torch.randn_like(z)


@sham("none", TUNED, inside=True)
def noisy(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Two calls have two different outputs."""
    return foreign(original, Jitter())
