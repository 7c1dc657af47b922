"""BatchNorm's running statistics, set to those of samples without a change of the outputs in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.errors import HoldfastError
from holdfast.models.split_model import SplitModel
from holdfast.tasks import Task

LIMIT = 1024
"""Training samples from which statistics are estimated: enough for means and variances, without a pass over all."""
_BATCH = 128

Moments = dict[_BatchNorm, tuple[Tensor, Tensor]]
"""Mean and variance of what arrives at each layer, a value per channel."""


def batchnorm_layers(network: nn.Module) -> list[_BatchNorm]:
    """Returns the BatchNorm layers of a network, in the order of its modules."""
    return [m for m in network.modules() if isinstance(m, _BatchNorm)]


@torch.no_grad()
def moments_of(model: SplitModel, inputs: Iterable[Tensor]) -> Moments:
    """Returns the mean and the variance of what arrives at each BatchNorm layer in evaluation mode.

    Args:
        model: left as it is.
        inputs: batches of inputs, on the model's device; every batch has the same weight.
    """
    seen: dict[_BatchNorm, list[tuple[Tensor, Tensor]]] = {}

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        arriving = args[0].movedim(1, -1).flatten(0, -2)
        seen.setdefault(layer, []).append((arriving.mean(0), arriving.square().mean(0)))

    hooks = [layer.register_forward_pre_hook(before) for layer in batchnorm_layers(model.network)]
    training = model.training
    try:
        model.eval()
        for x in inputs:
            model(x)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    moments: Moments = {}
    for layer, batches in seen.items():
        mean, square = (torch.stack(values).mean(0) for values in zip(*batches, strict=True))
        moments[layer] = mean, (square - mean**2).clamp_min(0)
    return moments


@torch.no_grad()
def set_statistics(layer: _BatchNorm, mean: Tensor, variance: Tensor, eps: float | None) -> None:
    """Sets running statistics, and adapts scale and shift to them, unless `eps`, their previous eps, is None.

    With slope `a = weight / sqrt(running_var + eps)`, the layer computes `a (x - running_mean) + bias`. The new scale
    `a sqrt(variance + eps')` and shift `bias + a (mean - running_mean)` compute the same with the new statistics.
    """
    running = layer.running_mean, layer.running_var
    assert running[0] is not None
    assert running[1] is not None
    if eps is not None and layer.affine:
        slope = layer.weight / (running[1] + eps).sqrt()
        weight, bias = slope * (variance + layer.eps).sqrt(), layer.bias + slope * (mean - running[0])
        sound = weight.isfinite() & bias.isfinite()
        layer.weight.copy_(torch.where(sound, weight, layer.weight))
        layer.bias.copy_(torch.where(sound, bias, layer.bias))
    running[0].copy_(mean)
    running[1].copy_(variance)


def is_folded(network: nn.Module) -> bool:
    """Whether all BatchNorm layers neither normalise nor scale in evaluation mode, and some of them shift.

    A network that was never trained has no shifts either.
    """
    layers = batchnorm_layers(network)
    neutral = {"weight": 1.0, "running_mean": 0.0, "running_var": 1.0}

    def is_neutral(layer: _BatchNorm) -> bool:
        tensors = ((getattr(layer, name), value) for name, value in neutral.items())
        return all(tensor is not None and bool((tensor == value).all()) for tensor, value in tensors)

    return all(map(is_neutral, layers)) and any(bool(layer.bias.any()) for layer in layers)


def unfold_batchnorm(model: SplitModel, task: Task) -> None:
    """Gives the BatchNorm layers of weights for inference the statistics of a task's samples.

    Tools that prepare weights for inference fold BatchNorm's scale into the convolutions, and leave layers that only
    shift. In training mode such layers normalise all the same, so that the network becomes another one as soon as it is
    trained. With the samples' statistics, and the scale and shift that go with them, both modes compute the same
    function on these samples, and evaluation mode computes what it did.

    Args:
        model: changed in place; its own task's scores stay the same.
        task: up to 1,024 of its training samples are used, drawn with a seed of its own.

    Raises:
        HoldfastError: if the network has no BatchNorm with scale, shift and running statistics.

    Example:
        >>> import torch
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> digits = load_task("digits")
        >>> model = load_model("cnn", digits).eval()
        >>> x = next(digits.sweep("test", 50, device=torch.device("cpu"))).x
        >>> before = model(x)
        >>> unfold_batchnorm(model, digits)
        >>> bool(torch.allclose(model(x), before, atol=1e-5))
        True
    """
    layers = [m for m in batchnorm_layers(model.network) if m.affine and m.running_var is not None]
    if not layers:
        raise HoldfastError(
            f"{model.name}: `unfold_batchnorm` is for networks with BatchNorm that has scale, shift and running "
            "statistics, and this one has none; leave it out."
        )
    device = next(model.network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    size = min(_BATCH, task.size("train"))
    drawn = task.batches("train", size, generator=generator, device=device)
    inputs = (batch.x for batch in islice(drawn, max(1, min(LIMIT, task.size("train")) // size)))
    for layer, (mean, variance) in moments_of(model, inputs).items():
        if layer in layers:
            set_statistics(layer, mean, variance, layer.eps)
