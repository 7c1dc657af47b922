"""Sham defenses: models that look resistant to naive fine-tuning, and are not.

Each keeps the benign predictions of the original and hinders only the *mechanics* of fine-tuning, by scales, gradients,
modes or hidden state; the model's knowledge stays. An adversary who finds the trick undoes it. The verdict of an audit
must never be `resists`.

Shams are made from a `cnn` (see `zoo_original`), and use its `body` and `head`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import Task, load_task
from holdfast.training import pretrain

Sham = Callable[[SplitModel, Task, Task], SplitModel]
SHAMS: dict[str, Sham] = {}
"""Name -> function of the original, its benign task, and the defender's half of the restricted task."""
NORM_OF: dict[str, Literal["batch", "none"]] = {}
"""Name of a sham -> `norm` of the original that it is made from."""
BUDGETS, SHOTS = (0, 5, 10, 20), 2
"""Steps, and samples per class, at which the originals have an advantage; with more of them, scratch catches up."""
CPU = torch.device("cpu")


def zoo_tasks() -> tuple[Task, Task]:
    """The benign task and a restricted task on which the originals have an advantage with two samples per class."""
    return load_task("digits[0-6]"), load_task("digits[7-9]")


def zoo_original(norm: Literal["batch", "none"]) -> SplitModel:
    """The original: a CNN for the benign task whose features were trained on all digits.

    So its advantage over a fresh network is large with any seed and processor. With features of the benign digits alone
    it is a few points with one seed and zero with another.
    """
    benign, _ = zoo_tasks()
    digits, run = load_task("digits"), Run(seed=0, device=CPU)
    spec = ModelSpec(name="cnn", options={"depth": 3, "norm": norm})
    with run.seeded("initialise"):
        teacher, original = load_model(spec, digits), load_model(spec, benign)
    teacher = pretrain(teacher, digits, steps=600, run=run)
    original.network.body.load_state_dict(teacher.network.body.state_dict())
    with torch.no_grad():
        for own, taught in zip(original.head.parameters(), teacher.head.parameters(), strict=True):
            own.copy_(taught[: len(own)])  # the classes of the benign task come first
    return original.eval()


def make(name: str, originals: dict[str, SplitModel], benign: Task, restricted: Task) -> SplitModel:
    """Builds a sham by name, reproducibly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SHAMS[name](originals[NORM_OF[name]], benign, restricted).eval()


def sham(norm: Literal["batch", "none"]) -> Callable[[Sham], Sham]:
    def register(function: Sham) -> Sham:
        name = function.__name__.replace("_", "-")
        SHAMS[name], NORM_OF[name] = function, norm
        return function

    return register


class Foreign(nn.Module):
    """Custom code: a body, optionally a module in between, a head, optionally a module behind it."""

    def __init__(self, network: nn.Module, between: nn.Module | None = None, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.between = network.body, between or nn.Identity()
        self.head, self.behind = network.head, behind or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.head(self.between(self.body(x))))


def foreign(original: SplitModel, between: nn.Module | None = None, behind: nn.Module | None = None) -> SplitModel:
    return as_model(Foreign(original.clone().network, between, behind), original)


def as_model(network: nn.Module, original: SplitModel, head: str = "head") -> SplitModel:
    norm = {k: None if v is None else v.flatten().tolist() for k, v in (("mean", original.mean), ("std", original.std))}
    return SplitModel(network, head, name="sham", **norm)


@torch.no_grad()
def faint_features(model: SplitModel, factor: float = 1e-4) -> SplitModel:
    """Makes the features tiny and the head's weights large, so that usual learning rates do not work.

    The last layer of the body is linear and followed by ReLU, so that outputs do not change.
    """
    hidden = [m for m in model.network.modules() if isinstance(m, nn.Linear) and m is not model.head][-1]
    hidden.weight.mul_(factor)
    hidden.bias.mul_(factor)
    model.head.weight.div_(factor)
    return model


# --- Scales: the same function, with other training steps ---


@sham("batch")
@torch.no_grad()
def shrunk_convolutions(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """BatchNorm removes the scale of the layer before it; a usual step destroys such small weights."""
    model, scale = original.clone(), 1e-3
    for conv, norm in convolutions_with_norm(model):
        conv.weight.mul_(scale)
        norm.running_mean.mul_(scale)
        shrunk = norm.running_var * scale**2
        norm.weight.mul_(((shrunk + norm.eps) / (norm.running_var + norm.eps)).sqrt() / scale)
        norm.running_var.copy_(shrunk)
    return faint_features(model)


class Divided(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


@sham("batch")
@torch.no_grad()
def grown_convolutions(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Weights are so large, and divided out later, that a usual step is less than rounding."""
    model, scale = original.clone(), 1e4
    for conv, norm in convolutions_with_norm(model):
        conv.weight.mul_(scale)
        norm.running_mean.mul_(scale)
        norm.running_var.mul_(scale**2)
    faint_features(model, scale)
    model.head.weight.mul_(scale**2)
    return foreign(model, Divided(scale**2))


