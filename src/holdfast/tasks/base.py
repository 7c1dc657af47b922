"""The contract of a task: data of one domain, the loss that honest training minimises, and the score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.results import TaskFacts
from holdfast.results.terms import Words, words

if TYPE_CHECKING:
    from holdfast.tasks.schedule import Schedule
    from holdfast.tasks.tokenizers import Vocabulary

Split = Literal["train", "test"]


class Batch(NamedTuple):
    """Inputs as the model takes them (images: float in [0, 1], shape (N, C, H, W)) and targets of shape (N, ...)."""

    x: Tensor
    y: Tensor


class Task(ABC):
    """One domain: data, the loss that honest training minimises, a score.

    Tasks are immutable: methods that narrow one (`halves`, `few_shot`, ...) return a new task.

    Attributes:
        name: for people, with the classes that were kept: `digits[5-9]`.
        kind: what is predicted, in a word, for people; code reads the attributes below.
        higher_is_better: whether a larger score is better.
        input_shape: shape of one input, without the batch axis.
        num_outputs: classes, width of the target, or channels of an image.
        chance: the score of `baseline` on the test split.
        baseline: the predictor whose score is `chance`.
        answers_with: what a model must return for a sample: one "vector", the "noise" of an image, or logits of the
            "next token" at every position. It must equal the `answers_with` of the model's class.
        labels_are_classes: whether targets are int64 class labels of shape (N,), and outputs are logits of the classes.
        no_features: why samples have no feature vectors for linear probes; None: they have.
        suppression_losses: names in `holdfast.losses.LOSSES` that fit the task, the default one first; defenses that
            need one refuse a task without any.
        sampling_schedule: of the noise, if a model of the task draws samples; None: it does not.
        vocabulary: of the token ids, if the inputs are such.
    """

    name: str
    kind: str
    baseline: str = "a constant guess"
    answers_with: ClassVar[str] = "vector"
    labels_are_classes: ClassVar[bool] = False
    no_features: ClassVar[str | None] = None
    suppression_losses: ClassVar[tuple[str, ...]] = ()
    sampling_schedule: Schedule | None = None
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
        """Returns a batch's targets for a least-squares probe, float64: one-hot classes, or the values."""

    def weight(self, y: Tensor) -> float:
        """Returns how much a batch's loss counts beside that of another: by default its number of samples."""
        return float(len(y))

    def counted(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the outputs and targets that `distance` and a loss of `holdfast.losses` take; by default all."""
        return outputs, y

    def probed_rows(self, y: Tensor) -> Tensor | slice:
        """Returns which rows of `features_by_depth` have a target for a probe; by default all."""
        return slice(None)

    def probe_targets(self, y: Tensor) -> Tensor:
        """Returns a batch's targets for `holdfast.losses.ridge_probe`, one for each of the `probed_rows`."""
        return y

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the loss that honest training minimises: a scalar with its graph."""

    @abstractmethod
    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns the same loss from the model's outputs on the batch."""

    def smoothed_loss_of(self, outputs: Tensor, batch: Batch, smoothing: float) -> Tensor:
        """Returns `loss_of` with smoothed labels, or plain `loss_of` if labels cannot be smoothed."""
        return self.loss_of(outputs, batch)

    def distance(self, outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        """Returns how far outputs are from those of another model, for distillation; a scalar with its graph.

        Args:
            outputs: of the model that learns, those that are `counted`.
            wanted: the same outputs of the other model.
            temperature: of class distributions; it has no effect on other outputs.
        """
        return F.mse_loss(outputs, wanted)

    def batch_skill(self, outputs: Tensor, batch: Batch) -> float:
        """Returns the quality of outputs on one batch, from 0 to 1: by default the share of explained variance."""
        y = batch.y
        error, spread = ((v.double().square().mean()) for v in (outputs.reshape(y.shape) - y, y - y.mean(0)))
        return max(0.0, 1 - float(error / spread)) if spread > 0 else 0.0

    @abstractmethod
    def score_of(self, outputs: Tensor, batch: Batch) -> float:
        """Returns the score on one batch from a model's outputs, in training or evaluation mode; see `score`."""

    @abstractmethod
    def outcomes(self, model: nn.Module, split: Split = "test") -> Tensor:
        """Returns each sample's contribution to the score, which is their mean: shape (N,), float64, on the CPU.

        The model runs in evaluation mode, and its mode is restored. All are NaN if any output is not finite.
        """

    def score(self, model: nn.Module, split: Split = "test") -> float:
        """Returns the score in evaluation mode, NaN if any output is not finite; the model's mode is restored."""
        return float(self.outcomes(model, split).mean())

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of a model's output for one input."""
        return (self.num_outputs,)

    error_name: ClassVar[str] = "mean squared error"
    """Name of a score of which smaller is better."""

    output_axis: ClassVar[int] = 0
    """The axis of `output_shape` that has `num_outputs` entries."""

    def takes_outputs(self, count: int) -> bool:
        """Returns whether a model with so many outputs can be scored on this task, its own: `num_outputs`."""
        return count == self.num_outputs

    def token_beyond(self, count: int) -> str | None:
        """Returns where a token id of at least `count` is read or counts, in words; None: there is none.

        Padding may have such an id, as it does not matter what a model makes of it.
        """
        return None

    def rows_at_once(self, wanted: int) -> int:
        """Returns how many samples a model may answer at once, at most `wanted`: fewer, if outputs are very large."""
        return wanted

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
        """The words of reports for the scores; results store them, so that reports do not need this class."""
        return words(self.audit_unit)

    @property
    def audit_unit(self) -> str:
        """Name of `audit_score`: accuracy, or the explained share of the test targets' variance."""
        return "accuracy" if self.higher_is_better else "explained variance"

    @property
    def audit_chance(self) -> float:
        """The `audit_score` of `baseline`."""
        return self.chance if self.higher_is_better else 0.0

    def constant_scores(self) -> list[float]:
        """Returns the test scores of answers that are the same for every sample, where these are few: by default none.

        Of a task of classes they are the shares of the classes.
        """
        return []

    def audit_score(self, model: nn.Module) -> float:
        """Returns the test score on an audit's scale: larger is better, 1 is perfect.

        It is the score itself if larger is better; for a mean squared error, 1 - error / error of `baseline`.
        """
        return float(self.audit_outcomes(model).mean())

    def audit_outcomes(self, model: nn.Module) -> Tensor:
        """Returns each test sample's contribution to the `audit_score`, which is their mean: shape (N,), float64."""
        outcomes = self.outcomes(model)
        return outcomes if self.higher_is_better else 1 - outcomes / self.chance

    @abstractmethod
    def halves(self, seed: int) -> tuple[Self, Self]:
        """Splits the training data into two disjoint parts, the defender's and the adversary's; the test data stay.

        A sample's side depends only on its input and the seed, not on the other samples.
        """

    @abstractmethod
    def few_shot(self, shots: int, seed: int) -> Self:
        """Keeps `shots` training samples a class, or in total for a task without classes, chosen by `seed`."""

    @abstractmethod
    def holdout(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """Returns this task without a part of its training data, and one whose *test* split is that part."""

    @abstractmethod
    def with_inputs(self, train: Tensor, test: Tensor) -> Self:
        """Returns this task on other inputs for the same samples, such as features; shapes (N, D), floating point."""

    def with_timesteps(self, timesteps: Sequence[int]) -> Self:
        """Returns a denoising task at these time steps alone.

        Raises:
            HoldfastError: for another kind of task, or if the schedule has no such time step.
        """
        raise HoldfastError(f"{self.described} has no time steps.")

    @abstractmethod
    def facts(self) -> TaskFacts:
        """Returns name, sizes and a hash of the data, for the provenance of a result."""
