"""Measurements of a model before an attack: scales, gradients, dead units, its two modes, and changing state.

`holdfast.auditing.red_flags` judges them, by comparing the released model with the original and a fresh one. A model
may have any code: exceptions that it raises become part of the result. The model is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from holdfast.models import SplitModel, every_tensor
from holdfast.runtime.run import Run
from holdfast.tasks import Batch, Task

SAMPLES = 128
"""Number of samples of each task; fewer, if the task says so (`Task.rows_at_once`)."""

PASSES = 8
"""Forward passes in training mode, without a step, after which state is compared."""

STEPS = (1e-6, 1e-3)
"""Relative step sizes of finite differences. Kinks of ReLU distort the long one, rounding the short one: the better
one counts.
"""

AGREES = 1e-2
"""An error below which no further differences are computed."""

DIRECTIONS = 3
GROUPS = 6
FEW = 16
"""Number of samples for repeated passes: finite differences, and comparisons of state."""

Norm = nn.modules.batchnorm._BatchNorm


@dataclass
class Inspection:
    """Measurements of one model; a part that failed is empty and has its error in `failures`.

    Attributes:
        failures: error messages of the parts that could not be measured ("evaluation", "training", "gradients",
            "state", "derivatives" or "tensors").
        weights: root mean square of each weight tensor of two or more axes.
        activations: the same of each layer's outputs, on benign samples in evaluation mode.
        logits: the same of the logits on benign and on restricted samples; may not be finite.
        negated: accuracy of its own head times -1 on restricted samples; None: the head has too few outputs.
        guess: accuracy of the best constant answer on the same samples.
        dead_units: largest share of a layer's inputs that are zero for all restricted samples, and the layer.
        dead_samples: largest share of restricted samples for which all inputs of a layer are zero, and the layer.
        in_a_row: condition numbers of linear layers whose output is the input of another linear layer.
        statistics: by BatchNorm layer, how far benign data is from the running statistics; see `Statistics`.
        unrepeatable: difference of two equal calls, relative to the spread of the logits.
        gradients: by setting ("fresh head", "own head") and weight tensor: norm of the gradient over that of the
            weights.
        scores: benign score of a batch in "evaluation" mode, in "training" mode, and in evaluation mode "after" passes
            in training mode without a step.
        moved: by mode, names of the tensors that a forward pass changed, except BatchNorm statistics.
        false_gradients: by group of weights and mode, relative error of the gradient against finite differences.
        parameters: number of parameters, and of trainable parameters.
        hidden: floating-point numbers in other tensors than parameters and BatchNorm statistics.
    """

    failures: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    activations: dict[str, float] = field(default_factory=dict)
    logits: dict[str, float] = field(default_factory=dict)
    negated: float | None = None
    guess: float = 0.0
    dead_units: tuple[float, str] = (0.0, "")
    dead_samples: tuple[float, str] = (0.0, "")
    in_a_row: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    unrepeatable: float = 0.0
    gradients: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    moved: dict[str, list[str]] = field(default_factory=dict)
    false_gradients: dict[str, float] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    hidden: int = 0


@dataclass(frozen=True)
class Statistics:
    """Running statistics of a BatchNorm layer, compared with its inputs on benign data.

    Attributes:
        shift: root mean square over channels of the distance of the means, in running standard deviations.
        factor: geometric mean over channels of the ratio of the variances, or its inverse: at least 1.
        momentum: of the layer; None: a plain average.
        eps: of the layer, relative to its typical running variance.
        estimated: False if the statistics are still those of a new layer.
    """

    shift: float
    factor: float
    momentum: float | None
    eps: float
    estimated: bool


Part = Literal["evaluation", "training", "gradients", "state", "derivatives", "tensors"]
PARTS: Final[tuple[Part, ...]] = get_args(Part)


def inspect(
    model: SplitModel, *, benign: Task, restricted: Task, run: Run, parts: Collection[Part] = PARTS
) -> Inspection:
    """Measures a model without changing it.

    Args:
        model: the model, whose code may fail.
        benign: the model's own task; a batch of its training data is used.
        restricted: the restricted task, likewise.
        run: seed and device.
        parts: what to measure; each part is independent. "derivatives" compares gradients with finite differences,
            which takes most of the time.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> benign, restricted = load_task("digits[0-4]"), load_task("digits[5-9]")
        >>> found = inspect(load_model("mlp", benign), benign=benign, restricted=restricted, run=Run())
        >>> found.parameters, found.hidden, found.failures
        ((25477, 25477), 0, {})
        >>> sorted(found.gradients["fresh head"])
        ['network.body.1.weight', 'network.body.3.weight', 'network.head.weight']
    """
    result = Inspection()
    own, other = (_batch(task, run) for task in (benign, restricted))
    measures: dict[Part, Callable[[SplitModel], None]] = {
        "evaluation": lambda m: _evaluation(m, own, restricted, other, result),
        "training": lambda m: _training(m, benign, own, result),
        "gradients": lambda m: _gradients(m, benign, own, restricted, other, result),
        "state": lambda m: _state(m, own, result),
        "derivatives": lambda m: _derivatives(m, benign, own, result),
        "tensors": lambda _: _tensors(model, result),
    }
    for name in (part for part in PARTS if part in parts):
        with run.seeded("inspect", name):
            try:
                measures[name](model.clone().to(run.device).requires_grad_(True))
            except Exception as error:  # the user's code may raise anything
                result.failures[name] = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return result


def _batch(task: Task, run: Run) -> Batch:
    size = task.rows_at_once(min(SAMPLES, task.size("train")))
    return next(iter(task.batches("train", size, generator=run.generator("inspect", task.name), device=run.device)))


def rms(x: Tensor) -> float:
    """Returns the root mean square, in float64."""
    return float(x.detach().cpu().double().square().mean().sqrt()) if x.numel() else 0.0


# --- Evaluation mode ---


@torch.no_grad()
def _evaluation(model: SplitModel, benign: Batch, restricted: Task, other: Batch, result: Inspection) -> None:
    model.eval()
    result.weights = {n: rms(p) for n, p in model.named_parameters() if p.dim() > 1}
    with _Watch(model) as watch:
        logits = model(benign.x)
        result.activations, result.in_a_row, result.statistics = watch.outputs, watch.in_a_row, watch.statistics
    result.logits["benign"] = rms(logits)
    result.unrepeatable = rms(model(benign.x) - logits) / (rms(logits - logits.mean()) or 1.0)
    with _Watch(model) as watch:
        logits = model(other.x)
        result.logits["restricted"] = rms(logits)
        result.dead_units, result.dead_samples = watch.dead_units, watch.dead_samples
    if restricted.labels_are_classes and model.num_outputs >= restricted.num_outputs:
        result.negated = restricted.batch_skill(-logits, other)
        result.guess = float(other.y.bincount().max() / len(other.y))


class _Watch:
    """A context in which hooks measure the inputs and outputs of a model's layers."""

    def __init__(self, model: SplitModel) -> None:
        self.model = model
        self.outputs: dict[str, float] = {}
        self.in_a_row: dict[str, float] = {}
        self.statistics: dict[str, Statistics] = {}
        self.dead_units = self.dead_samples = (0.0, "")
        self._linear: dict[int, tuple[Tensor, Tensor]] = {}  # by id: output, kept so that ids stay unique, and weight
        self._first = True

    def __enter__(self) -> _Watch:
        self._hooks = []
        self._names = {layer: name for name, layer in self.model.network.named_modules()}
        for layer in self._names:
            if not any(layer.children()) or isinstance(layer, nn.Conv2d | nn.Linear):
                self._hooks.append(layer.register_forward_hook(self._hook))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
            return
        name = self._names[layer]
        self.outputs[name] = rms(output)
        if isinstance(layer, Norm) and layer.running_mean is not None:
            self.statistics[name] = _statistics(layer, args[0])
        if isinstance(layer, nn.Conv2d | nn.Linear):
            self._linear_layer(name, layer, args[0], output)

    def _linear_layer(self, name: str, layer: nn.Conv2d | nn.Linear, inputs: Tensor, output: Tensor) -> None:
        _, before = self._linear.get(id(inputs), (None, None))
        if before is not None:
            weight = before.detach().cpu().double().flatten(1)
            sigma = torch.linalg.svdvals(torch.nan_to_num(weight))
            self.in_a_row[name] = float(sigma[0] / sigma[-1].clamp_min(torch.finfo(torch.float64).tiny))
        self._linear[id(output)] = output, layer.weight
        if not self._first:  # inputs of the first layer are data: pixels that are always black are not dead units
            active = inputs != 0
            units = active.movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1).any(1)
            samples = active.flatten(1).any(1)
            self.dead_units = max(self.dead_units, (1 - float(units.float().mean()), name))
            self.dead_samples = max(self.dead_samples, (1 - float(samples.float().mean()), name))
        self._first = False


