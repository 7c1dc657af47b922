"""What an adversary does with benign data, so that the model keeps its own task while it learns another one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from holdfast import training
from holdfast.models import SplitModel
from holdfast.tasks import Batch, Task
from holdfast.training import Strategy

TEMPERATURE = 1.0
"""Of the class distributions that an anchor compares."""


class BenignTraining:
    """The benign task of a model under attack, through a frozen copy of the head that it has now.

    Args:
        model: under attack, after the undo moves, still with the released head.
        released: the model as received, for an anchor; None: there is none.
        benign: the model's own task.
        strategy: its batch size is also that of the benign batches.
        replay: weight of the loss.
        anchor: weight of the distance from the outputs of `released`.
        generator: draws the batches.
        device: where models and data are.
    """

    def __init__(
        self,
        model: SplitModel,
        released: SplitModel | None,
        benign: Task,
        strategy: Strategy,
        *,
        replay: float,
        anchor: float,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.model, self.released, self.benign, self.strategy = model, released, benign, strategy
        self.replay, self.anchor = replay, anchor
        self.generator, self.device = generator, device
        self.head = copy.deepcopy(model.head).requires_grad_(False)
        self.batches = benign.batches("train", strategy.batch_size, generator=generator, device=device)

    def penalty(self) -> Tensor:
        """Returns the weighted terms on the next benign batch; the running statistics of the model do not change."""
        batch = next(self.batches)
        norms = [m for m in self.model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
        momenta = [m.momentum for m in norms]
        for norm in norms:  # running statistics must be those of the restricted task, which is scored
            norm.momentum = 0.0
        try:
            with self._released_head():
                return self._terms(batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    def _terms(self, batch: Batch) -> Tensor:
        if self.released is None:
            return self.replay * self.benign.loss(self.model, batch)
        with torch.no_grad():
            wanted = self.released(batch.x)
        outputs = self.model(batch.x)
        own, kept = (_in_float32(self.benign.counted(each, batch.y)[0]) for each in (outputs, wanted))
        distance = self.anchor * self.benign.distance(own, kept, TEMPERATURE)
        return distance + self.replay * self.benign.loss_of(outputs, batch) if self.replay else distance

    def first(self, steps: int) -> Iterator[Tensor]:
        """Trains the body on the benign task alone, and yields the loss of each step.

        In between the model has the head of the attack, so that it can be scored on the restricted task. The optimizer
        is a new one, at a constant rate: a schedule is that of the training that follows.
        """
        constant = replace(self.strategy, schedule="constant", schedule_steps=0, warmup=0)
        work = training.finetune(self.model, self.benign, constant, generator=self.generator, device=self.device)
        for _ in range(steps):
            with self._released_head():
                loss = next(work)
            yield loss

    @contextmanager
    def _released_head(self) -> Iterator[None]:
        own = self.model.head
        self.model.put_head(self.head)
        try:
            yield
        finally:
            self.model.put_head(own)


def _in_float32(outputs: Tensor) -> Tensor:
    """Outputs in float32 if their precision is lower: a distance of half-precision outputs is mostly rounding."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
