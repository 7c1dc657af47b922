"""Prompts with a token of their own: where it goes in a caption, and which token ids are free for it.

DreamBooth (Ruiz et al. 2023) puts a rare token before the class noun, "a photo of a sks dog"; Textual Inversion (Gal et
al. 2023) puts a learned one in its place, "a photo of a <concept>". The last word of a caption counts as its noun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, TextToImage
from holdfast.tasks import Task
from holdfast.tasks.text_to_image import TextToImageTask
from holdfast.tasks.tokenizers import Tokenizer

USUAL: Final = "sks"
"""The rare token of DreamBooth's examples in diffusers, if the tokenizer knows it as one token."""


def not_captioned(model: SplitModel, task: Task) -> str | None:
    """Returns why no token can be put into the task's captions, or None if one can."""
    if not isinstance(task, TextToImageTask):
        return f"it changes captions, which {task.described} does not have"
    if not isinstance(model, TextToImage):
        return "it prompts a text-to-image model with other captions, and this model reads none"
    try:
        concepts = Concepts.of(task)
    except HoldfastError:
        return f"captions have {task.length} tokens, which leaves no room for another one; set the task's length"
    if (
        wordless := next((c for c, word in zip(task.captions, concepts.words, strict=True) if not word), None)
    ) is not None:
        return f"the caption {wordless!r} has no word to put a token before"
    free = len(_free(model, task, None))
    if free < len(task.captions):
        return f"it needs a token for each of {len(task.captions)} captions, and {free} are free"
    return None


def captioned(model: SplitModel, task: Task, name: str) -> tuple[TextToImage, TextToImageTask]:
    """Returns a model and a task of captions, without dropout of captions.

    Raises:
        HoldfastError: with the reason of `not_captioned`.
    """
    reason = not_captioned(model, task)
    if reason is not None or not isinstance(model, TextToImage) or not isinstance(task, TextToImageTask):
        raise HoldfastError(f"{name} cannot be run on {task.name!r}: {reason}.")
    return model, task.with_dropout(0.0)


@dataclass(frozen=True)
class Concepts:
    """The captions of a task, split before the last word.

    Attributes:
        captions: token ids, int64, shape (K, L).
        openings: ids of the captions without their last word, shape (K, L).
        at: where the last word of each begins.
        words: the ids of each last word.

    Example:
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits[3-4]@kind=text-to-image,caption=a digit {},length=5")
        >>> concepts = Concepts.of(task)
        >>> concepts.captions.tolist()
        [[828, 251, 917, 0, 0], [828, 251, 659, 0, 0]]
        >>> concepts.with_tokens([1, 2]).tolist()
        [[828, 251, 1, 917, 0], [828, 251, 2, 659, 0]]
        >>> concepts.in_place([1, 2]).tolist()
        [[828, 251, 1, 0, 0], [828, 251, 2, 0, 0]]
    """

    captions: Tensor
    openings: Tensor
    at: tuple[int, ...]
    words: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, task: TextToImageTask) -> Self:
        """Splits a task's captions.

        Raises:
            HoldfastError: if a caption leaves no room for one more token.
        """
        tokenizer, pad = task.tokenizer, task.vocabulary.pad
        captions = task.tokens[:-1]
        shorter = torch.from_numpy(tokenizer.encode(task.captions, task.length - 1))
        if not torch.equal(captions, torch.nn.functional.pad(shorter, (0, 1), value=pad)):
            raise HoldfastError(
                f"Task {task.name!r}: its captions of {task.length} tokens have no room for another one."
            )
        openings = torch.from_numpy(tokenizer.encode([_opening(c) for c in task.captions], task.length))
        at, words = [], []
        for caption, opening in zip(captions, openings, strict=True):
            first = _shared(caption, opening)
            count = int((caption != pad).sum() - (opening != pad).sum())
            at.append(first)
            words.append(tuple(caption[first : first + count].tolist()))
        return cls(captions, openings, tuple(at), tuple(words))

    def with_tokens(self, ids: list[int]) -> Tensor:
        """Returns prompts of shape (K, L) with one token each before the last word."""
        return _inserted(self.captions, self.at, ids)

    def in_place(self, ids: list[int]) -> Tensor:
        """Returns prompts of shape (K, L) with one token each in place of the last word."""
        return _inserted(self.openings, self.at, ids)


def _opening(caption: str) -> str:
    """A caption without its last word."""
    return " ".join(caption.split()[:-1])


def _shared(a: Tensor, b: Tensor) -> int:
    """How many tokens two rows begin with in common."""
    differs = (a != b).nonzero()
    return int(differs[0]) if len(differs) else len(a)


def _inserted(rows: Tensor, at: tuple[int, ...], ids: list[int]) -> Tensor:
    """Rows with one more token each; the last token of a row, which is padding, is left out."""
    new = [torch.cat([row[:i], torch.tensor([token]), row[i:-1]]) for row, i, token in zip(rows, at, ids, strict=True)]
    return torch.stack(new)


def rare_tokens(model: TextToImage, task: TextToImageTask, benign: Task | None) -> list[int]:
    """Returns a token id for each caption of a task that no caption of the two tasks uses.

    The first is `USUAL`, if the tokenizer knows it as one token. The others are the last of the vocabulary, which in a
    byte-pair encoding are its rarest merges; special tokens are left out.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits[3-4]@kind=text-to-image")
        >>> rare_tokens(load_model("text-unet", task), task, None)
        [883, 1023]
    """
    free = _free(model, task, benign)
    usual = _usual(task.tokenizer)
    if usual in free:
        free = [usual, *(i for i in free if i != usual)]
    if len(free) < len(task.captions):
        raise HoldfastError(
            f"A token for each of {len(task.captions)} captions of {task.name!r} is needed, and {len(free)} are free "
            f"in the vocabulary {task.vocabulary.name!r}; keep fewer captions with NAME[...]."
        )
    return free[: len(task.captions)]


def _free(model: TextToImage, task: TextToImageTask, benign: Task | None) -> list[int]:
    """Token ids that no caption uses, the last of the vocabulary first."""
    used = {task.vocabulary.pad, *task.tokens.flatten().tolist()}
    if isinstance(benign, TextToImageTask):
        used |= set(benign.tokens.flatten().tolist())
    fast = task.tokenizer.fast
    if fast is not None:
        used |= {*fast.all_special_ids, *fast.added_tokens_encoder.values()}
    count = min(task.vocabulary.size, model.text.embedding.num_embeddings)
    return [i for i in range(count - 1, -1, -1) if i not in used]


def _usual(tokenizer: Tokenizer) -> int | None:
    """The id of `USUAL`; None if the tokenizer has no token for it."""
    word, empty = torch.from_numpy(tokenizer.encode([USUAL, ""], 8))
    pad, first = tokenizer.vocabulary.pad, _shared(word, empty)
    if int((word != pad).sum() - (empty != pad).sum()) != 1:
        return None
    unknown = None if tokenizer.fast is None else tokenizer.fast.unk_token_id
    token = int(word[first])
    return None if token == unknown else token
