"""A script that fine-tunes what it finds: it neither thaws weights nor replaces layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.adversaries import Adversary
from holdfast.models import SplitModel
from holdfast.tasks import Task


@dataclass(frozen=True)
class Script(Adversary):
    """Adam on the parameters that require a gradient, in training mode, from the released model on."""

    name: str = "a script: adam 0.001 b50"
    batch_size: int = 50
    learning_rate: float = 1e-3

    @property
    def trains_head_in_place(self) -> bool:
        return True

    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        yield torch.zeros((), device=device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, self.learning_rate) if trained else None
        for batch in task.batches("train", self.batch_size, generator=generator, device=device):
            loss = task.loss(model.train(), batch)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            yield loss.detach()

    def config(self) -> dict[str, Any]:
        return {"kind": "script", "batch_size": self.batch_size, "learning_rate": self.learning_rate}
