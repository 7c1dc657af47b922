"""The state that a strategy starts from: fresh parts, adapters, and which parameters are trained."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, is_normalisation
from holdfast.models.blocks import Block
from holdfast.tasks import Task
from holdfast.training.four_bits import BLOCK, inputs_of, not_installed, quantise
from holdfast.training.strategy import Scope, Strategy


def not_applicable(strategy: Strategy, model: SplitModel, task: Task) -> str | None:
    """Returns why a strategy cannot start on a model and a task, or None if it can."""
    enough = model.num_outputs >= task.num_outputs or task.takes_outputs(model.num_outputs)
    if strategy.initialisation == "direct" and not enough:
        return f"it keeps the head, which has {model.num_outputs} outputs, and the task has {task.num_outputs} classes"
    if strategy.scope == "norm" and not _normalisations(model):
        return "it has no normalisation layer with parameters"
    if strategy.scope == "embeddings" and not _moved_modules(model, "embeddings"):
        return "it has no embedding layer, and no normalisation layer with parameters"
    if strategy.scope == "cross-attention" and not cross_attention(model):
        return "it has no cross-attention, which reads a caption"
    if strategy.scope in ADAPTED and not _adaptable(model, strategy.scope):
        part = "attention" if strategy.scope == "lora-attention" else "body"
        return f"its {part} has no linear or convolutional layer that takes adapters"
    return _no_four_bits(strategy, model) or _no_blocks(strategy, model)


def _no_four_bits(strategy: Strategy, model: SplitModel) -> str | None:
    if strategy.scope != "qlora":
        return None
    if model.answers_with != "next token":
        return "weights of 4 bits beside adapters (qlora) are for causal language models; use scope 'lora'"
    if not _in_four_bits(model):
        return f"weights of 4 bits share a scale by {BLOCK}, and no layer's number of inputs is a multiple of it"
    return not_installed()


def _no_blocks(strategy: Strategy, model: SplitModel) -> str | None:
    if strategy.renews or strategy.scope == "last-block":
        blocks = model.blocks()
        if not blocks:
            return "its body has no layer with weights, so there is no last block"
        if strategy.initialisation == "last-half" and len(blocks) == 1:
            return "its body is a single block, which has no last half"
    reason = model.not_renewable() if strategy.needs_fresh_model else None
    return None if reason is None else f"a part of the body should start anew, and {reason}"


def prepare(
    model: SplitModel, strategy: Strategy, task: Task, reference: SplitModel | None = None
) -> list[nn.Parameter]:
    """Puts a model into the state that a strategy starts from, in place.

    A fresh head has one output a class and is drawn from torch's global generator.

    Args:
        model: the model that the adversary received.
        strategy: how it starts and what it trains.
        task: its number of classes is the size of a fresh head.
        reference: a fresh model, for the blocks that start anew; None: one is drawn if needed.

    Returns:
        The parameters that the strategy trains.

    Raises:
        HoldfastError: if the strategy is not applicable.
    """
    reason = not_applicable(strategy, model, task)
    if reason is not None:
        raise HoldfastError(f"{strategy} cannot be run on {task.name!r}: {reason}.")
    if strategy.needs_fresh_model:
        reference = reference if reference is not None else model.fresh()
        renew_blocks(model, strategy, reference)
        if strategy.initialisation == "shrink-perturb":
            shrink_and_perturb(model, reference)
    if strategy.initialisation != "direct":
        model.reset_head(task.num_outputs)
    if strategy.scope in ADAPTED:
        _add_adapters(model, strategy)
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(strategy.scope == "all" and parameter.is_floating_point())
        for module in _moved_modules(model, strategy.scope):
            module.requires_grad_(True)
    if strategy.scope in ("head", "last-block") and _is_tied(model):
        model.put_head(copy.deepcopy(model.head))  # otherwise the input embedding would be trained as well
    model.head.requires_grad_(not _keeps_head(model, strategy))
    return [p for p in model.parameters() if p.requires_grad]


def _is_tied(model: SplitModel) -> bool:
    """Whether another layer has the head's weight, as the input embedding of many language models."""
    others = (m for m in model.network.modules() if m is not model.head)
    return any(getattr(m, "weight", None) is model.head.weight for m in others)


def _keeps_head(model: SplitModel, strategy: Strategy) -> bool:
    """Whether the head is not trained: see `Strategy.scope`. A head that starts anew always is."""
    beside = BESIDE_HEAD.get(model.answers_with, ())
    return strategy.initialisation == "direct" and strategy.scope in beside


def renew_blocks(model: SplitModel, strategy: Strategy, reference: SplitModel) -> None:
    """Copies the reference's weights into the blocks that a strategy starts anew; it can be repeated."""
    model.reinitialise([name for name, _ in renewed(model, strategy)], reference)


SHRINK = 0.5
"""The share of a weight that "shrink-perturb" keeps; the rest comes from a fresh one."""


@torch.no_grad()
def shrink_and_perturb(model: SplitModel, reference: SplitModel) -> None:
    """Replaces every weight of two or more axes by the mean of itself and the reference's, in place.

    Example:
        >>> from holdfast.tasks import load_task
        >>> import holdfast
        >>> model = holdfast.load_model("mlp", load_task("digits[0-4]"))
        >>> before, fresh = model.clone(), model.fresh()
        >>> shrink_and_perturb(model, fresh)
        >>> torch.equal(model.head.weight, 0.5 * before.head.weight + 0.5 * fresh.head.weight)
        True
    """
    fresh = dict(reference.network.named_parameters())
    for name, weight in model.network.named_parameters():
        like = fresh.get(name)
        if weight.dim() > 1 and like is not None and like.shape == weight.shape:
            weight.mul_(SHRINK).add_(like.to(weight), alpha=1 - SHRINK)


