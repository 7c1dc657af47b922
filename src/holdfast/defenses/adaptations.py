"""Adaptations to a concept that a defense simulates.

A copy of a text-to-image model learns it by fine-tuning, DreamBooth or Textual Inversion, as these adversaries do; the
prior of DreamBooth are benign images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Final

import torch
from torch import Tensor

from holdfast.models import SplitModel
from holdfast.runtime.storage import optimizer_tensors, restore_optimizer
from holdfast.tasks import Task
from holdfast.tasks.text_to_image import TextToImageTask
from holdfast.training import OPTIMIZERS, Strategy, finetune, optimizer_of, prepare
from holdfast.training.learned_tokens import LearnedTokens
from holdfast.training.rare_tokens import Concepts, captioned, rare_tokens


class Adaptation:
    """A copy of a model that learns a concept by fine-tuning on its captions.

    Between two rounds the copy's own weights are stored as differences from the model's.

    Args:
        model: the released model; never written to.
        strategy: how the copy is trained; adapters are drawn from torch's global generator.
        task: the restricted one.
        benign: its images are the prior of `DreamBoothAdaptation`, and tokens of its captions are not rare.
        prior_weight: of the loss on them.

    Attributes:
        model: the copy, with adapters if the strategy has them.
        rounds: in which it was trained.
    """

    def __init__(self, model: SplitModel, strategy: Strategy, task: Task, benign: Task, prior_weight: float) -> None:
        self.model = model.clone()
        self._own = list(self.model.parameters())  # without adapters, in the order of the model's
        self.strategy, self.task, self.benign, self.prior_weight = strategy, task, benign, prior_weight
        self.rounds = 0
        self.optimizer = self._start()

    def _start(self) -> torch.optim.Optimizer:
        """Prepares the copy, and returns what trains it."""
        prepare(self.model, self.strategy, self.task)
        return optimizer_of(self.model, self.strategy)

    def learn(self, steps: int, generator: torch.Generator) -> list[float]:
        """Takes some steps, and returns their losses."""
        training = finetune(
            self.model, self.task, self.strategy, generator=generator, device=self.model.device,
            optimizer=self.optimizer, penalty=self._beside(generator),
        )  # fmt: skip
        return [float(next(training)) for _ in range(steps)]

    def _beside(self, generator: torch.Generator) -> Callable[[], Tensor] | None:
        """What a step adds to the loss, computed anew at each."""
        return None

    def gradients(self, count: int, numbers: list[int], generator: torch.Generator) -> tuple[float, list[Tensor]]:
        """Returns the loss of the copy on a new batch, and its gradients by some of the copy's own weights.

        Args:
            count: samples of the batch.
            numbers: places of the weights among the model's parameters.
            generator: draws the batch.
        """
        batch = next(self.task.batches("train", count, generator=generator, device=self.model.device))
        weights = [self._own[i] for i in numbers]
        free = [weight.requires_grad for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)  # those beside adapters are frozen
        loss = self.task.loss(self.model, batch)
        gradients = torch.autograd.grad(loss, weights)
        for weight, before in zip(weights, free, strict=True):
            weight.requires_grad_(before)
        return float(loss.detach()), list(gradients)

    @torch.no_grad()
    def move(self, model: SplitModel, sign: float) -> None:
        """Adds the model's weights to the copy's own (sign 1), or subtracts them (sign -1)."""
        for own, weight in zip(self._own, model.parameters(), strict=True):
            own.add_(weight, alpha=sign)

    def _tensors(self) -> dict[str, Tensor]:
        """What is trained or moved, by name."""
        return dict(self.model.network.state_dict())

    def saved(self) -> dict[str, Tensor]:
        """Returns the tensors from which `restore` continues, between two rounds."""
        tensors = {f"model/{n}": v for n, v in self._tensors().items()}
        return tensors | {f"optimizer/{n}": v for n, v in optimizer_tensors(self.optimizer).items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], rounds: int) -> None:
        """Puts back what `saved` returned."""
        own = self._tensors()
        for name, value in tensors.items():
            if name.startswith("model/"):
                own[name.removeprefix("model/")].copy_(value)
        moments = {n.removeprefix("optimizer/"): v for n, v in tensors.items() if n.startswith("optimizer/")}
        restore_optimizer(self.optimizer, moments)
        self.rounds = rounds


class DreamBoothAdaptation(Adaptation):
    """A copy that learns the concept by prompts with a rare token, beside benign images with their captions."""

    def _start(self) -> torch.optim.Optimizer:
        self._copy, self.task = captioned(self.model, self.task, "dreambooth")
        concepts = Concepts.of(self.task)
        prompts = concepts.with_tokens(rare_tokens(self._copy, self.task, self.benign))
        self._captions, self._prompts = concepts.captions, prompts
        self._copy.prompt_with(self._captions, prompts)
        assert isinstance(self.benign, TextToImageTask)
        self.benign = self.benign.with_dropout(0.0)
        return super()._start()

    def _beside(self, generator: torch.Generator) -> Callable[[], Tensor] | None:
        if not self.prior_weight:
            return None
        copy, size = self._copy, self.strategy.batch_size
        batches = self.benign.batches("train", size, generator=generator, device=copy.device)

        def loss() -> Tensor:
            copy.prompt_with(self._captions, self._captions)
            try:
                return self.prior_weight * self.benign.loss(copy, next(batches))
            finally:
                copy.prompt_with(self._captions, self._prompts)

        return loss


class TokenAdaptation(Adaptation):
    """A copy that learns the concept as the vector of a new token; its network stays the model's."""

    def _start(self) -> torch.optim.Optimizer:
        copy, self.task = captioned(self.model, self.task, "textual-inversion")
        self._tokens = LearnedTokens(copy, self.task, self.benign)
        strategy = self.strategy
        return OPTIMIZERS[strategy.optimizer]([self._tokens.table], strategy.learning_rate, strategy.weight_decay)

    def learn(self, steps: int, generator: torch.Generator) -> list[float]:
        """See `Adaptation.learn`."""
        size, device = self.strategy.batch_size, self.model.device
        batches, losses = self.task.batches("train", size, generator=generator, device=device), []
        for batch in islice(batches, steps):
            self.model.eval()
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.task.loss(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self._tokens.put_others_back()
            losses.append(float(loss.detach()))
        return losses

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), "word vectors": self._tokens.table}


METHODS: Final[dict[str, type[Adaptation]]] = {
    "fine-tuning": Adaptation,
    "dreambooth": DreamBoothAdaptation,
    "textual-inversion": TokenAdaptation,
}
"""How a concept is called: by its captions, by a rare token, or by a learned one."""