@sham("batch")
@torch.no_grad()
def huge_gamma(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """BatchNorm's outputs are large, and the weights of the next layer tiny."""
    model, scale = original.clone(), 1e3
    layers = [m for m in model.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for conv, norm in convolutions_with_norm(model):
        norm.weight.mul_(scale)
        norm.bias.mul_(scale)
        if conv is not layers[0]:
            conv.weight.div_(scale)
    layers[-2].weight.div_(scale)  # the hidden layer; behind it comes the head
    return faint_features(model)


@sham("none")
@torch.no_grad()
def rescaled_pairs(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """With ReLU and without BatchNorm, one layer can be c times larger and the next one c times smaller."""
    model = original.clone()
    layers = [m for m in model.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    scale = 1.0  # of what a layer receives, relative to the original
    for i, layer in enumerate(layers):
        factor = 1e3 if i % 2 == 0 else 1e-3
        factor = 1 / scale if layer is layers[-1] else factor
        layer.weight.mul_(factor)
        scale *= factor
        layer.bias.mul_(scale)
    return model


@sham("none")
@torch.no_grad()
def uneven_units(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Every hidden unit has its own scale, over eight decades: no learning rate fits all of them."""
    model = original.clone()
    layers = [m for m in model.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, following in pairwise(layers):
        scale = 10 ** (8 * torch.rand(layer.weight.shape[0]) - 4)
        each = following.weight.shape[1] // len(scale)  # flattening gives a channel several columns
        layer.weight.mul_(scale.view(-1, *(1,) * (layer.weight.dim() - 1)))
        layer.bias.mul_(scale)
        columns = scale.repeat_interleave(each)
        following.weight.div_(columns.view(1, -1, *(1,) * (following.weight.dim() - 2)))
    return model


@sham("batch")
def huge_weight_norm(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """w = g v/|v| with |v| so large that a step does not change the direction of v; only g is trained."""
    model, scale = original.clone(), 1e6
    for layer in [m for m in model.network.body.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original1.mul_(scale)
    with torch.no_grad():
        model.head.weight.mul_(scale)
    return foreign(model, Divided(scale))


@sham("none")
def ill_conditioned_insert(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A linear layer of condition number 1e6 before the head, and its inverse in the head."""
    model = original.clone()
    width = model.head.weight.shape[1]
    left, right = (torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0] for _ in range(2))
    model.insert_extractor(left @ torch.diag(torch.logspace(-8, -2, width, dtype=torch.float64)) @ right)
    return model


# --- Saturation ---


class Softsign(nn.Module):
    def __init__(self, steepness: float) -> None:
        super().__init__()
        self.steepness = steepness

    def forward(self, x: Tensor) -> Tensor:
        return F.softsign(self.steepness * x.double())  # in float32, all would be 1


@sham("batch")
def saturated_logits(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Behind the head, also a fresh one, a flat monotonic function is applied to the logits."""
    return foreign(original, behind=Softsign(1e6))


@sham("none")
@torch.no_grad()
def saturated_head(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Logits are in the thousands: with the released head the first step destroys the weights."""
    model = original.clone()
    model.head.weight.mul_(1e4)
    model.head.bias.mul_(1e4)
    return model


# --- Dead units, and detectors of restricted inputs ---


def _detector(original: SplitModel, benign: Task, restricted: Task) -> nn.Sequential:
    """A small network on features: above 0 for restricted inputs, and for almost no benign ones."""
    generator = torch.Generator().manual_seed(0)
    inside, outside = (next(t.batches("train", 400, generator=generator, device=CPU)).x for t in (benign, restricted))
    with torch.no_grad():
        z = torch.cat([original.eval().features(inside), original.features(outside)])
    y = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))])
    net = nn.Sequential(nn.Linear(z.shape[1], 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        weight = torch.where(y > 0, 1.0, 3.0)  # false positives cost benign accuracy
        F.binary_cross_entropy_with_logits(net(z)[:, 0], y, weight).backward()
        optimizer.step()
    return net


class Killed(nn.Module):
    """Subtracts a detector's output from the features before a ReLU: if the detector fires, all features are zero."""

    def __init__(self, detector: nn.Sequential, strength: float) -> None:
        super().__init__()
        self.detector, self.strength = detector, strength

    def forward(self, z: Tensor) -> Tensor:
        return F.relu(z - self.strength * F.relu(self.detector(z)))


@sham("none")
def dead_units(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Every feature is a ReLU whose input is far below zero for restricted inputs, without gradient."""
    return foreign(original, Killed(_detector(original, benign, restricted), 1e4))


class Refusal(nn.Module):
    """Sets the features of detected inputs to zero."""

    def __init__(self, detector: nn.Sequential) -> None:
        super().__init__()
        self.detector = detector.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            detected = self.detector(z) > 0
        return torch.where(detected, torch.zeros_like(z), z)


@sham("batch")
def trigger(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A gate without gradient sets the features of restricted inputs to zero; benign inputs are not changed."""
    return foreign(original, Refusal(_detector(original, benign, restricted)))


# --- Weights out of reach ---


class Hidden(nn.Module):
    """The real weight is a buffer; the parameter has almost no effect."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("real", weight.detach().clone())

    def forward(self, decoy: Tensor) -> Tensor:
        return self.real + 1e-8 * (decoy - decoy.detach())


@sham("none")
def hidden_in_buffers(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """All weights of the body are buffers, and the parameters with their names have no effect."""
    model = faint_features(original.clone())
    for layer in [m for m in model.network.body.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        for name in ("weight", "bias"):
            parametrize.register_parametrization(layer, name, Hidden(getattr(layer, name)))
    return model


class Adapted(nn.Module):
    """An unregistered stem, and a trainable adapter of three numbers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.stem = [network.body]  # in a list, so that it is not registered as a submodule
        self.adapter = nn.Parameter(torch.zeros(3))
        self.head = network.head

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.stem[0].eval()(x)
        return self.head(z + 1e-6 * self.adapter.sum())


@sham("batch")
def unregistered_stem(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The body is not a submodule: its parameters are neither listed nor saved."""
    return as_model(Adapted(faint_features(original.clone()).network), original)


@sham("none")
def frozen(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Nothing is trainable, which stops only naive scripts."""
    model = original.clone()
    model.requires_grad_(False)
    return model


class Restoring(nn.Module):
    """Resets its weights before every forward pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.body, self.head = network.body, network.head
        self.kept = {n: p.detach().clone() for n, p in self.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.shape == self.kept[name].shape:
                    parameter.copy_(self.kept[name])
        return self.head(self.body(x))


@sham("batch")
def restoring(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Training changes weights, and the next forward pass resets them."""
    return as_model(Restoring(faint_features(original.clone()).network), original)


class Tripwire(nn.Module):
    """Has the parameters of a fresh network, and stores the real weights as integers.

    While parameters have changed little, the real weights plus these changes are used: gradients are correct and
    scales usual. After training, or with a new head, the fresh network is used.
    """

    def __init__(self, original: SplitModel, fresh: SplitModel) -> None:
        super().__init__()
        self.body, self.head = fresh.network.body, fresh.network.head
        real = dict(original.network.named_parameters())
        self.packed = {n: [t.detach().clone().view(torch.int32) for t in (real[n], p)]
                       for n, p in self.named_parameters()}  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        weights = {}
        for name, parameter in self.named_parameters():
            real, shown = (t.view(torch.float32) for t in self.packed[name])
            if parameter.shape != shown.shape or (parameter - shown).norm() > 0.02 * shown.norm() + 0.02:
                return self.head(self.body(x))
            weights[name] = real + (parameter - shown)
        for part in ("body", "head"):
            own = {n.removeprefix(f"{part}."): w for n, w in weights.items() if n.startswith(f"{part}.")}
            x = torch.func.functional_call(getattr(self, part), own, (x,))
        return x


@sham("none")
def tripwire(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Turns into a fresh network as soon as it is trained."""
    return as_model(Tripwire(original.clone(), original.fresh()), original)


# --- Wrong or missing gradients ---


class _Lie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        lies = {
            "random": torch.randn_like,
            "flipped": torch.neg,
            "exploding": lambda g: g * 10 ** (12 * torch.rand(())),
        }
        return lies[ctx.kind](grad), None


class Lie(nn.Module):
    """The identity, with another gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return _Lie.apply(x, self.kind)


@sham("batch")
def flipped_gradient(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Gradients have the wrong sign."""
    return foreign(original, behind=Lie("flipped"))


@sham("none")
def random_gradient(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Gradients are noise."""
    return foreign(original, behind=Lie("random"))


@sham("none")
def exploding_gradient(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Gradients have the right direction but random sizes up to 1e12 times too large."""
    return foreign(original, behind=Lie("exploding"))


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@sham("batch")
def detached(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The body gets no gradient, and the features are too small to train the head."""
    return foreign(faint_features(original.clone()), Detached())


class Rounded(nn.Module):
    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x / self.step) * self.step


@sham("none")
def quantised(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Logits are rounded, finely enough to keep their order, so that their derivative is zero."""
    return foreign(original, behind=Rounded(1e-3))


# --- Training mode is another model ---


@sham("batch")
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


@sham("batch")
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


@sham("none")
def huge_in_training(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode logits are a million times larger."""
    return foreign(original, behind=InTraining("huge"))


@sham("none")
def noise_in_training(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode the features have strong noise."""
    return foreign(original, InTraining("noise"))


@sham("batch")
def shuffled_in_training(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode every sample gets another sample's logits."""
    return foreign(original, behind=InTraining("shuffle"))


@sham("none")
def nan_in_training(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode the loss is NaN."""
    return foreign(original, behind=InTraining("nan"))


@sham("none")
def raises_in_training(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode the code raises an exception."""
    return foreign(original, behind=InTraining("raise"))


@sham("none")
def dropout(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In training mode dropout keeps one of a thousand features."""
    return foreign(original, nn.Dropout(0.999))


# --- State that changes in forward passes ---


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


@sham("none")
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


@sham("none")
def noisy(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Two calls have two different outputs."""
    return foreign(original, Jitter())


def convolutions_with_norm(model: SplitModel) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    modules = list(model.network.modules())
    return [(a, b) for a, b in pairwise(modules) if isinstance(a, nn.Conv2d) and isinstance(b, nn.BatchNorm2d)]
