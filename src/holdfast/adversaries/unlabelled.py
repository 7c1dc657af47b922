"""Fine-tuning with few labels: the other samples are used without, by entropy and pseudo-labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast import training
from holdfast.adversaries.base import KINDS, StrategyAdversary
from holdfast.adversaries.finetuning import FineTuning
from holdfast.errors import HoldfastError
from holdfast.losses import negative_entropy
from holdfast.models import SplitModel
from holdfast.tasks import Task


@KINDS.register("unlabelled")
@dataclass(frozen=True)
class Unlabelled(StrategyAdversary):
    """Fine-tuning on all samples with the labels of a part of them; for classes.

    Each step has a batch with labels, and one without, on which the model becomes surer of what it finds: entropy
    minimisation (Grandvalet and Bengio, 2004) and pseudo-labels (Lee, 2013). It is for an adversary with many samples
    and few labels, and for a defense that acts on the gradients of labels alone.

    Attributes:
        strategy: of the fine-tuning.
        share: of the samples that have labels, at least one a class.
        entropy: weight of the entropy of the outputs on unlabelled samples.
        pseudo: weight of the cross-entropy with the likeliest class, where its probability is at least `threshold`.
        threshold: see `pseudo`.
        undo: moves before training; see `FineTuning`.
        name: by default made from the settings.

    Raises:
        HoldfastError: for a number out of range, or an unknown move.

    Example:
        >>> from holdfast.training import Strategy
        >>> Unlabelled(Strategy("head", "all", "adam", 1e-3)).name
        'unlabelled, 0.1 labelled, entropy 0.1, pseudo 0.5 at 0.9, initFC+all adam 0.001 b50'
    """

    kind: ClassVar[str] = "unlabelled"

    share: float = 0.1
    entropy: float = 0.1
    pseudo: float = 0.5
    threshold: float = 0.9
    undo: tuple[str, ...] = ()
    name: str = field(default="")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise HoldfastError(f"share is {self.share}; expected a share above 0, at most 1.")
        for name in ("entropy", "pseudo"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise HoldfastError(f"{name} is {getattr(self, name)}; expected a weight of at least 0.")
        if not 0 <= self.threshold <= 1:
            raise HoldfastError(f"threshold is {self.threshold}; expected a probability from 0 to 1.")
        weights = f"entropy {self.entropy:g}, pseudo {self.pseudo:g} at {self.threshold:g}"
        shown = f"unlabelled, {self.share:g} labelled, {weights}, {self._tuning.name}"
        object.__setattr__(self, "name", self.name or shown)

    @property
    def _tuning(self) -> FineTuning:
        return FineTuning(self.strategy, undo=self.undo)

    def not_applicable(self, model: SplitModel, task: Task) -> str | None:
        """See `Adversary.not_applicable`."""
        if not task.labels_are_classes:
            return f"entropy and pseudo-labels are those of classes, which {task.described} does not have"
        return self._tuning.not_applicable(model, task)

    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """See `Adversary.run`; the losses are those of the labelled batches."""
        shots = max(1, round(self.share * task.size("train") / task.num_outputs))
        seed = int(torch.randint(2**31, (), generator=generator))
        labelled = task.few_shot(shots, seed)
        self._tuning.start(model, labelled, None, generator, device)  # as some moves use labels
        unlabelled = task.batches("train", self.batch_size, generator=generator, device=device)
        yield torch.zeros((), device=device)

        def penalty() -> Tensor:
            logits = model(next(unlabelled).x)
            sure, likeliest = logits.detach().softmax(-1).max(-1)
            losses = F.cross_entropy(logits, likeliest, reduction="none") * (sure >= self.threshold)
            total: Tensor = self.pseudo * losses.mean() - self.entropy * negative_entropy(logits)
            return total

        yield from training.finetune(
            model, labelled, self.strategy, generator=generator, device=device, penalty=penalty
        )
