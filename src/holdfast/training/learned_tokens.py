"""Tokens of a text-to-image model whose word vectors alone are trained, as Textual Inversion does."""

from __future__ import annotations

import torch
from torch import nn

from holdfast.models import TextToImage
from holdfast.tasks import Task
from holdfast.tasks.text_to_image import TextToImageTask
from holdfast.training.rare_tokens import Concepts, rare_tokens


class LearnedTokens:
    """A new token in place of the last word of each caption, whose vector begins as that of the word.

    A free row of the table of word vectors is that of the token, see `rare_tokens`; a word of several tokens gives
    their mean. Of a model with several text encoders the first one learns, and the others read the caption as it is.

    Args:
        model: changed in place: all its weights are frozen but the table, and it reads the tokens.
        task: whose captions are read with the tokens.
        benign: the model's own task, whose captions' tokens are taken; None if it is not available.

    Attributes:
        table: word vectors of the first text encoder, to be trained; shape (tokens, D).

    Raises:
        HoldfastError: if there are too few free tokens, or a caption has no room for one.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits[3-4]@kind=text-to-image")
        >>> model = load_model("text-unet", task)
        >>> tokens = LearnedTokens(model, task, None)
        >>> [name for name, p in model.text.named_parameters() if p.requires_grad], tokens.ids
        (['words.weight'], [883, 1023])
    """

    def __init__(self, model: TextToImage, task: TextToImageTask, benign: Task | None) -> None:
        concepts, self.ids = Concepts.of(task), rare_tokens(model, task, benign)[0]
        model.requires_grad_(False)
        self.table: nn.Parameter = model.text.requires_grad_(False).embedding.weight  # type: ignore[assignment]
        with torch.no_grad():
            for token, word in zip(self.ids, concepts.parts[0].words, strict=True):
                self.table[token] = self.table[list(word)].mean(0)
        self._kept = self.table.detach().clone()
        self._others = torch.ones(len(self.table), dtype=torch.bool, device=self.table.device)
        self._others[self.ids] = False
        self.table.requires_grad_(True)
        model.prompt_with(concepts.captions, concepts.in_place(self.ids))

    @torch.no_grad()
    def put_others_back(self) -> None:
        """Undoes what an optimizer's step did to all other rows, such as weight decay."""
        self.table[self._others] = self._kept[self._others]
