"""Few-shot prompting: the adversary who trains nothing, and shows a language model solved examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.adversaries.base import KINDS, Adversary
from holdfast.errors import HoldfastError
from holdfast.models import CausalModel, SplitModel
from holdfast.tasks import Task
from holdfast.tasks.next_token import IGNORED


@KINDS.register("few-shot-prompt")
@dataclass(frozen=True)
class FewShotPrompt(Adversary):
    """Puts some training rows before every row that a causal language model reads; no weight changes.

    All budgets have the same score. A model that answers well here needs no fine-tuning, so the audit of its resistance
    to fine-tuning is beside the point.

    Attributes:
        examples: rows of the prompt, drawn by the seed; those that do not fit into the model's context are left out.
        name: by default made from the settings.

    Raises:
        HoldfastError: for fewer than one example.

    Example:
        >>> FewShotPrompt(8).name
        'prompt with 8 examples'
    """

    examples: int = 4
    name: str = field(default="")
    batch_size: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise HoldfastError(f"examples is {self.examples}; expected at least 1.")
        shown = f"prompt with {self.examples} example{'s' if self.examples > 1 else ''}"
        object.__setattr__(self, "name", self.name or shown)

    def config(self) -> dict[str, Any]:
        """See `Adversary.config`."""
        return {"kind": "few-shot-prompt", "examples": self.examples}

    def not_applicable(self, model: SplitModel, task: Task) -> str | None:
        """See `Adversary.not_applicable`."""
        if not isinstance(model, CausalModel):
            return "it prompts a causal language model"
        rows = next(task.sweep("train", task.size("train"), device=torch.device("cpu")))
        shortest = min(len(_example(x, y)) for x, y in zip(rows.x, rows.y, strict=True))
        fits = _room(model, task) >= shortest
        return None if fits else f"its context of {model.context} tokens has no room for an example beside a row"

    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """See `Adversary.run`; the loss of every step is 0."""
        assert isinstance(model, CausalModel)
        rows = next(task.batches("train", self.examples, generator=generator, device=device))
        shown: list[Tensor] = []
        room = _room(model, task)
        for x, y in zip(rows.x, rows.y, strict=True):
            example = _example(x, y)
            if sum(map(len, shown)) + len(example) <= room:
                shown.append(example)
        model.prefix = torch.cat(shown) if shown else None
        while True:
            yield torch.zeros((), device=device)


def _example(x: Tensor, y: Tensor) -> Tensor:
    """The tokens of a row, up to the last one that counts."""
    last = int((y != IGNORED).nonzero()[-1])
    return torch.cat([x[: last + 1], y[last : last + 1]])


def _room(model: CausalModel, task: Task) -> int:
    """Tokens of the context that a row of the task leaves."""
    return model.context - task.input_shape[0]
