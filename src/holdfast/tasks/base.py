"""The contract of a task: data of one domain, the loss that honest training minimises, and the score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.results import TaskFacts
from holdfast.results.terms import Words, words

if TYPE_CHECKING:
    from holdfast.tasks.tokenizers import Vocabulary

Split = Literal["train", "test"]


class Batch(NamedTuple):
    """Inputs as the model takes them (images: float in [0, 1], shape (N, C, H, W)) and targets of shape (N, ...)."""

    x: Tensor
    y: Tensor


class Task(ABC):
    """One domain: data, the loss that honest training minimises, a score.

    Tasks are immutable: every method that narrows one (`halves`, `few_shot`, ...) returns a new task.

    Attributes:
        name: as a person would say it, with whatever narrowed it: `digits[5-9]`.
        kind: what is predicted, in a word. It is for people: code asks for one of the attributes below.
        higher_is_better: whether a larger score is a better one.
        input_shape: shape of one input, without the batch axis.
        num_outputs: classes, width of the target, or channels of an image.
        chance: the score of `baseline` on the test split.
        baseline: what reaches `chance`.
        answers_with: what a model must return for a sample: one "vector", or the "noise" of an image. It must be the
            `answers_with` of the model's class.
        labels_are_classes: whether targets are int64 class labels of shape (N,), and outputs are logits of the classes.
        no_features: why samples have no vector of features, on which a linear probe could be fitted; None: they have.
        suppression_losses: names in `holdfast.losses.LOSSES` that fit the task, the default one first; a defense that
            needs one refuses a task without any.
        vocabulary: what the inputs mean, if they are token ids.
    """

    name: str
    kind: str
    baseline: str = "a constant guess"
    answers_with: ClassVar[str] = "vector"
    labels_are_classes: ClassVar[bool] = False
    no_features: ClassVar[str | None] = None
    suppression_losses: ClassVar[tuple[str, ...]] = ()
    vocabulary: Vocabulary | None = None
    higher_is_better: bool
    input_shape: tuple[int, ...]
    num_outputs: int
    chance: float

    @abstractmethod
    def size(self, split: Split) -> int:
        """Returns the number of samples in a split."""

    @abstractmethod
    def batches(
        self, split: Split, batch_size: int, *, generator: torch.Generator | None = None, device: torch.device
    ) -> Iterator[Batch]:
        """Yields batches: endlessly and shuffled by `generator` for "train", once and in order for "test".

        Training batches all have `min(batch_size, size("train"))` samples; each sample comes once an epoch.
        """

    @abstractmethod
    def sweep(self, split: Split, batch_size: int, *, device: torch.device) -> Iterator[Batch]:
        """Yields every sample of a split once, in order."""

    @abstractmethod
    def targets(self, y: Tensor) -> Tensor:
        """Returns a batch's targets as a least-squares probe sees them, float64: one-hot classes, or the values."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the loss that honest training minimises: a scalar with its graph."""

    @abstractmethod
    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns the same loss where the model's outputs on the batch are there already."""

    def smoothed_loss_of(self, outputs: Tensor, batch: Batch, smoothing: float) -> Tensor:
        """Returns `loss_of` with smoothed labels; where labels cannot be smoothed, `loss_of` itself."""
        return self.loss_of(outputs, batch)

    def distance(self, outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        """Returns how far outputs are from those of another model, for distillation; a scalar with its graph.

        Args:
            outputs: of the model that learns.
            wanted: of the other.
            temperature: of class distributions; it has no effect on other outputs.
        """
        return F.mse_loss(outputs, wanted)

    def batch_skill(self, outputs: Tensor, batch: Batch) -> float:
        """Returns how good outputs are on one batch, from 0 to 1: by default the share of variance explained."""
        y = batch.y
        error, spread = ((v.double().square().mean()) for v in (outputs.reshape(y.shape) - y, y - y.mean(0)))
        return max(0.0, 1 - float(error / spread)) if spread > 0 else 0.0

    @abstractmethod
    def score_of(self, outputs: Tensor, batch: Batch) -> float:
        """Returns the score on one batch, by the outputs of a model in whatever mode it was; see `score`."""

    @abstractmethod
    def outcomes(self, model: nn.Module, split: Split = "test") -> Tensor:
        """Returns what each sample adds to the score: shape (N,), float64, on the CPU; the score is their mean.

        Taken in evaluation mode, and the model's mode is restored. All are NaN if any output is not finite.
        """

    def score(self, model: nn.Module, split: Split = "test") -> float:
        """Returns the score in evaluation mode, NaN if any output is not finite; the model's mode is restored."""
        return float(self.outcomes(model, split).mean())

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of a model's output for one input."""
        return (self.num_outputs,)

    @property
    def described(self) -> str:
        """The task with its kind, for messages."""
        return f"the {self.kind} task {self.name!r}"

    def check_classes(self) -> None:
        """Refuses a task with classes that have no training samples.

        Raises:
            HoldfastError: naming the first such class.
        """
        return

    @property
    def words(self) -> Words:
        """How reports speak of the scores; results carry them, so that a report can be made without this class."""
        return words(self.audit_unit)

    @property
    def audit_unit(self) -> str:
        """What `audit_score` is called: accuracy, or the share of the test targets' variance that is explained."""
        return "accuracy" if self.higher_is_better else "explained variance"

    @property
    def audit_chance(self) -> float:
        """The `audit_score` of a constant guess."""
        return self.chance if self.higher_is_better else 0.0

    def constant_scores(self) -> list[float]:
        """Returns the test scores of answers that are the same for every sample, where these are few: by default none.

        Of a task of classes they are the shares of the classes.
        """
        return []

    def audit_score(self, model: nn.Module) -> float:
        """Returns the test score as an audit compares it: larger is better, 1 is perfect.

        It is the score itself if larger is better; of a mean squared error, 1 - error / error of a constant guess.
        """
        return float(self.audit_outcomes(model).mean())

    def audit_outcomes(self, model: nn.Module) -> Tensor:
        """Returns what each test sample adds to the `audit_score`, which is their mean: shape (N,), float64."""
        found = self.outcomes(model)
        return found if self.higher_is_better else 1 - found / self.chance

    @abstractmethod
    def halves(self, seed: int) -> tuple[Self, Self]:
        """Splits the training data in two disjoint parts, the defender's and the adversary's; test data is shared.

        The side of a sample depends on its input and the seed alone, not on what else the task holds.
        """

    @abstractmethod
    def few_shot(self, shots: int, seed: int) -> Self:
        """Keeps `shots` training samples a class, or in all where there are no classes, chosen by `seed`."""

    @abstractmethod
    def holdout(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """Returns this task without a part of its training data, and one whose *test* split is that part."""

    @abstractmethod
    def with_inputs(self, train: Tensor, test: Tensor) -> Self:
        """Returns this task on other inputs for the same samples, such as features; shapes (N, D), floating point."""

    @abstractmethod
    def facts(self) -> TaskFacts:
        """Returns name, sizes and a hash of the data, for the provenance of a result."""
