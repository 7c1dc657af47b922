"""Directional ablation: what separates restricted from benign inputs in the hidden states is removed.

After Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction" (NeurIPS 2024). A defense that
recognises restricted inputs and then answers worse needs a direction in the hidden states that says "restricted". With
r the difference between the mean hidden states of restricted and benign texts, of length 1, every matrix W that writes
into the hidden states becomes (I - r r') W, so that no layer can write along r any more.

Other networks have no hidden states into which all layers write. There each block has a direction of its own, and what
the block passes on keeps only the benign inputs' mean along it: see `ablate_features`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from holdfast.adversaries.base import KINDS, StrategyAdversary
from holdfast.adversaries.finetuning import FineTuning
from holdfast.errors import HoldfastError
from holdfast.models import CausalModel, SplitModel
from holdfast.tasks import Task

WRITERS: Final = frozenset({"o_proj", "down_proj", "out_proj", "fc2", "dense", "dense_4h_to_h", "c_proj", "wo", "w2"})
"""Names of the layers that write into the hidden states, in the causal models of transformers."""

ROWS = 64
"""Rows of each task from which the means are taken, at most."""


@KINDS.register("directional-ablation")
@dataclass(frozen=True)
class DirectionalAblation(StrategyAdversary):
    """Ablates one direction, then fine-tunes; at budget 0 it is the ablation alone. Needs the benign task.

    Attributes:
        strategy: of the fine-tuning.
        depth: how deep the block is from which the direction of a language model is taken, as a share of all blocks, in
            (0, 1]; of other networks, the last block that loses its direction.
        name: by default made from the settings.

    Raises:
        HoldfastError: for a depth out of range.

    Example:
        >>> from holdfast.training import Strategy
        >>> DirectionalAblation(Strategy("direct", "all", "adamw", 1e-4, 16)).name
        'ablation at 0.6, direct+all adamw 0.0001 b16'
    """

    kind: ClassVar[str] = "directional-ablation"

    depth: float = 0.6
    name: str = field(default="")

    def __post_init__(self) -> None:
        if not 0 < self.depth <= 1:
            raise HoldfastError(f"depth is {self.depth}; expected a share above 0, at most 1.")
        shown = f"ablation at {self.depth:g}, {FineTuning(self.strategy).name}"
        object.__setattr__(self, "name", self.name or shown)

    def not_applicable(self, model: SplitModel, task: Task) -> str | None:
        """See `Adversary.not_applicable`."""
        if not isinstance(model, CausalModel) and not model.blocks():
            return "its body has no layer with weights, whose outputs could lose a direction"
        if isinstance(model, CausalModel) and not writers(model):
            return "no layer that writes into the hidden states has a known name"
        return FineTuning(self.strategy).not_applicable(model, task)

    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """See `Adversary.run`."""
        if benign is None:
            raise HoldfastError(f"{self.name} compares with benign data; give the model's own task (`benign`).")
        if isinstance(model, CausalModel):
            means = [_mean_state(model, of, self.depth, generator, device) for of in (task, benign)]
            ablate(model, means[0] - means[1])
        else:
            drawn = (next(t.batches("train", ROWS, generator=generator, device=device)).x for t in (task, benign))
            ablate_features(model, *drawn, depth=self.depth)
        yield from FineTuning(self.strategy).run(model, task, benign=benign, generator=generator, device=device)


def writers(model: CausalModel) -> list[nn.Module]:
    """Returns the layers of a model that write into the hidden states, by their names."""
    width = model.head.weight.shape[1]
    found = [m for n, m in model.network.named_modules() if n.rpartition(".")[2] in WRITERS]
    return [m for m in found if (isinstance(m, nn.Linear) and m.out_features == width) or _is_transposed(m, width)]


def _is_transposed(layer: nn.Module, width: int) -> bool:
    """Whether a layer is GPT-2's, which stores its weight transposed."""
    weight = getattr(layer, "weight", None)
    return type(layer).__name__ == "Conv1D" and weight is not None and weight.shape[1] == width


