"""What a model shows before an attack: scales, gradients, dead units, its two modes, and state that moves.

Nothing is judged here; `holdfast.auditing.red_flags` does that: it compares the released model with the original and a
fresh one. The code of a model is the publisher's: what it raises becomes a finding, and nothing here changes the model.
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
"""Samples of each task that are looked at."""

PASSES = 8
"""Forward passes in training mode, without a step, after which state is compared."""

STEPS = (1e-6, 1e-3)
"""Relative lengths of the differences. Kinks of ReLU spoil the long one, rounding the short one: the better counts."""

AGREES = 1e-2
"""An error that ends the search for a better one."""

DIRECTIONS = 3
GROUPS = 6
FEW = 16
"""Samples for what is repeated most: differences, and passes after which state is compared."""

Norm = nn.modules.batchnorm._BatchNorm


@dataclass
class Inspection:
    """What was measured of one model; a part that failed is empty and has its reason in `failures`.

    Attributes:
        failures: what could not be measured ("evaluation", "training", "gradients", "state", "derivatives" or
            "tensors"), with what was raised.
        weights: root mean square of each weight tensor of two or more axes.
        activations: the same of each layer's outputs, on benign samples in evaluation mode.
        logits: the same of the logits on benign and on restricted samples; not finite if they are not.
        negated: accuracy on restricted samples of its own head times -1; None: the head is not for as many classes.
        dead_units: largest share of a layer's inputs that are zero for all restricted samples, and the layer.
        dead_samples: largest share of restricted samples for which a layer gets nothing but zeros, and the layer.
        in_a_row: condition numbers of linear layers that feed another one directly.
        statistics: by BatchNorm layer, how far benign data is from the running statistics; see `Statistics`.
        unrepeatable: difference of two equal calls, relative to the spread of the logits.
        gradients: by setting ("fresh head", "own head") and weight tensor: length of the gradient over that of the
            weights.
        scores: benign score of a batch in "evaluation", in "training" mode, and again in evaluation "after" passes in
            training mode that nothing was learned in.
        moved: tensors that a forward pass changed, beyond BatchNorm's own: by mode, their names.
        false_gradients: by group of weights and mode, relative error of its gradient against finite differences.
        parameters: numbers in all parameters, and in those that may be trained.
        hidden: floating-point numbers in neither parameters nor BatchNorm statistics.
    """

    failures: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    activations: dict[str, float] = field(default_factory=dict)
    logits: dict[str, float] = field(default_factory=dict)
    negated: float | None = None
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
    """Running statistics of a BatchNorm layer against what it gets from benign data.

    Attributes:
        shift: root mean square over channels of the distance of the means, in running standard deviations.
        factor: geometric mean over channels of the ratio of the variances, or its inverse: at least 1.
        momentum: the layer's; None: a plain average.
        eps: the layer's, relative to its typical running variance.
        estimated: False for statistics that are still what a new layer has.
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
    """Measures a model; it is left as it is.

    Args:
        model: any; its code may fail.
        benign: the model's own task; a batch of its training data is used.
        restricted: likewise.
        run: seed and device.
        parts: what to measure, each by itself; "derivatives" compares gradients with differences, which takes most of
            the time.

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
    found = Inspection()
    own, foreign = (_batch(task, run) for task in (benign, restricted))
    measures: dict[Part, Callable[[SplitModel], None]] = {
        "evaluation": lambda m: _look(m, own, restricted, foreign, found),
        "training": lambda m: _train_mode(m, benign, own, found),
        "gradients": lambda m: _gradients(m, benign, own, restricted, foreign, found),
        "state": lambda m: _state(m, own, found),
        "derivatives": lambda m: _derivatives(m, benign, own, found),
        "tensors": lambda _: _tensors(model, found),
    }
    for name in (part for part in PARTS if part in parts):
        with run.seeded("inspect", name):
            try:
                measures[name](model.clone().to(run.device).requires_grad_(True))
            except Exception as error:  # the user's code may raise anything
                found.failures[name] = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return found


def _batch(task: Task, run: Run) -> Batch:
    size = min(SAMPLES, task.size("train"))
    return next(iter(task.batches("train", size, generator=run.generator("inspect", task.name), device=run.device)))


def rms(x: Tensor) -> float:
    """Returns the root mean square, in float64."""
    return float(x.detach().cpu().double().square().mean().sqrt()) if x.numel() else 0.0


# --- Evaluation mode ---


@torch.no_grad()
def _look(model: SplitModel, own: Batch, restricted: Task, foreign: Batch, found: Inspection) -> None:
    model.eval()
    found.weights = {n: rms(p) for n, p in model.named_parameters() if p.dim() > 1}
    with _Watch(model) as watch:
        logits = model(own.x)
        found.activations, found.in_a_row, found.statistics = watch.outputs, watch.in_a_row, watch.statistics
    found.logits["benign"] = rms(logits)
    again = model(own.x)
    found.unrepeatable = rms(again - logits) / (rms(logits - logits.mean()) or 1.0)
    with _Watch(model) as watch:
        logits = model(foreign.x)
        found.logits["restricted"] = rms(logits)
        found.dead_units, found.dead_samples = watch.dead_units, watch.dead_samples
    if restricted.labels_are_classes and model.num_outputs >= restricted.num_outputs:
        found.negated = restricted.batch_skill(-logits, foreign)


class _Watch:
    """Looks at what goes through the layers of a model while it is open."""

    def __init__(self, model: SplitModel) -> None:
        self.model = model
        self.outputs: dict[str, float] = {}
        self.in_a_row: dict[str, float] = {}
        self.statistics: dict[str, Statistics] = {}
        self.dead_units = self.dead_samples = (0.0, "")
        self._linear: dict[int, tuple[Tensor, Tensor]] = {}  # by id: outputs, kept so that ids stay unique, and weights
        self._first = True

    def __enter__(self) -> _Watch:
        self._hooks = []
        for name, layer in self.model.network.named_modules():
            if not any(layer.children()) or isinstance(layer, nn.Conv2d | nn.Linear):
                self._hooks.append(layer.register_forward_hook(self._seen(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _seen(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
                return
            self.outputs[name] = rms(output)
            if isinstance(layer, Norm) and layer.running_mean is not None:
                self.statistics[name] = _compared(layer, args[0])
            if isinstance(layer, nn.Conv2d | nn.Linear):
                self._linear_layer(name, layer, args[0], output)

        return hook

    def _linear_layer(self, name: str, layer: nn.Conv2d | nn.Linear, inputs: Tensor, output: Tensor) -> None:
        _, before = self._linear.get(id(inputs), (None, None))
        if before is not None:
            weight = before.detach().cpu().double().flatten(1)
            sigma = torch.linalg.svdvals(torch.nan_to_num(weight))
            self.in_a_row[name] = float(sigma[0] / sigma[-1].clamp_min(torch.finfo(torch.float64).tiny))
        self._linear[id(output)] = output, layer.weight
        if not self._first:  # the first layer gets data: pixels that are always black are not dead units
            active = inputs != 0
            units = active.movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1).any(1)
            samples = active.flatten(1).any(1)
            self.dead_units = max(self.dead_units, (1 - float(units.float().mean()), name))
            self.dead_samples = max(self.dead_samples, (1 - float(samples.float().mean()), name))
        self._first = False


def _compared(layer: Norm, inputs: Tensor) -> Statistics:
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
def _train_mode(model: SplitModel, task: Task, batch: Batch, found: Inspection) -> None:
    found.scores["evaluation"] = _score(model.eval(), task, batch)
    found.scores["training"] = _score(model.train(), task, batch)
    for _ in range(PASSES):
        model.train()(batch.x)
    found.scores["after"] = _score(model.eval(), task, batch)


def _score(model: SplitModel, task: Task, batch: Batch) -> float:
    """Accuracy, or share of variance explained, in the mode that the model is in; NaN if outputs are not finite."""
    logits = model(batch.x)
    if not bool(logits.isfinite().all()):
        return float("nan")
    return task.batch_skill(logits, batch)


def _gradients(
    model: SplitModel, benign: Task, own: Batch, restricted: Task, foreign: Batch, found: Inspection
) -> None:
    """Relative lengths of gradients in training mode, as an adversary's first step would see them.

    With its own head a good model has next to no loss, and hence no gradient; shuffled labels give it something to do.
    """
    shuffled = Batch(own.x, own.y[torch.randperm(len(own.y)).to(own.y.device)])
    found.gradients["own head"] = _relative(model.train(), benign.loss(model, shuffled))
    model.reset_head(restricted.num_outputs)
    found.gradients["fresh head"] = _relative(model.train(), restricted.loss(model, foreign))


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
def _state(model: SplitModel, batch: Batch, found: Inspection) -> None:
    """Which tensors are others after a forward pass; weights are moved a bit first, so that putting them back shows."""
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-3)
    for mode, passes in (("evaluation", 1), ("training", PASSES)):
        before = {name: t.clone() for name, t in _watched(model)}
        for _ in range(passes):
            model.train(mode == "training")(batch.x[:FEW])
        found.moved[mode] = [n for n, t in _watched(model) if n not in before or not _equal(t, before[n])]


def _watched(model: SplitModel) -> Iterator[tuple[str, Tensor]]:
    """All tensors but those that BatchNorm is meant to move."""
    norms = {id(b) for m in model.modules() if isinstance(m, Norm) for b in m.buffers(recurse=False)}
    return ((n, t) for n, t in every_tensor(model.network) if id(t) not in norms)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _tensors(model: SplitModel, found: Inspection) -> None:
    parameters = list(model.network.parameters())
    found.parameters = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    known = {id(p) for p in parameters}
    found.hidden = sum(t.numel() for _, t in _watched(model) if id(t) not in known and t.is_floating_point())


# --- Do gradients tell the truth? ---


def _derivatives(model: SplitModel, task: Task, batch: Batch, found: Inspection) -> None:
    """Compares directional derivatives by autograd with differences, in float64 where the model can be made so."""
    few = Batch(batch.x[:FEW], batch.y[:FEW])
    for training in (False, True):
        try:
            errors = _errors(model.clone().double(), task, few, training)
        except Exception:
            # Code that does not run in float64; the long step then counts.
            errors = _errors(model.clone(), task, few, training)
        for name, error in errors.items():
            found.false_gradients[f"{name} ({'training' if training else 'evaluation'} mode)"] = error


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

    def value() -> Tensor:
        with torch.random.fork_rng(devices=[batch.x.device] if batch.x.is_cuda else []):
            torch.manual_seed(0)  # dropout must drop the same
            return task.loss(model.train(training), batch)

    loss = value()
    names = [n for n, p in parameters.items() if p.requires_grad]
    slopes = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True) if loss.requires_grad else ()
    gradient = {n: g for n, g in zip(names, slopes, strict=False) if g is not None}
    found = {}
    for name, members in groups.items():
        errors = []
        for _ in range(DIRECTIONS if members else 0):
            errors.append(_error({n: parameters[n] for n in members}, gradient, value))
            if errors[-1] < AGREES:  # a lie agrees so well once in a hundred times
                break
        known = sorted(e for e in errors if not math.isnan(e))
        if known:
            found[name] = known[0] if known[0] < AGREES else known[len(known) // 2]
    return found


def _error(parameters: dict[str, nn.Parameter], gradient: dict[str, Tensor], value: Callable[[], Tensor]) -> float:
    """Relative error along one random direction; NaN where both derivatives drown in rounding."""
    # Relative to each weight: units may have scales of their own, and a step that suits one is a leap for another.
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
    return min(errors, default=float("nan"))
