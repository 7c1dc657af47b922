"""Text classification: loading turns sentences into arrays of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from holdfast.results import TaskFacts
from holdfast.tasks.arrays import Array
from holdfast.tasks.classification import ArrayTask
from holdfast.tasks.tokenizers import Tokenizer, Vocabulary

LENGTH = 64
"""Default number of tokens a sentence: enough for short news with their titles, and for most sentences."""


class TextTask(ArrayTask):
    """Classification of sentences, as token ids of one length.

    A batch's x has shape (N, L) and is int64. The vocabulary's padding id follows a sentence's end; models mask it.

    Args:
        name: shown in reports and errors.
        x_train: token ids of shape (N, L), integers from 0 on, below the vocabulary's size.
        y_train: integer labels of shape (N,), in [0, classes).
        x_test: like `x_train`.
        y_test: like `y_train`.
        class_names: one name a class; sets the number of classes (default: largest training label + 1).
        vocabulary: what the ids mean.

    Raises:
        HoldfastError: see `ArrayTask`; and for ids that are not integers or outside of the vocabulary.

    Example:
        >>> from holdfast.tasks.tokenizers import load_tokenizer
        >>> words = load_tokenizer("words")
        >>> x = words.encode(["so good", "so bad"], 3)
        >>> task = TextTask("toy", x, [0, 1], x, [0, 1], ["good", "bad"], vocabulary=words.vocabulary)
        >>> task.input_shape, task.num_outputs, task.vocabulary.size
        ((3,), 2, 1024)
    """

    def __init__(
        self,
        name: str,
        x_train: npt.ArrayLike,
        y_train: npt.ArrayLike,
        x_test: npt.ArrayLike,
        y_test: npt.ArrayLike,
        class_names: Sequence[str] | None = None,
        *,
        vocabulary: Vocabulary,
    ) -> None:
        self.vocabulary = vocabulary
        super().__init__(name, x_train, y_train, x_test, y_test, class_names)

    def _inputs(self, values: npt.ArrayLike, label: str) -> Array:
        a = np.asarray(values)
        assert self.vocabulary is not None
        if a.ndim != 2 or a.dtype.kind not in "ui":
            raise self._bad(f"{label} is {a.dtype} of shape {a.shape}; expected integers of shape (N, L), token ids")
        if a.size and not 0 <= int(a.min()) <= int(a.max()) < self.vocabulary.size:
            bad = int(a.min()) if a.min() < 0 else int(a.max())
            raise self._bad(
                f"{label} holds the id {bad}; the vocabulary {self.vocabulary.name!r} has ids from 0 to "
                f"{self.vocabulary.size - 1}"
            )
        return a.astype(np.int64)

    def with_inputs(self, train: Tensor, test: Tensor) -> Self:
        """See `Task.with_inputs`; the new inputs have no vocabulary."""
        task = super().with_inputs(train, test)
        task.vocabulary = None
        return task

    def facts(self) -> TaskFacts:
        """See `Task.facts`; the hash covers the vocabulary, and the facts name the tokenizer."""
        facts = super().facts()
        if self.vocabulary is None:
            return facts
        both = hashlib.sha256(f"{facts.sha256} {self.vocabulary.sha256}".encode()).hexdigest()
        return facts.model_copy(update={"sha256": both, "tokenizer": self.vocabulary.name})


def text_task(
    name: str,
    train: tuple[Sequence[str], npt.ArrayLike],
    test: tuple[Sequence[str], npt.ArrayLike],
    class_names: Sequence[str],
    *,
    tokenizer: Tokenizer,
    length: int = LENGTH,
) -> TextTask:
    """Returns a task over sentences in memory.

    Args:
        name: shown in reports and errors.
        train: sentences and integer labels.
        test: likewise.
        class_names: one name a class.
        tokenizer: makes the ids.
        length: tokens a sentence; longer sentences are cut off.
    """
    x_train, x_test = (tokenizer.encode(part[0], length) for part in (train, test))
    return TextTask(name, x_train, train[1], x_test, test[1], class_names, vocabulary=tokenizer.vocabulary)
