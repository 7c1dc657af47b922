"""Prompts with a token of their own: where it goes in a caption, and which token ids are free for it.

DreamBooth (Ruiz et al. 2023) puts a rare token before the class noun, "a photo of a sks dog"; Textual Inversion (Gal et
al. 2023) puts a learned one in its place, "a photo of a <concept>". The last word of a caption counts as its noun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, TextToImage
from holdfast.tasks import Task
from holdfast.tasks.pipeline_folder import PipelineTokenizer
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
    for part in concepts.parts:
        for caption, word in zip(task.captions, part.words, strict=True):
            if not word:
                return f"the caption {caption!r} has no word to put a token before"
    free = min(len(each) for each in _free(model, task, None))
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
class Part:
    """The captions of a task as one text encoder reads them, split before the last word.

    Attributes:
        captions: token ids, int64, shape (K, L).
        openings: ids of the captions without their last word, shape (K, L).
        at: where the last word of each begins.
        words: the ids of each last word.
    """

    captions: Tensor
    openings: Tensor
    at: tuple[int, ...]
    words: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, captions: list[str], length: int, read: int) -> Self:
        """Splits captions.

        Args:
            tokenizer: of the encoder.
            captions: K texts.
            length: L.
            read: tokens that the encoder reads of them.

        Raises:
            HoldfastError: if a caption leaves no room for one more token.
        """
        pad = tokenizer.vocabulary.pad

        def rows(texts: list[str], count: int) -> Tensor:
            return F.pad(torch.from_numpy(tokenizer.encode(texts, count)), (0, length - count), value=pad)

        whole = rows(captions, read)
        if not torch.equal(whole, rows(captions, read - 1)):
            raise HoldfastError(f"Captions of {read} tokens have no room for another one.")
        openings = rows([_opening(caption) for caption in captions], read)
        at, words = [], []
        for caption, opening in zip(whole, openings, strict=True):
            first = _shared(caption, opening)
            count = int((caption != pad).sum() - (opening != pad).sum())
            at.append(first)
            words.append(tuple(caption[first : first + count].tolist()))
        return cls(whole, openings, tuple(at), tuple(words))


@dataclass(frozen=True)
class Concepts:
    """The captions of a task, split before the last word, for each text encoder of a model.

    Attributes:
        captions: token ids, int64, shape (K, L); with several encoders, a part of equal length for each.
        parts: these parts, split.

    Example:
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits[3-4]@kind=text-to-image,caption=a digit {},length=5")
        >>> concepts = Concepts.of(task)
        >>> concepts.captions.tolist()
        [[828, 251, 917, 0, 0], [828, 251, 659, 0, 0]]
        >>> concepts.with_tokens([[1, 2]]).tolist()
        [[828, 251, 1, 917, 0], [828, 251, 2, 659, 0]]
        >>> concepts.in_place([1, 2]).tolist()
        [[828, 251, 1, 0, 0], [828, 251, 2, 0, 0]]
    """

    captions: Tensor
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, task: TextToImageTask) -> Self:
        """Splits a task's captions.

        Raises:
            HoldfastError: if a caption leaves no room for one more token.
        """
        tokenizer, texts = task.tokenizer, task.captions
        if isinstance(tokenizer, PipelineTokenizer) and tokenizer.lowercase:
            texts = [text.lower().strip() for text in texts]
        split = []
        for part, limit in _readers(task):
            read = task.length if limit is None else min(task.length, limit)
            split.append(Part.of(part, texts, task.length, read))
        return cls(task.tokens[:-1], tuple(split))

    def with_tokens(self, ids: list[list[int]]) -> Tensor:
        """Returns prompts with one token each before the last word.

        Args:
            ids: of the tokens, K for each part.

        Returns:
            int64, shape (K, L).
        """
        return torch.cat([_inserted(p.captions, p.at, i) for p, i in zip(self.parts, ids, strict=True)], 1)

    def in_place(self, ids: list[int]) -> Tensor:
        """Returns prompts with one token each in place of the last word, as the first encoder reads them.

        Other encoders read the captions as they are.

        Args:
            ids: of the tokens, K.

        Returns:
            int64, shape (K, L).
        """
        first, *others = self.parts
        return torch.cat([_inserted(first.openings, first.at, ids), *(part.captions for part in others)], 1)


def _readers(task: TextToImageTask) -> list[tuple[Tokenizer, int | None]]:
    """The tokenizers of a task, one for each text encoder, and how many tokens each encoder reads; None: any number."""
    tokenizer = task.tokenizer
    if isinstance(tokenizer, PipelineTokenizer):
        return list(zip(tokenizer.parts, tokenizer.limits, strict=True))
    return [(tokenizer, None)]


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


def rare_tokens(model: TextToImage, task: TextToImageTask, benign: Task | None) -> list[list[int]]:
    """Returns a token id for each caption of a task that no caption of the two tasks uses, for each text encoder.

    The first is `USUAL`, if the tokenizer knows it as one token. The others are the last of the vocabulary, which in a
    byte-pair encoding are its rarest merges; special tokens are left out.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits[3-4]@kind=text-to-image")
        >>> rare_tokens(load_model("text-unet", task), task, None)
        [[883, 1023]]
    """
    found = []
    for free, (tokenizer, _) in zip(_free(model, task, benign), _readers(task), strict=True):
        usual = _usual(tokenizer)
        ordered = [usual, *(i for i in free if i != usual)] if usual is not None and usual in free else free
        if len(ordered) < len(task.captions):
            raise HoldfastError(
                f"A token for each of {len(task.captions)} captions of {task.name!r} is needed, and {len(ordered)} are "
                f"free in the vocabulary {tokenizer.vocabulary.name!r}; keep fewer captions with NAME[...]."
            )
        found.append(ordered[: len(task.captions)])
    return found


def _free(model: TextToImage, task: TextToImageTask, benign: Task | None) -> list[list[int]]:
    """Token ids that no caption uses, the last of the vocabulary first, for each text encoder."""
    readers, found = _readers(task), []
    known = [model.text.embedding.num_embeddings, *(t.vocabulary.size for t, _ in readers[1:])]
    seen = [each.tokens for each in (task, benign) if isinstance(each, TextToImageTask)]
    for number, (tokenizer, _) in enumerate(readers):
        used = {tokenizer.vocabulary.pad}
        for tokens in seen:
            used |= set(tokens.chunk(len(readers), 1)[number].flatten().tolist())
        if tokenizer.fast is not None:
            used |= {*tokenizer.fast.all_special_ids, *tokenizer.fast.added_tokens_encoder.values()}
        count = min(tokenizer.vocabulary.size, known[number])
        found.append([i for i in range(count - 1, -1, -1) if i not in used])
    return found


def _usual(tokenizer: Tokenizer) -> int | None:
    """The id of `USUAL`; None if the tokenizer has no token for it."""
    word, empty = torch.from_numpy(tokenizer.encode([USUAL, ""], 8))
    pad, first = tokenizer.vocabulary.pad, _shared(word, empty)
    if int((word != pad).sum() - (empty != pad).sum()) != 1:
        return None
    unknown = None if tokenizer.fast is None else tokenizer.fast.unk_token_id
    token = int(word[first])
    return None if token == unknown else token