def _statistics(layer: Norm, inputs: Tensor) -> Statistics:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var = layer.running_mean.cpu().double(), layer.running_var.cpu().double()
    channels = inputs.detach().cpu().double().movedim(1, 0).flatten(1)
    eps = torch.finfo(torch.float32).tiny
    ratio = ((channels.var(1, correction=0) + layer.eps) / (var + layer.eps).clamp_min(eps)).clamp_min(eps).log()
    return Statistics(
        shift=float(((channels.mean(1) - mean).square() / (var + layer.eps).clamp_min(eps)).mean().sqrt()),
        factor=float(ratio.mean().abs().exp()),
        momentum=layer.momentum,
        eps=float(layer.eps / var.median().clamp_min(eps)),
        estimated=not (bool((mean == 0).all()) and bool((var == 1).all())),
    )


# --- Training mode ---


@torch.no_grad()
def _training(model: SplitModel, task: Task, batch: Batch, result: Inspection) -> None:
    result.scores["evaluation"] = _score(model.eval(), task, batch)
    result.scores["training"] = _score(model.train(), task, batch)
    for _ in range(PASSES):
        model.train()(batch.x)
    result.scores["after"] = _score(model.eval(), task, batch)


def _score(model: SplitModel, task: Task, batch: Batch) -> float:
    """Accuracy, or explained variance, in the model's current mode; NaN if outputs are not finite."""
    logits = model(batch.x)
    return task.batch_skill(logits, batch) if bool(logits.isfinite().all()) else math.nan


