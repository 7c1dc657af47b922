"""Rows of prompts with answers, and conversations, as token ids for a language model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from holdfast.errors import HoldfastError
from holdfast.tasks.next_token import IGNORED
from holdfast.tasks.tokenizers import Tokenizer

PROMPTS: Final = ("prompt", "question", "instruction")
ANSWERS: Final = ("answer", "completion", "response", "output")
"""Names of columns; the first that a table has is used."""

DATE: Final = "26 Jul 2024"
"""What chat templates that write a date get, so that the data do not change from day to day: the default of Llama 3."""

ROLES: Final = ("system", "user", "assistant", "tool", "developer")

LossOn = Literal["answer", "all"]


@dataclass(frozen=True)
class Passage:
    """A text with the parts of it that count for the loss.

    Attributes:
        text: what the tokenizer reads.
        spans: starts and ends of the parts that count, in characters.
        complete: whether the text has its special tokens, as chat templates write them; otherwise the tokenizer's own
            are added, and an end token.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    complete: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a file: the passage to learn, and the same prompt with wrong answers."""

    number: int
    right: Passage
    wrong: tuple[Passage, ...] = ()


@dataclass
class Counts:
    """What became of the rows, for a note."""

    rows: int = 0
    cut: int = 0


class RowReader:
    """Turns the rows of one table into token ids.

    Args:
        path: for messages.
        tokenizer: makes the ids; it must be one of transformers.
        length: tokens that a model sees in a row; what is longer is cut off.
        loss_on: whether the answers count, or everything.

    Raises:
        HoldfastError: if the tokenizer hashes words.
    """

    def __init__(self, path: Path | str, tokenizer: Tokenizer, length: int, loss_on: LossOn) -> None:
        check_language(path, tokenizer)
        self.path, self.tokenizer, self.length, self.loss_on = path, tokenizer, length, loss_on
        self.counts = Counts()

    # From cells to passages

    def conversation(self, messages: Any, number: int) -> Row:
        """Returns a row from a list of messages by the tokenizer's chat template; the assistant's words count."""
        told = self._messages(messages, number)
        if getattr(self.tokenizer.fast, "chat_template", None) is None:
            raise HoldfastError(
                f"{str(self.path)!r} holds conversations, and the tokenizer {self.tokenizer.vocabulary.name!r} has no "
                f"chat template. Take the tokenizer of a chat model, or give columns {PROMPTS[0]!r} and {ANSWERS[0]!r}."
            )
        if "strftime_now" in str(self.tokenizer.fast.chat_template) and "date_string" not in str(
            self.tokenizer.fast.chat_template
        ):
            raise self.bad(
                number,
                "the chat template writes today's date, so that the data would be others tomorrow; give columns "
                f"{PROMPTS[0]!r} and {ANSWERS[0]!r}",
            )
        text = self._templated(told, number)
        spans = []
        for i, message in enumerate(told):
            if message["role"] == "assistant":
                before = self._templated(told[:i], number, add_generation_prompt=True)
                after = self._templated(told[: i + 1], number)
                if not (text.startswith(before) and text.startswith(after)):
                    raise self.bad(
                        number,
                        "the chat template writes earlier messages in another way than the last one, so answers cannot "
                        f"be found; give one answer a row, or columns {PROMPTS[0]!r} and {ANSWERS[0]!r}",
                    )
                spans.append((len(before), len(after)))
        return Row(number, Passage(text, tuple(spans), complete=True))

    def _messages(self, messages: Any, number: int) -> list[dict[str, str]]:
        if isinstance(messages, np.ndarray):  # as parquet files hold them
            messages = messages.tolist()
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages) or not messages:
            raise self.bad(number, f"messages is {str(messages)[:60]!r}; expected a list of role and content")
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise self.bad(number, f"the role {role!r} is not known; expected {', '.join(ROLES)}")
            if not isinstance(content, str):
                raise self.bad(number, f"the content of {role} is {content!r}; expected text")
        if not any(m["role"] == "assistant" and m["content"] for m in messages):
            raise self.bad(number, "no message is the assistant's, so there is nothing to learn; add an answer")
        return [{"role": m["role"], "content": m["content"]} for m in messages]

    def _templated(self, messages: list[dict[str, str]], number: int, **more: Any) -> str:
        if not messages:
            return ""
        try:
            settings = {"tokenize": False, "date_string": DATE, **more}
            return str(self.tokenizer.fast.apply_chat_template(messages, **settings))
        except Exception as error:  # a template is code, and may raise anything
            raise self.bad(number, f"the tokenizer's chat template refuses it: {error}") from error

    def question(self, prompt: Any, answer: Any, choices: Any, number: int, prompt_column: str) -> Row:
        """Returns a row from a prompt, its answer and, if there are some, the choices."""
        asked = self.text(prompt, number, prompt_column)
        if choices is None:
            return Row(number, self._answered(asked, self.text(answer, number, "answer")))
        options = self._options(choices, number)
        said = str(answer).strip()
        numbered = isinstance(answer, int | np.integer) and not isinstance(answer, bool) and said not in options
        position = int(answer) if numbered else None
        if position is not None and not 0 <= position < len(options):
            raise self.bad(number, f"the answer is number {position}, and there are {len(options)} choices, from 0 on")
        right = options[position] if position is not None else said
        if right not in options:
            raise self.bad(number, f"the answer {right!r} is not among its choices {options}")
        wrong = tuple(self._answered(asked, other) for other in options if other != right)
        if not wrong:
            raise self.bad(number, f"its choices {options} are all the same; give a wrong one")
        return Row(number, self._answered(asked, right), wrong)

    def _options(self, choices: Any, number: int) -> list[str]:
        values = choices.split("|") if isinstance(choices, str) else choices
        if not isinstance(values, list | tuple | np.ndarray) or len(values) < 2:
            raise self.bad(number, f"choices is {choices!r}; expected a list of at least two, or texts with | between")
        return [self.text(value, number, "choices").strip() for value in values]

    def _answered(self, prompt: str, answer: str) -> Passage:
        gap = "" if not prompt or prompt[-1].isspace() or answer[0].isspace() else " "
        start = len(prompt) + len(gap)
        return Passage(prompt + gap + answer, ((start, start + len(answer)),))

    def text(self, value: Any, number: int, column: str) -> str:
        """Returns a cell that must hold text.

        Raises:
            HoldfastError: naming row and column.
        """
        if not isinstance(value, str):
            what = "is missing" if is_missing(value) else f"is {value!r}"
            raise self.bad(number, f"{column} {what}; expected text")
        if not value.strip():
            raise self.bad(number, f"{column} is empty; fill it, or leave the row out")
        return value

    # From passages to ids

    def arrays(
        self, rows: Sequence[Row], *, whole: bool = False
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns ids and targets of rows: shape (N, 1 + K, length), with K the largest number of wrong answers.

        Args:
            rows: of one split.
            whole: whether a row that is too long is refused; otherwise its end is cut off.
        """
        width = 1 + max((len(row.wrong) for row in rows), default=0)
        x = np.full((len(rows), width, self.length), self.tokenizer.vocabulary.pad, dtype=np.int64)
        y = np.full_like(x, IGNORED)
        passages = [(i, k, p) for i, row in enumerate(rows) for k, p in enumerate((row.right, *row.wrong))]
        encoded = self._encoded([p for _, _, p in passages])
        cut: set[int] = set()
        for (i, k, _), (ids, counts) in zip(passages, encoded, strict=True):
            if len(ids) > self.length + 1:
                cut.add(i)
                if whole:
                    raise self.bad(
                        rows[i].number,
                        f"with one of its answers it has {len(ids)} tokens, and only whole answers can be compared; "
                        f"set length to at least {len(ids) - 1}",
                    )
            self._check(ids, counts, rows[i].number)
            targets = np.where(counts[1:], ids[1:], IGNORED)[: self.length]
            x[i, k, : min(len(ids) - 1, self.length)] = ids[:-1][: self.length]
            y[i, k, : len(targets)] = targets
        self.counts.rows += len(rows)
        self.counts.cut += len(cut)
        return x, y

    def _check(self, ids: npt.NDArray[np.int64], counts: npt.NDArray[np.bool_], number: int) -> None:
        kept = counts[1 : self.length + 1]
        if kept.any():
            return
        first = int(np.flatnonzero(counts)[0]) if counts.any() else len(ids)
        raise self.bad(
            number,
            f"it has {len(ids)} tokens, and the answer, which begins after {first}, is cut away at {self.length}; set "
            f"length to at least {first + 1}, or shorten the prompt",
        )

    def _encoded(self, passages: Sequence[Passage]) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
        """Ids of each passage, and which of them count; all passages are complete, or none is."""
        complete, fast = passages[0].complete, self.tokenizer.fast
        made = fast(
            [p.text for p in passages], add_special_tokens=not complete, return_offsets_mapping=True, verbose=False
        )
        result, end = [], None if complete else fast.eos_token_id
        for passage, ids, offsets in zip(passages, made["input_ids"], made["offset_mapping"], strict=True):
            counts = [self.loss_on == "all" or _within(passage.spans, *offset) for offset in offsets]
            ended = end is None or (ids and ids[-1] == end)
            more = [] if ended else [end]
            result.append((np.asarray([*ids, *more], dtype=np.int64), np.asarray([*counts, *(True for _ in more)])))
        return result

    def note(self) -> str:
        """Returns how many rows there are, and how many were cut."""
        cut = f", {self.counts.cut} of them cut there" if self.counts.cut else ""
        return f"{self.counts.rows} rows, padded to {self.length} tokens{cut}"

    def bad(self, number: int, problem: str) -> HoldfastError:
        """Returns the error for a row."""
        return HoldfastError(f"{str(self.path)!r}, row {number}: {problem}.")


def check_language(name: Path | str, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer whose ids stand for no text.

    Raises:
        HoldfastError: naming the task or file.
    """
    if tokenizer.fast is None:
        raise HoldfastError(
            f"{str(name)!r}: the tokenizer {tokenizer.vocabulary.name!r} hashes words, which cannot be turned back "
            "into text; give the folder of a language model's tokenizer, or `bytes`."
        )


def is_missing(cell: Any) -> bool:
    """Whether a cell of a table has no value: None, or the NaN of pandas."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _within(spans: Iterable[tuple[int, int]], start: int, end: int) -> bool:
    """Whether a token with these offsets has a character in one of the spans; added tokens have none."""
    return any(start < stop and end > first for first, stop in spans) and end > start
