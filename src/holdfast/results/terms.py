"""Words that reports use for scores."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from holdfast.results.tables import ResultModel


class Words(ResultModel):
    """Words for the scores of a kind of task; the defaults are for classification.

    Each task has them (`Task.words`), and a result stores those that do not follow from its unit.
    """

    guess: str = Field("guessing", description="The predictor that reaches the score called chance.")
    chance: str = Field("chance", description="Name of that score in a legend.")
    samples: str = Field("labelled samples", description="The adversary's training samples.")
    answers: str = Field("test labels", description="The test data that a real adversary does not have.")
    note: str = Field("", description="Explains the unit, if that is necessary.")
    by_class: bool = Field(True, description="Whether few-shot samples are counted for each class.")
    is_share: bool = Field(False, description="Whether a score is the share of correct test samples.")
    has_features: bool = Field(True, description="Whether a probe can be fitted on features.")
    reference: str = Field(
        "", description="The public model that stands for training from scratch as a control; empty: none does."
    )

    @property
    def control(self) -> str:
        """The control that a model is compared with, after "over"."""
        return f"the reference {self.reference}" if self.reference else "scratch"

    @property
    def from_control(self) -> str:
        """The same, as a start."""
        return f"from the reference {self.reference}" if self.reference else "from scratch"

    @property
    def training_control(self) -> str:
        """The same, as a way to reach a score."""
        return f"fine-tuning the reference {self.reference}" if self.reference else "training from scratch"


KNOWN: Final = {
    "accuracy": Words(is_share=True),
    "skill": Words(
        guess="a linear denoiser",
        chance="linear denoiser",
        samples="images",
        answers="test images",
        note="Skill is 1 minus the mean squared error of the predicted noise over that of the best linear denoiser: "
        "100% is perfect, 0% as good as a linear one, and a model that answers nothing is far below.",
        by_class=False,
        has_features=False,
    ),
    "language skill": Words(
        guess="a unigram model",
        chance="unigram model",
        samples="sequences",
        answers="test text",
        note="Language skill is 1 minus the negative log-likelihood a token over that of a unigram model, which knows "
        "how frequent each token is and nothing else: 100% is perfect, 0% as good as the unigram model.",
        by_class=False,
        has_features=False,
    ),
}
"""By the unit of an audit: for the kinds of task in Holdfast, and for results without words."""


def words(unit: str) -> Words:
    """Returns the words for a known unit, or the defaults.

    Example:
        >>> words("accuracy").guess, words("skill").guess
        ('guessing', 'a linear denoiser')
    """
    return KNOWN.get(unit, Words())


def count(number: int, noun: str) -> str:
    """Returns a number with its noun.

    Example:
        >>> count(1, "step"), count(20, "step"), count(2, "adversary")
        ('1 step', '20 steps', '2 adversaries')
    """
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
