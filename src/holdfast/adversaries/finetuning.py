"""Fine-tuning as an adversary: initialisation x scope x optimizer x learning rate x batch size, by composition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast import finetune
from holdfast.adversaries.base import Adversary
from holdfast.finetune import Strategy
from holdfast.models import SplitModel
from holdfast.tasks import Task


@dataclass(frozen=True)
class FineTuning(Adversary):
    """Plain fine-tuning by one strategy.

    Attributes:
        strategy: how it starts, what it moves, and with which optimizer.
        name: by default spelled from the strategy, with the paper's words for start and scope.

    Example:
        >>> FineTuning(Strategy("head", "all", "adam", 1e-3)).name
        'initFC+all adam 0.001 b50'
    """

    strategy: Strategy
    name: str = field(default="")

    def __post_init__(self) -> None:
        s = self.strategy
        start = "initFC" if s.initialisation == "head" else s.initialisation
        scope = "FC" if s.scope == "head" else s.scope
        spelled = f"{start}+{scope} {s.optimizer} {s.learning_rate:g} b{s.batch_size}"
        spelled += f" wd{s.weight_decay:g}" if s.weight_decay else ""
        spelled += f" {s.gradient}" if s.gradient != "raw" else ""
        spelled += f" r{s.rank}" if s.rank != 8 else ""
        object.__setattr__(self, "name", self.name or spelled)

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Samples a step."""
        return self.strategy.batch_size

    def not_applicable(self, model: SplitModel, task: Task) -> str | None:
        """See `Adversary.not_applicable`."""
        return finetune.not_applicable(self.strategy, model, task)

    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """See `Adversary.run`."""
        finetune.prepare(model, self.strategy, task)
        yield torch.zeros((), device=device)
        yield from finetune.finetune(model, task, self.strategy, generator=generator, device=device)

    def config(self) -> dict[str, Any]:
        """See `Adversary.config`."""
        return {"kind": "finetuning", **self.strategy.settings()}
