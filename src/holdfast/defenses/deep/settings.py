"""The hyper-parameters of defenses that train the last blocks of a network, and the methods that each defines."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

from torch import Tensor

from holdfast.defenses.base import Defense
from holdfast.defenses.guard import GuardedDefense
from holdfast.errors import HoldfastError
from holdfast.training import OPTIMIZERS, Precision


class FeatureBatch(NamedTuple):
    """The features of a batch of each task, from which a term is computed.

    Attributes:
        benign: features, shape (N, D), in the network's precision.
        restricted: features, shape (M, D).
        labels: of the restricted samples, shape (M,).
    """

    benign: Tensor
    restricted: Tensor
    labels: Tensor


@dataclass
class PreservationSettings(Defense):
    """How benign outputs and features are kept near the original's.

    Attributes:
        distillation: weight of the distance of the benign outputs from the original's; 0: none.
        temperature: of distillation.
        matching: weight of the squared distance of the benign features from the original's, each feature in units of
            its standard deviation, averaged over features; 0: none.
        mixing: weight of the same distance on mixtures of pairs of benign samples, which fixes the features at more
            points than the samples themselves do; 0: none. The inputs of the first trained block are mixed, or the
            network's inputs if those of the block cannot be computed. Token ids cannot be mixed. None: 1, or 0 for
            token ids.
    """

    distillation: float = 0.0
    temperature: float = 2.0
    matching: float = 0.0
    mixing: float | None = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_not_above_zero("temperature")
        self.refuse_negative("distillation", "matching", "mixing")


@dataclass
class DeepSettings(PreservationSettings, GuardedDefense):
    """The settings of every `DeepDefense`, and the term that a subclass adds to the benign loss.

    A round is one step on a batch of each task. The samples of each task come in epochs; the shorter set starts its
    next epoch when it is exhausted, as the paper pairs them.

    The guard does not go back when the benign score is low during training, because the loss repairs it; but the result
    is always a good state.

    Attributes:
        iterations: steps.
        epochs: replaces `iterations`: passes over the shorter of both sets, as the paper counts them (ResNet-18: 3,
            ViT: 2). An event gives the number of steps.
        blocks: how many of the last blocks of the body are trained (see `SplitModel.blocks`; the paper: the last two
            of a ResNet-18, the last one of a ViT). The head is trained as well.
        batch_size: benign samples a step.
        restricted_batch: restricted samples a step; None: `batch_size`.
        optimizer: a name of `holdfast.training.OPTIMIZERS`; the paper's is "nesterov".
        learning_rate: at the start.
        schedule: "cosine": it falls to 0 along a cosine; "constant".
        head_weight_decay: of the head alone; the body has none (the paper's numbers).
        label_smoothing: of the benign cross-entropy.
        benign_loss: whether the body is trained by the benign loss; without it, only the head is.
        precision: of forward and backward passes; see `Strategy.precision`. Terms are always computed in float64.
        cache_gib: keep the outputs of the frozen blocks if they need at most this much memory; 0: never.
    """

    iterations: int = 400
    epochs: float | None = None
    blocks: int = 1
    batch_size: int = 64
    restricted_batch: int | None = None
    optimizer: str = "nesterov"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    head_weight_decay: float = 2e-5
    label_smoothing: float = 0.1
    benign_loss: bool = True
    precision: Precision = "float32"
    cache_gib: float = 4.0
    guard_every: int = 50
    max_benign_drop: float = 0.02

    terms: ClassVar[tuple[str, ...]]
    """Names of the regularizers."""
    classes: ClassVar[bool] = False
    """Whether the restricted task must be a classification task."""
    spectral: ClassVar[bool] = False
    """Whether the smallest singular values of features are used; in bfloat16 they are only rounding errors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unknown("optimizer", OPTIMIZERS)
        self.refuse_unknown("schedule", ("cosine", "constant"))
        self.refuse_unknown("precision", get_args(Precision))
        if self.spectral and self.precision != "float32":
            raise HoldfastError(
                f"{self.name}: precision is {self.precision}, in which the smallest singular values of features are "
                "only rounding errors; set precision to float32."
            )
        self.refuse_below_one("blocks", "batch_size")
        self.require(lambda value: value >= 2, "at least 2", "restricted_batch")
        self.refuse_not_above_zero("learning_rate", "epochs")
        self.refuse_negative("head_weight_decay", "cache_gib")
        self.require(lambda value: 0 <= value < 1, "a share of at least 0 and below 1", "label_smoothing")

    @abstractmethod
    def regularizers(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Returns the value of each of the `terms`, a scalar with its graph; the defender minimises them."""

    @abstractmethod
    def weights(self) -> dict[str, tuple[float | None, float]]:
        """Returns for each of the `terms` its weight, or None and a multiple.

        None: the term is balanced, so that at the start its gradient by the body has the norm of the benign loss's,
        times the multiple (appendix C.2 of the paper).
        """