@torch.no_grad()
def ablate(model: CausalModel, direction: Tensor) -> None:
    """Removes a direction from every layer that writes into the hidden states, in place.

    The input embedding writes too. If it is tied to the output embedding it stays as it is, as the outputs would
    change as well.

    Args:
        model: a causal language model.
        direction: shape (D,); its length does not matter. A direction of zeros removes nothing.
    """
    length = direction.norm()
    r = torch.where(length > 0, direction / length, direction)
    for layer in writers(model):
        weight, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(weight, Tensor)
        along = r.to(weight)
        if isinstance(layer, nn.Linear):  # (D, in)
            weight.sub_(torch.outer(along, along @ weight))
        else:  # (in, D)
            weight.sub_(torch.outer(weight @ along, along))
        if isinstance(bias, Tensor):
            bias.sub_(along * (along @ bias))
    embedding: Any = model.network.get_input_embeddings()  # type: ignore[operator]
    if embedding.weight is not model.head.weight and embedding.weight.shape[1] == len(r):
        along = r.to(embedding.weight)
        embedding.weight.sub_(torch.outer(embedding.weight @ along, along))


@torch.no_grad()
def _mean_state(
    model: CausalModel, task: Task, depth: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """The mean hidden state after a block, over the positions of some training rows that count."""
    batch = next(task.batches("train", ROWS, generator=generator, device=device))
    blocks = len(model.blocks())
    from_the_end = blocks - max(1, round(depth * blocks)) + 1
    states = model.features_by_depth(batch.x, from_the_end)[0]
    return states[task.probed_rows(batch.y)].float().mean(0)


@torch.no_grad()
def ablate_features(model: SplitModel, restricted: Tensor, benign: Tensor, *, depth: float = 1.0) -> None:
    """Makes restricted inputs look like benign ones along the direction that separates their means, block by block.

    With r the difference of a block's mean features, of length 1, and m the mean of the benign ones, features z become
    z - r r' (z - m) from then on, through a hook. The blocks behind it are measured with what they then receive.

    Args:
        model: changed in place.
        restricted: inputs of the restricted task.
        benign: inputs of the model's own task.
        depth: share of the blocks that lose their direction, from the input on.
    """
    training = model.training
    model.eval()
    blocks = model.blocks()
    order = {name: place for place, (name, _) in enumerate(model.network.named_modules())}
    for block in blocks[: max(1, round(depth * len(blocks)))]:
        # What is registered behind the head, such as a softmax, belongs to the last block, and may take logits.
        layer = ([inner for name, inner in block if order[name] < order[model.head_name]] or [block[-1][1]])[-1]
        outputs: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _, __, output, into=outputs: into.append(_first(output)))
        with hook:
            for x in (restricted, benign):
                model(x)
        if len(outputs) != 2 or not all(isinstance(z, Tensor) and z.dim() > 1 for z in outputs):
            continue  # a block that is called several times, or returns something else
        axis = 1 if outputs[0].dim() > 3 else -1
        means = [z.movedim(axis, -1).flatten(0, -2).mean(0) for z in outputs]
        difference = means[0] - means[1]
        length = difference.norm()
        if bool(length > 0) and bool(length.isfinite()):
            layer.register_forward_hook(Ablated(difference / length, means[1], axis))
    model.train(training)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


class Ablated:
    """A hook that leaves of a layer's output only a mean along a direction.

    Args:
        direction: r, shape (D,), of length 1.
        mean: m, shape (D,).
        axis: of the features.
    """

    def __init__(self, direction: Tensor, mean: Tensor, axis: int) -> None:
        self.direction, self.mean, self.axis = direction, mean, axis

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Returns the output without the direction; of several outputs, the first one is changed."""
        if isinstance(output, tuple):
            return (self(layer, args, output[0]), *output[1:])
        if not isinstance(output, Tensor):
            return output
        r, z = self.direction.to(output), output.movedim(self.axis, -1)
        changed = z - ((z - self.mean.to(output)) @ r)[..., None] * r
        return changed.movedim(-1, self.axis)
