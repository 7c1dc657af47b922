"""The distance of benign outputs and features from the original's, which keeps the model useful."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from holdfast.defenses.deep.frozen_prefix import FrozenPrefix
from holdfast.defenses.deep.settings import PreservationSettings
from holdfast.models import SplitModel
from holdfast.runtime.devices import autocast
from holdfast.tasks import Batch, Task
from holdfast.training import Precision

STATISTICS = 2000
"""Number of benign samples from which the scale of each feature is measured."""


class Preservation:
    """The penalty on outputs and features that differ from the original's.

    Args:
        config: weights of the distances.
        precision: of forward passes.
        original: the model before any training.
        frozen: its frozen blocks.
        benign: the benign task.
    """

    def __init__(
        self,
        config: PreservationSettings,
        precision: Precision,
        original: SplitModel,
        frozen: FrozenPrefix,
        benign: Task,
    ) -> None:
        self.config, self.original, self.frozen, self.benign = config, original, frozen, benign
        self.precision, self.device = precision, original.device

    def penalty(
        self, model: SplitModel, benign: Batch, logits: Tensor, features: Tensor, generator: torch.Generator
    ) -> Tensor | float:
        """Returns the weighted distances on a batch, with their graph.

        Args:
            model: the trained model.
            benign: a batch that `FrozenPrefix.enter` returned.
            logits: the model's logits on this batch.
            features: the model's features on this batch.
            generator: draws the mixtures.
        """
        config = self.config
        total: Tensor | float = 0.0
        ours, theirs = self.frozen.runner(model), self.frozen.runner(self.original)
        if config.distillation or config.matching:
            with autocast(self.device, self.precision == "bf16"), torch.no_grad():
                wanted, kept = theirs.with_features(benign.x)
            if config.distillation:
                distance = self.benign.distance(logits.float(), wanted.float(), config.temperature)
                total = total + config.distillation * distance
            total = total + config.matching * self._distance(features, kept)
        if config.mixing:
            share = torch.rand(len(benign.x), *[1] * (benign.x.dim() - 1), generator=generator).to(benign.x)
            other = benign.x[torch.randperm(len(benign.x), generator=generator).to(benign.x.device)]
            mixed = share * benign.x + (1 - share) * other
            with autocast(self.device, self.precision == "bf16"):
                features = ours.with_features(mixed)[1]
                with torch.no_grad():
                    kept = theirs.with_features(mixed)[1]
            total = total + config.mixing * self._distance(features, kept)
        return total

    def _distance(self, features: Tensor, wanted: Tensor) -> Tensor:
        return ((features.float() - wanted.float()) / self.spread).square().mean()

    @cached_property
    def spread(self) -> Tensor:
        """Standard deviation of each of the original's features on benign samples; for dead ones, the mean of all."""
        runner, features, samples = self.frozen.runner(self.original), [], 0
        with torch.no_grad():
            for batch in self.frozen.tasks.benign.sweep("train", 250, device=self.device):
                features.append(runner.with_features(self.frozen.enter(batch).x)[1].float())
                samples += len(batch.x)
                if samples >= STATISTICS:
                    break
        deviation = torch.cat(features).std(0)
        mean = deviation.mean().clamp_min(torch.finfo(deviation.dtype).tiny)
        return torch.where(deviation > 1e-3 * mean, deviation, mean)
