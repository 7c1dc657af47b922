"""The frontier's extractors as defenses: from whitening to stretch, and the one that protects the benign signal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from holdfast.defenses.base import DefenseRecord
from holdfast.defenses.linear.base import LinearDefense, LinearProblem
from holdfast.defenses.registry import register_defense
from holdfast.runtime.run import Run

_OURS = "Holdfast, docs/frontier.md (after Zheng et al., ICML 2025)"


@register_defense
@dataclass
class FrontierDefense(LinearDefense):
    """The closed-form optimum of linear immunization; see `holdfast.spectral.frontier`.

    Nothing is trained, and nothing is random.

    Attributes:
        stretch: 0 whitens the benign task, 1 (the optimum of Definition 3.1) leaves its condition number as it was.
        rotate: rotate the features so that no axis is special; otherwise standardising them undoes the extractor.
    """

    name: ClassVar[str] = "frontier"
    citation: ClassVar[str] = _OURS

    stretch: float = 1.0
    rotate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_negative("stretch")

    def extractor(self, problem: LinearProblem, *, run: Run) -> tuple[Tensor, DefenseRecord]:
        """See `LinearDefense.extractor`."""
        return _noted(problem, problem.frontier.stretch(self.stretch, rotate=self.rotate))


@register_defense
@dataclass
class SignalFrontier(LinearDefense):
    """Protects the directions that carry benign labels and slows all others down; see `holdfast.spectral.frontier`.

    The extractor is made from the benign task alone; restricted inputs serve only to report ratios.

    Attributes:
        epsilon: scale of everything outside the benign signal, in (0, 1]; None: kappa(K_P)^(-1/2), with which (ii) = 1.
        rotate: rotate the features so that no axis is special; otherwise standardising them undoes the extractor.
    """

    name: ClassVar[str] = "signal-frontier"
    citation: ClassVar[str] = _OURS

    epsilon: float | None = None
    rotate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(lambda value: 0 < value <= 1, "a number above 0 and at most 1, or none", "epsilon")

    def extractor(self, problem: LinearProblem, *, run: Run) -> tuple[Tensor, DefenseRecord]:
        """See `LinearDefense.extractor`."""
        return _noted(problem, problem.frontier.protect_signal(self.epsilon, rotate=self.rotate))


def _noted(problem: LinearProblem, theta: Tensor) -> tuple[Tensor, DefenseRecord]:
    ratios = problem.ratios(theta)
    values = {"ratio_restricted": ratios.restricted, "ratio_benign": ratios.benign, "rir": ratios.rir}
    return theta, DefenseRecord(history={name: [value] for name, value in values.items()})
