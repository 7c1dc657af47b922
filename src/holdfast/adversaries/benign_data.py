"""What an adversary does with benign data, so that the model keeps its own task while it learns another one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from holdfast import training
from holdfast.models import SplitModel
from holdfast.tasks import Batch, Task
from holdfast.training import Strategy

TEMPERATURE = 1.0
"""Of the class distributions that an anchor compares."""

WATCHED = 200
"""Benign samples on which a floor is watched, at most."""

Train = Callable[[torch.optim.Optimizer, Callable[[], float]], Iterator[Tensor]]
"""Begins a training with an optimizer and a factor on its rate."""

HALVINGS = 6
"""Of the rate, after which an attack that cannot hold its floor ends."""


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
        # Running statistics must be those of the restricted task, which is scored.
        with training.constant_statistics(self.model), self._released_head():
            return self._terms(batch)

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

    def hold(self, floor: float, train: Train) -> Iterator[Tensor]:
        """Trains without losing the benign task, and yields the loss of each step.

        A step that brings the skill on some benign training samples below `floor` times what it was at first is taken
        back, with the optimizer's state, and the rate is halved. After `HALVINGS` such steps the attack ends: the
        weights stay as they are.

        Args:
            floor: share of the skill, in (0, 1].
            train: begins the training.
        """
        watched = next(self.benign.batches("train", WATCHED, generator=self.generator, device=self.device))
        least, halved, loss = floor * self._skill(watched), 0, torch.zeros((), device=self.device)
        optimizer = training.optimizer_of(self.model, self.strategy)
        work = train(optimizer, lambda: 0.5**halved)
        kept = self._state(optimizer)
        while halved < HALVINGS:
            loss = next(work)
            if self._skill(watched) >= least:
                kept = self._state(optimizer)
            else:
                halved += 1
                self.model.load_state_dict(kept[0])
                optimizer.load_state_dict(kept[1])
            yield loss
        while True:
            yield loss

    def _state(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        return copy.deepcopy(self.model.state_dict()), copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def _skill(self, watched: Batch) -> float:
        """The quality of the answers through the released head, from 0 to 1; 0 if any is not finite."""
        training = self.model.training
        with self._released_head():
            outputs = self.model.eval()(watched.x)
        self.model.train(training)
        return self.benign.batch_skill(outputs, watched) if bool(outputs.isfinite().all()) else 0.0

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
