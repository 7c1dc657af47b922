"""What scores and gains are called, by kind of score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Words:
    """What is called otherwise where something else than accuracy is compared.

    Attributes:
        guess: who reaches the score that is called chance.
        chance: that score, in a legend.
        samples: what an adversary trains on.
        answers: what a real adversary has none of.
        note: what the unit means, if it needs saying.
    """

    guess: str = "guessing"
    chance: str = "chance"
    samples: str = "labelled samples"
    answers: str = "test labels"
    note: str = ""


WORDS: Final = {
    "skill": Words(
        "a linear denoiser",
        "linear denoiser",
        "images",
        "test images",
        "Skill is 1 minus the mean squared error of the predicted noise over that of the best linear denoiser: 100% is "
        "perfect, 0% as good as a linear one, and a model that answers nothing is far below.",
    )
}
"""By the unit of an audit; all others are spoken of as accuracies are."""


def words(unit: str) -> Words:
    """Returns how to speak of scores in a unit.

    Example:
        >>> words("accuracy").guess, words("skill").guess
        ('guessing', 'a linear denoiser')
    """
    return WORDS.get(unit, Words())


def count(number: int, noun: str) -> str:
    """Returns a number with its noun.

    Example:
        >>> count(1, "step"), count(20, "step"), count(2, "adversary")
        ('1 step', '20 steps', '2 adversaries')
    """
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
