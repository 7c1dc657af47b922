"""The guard on the benign score: its settings, and the state that it goes back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from holdfast.defenses.base import Defense


@dataclass
class GuardedDefense(Defense):
    """A defense that trains in rounds, watched by a guard on held-out benign data.

    Attributes:
        iterations: rounds.
        guard: check the benign score and look for non-finite values. After a non-finite value the guard goes back to
            the last good state and halves the rate; without a guard, it ends the defense.
        guard_every: rounds between two measurements of the benign score.
        max_benign_drop: how far the held-out benign score of a good state may be below the original's; where the score
            is an error, by which share of the original's it may be higher. If the original was trained on the samples
            held out here, it scores higher on them than on test data, and falls further.
        max_rollbacks: after this many returns the guard gives up, and the last good state is the result.
        holdout: share of the benign training data kept back for the guard.
        ema: decay per round of an exponential moving average of the weights. The guard measures the average, validation
            examines it, and it is the result, as is usual for diffusion models; training continues from the weights
            themselves. None: no average.
        validate_every: rounds between two validations by short adversaries (see `VALIDATION`). The result is then the
            good state with the lowest validation score, not the last one. The adversaries are scored on a fifth of the
            defender's restricted data, which is kept back for them. None: no validation.
        validation_steps: steps of each of these adversaries.

    Raises:
        HoldfastError: for a value out of range.
    """

    iterations: int = 800
    guard: bool = True
    guard_every: int = 10
    max_benign_drop: float = 0.05
    max_rollbacks: int = 20
    holdout: float = 0.1
    ema: float | None = None
    validate_every: int | None = None
    validation_steps: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_below_one("iterations", "guard_every", "max_rollbacks", "validate_every")
        self.require(lambda value: value >= 2, "at least 2", "validation_steps")
        self.require(lambda value: 0 <= value <= 1, "a share from 0 to 1", "max_benign_drop")
        self.refuse_no_share("holdout")
        self.require(lambda value: 0 < value < 1, "a decay between 0 and 1", "ema")


class BenignGuard:
    """Decides by the held-out benign score which states are good, and keeps the last good one.

    Args:
        max_drop: see `GuardedDefense.max_benign_drop`.
        higher_is_better: whether a high score is a good one.
        original_score: the held-out benign score of the original.
        state: the original's; it is the first good state.
    """

    def __init__(
        self, max_drop: float, *, higher_is_better: bool, original_score: float, state: Mapping[str, Tensor]
    ) -> None:
        self.max_drop, self.higher_is_better, self.original_score = max_drop, higher_is_better, original_score
        self.good = dict(state)
        self.changed = False
        """Whether there has been a good state after the original's."""

    @property
    def limit(self) -> float:
        """The worst held-out benign score of a good state."""
        drop = self.max_drop
        return self.original_score - drop if self.higher_is_better else self.original_score * (1 + drop)

    def acceptable(self, score: float) -> bool:
        """Whether this is the held-out benign score of a good state."""
        return score >= self.limit if self.higher_is_better else score <= self.limit

    def complaint(self, score: float) -> str:
        """Says why a score is not acceptable."""
        if self.higher_is_better:
            return f"held-out benign score {score:.3f} is under the floor {self.limit:.3f}"
        return f"held-out benign error {score:.4f} is over the ceiling {self.limit:.4f}"

    def keep(self, state: Mapping[str, Tensor]) -> None:
        """Keeps a state as the last good one."""
        self.good, self.changed = dict(state), True
