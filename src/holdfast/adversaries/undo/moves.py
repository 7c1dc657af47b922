"""Undo: what an informed adversary tries first, before any fine-tuning.

Who knows that a model was made hard to fine-tune does not start from it as it is. Weights can be scaled back, dead
units revived, statistics estimated again: each of it costs a few forward passes on the adversary's own samples. A
defense that falls to one of these moves has hidden something and removed nothing.

Each move changes the released copy in place, and knows what the adversary knows: his samples, and a freshly initialised
model of the same architecture (`reference`). Moves that have nothing to do on a network leave it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from holdfast.adversaries.undo.batchnorm import fold, recalibrate
from holdfast.adversaries.undo.gradient_bypass import activations, put_affine, swap_activations
from holdfast.adversaries.undo.introspection import (
    batch_statistics,
    counterpart,
    fresh_values,
    in_order,
    mend,
    own_biases,
    own_weights,
    samples,
    some_samples,
)
from holdfast.adversaries.undo.layer_scaling import equalise, norm_of, rescale
from holdfast.adversaries.undo.unit_scaling import balance
from holdfast.models import Denoiser, SplitModel, is_normalisation
from holdfast.runtime.devices import place_of_float64
from holdfast.tasks import Task

Move = Callable[[SplitModel, SplitModel, Task, torch.Generator, torch.device], None]

SHRINK, NOISE = 0.5, 0.5
WORST = 2
"""Layers that `reset-worst` initialises anew."""


def thaw(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Makes every floating-point tensor that the network computes with a trainable parameter, and drops gradient hooks.

    Buffers and plain attributes that hide weights become parameters, and so does what parametrizations compute (weight
    normalisation among them), which are taken away. Running statistics, which a forward pass in
    training mode changes, and everything of normalisation layers stay what they are.

    Example:
        >>> from holdfast.tasks import load_task
        >>> hiding = nn.Module()
        >>> hiding.register_buffer("weight", torch.ones(64, 8))
        >>> hiding.forward = lambda x: x @ hiding.weight
        >>> model = SplitModel(nn.Sequential(nn.Flatten(), hiding, nn.Linear(8, 5)), "2")
        >>> thaw(model, model, load_task("digits[0-4]"), torch.Generator(), torch.device("cpu"))
        >>> [n for n, p in model.network.named_parameters() if p.requires_grad]
        ['1.weight', '2.weight', '2.bias']
    """
    for module in model.network.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    bake(model)
    steady = _steady(model, next(task.sweep("train", 8, device=device)).x) if _hidden(model) else []
    before = model.dtype
    made: dict[int, nn.Parameter] = {}
    for name, key in steady:
        module = model.network.get_submodule(name)
        value = getattr(module, key)
        delattr(module, key)
        module.register_parameter(key, made.setdefault(id(value), nn.Parameter(value.detach())))
    if model.dtype != before:
        model.precision = before
    for parameter in model.network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def bake(model: SplitModel) -> None:
    """Replaces every parametrized tensor by a plain parameter with the value that it has."""
    for module in model.network.modules():
        if parametrize.is_parametrized(module):
            # Copies share the class that torch made, and it takes the tensor's property from the class.
            made = type(module)
            own = {k: v for k, v in vars(made).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(made.__name__, made.__bases__, own)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)


def _hidden(model: SplitModel) -> dict[tuple[str, str], Tensor]:
    """Floating-point tensors that are no parameters, by (module, name)."""
    return {
        (name, key): value
        for name, module in model.network.named_modules()
        if not is_normalisation(module)
        for key, value in [*module.named_buffers(recurse=False), *vars(module).items()]
        if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isfinite().all())
    }


def _steady(model: SplitModel, x: Tensor) -> list[tuple[str, str]]:
    """Which of them a forward pass in training mode leaves alone: weights, and no statistics."""
    twin = model.clone().train()
    before = {where: value.clone() for where, value in _hidden(twin).items()}
    with torch.no_grad(), torch.random.fork_rng():
        twin(torch.cat([x, x]) if len(x) == 1 else x)
    after = _hidden(twin)
    return [where for where, value in before.items() if where in after and torch.equal(after[where], value)]


