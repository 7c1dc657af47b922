"""Made-up sentences with three kinds of labels: text without a file, for examples and tests of recipes.

A few frames are filled with words. The sentences do not represent a language, so results on them do not carry over to
real text.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from holdfast.tasks.builtin import TASKS
from holdfast.tasks.next_token import NextTokenTask
from holdfast.tasks.next_token_files import text_windows
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
_TRAIN, _TEST = 480, 240


@TASKS.register("phrases")
def phrases(tokenizer: Tokenizer, length: int = LENGTH) -> NextTokenTask:
    """Returns sentences one after the other, of which a language model predicts each next token.

    Example:
        >>> from holdfast.tasks.tokenizers import load_tokenizer
        >>> task = phrases(load_tokenizer("bytes"), length=32)
        >>> task.kind, task.input_shape, task.num_outputs
        ('next-token', (32,), 258)
    """
    rng = np.random.default_rng(len(_LABELS))
    train, test = ([_sentence(rng)[0] for _ in range(count)] for count in (_TRAIN, _TEST))
    return text_windows("phrases", train, test, tokenizer=tokenizer, length=length).noted("embedded sentences")


@TASKS.register("phrases-topic")
def phrases_topic(tokenizer: Tokenizer, length: int = LENGTH) -> TextTask:
    """Returns sentences labelled by topic."""
    return _phrases("topic", tokenizer, length)


@TASKS.register("phrases-mood")
def phrases_mood(tokenizer: Tokenizer, length: int = LENGTH) -> TextTask:
    """Returns sentences labelled as good or bad.

    Example:
        >>> from holdfast.tasks.tokenizers import load_tokenizer
        >>> task = phrases_mood(load_tokenizer("words"), length=12)
        >>> task.class_names, task.size("train"), task.input_shape
        (['bad', 'good'], 480, (12,))
    """
    return _phrases("mood", tokenizer, length)


@TASKS.register("phrases-form")
def phrases_form(tokenizer: Tokenizer, length: int = LENGTH) -> TextTask:
    """Returns sentences labelled as questions, statements or commands."""
    return _phrases("form", tokenizer, length)


def _phrases(label: str, tokenizer: Tokenizer, length: int) -> TextTask:
    """Each task has its own sentences, drawn by a fixed seed."""
    rng = np.random.default_rng(list(_LABELS).index(label))
    wanted = list(_LABELS[label])

    def part(count: int) -> tuple[list[str], list[int]]:
        drawn = [_sentence(rng) for _ in range(count)]
        return [text for text, _ in drawn], [wanted.index(picked[label]) for _, picked in drawn]

    made = text_task(f"phrases-{label}", part(_TRAIN), part(_TEST), wanted, tokenizer=tokenizer, length=length)
    return made.noted("embedded sentences")


def _sentence(rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """A sentence, and its label of each kind."""
    picked = {axis: str(rng.choice(list(words))) for axis, words in _LABELS.items()}
    thing, mood, frame = (str(rng.choice(_LABELS[axis][group])) for axis, group in picked.items())
    return frame.format(thing=thing, mood=mood), picked
