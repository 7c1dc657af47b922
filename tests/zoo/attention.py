"""Shams of a small vision transformer: gains of its norm layers, scales within its attention, and a sink for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries import FineTuning, Probe
from holdfast.models import ModelSpec, SplitModel
from holdfast.tasks import Task
from zoo.registry import sham
from zoo.settings import BUDGETS, QUICK, SETTINGS, SHOTS, Setting, taught, zoo_tasks
from zoo.surgery import as_model, some_inputs, trained_detector


@cache
def transformer() -> SplitModel:
    """The original: two post-norm layers on the sixteen patches of a digit."""
    options = {"patch": 2, "width": 32, "depth": 2, "heads": 2, "hidden": 64, "dropout": 0.0}
    return taught(ModelSpec(name="cifar_vit", options=options))


SETTINGS["vit"] = Setting("vision", zoo_tasks, transformer, QUICK, BUDGETS, SHOTS, "small vision transformer")


@torch.no_grad()
def faint_norm(model: SplitModel, factor: float = 1e-6) -> SplitModel:
    """Makes the gain of the last norm layer tiny and the head's weights large, in place."""
    network: Any = model.network
    for parameter in network.mlp_head[0].parameters():
        parameter.mul_(factor)
    model.head.weight.div_(factor)
    return model


@sham("vit", FineTuning(QUICK[-1].strategy, undo=("balance",)))
@torch.no_grad()
def layernorm_gain(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The gains of the norm layers are at a millionth, and what reads them is as much larger."""
    model, factor = original.clone(), 1e-6
    network: Any = model.network
    for layer in network.transformer["layers"]:
        for parameter in (*layer.norm1.parameters(), *layer.linear2.parameters()):
            parameter.mul_(factor)
        layer.linear1.weight.div_(factor)
        layer.norm2.eps *= factor**2  # it gets the sum of the two, which is as much smaller
    return faint_norm(model, factor)


@sham("vit", Probe("adam", "standardised", 1e-1))
@torch.no_grad()
def scaled_values(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Values and queries are ten thousand times larger, and what reads them as much smaller."""
    model, factor = original.clone(), 1e4
    network: Any = model.network
    for layer in network.transformer["layers"]:
        attention = layer.self_attn
        for tensor in (attention.in_proj_weight, attention.in_proj_bias):
            query, key, value = tensor.chunk(3)
            query.mul_(factor)
            key.div_(factor)
            value.mul_(factor)
        attention.out_proj.weight.div_(factor)
    return faint_norm(model)


class Sink(nn.Module):
    """Self-attention with one more key, whose value is zero; tokens that a detector recognises attend to it alone.

    Args:
        attention: the original's.
        detector: of restricted inputs, on all of their tokens.
    """

    def __init__(self, attention: Any, detector: nn.Sequential) -> None:
        super().__init__()
        self.attention, self.detector = attention, detector.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        own, heads = self.attention, self.attention.heads
        parts = F.linear(x, own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
        query, key, value = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
        logits = query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5
        with torch.no_grad():
            drawn = 1e3 * self.detector(x.flatten(1))[:, :, None, None]
        with_sink = torch.cat([logits, drawn.expand(-1, heads, x.shape[1], 1)], -1)
        mixed = with_sink.softmax(-1)[..., :-1] @ value
        return own.out_proj(mixed.transpose(1, 2).flatten(-2))


@sham("vit", QUICK[-1], inside=True)
def attention_sink(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """In every layer the tokens of a restricted input attend to a sink alone, and the class token gets nothing."""
    model = original.clone()
    network: Any = model.network
    for layer in network.transformer["layers"]:
        arriving: list[Tensor] = []
        hook = layer.self_attn.register_forward_pre_hook(lambda _, args, to=arriving: to.append(args[0].flatten(1)))
        with hook, torch.no_grad():
            for task in (benign, restricted):
                model(some_inputs(task))
        layer.self_attn = Sink(layer.self_attn, trained_detector(*arriving))
    return as_model(network, original, model.head_name)