@torch.no_grad()
def revive(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Gives units that say the same on every sample fresh incoming weights and no bias.

    A unit is dead if what arrives from it at the next layer with weights is zero on all samples (or, with two samples
    and more, constant). A BatchNorm between starts anew for this unit.
    """
    mend(model, reference)
    x = some_samples(task, generator, device)
    order = in_order(model, x)
    for _ in order:  # a layer that is mostly dead hides those behind it: look again once it is revived
        blind = False
        for layer, norms, dead, name in _dead_units(model, order, x):
            if not bool(dead.any()):
                continue
            blind = float(dead.float().mean()) >= 0.5
            like = counterpart(reference, name)
            for key, weight in own_weights(layer).items():
                weight[dead] = fresh_values(layer, like, key)[dead]
            for bias in own_biases(layer):
                bias[dead] = 0
            for norm in norms:
                _renew_units(norm, dead)
            if blind:
                break
        if not blind:
            return


def _renew_units(norm: nn.Module, units: Tensor) -> None:
    state = {**dict(norm.named_parameters(recurse=False)), **dict(norm.named_buffers(recurse=False))}
    for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
        found = state.get(name)
        if found is not None and found.shape == units.shape:
            found.masked_fill_(units, value)


def _dead_units(
    model: SplitModel, order: list[tuple[str, nn.Module]], x: Tensor
) -> list[tuple[nn.Module, list[nn.Module], Tensor, str]]:
    """For each layer with a successor: itself, the normalisations between, which units are dead, its name."""
    constant: dict[nn.Module, Tensor] = {}

    def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if layer in constant or not args or not isinstance(args[0], Tensor) or args[0].dim() < 2:
            return
        axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
        arriving = args[0].movedim(axis, -1).flatten(0, -2)
        low, high = arriving.amin(0), arriving.amax(0)
        constant[layer] = (low == high) if len(x) > 1 else (low == 0) & (high == 0)

    hooks = [m.register_forward_pre_hook(before) for _, m in order if own_weights(m)]
    try:
        with batch_statistics(model, x):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    found: list[tuple[nn.Module, list[nn.Module], Tensor, str]] = []
    last: tuple[str, nn.Module] | None = None
    between: list[nn.Module] = []
    for name, layer in order:
        if is_normalisation(layer):
            between.append(layer)
            continue
        if last is not None and layer in constant:
            units = len(next(iter(own_weights(last[1]).values())))
            if constant[layer].numel() % units == 0:  # flattened maps: a unit has several places
                found.append((last[1], between, constant[layer].view(units, -1).all(1), last[0]))
        last, between = (name, layer), []
    return found


@torch.no_grad()
def shrink_perturb(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Halves every weight and adds half of a fresh one: w <- 0.5 w + 0.5 fresh, the reference being the noise."""
    mend(model, reference)
    for name, layer in model.network.named_modules():
        for key, weight in own_weights(layer).items():
            weight.mul_(SHRINK).add_(fresh_values(layer, counterpart(reference, name), key), alpha=NOISE)


def activation(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Lets gradients pass every activation module, without a change of its outputs; see `Flowing`."""
    swap_activations(model)


def whiten(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Puts a fixed layer before the head after which the samples' features have the identity as covariance.

    Directions that the samples do not use are scaled like the one that they use most. The head makes up for it.
    """
    z = _head_inputs(model, task, generator, device)
    mean, precision = z.mean(0), torch.finfo(model.head.weight.dtype).eps
    # All of V, for directions without samples too; where there are enough samples, a square U is not needed for that.
    _, sigma, v = torch.linalg.svd(z - mean, full_matrices=len(z) < z.shape[1])
    wide = torch.zeros(z.shape[1]).to(z)
    wide[: len(sigma)] = sigma
    used = wide > max(z.shape) * precision * wide.max()
    if bool(used.any()):
        scale = math.sqrt(len(z)) / torch.where(used, wide, wide.max())
        put_affine(model, mean, (v.T * scale) @ v)


def standardise(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Puts a fixed layer before the head after which each feature has mean 0 and deviation 1 on the samples.

    A constant feature keeps its scale. The head makes up for it.
    """
    z = _head_inputs(model, task, generator, device)
    deviation = z.std(0, correction=0)
    varies = deviation > 1e-12 * deviation.max()
    if bool(varies.any()):
        put_affine(model, z.mean(0), torch.diag(torch.where(varies, 1 / deviation.clamp_min(1e-300), 1.0)))


@torch.no_grad()
def _head_inputs(model: SplitModel, task: Task, generator: torch.Generator, device: torch.device) -> Tensor:
    """What the head gets, one row a vector of as many features as it takes; rows that are not finite are left out."""
    caught: list[Tensor] = []
    axis = 1 if isinstance(model.head, nn.Conv2d) else -1
    place = place_of_float64(device)
    hook = model.head.register_forward_pre_hook(
        lambda _, args: caught.append(args[0].movedim(axis, -1).flatten(0, -2).to(place, torch.float64))
    )
    training = model.training
    try:
        model.eval()
        for x in samples(task, generator, device):
            model(x)
    finally:
        hook.remove()
        model.train(training)
    z = torch.cat(caught)
    return z[z.isfinite().all(1)] if bool(z.isfinite().all(1).any()) else torch.zeros_like(z)


def reset_worst(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Initialises the `WORST` layers anew whose weights and gradients deviate most from the reference.

    By the logarithms of the norm of the weights and of their gradient, both against the reference and against the
    median over layers: that a trained network as a whole has larger weights or smaller gradients is no anomaly.
    """
    mend(model, reference)
    own, fresh = (_statistics(m, task, generator.clone_state(), device) for m in (model, reference))
    holds_head = {n for n in own if not n or f"{model.head_name}.".startswith(f"{n}.")}
    names = [n for n in own if n in fresh and n not in holds_head]
    if not names:
        return
    anomaly = torch.zeros(len(names), dtype=torch.float64)
    for i in range(2):
        ratios = torch.tensor([own[n][i] - fresh[n][i] for n in names], dtype=torch.float64)
        anomaly += (ratios - ratios.median()).abs()
    worst = anomaly.argsort(descending=True, stable=True)[:WORST]
    model.reinitialise([names[i] for i in worst], reference)


def _statistics(
    model: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Logarithms of the norms of each layer's weights and of their gradient under a fresh head."""
    twin = model.clone()
    twin.reset_head(task.num_outputs)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    batch = next(task.batches("train", 250, generator=generator, device=device))
    with batch_statistics(twin, batch.x):
        task.loss(twin, batch).backward()  # type: ignore[no-untyped-call]
    tiny = 1e-300
    return {
        name: (
            math.log(max(norm_of(weights.values()), tiny)),
            math.log(max(norm_of(_finite(p.grad) for p in weights.values() if p.grad is not None), tiny)),
        )
        for name, layer in twin.network.named_modules()
        if (weights := own_weights(layer))
    }


def _finite(gradient: Tensor) -> Tensor:
    return torch.nan_to_num(gradient)


def insert(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Puts a trainable linear layer before the head, the identity at first: a product of two learns differently."""
    model.add_extractor()


UNDO: Final[dict[str, Move]] = {
    "thaw": thaw,
    "recalibrate": recalibrate,
    "fold": fold,
    "rescale": rescale,
    "balance": balance,
    "equalise": equalise,
    "revive": revive,
    "shrink-perturb": shrink_perturb,
    "activation": activation,
    "whiten": whiten,
    "standardise": standardise,
    "reset-worst": reset_worst,
    "insert": insert,
}
"""The moves by name."""

NEED_REFERENCE: Final = frozenset({"rescale", "balance", "equalise", "revive", "shrink-perturb", "reset-worst"})

OF_FEATURES: Final = frozenset({"whiten", "standardise"})
"""Moves that depend on what the last layer of the body says."""

IMPOSSIBLE: Final = NEED_REFERENCE | OF_FEATURES | {"insert"}
"""Moves that, where there is a reason against them, cannot be made; the others would have nothing to do."""


def nothing_to_undo(move: str, model: SplitModel) -> str | None:
    """Says why a move cannot be made, or would do nothing, on a model; None if it can."""
    if move in ("recalibrate", "fold") and not any(isinstance(m, _BatchNorm) for m in model.network.modules()):
        return "it has no BatchNorm to recalibrate"
    if move == "activation" and not activations(model):
        return "it has no activation that is a module of its own"
    if move in {*OF_FEATURES, "insert"} and isinstance(model, Denoiser):
        return "it is a denoiser, whose head takes an image and no vector of features"
    reason = model.not_renewable() if move in NEED_REFERENCE else None
    return None if reason is None else f"{move} compares with a fresh model, and {reason}"