def _gradients(model: SplitModel, benign: Task, own: Batch, restricted: Task, other: Batch, result: Inspection) -> None:
    """Measures relative norms of gradients in training mode, as at an adversary's first step.

    With its own head a good model has nearly no loss and gradient, so labels are shuffled.
    """
    shuffled = Batch(own.x, own.y[torch.randperm(len(own.y)).to(own.y.device)])
    result.gradients["own head"] = _relative(model.train(), benign.loss(model, shuffled))
    model.reset_head(restricted.num_outputs)
    result.gradients["fresh head"] = _relative(model.train(), restricted.loss(model, other))


def _relative(model: SplitModel, loss: Tensor) -> dict[str, float]:
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    if not loss.requires_grad:
        return dict.fromkeys(weights, 0.0)
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {
        name: 0.0 if g is None else rms(g) / max(rms(p), torch.finfo(torch.float32).tiny)
        for (name, p), g in zip(weights.items(), gradients, strict=True)
    }


# --- State ---


@torch.no_grad()
def _state(model: SplitModel, batch: Batch, result: Inspection) -> None:
    """Finds tensors that a forward pass changes; weights are changed a little before, so that resetting them shows."""
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-3)
    for mode, passes in (("evaluation", 1), ("training", PASSES)):
        before = {name: t.clone() for name, t in _watched(model)}
        for _ in range(passes):
            model.train(mode == "training")(batch.x[:FEW])
        result.moved[mode] = [n for n, t in _watched(model) if n not in before or not _equal(t, before[n])]


