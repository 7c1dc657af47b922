"""The frozen blocks of a network: their outputs are computed once, if possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch

from holdfast.models import FrozenActivations, SplitModel
from holdfast.tasks import Batch, Task
from holdfast.tasks.base import Split

_TRIED = 8
"""Number of samples of each task that test whether the frozen blocks can be skipped."""


class Trained(NamedTuple):
    """The tasks of an immunization.

    Attributes:
        benign: trained on.
        held_out: the guard scores its test split.
        restricted: trained on.
    """

    benign: Task
    held_out: Task
    restricted: Task


class FrozenPrefix:
    """The frozen blocks of a network, and the tasks and models behind them.

    Args:
        original: the network before any training, on its device and in evaluation mode.
        blocks: how many of the last blocks are trained.
        plain: the tasks with the network's inputs.
        cache_gib: keep the outputs of the frozen blocks if they need at most this much memory.
        say: called with the reason if the frozen blocks have to run in every step.
    """

    def __init__(
        self, original: SplitModel, blocks: int, plain: Trained, cache_gib: float, say: Callable[[str], None]
    ) -> None:
        self.original, self.blocks, self.plain, self.cache_gib, self.say = original, blocks, plain, cache_gib, say

    @cached_property
    def prefix(self) -> FrozenActivations | None:
        """Computes the outputs of the frozen blocks; None if the network cannot run without them."""
        frozen = self.original.blocks()[: -self.blocks]
        batches = [next(task.sweep("train", _TRIED, device=self.original.device)) for task in self.plain[::2]]
        try:
            return FrozenActivations(self.original, frozen, torch.cat([batch.x for batch in batches]))
        except ValueError as error:
            if frozen:
                self.say(f"the frozen blocks run in every step: {error}")
            return None

    @cached_property
    def kept(self) -> bool:
        """Whether their outputs are computed once and kept, or again for each batch."""
        if self.prefix is None or not self.cache_gib:
            return False
        needed = sum(self.prefix.size(task, split) for task, split in self._needed()) / 2**30
        if needed > self.cache_gib:
            self.say(f"the frozen blocks run in every step: their outputs need {needed:.1f} GiB, more than cache_gib")
        return needed <= self.cache_gib

    @cached_property
    def tasks(self) -> Trained:
        """The tasks; if activations are kept, the split in use holds them instead of inputs."""
        prefix = self.prefix
        if prefix is None or not self.kept:
            return self.plain
        return Trained(*(prefix.task(task, split) for task, split in self._needed()))

    def _needed(self) -> tuple[tuple[Task, Split], ...]:
        return (self.plain.benign, "train"), (self.plain.held_out, "test"), (self.plain.restricted, "train")

    def enter(self, batch: Batch) -> Batch:
        """Returns a batch of `tasks` for `runner`: the inputs of the first trained block, if possible."""
        return batch if self.prefix is None or self.kept else Batch(self.prefix.activations(batch.x), batch.y)

    def runner(self, model: SplitModel) -> SplitModel:
        """Returns a model that computes a model's outputs from batches that `enter` returned."""
        return model if self.prefix is None else self.prefix.remainder(model)

    def score_held_out(self, model: SplitModel) -> float:
        """Returns a model's score on the held-out benign data."""
        return self.tasks.held_out.score(self.runner(model) if self.kept else model)
