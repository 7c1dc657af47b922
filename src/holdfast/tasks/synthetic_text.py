"""Made-up sentences with three kinds of labels: text that needs no file, for examples and for trying recipes out.

They are filled into a few frames and say nothing about language: a result on them is not one on text.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from holdfast.tasks.text import LENGTH, TextTask, text_task
from holdfast.tasks.tokenizers import Tokenizer

_Words = dict[str, tuple[str, ...]]

_THINGS: Final[_Words] = {
    "music": ("concert", "song", "choir", "violin", "album", "drummer", "singer", "melody"),
    "food": ("soup", "dinner", "bread", "cook", "salad", "pudding", "kitchen", "cheese"),
    "sport": ("match", "goal", "team", "runner", "race", "coach", "stadium", "keeper"),
    "travel": ("train", "harbour", "hotel", "flight", "map", "ferry", "guide", "station"),
}
_MOODS: Final[_Words] = {
    "bad": ("dreadful", "poor", "sad", "dull", "weak", "boring", "ugly", "broken"),
    "good": ("lovely", "great", "happy", "bright", "strong", "exciting", "pretty", "splendid"),
}
_FRAMES: Final[_Words] = {
    "question": (
        "was the {thing} really {mood} ?",
        "why is that {thing} so {mood} ?",
        "who finds the {thing} {mood} ?",
    ),
    "statement": ("the {thing} was really {mood} .", "that {thing} is so {mood} .", "we find the {thing} {mood} ."),
    "command": ("call the {thing} {mood} !", "tell them that the {thing} is {mood} !", "keep this {thing} {mood} !"),
}
_LABELS: Final[dict[str, _Words]] = {"topic": _THINGS, "mood": _MOODS, "form": _FRAMES}
PHRASES: Final = tuple(f"phrases-{label}" for label in _LABELS)
"""Names of the tasks: the same kind of sentences, labelled by topic, mood or form."""

_TRAIN, _TEST = 480, 240


def load_phrases(name: str, tokenizer: Tokenizer, length: int = LENGTH) -> TextTask:
    """Returns one of `PHRASES`; each has sentences of its own, drawn once and for all.

    Args:
        name: of the task.
        tokenizer: makes the ids.
        length: tokens a sentence.

    Example:
        >>> from holdfast.tasks.tokenizers import load_tokenizer
        >>> task = load_phrases("phrases-mood", load_tokenizer("words"), length=12)
        >>> task.class_names, task.size("train"), task.input_shape
        (['bad', 'good'], 480, (12,))
    """
    rng = np.random.default_rng(PHRASES.index(name))
    wanted = list(_LABELS[name.removeprefix("phrases-")])

    def sentence() -> tuple[str, dict[str, str]]:
        picked = {label: str(rng.choice(list(words))) for label, words in _LABELS.items()}
        thing, mood, frame = (str(rng.choice(_LABELS[label][kind])) for label, kind in picked.items())
        return frame.format(thing=thing, mood=mood), picked

    def part(count: int) -> tuple[list[str], list[int]]:
        drawn = [sentence() for _ in range(count)]
        label = name.removeprefix("phrases-")
        return [text for text, _ in drawn], [wanted.index(picked[label]) for _, picked in drawn]

    made = text_task(name, part(_TRAIN), part(_TEST), wanted, tokenizer=tokenizer, length=length)
    return made.noted("embedded sentences")