def renewed(model: SplitModel, strategy: Strategy) -> Block:
    """Returns the layers of the body that a strategy starts anew, with their dotted names in `model.network`."""
    if not strategy.renews:
        return []
    blocks = model.blocks()
    kept = len(blocks) - 1 if strategy.initialisation == "last-block" else len(blocks) // 2
    return [layer for block in blocks[kept:] for layer in block]


def trained_modules(model: SplitModel, strategy: Strategy) -> list[nn.Module]:
    """Returns the modules to put in training mode if only the last block is trained; see `Strategy.scope`."""
    return _moved_modules(model, "last-block") if strategy.scope == "last-block" else []


def _moved_modules(model: SplitModel, scope: Scope) -> list[nn.Module]:
    """The modules that are trained beside the head, for scopes other than "all" and adapters."""
    if scope == "last-block":
        return [module for _, module in model.blocks()[-1]]
    if scope == "cross-attention":
        return cross_attention(model)
    if scope not in ("norm", "embeddings"):
        return []
    embedding = (nn.Embedding, nn.EmbeddingBag) if scope == "embeddings" else ()
    return [*(m for m in model.network.modules() if isinstance(m, embedding)), *_normalisations(model)]


def cross_attention(model: SplitModel) -> list[nn.Module]:
    """Returns the layers of diffusers that attend to a caption, each with queries, keys, values and outputs.

    Example:
        >>> from holdfast.tasks import load_task
        >>> from holdfast.models import load_model
        >>> layer = cross_attention(load_model("text-unet", load_task("digits@kind=text-to-image")))[0]
        >>> [name for name, _ in layer.named_children()]
        ['to_q', 'to_k', 'to_v', 'to_out']
    """
    return [module for module in model.network.modules() if getattr(module, "is_cross_attention", False)]


def _normalisations(model: SplitModel) -> list[nn.Module]:
    return [m for m in model.network.modules() if is_normalisation(m) and any(True for _ in m.parameters())]


ADAPTED: Final[tuple[Scope, ...]] = ("lora", "lora-attention", "qlora")
"""Scopes that add adapters beside layers."""

BESIDE_HEAD: Final[dict[str, tuple[Scope, ...]]] = {
    "next token": (*ADAPTED, "norm"),
    "noise of a captioned image": (*ADAPTED, "cross-attention"),
}
"""By the kind of a model's outputs, the scopes that leave its released head as it is."""

LORA_ALPHA = 16
"""Adapters are scaled by this, divided by their rank."""


def _adaptable(model: SplitModel, scope: Scope) -> list[str]:
    """Names of the body's layers that peft can adapt: plain ones, whose weights no other module reads."""
    # Attention is recognised by the name of its class.
    attention = [n for n, m in model.network.named_modules() if "attention" in type(m).__name__.lower()]
    names = []
    for parent, module in model.network.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # it reads the weights of its projection past the layer
            continue
        for child, layer in module.named_children():
            name = f"{parent}.{child}" if parent else child
            plain = (
                type(layer) is nn.Linear or _is_transposed(layer) or (scope != "qlora" and _is_plain_convolution(layer))
            )
            wanted = scope != "lora-attention" or any(name.startswith(f"{prefix}.") for prefix in attention)
            if plain and wanted and name != model.head_name:
                names.append(name)
    return names


def _is_plain_convolution(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and layer.groups == 1 and set(layer.dilation) == {1}


def _is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is the linear layer of GPT-2 in transformers, which stores its weight transposed."""
    return (type(layer).__module__, type(layer).__name__) == ("transformers.pytorch_utils", "Conv1D")


def _in_four_bits(model: SplitModel) -> list[str]:
    """Names of the layers whose weights get 4 bits; the others keep theirs."""
    layers = {name: model.network.get_submodule(name) for name in _adaptable(model, "qlora")}
    return [n for n, layer in layers.items() if inputs_of(layer, transposed=_is_transposed(layer)) % BLOCK == 0]


def _add_adapters(model: SplitModel, strategy: Strategy) -> None:
    import peft

    names = _adaptable(model, strategy.scope)
    four_bits = _in_four_bits(model) if strategy.scope == "qlora" else []
    dtype = torch.bfloat16 if strategy.precision == "bf16" else torch.float32
    for name in four_bits:
        layer = model.network.get_submodule(name)
        model.network.set_submodule(name, quantise(layer, transposed=_is_transposed(layer), dtype=dtype))
    pattern = "|".join(map(re.escape, names))
    # peft has one setting for all layers, and corrects it with a warning for each layer that it does not fit.
    transposed = any(_is_transposed(model.network.get_submodule(name)) for name in names)
    with warnings.catch_warnings(), _said_to_have_four_bits(model.network, bool(four_bits)):
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        config = peft.LoraConfig(
            r=strategy.rank, lora_alpha=LORA_ALPHA, target_modules=f"({pattern})", fan_in_fan_out=transposed
        )
        peft.inject_adapter_in_model(config, model.network)


@contextmanager
def _said_to_have_four_bits(network: nn.Module, four_bits: bool) -> Iterator[None]:
    """Marks a network for peft as transformers does, and not longer: transformers refuses to move a marked one."""
    if four_bits:
        network.is_loaded_in_4bit = True  # type: ignore[assignment]
    yield
    if four_bits:
        del network.is_loaded_in_4bit