def _watched(model: SplitModel) -> Iterator[tuple[str, Tensor]]:
    """All tensors except BatchNorm statistics."""
    norms = {id(b) for m in model.modules() if isinstance(m, Norm) for b in m.buffers(recurse=False)}
    return ((n, t) for n, t in every_tensor(model.network) if id(t) not in norms)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _tensors(model: SplitModel, result: Inspection) -> None:
    parameters = list(model.network.parameters())
    result.parameters = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    known = {id(p) for p in parameters}
    result.hidden = sum(t.numel() for _, t in _watched(model) if id(t) not in known and t.is_floating_point())


# --- Gradients against finite differences ---


def _derivatives(model: SplitModel, task: Task, batch: Batch, result: Inspection) -> None:
    """Compares directional derivatives by autograd with finite differences, in float64 if the model can run in it."""
    few = Batch(batch.x[:FEW], batch.y[:FEW])
    for training in (False, True):
        try:
            errors = _errors(model.clone().double(), task, few, training)
        except Exception:
            # The code does not run in float64; then the long step counts.
            errors = _errors(model.clone(), task, few, training)
        for name, error in errors.items():
            result.false_gradients[f"{name} ({'training' if training else 'evaluation'} mode)"] = error


def _errors(model: SplitModel, task: Task, batch: Batch, training: bool) -> dict[str, float]:
    parameters = dict(model.named_parameters())
    head = {n for n in parameters if n.startswith(f"network.{model.head_name}.")}
    large = [n for n, p in parameters.items() if p.dim() > 1]
    groups = {
        "all weights": list(parameters),
        "the body": [n for n in parameters if n not in head],
        "the head": list(head),
    }
    groups |= {f"{n!r}": [n] for n in large[:: max(1, len(large) // GROUPS)]}

    # `torch.manual_seed` costs more than a pass of a small network while no GPU is in use, see `Run.seeded`.
    seed = torch.default_generator.manual_seed if batch.x.device.type == "cpu" else torch.manual_seed

    def value() -> Tensor:
        with torch.random.fork_rng(devices=[batch.x.device] if batch.x.is_cuda else []):
            seed(0)  # the same dropout each time
            return task.loss(model.train(training), batch)

    loss = value()
    names = [n for n, p in parameters.items() if p.requires_grad]
    slopes = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True) if loss.requires_grad else ()
    gradient = {n: g for n, g in zip(names, slopes, strict=False) if g is not None}
    by_group = {}
    for name, members in groups.items():
        errors = []
        for _ in range(DIRECTIONS if members else 0):
            errors.append(_error({n: parameters[n] for n in members}, gradient, value))
            if errors[-1] < AGREES:  # a wrong gradient agrees this well in one of a hundred directions
                break
        known = sorted(e for e in errors if not math.isnan(e))
        if known:
            by_group[name] = known[0] if known[0] < AGREES else known[len(known) // 2]
    return by_group


def _error(parameters: dict[str, nn.Parameter], gradient: dict[str, Tensor], value: Callable[[], Tensor]) -> float:
    """Relative error along one random direction; NaN if both derivatives are below rounding errors."""
    # Relative to each weight, because units may have very different scales.
    direction = {n: torch.randn_like(p) * (p.detach().abs() if rms(p) else 1e-2) for n, p in parameters.items()}
    slope = sum(float((gradient[n] * d).sum()) for n, d in direction.items() if n in gradient)
    errors = []
    for step in STEPS:
        values = []
        with torch.no_grad():
            kept = {n: p.clone() for n, p in parameters.items()}
            for sign in (1, -1):
                for n, p in parameters.items():
                    p.copy_(kept[n] + sign * step * direction[n])
                values.append(float(value()))
            for n, p in parameters.items():
                p.copy_(kept[n])
        difference = (values[0] - values[1]) / (2 * step)
        dtype = next(iter(parameters.values())).dtype
        noise = 100 * torch.finfo(dtype).eps * max(1.0, abs(values[0])) / step
        size = abs(slope) + abs(difference)
        if size > noise:
            errors.append(abs(slope - difference) / size)
        if errors and errors[-1] < AGREES:
            break
    return min(errors, default=math.nan)
