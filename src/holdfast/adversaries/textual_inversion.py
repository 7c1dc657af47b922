"""Textual Inversion: a text-to-image model stays as it is, and learns a concept as the vector of a new token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.adversaries.base import KINDS, Adversary
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training.learned_tokens import LearnedTokens
from holdfast.training.rare_tokens import captioned, not_captioned
from holdfast.training.strategy import OPTIMIZERS


@KINDS.register("textual-inversion")
@dataclass(frozen=True)
class TextualInversion(Adversary):
    """Trains one word vector for each caption of the task, and nothing else.

    After Gal et al. (ICLR 2023), as `textual_inversion.py` of diffusers has it: a new token stands in place of the last
    word of each caption ("a photo of a <concept>"), and its vector begins as that of the word (the mean, if it has
    several tokens). AdamW trains the table of word vectors, and all other rows are put back after every step. The
    network and the rest of the text encoder keep their weights. A free row of the table is that of the new token, see
    `rare_tokens`; no row is added. The encoder stays in evaluation mode, and no caption is left out. Of a model with
    several text encoders the first learns, as in `textual_inversion_sdxl.py`, and the others read the caption as it is.

    Attributes:
        learning_rate: that of diffusers by default, which suits the small vectors of CLIP; vectors of unit size need a
            hundred times more.
        batch_size: samples a step.
        weight_decay: at least 0.
        name: by default made from the settings.

    Raises:
        HoldfastError: for a number out of range.

    Example:
        >>> TextualInversion().name
        'textual inversion adamw 0.0005 b50 wd0.01'
    """

    learning_rate: float = 5e-4
    batch_size: int = 50
    weight_decay: float = 1e-2
    name: str = field(default="")

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise HoldfastError(f"learning_rate is {self.learning_rate}; expected a number above 0.")
        if self.batch_size < 1:
            raise HoldfastError(f"batch_size is {self.batch_size}; expected at least 1.")
        if not 0 <= self.weight_decay < float("inf"):
            raise HoldfastError(f"weight_decay is {self.weight_decay}; expected at least 0.")
        decay = f" wd{self.weight_decay:g}" if self.weight_decay else ""
        shown = f"textual inversion adamw {self.learning_rate:g} b{self.batch_size}{decay}"
        object.__setattr__(self, "name", self.name or shown)

    def config(self) -> dict[str, Any]:
        """See `Adversary.config`."""
        own = {name: getattr(self, name) for name in ("learning_rate", "batch_size", "weight_decay")}
        return {"kind": "textual-inversion", **own}

    def not_applicable(self, model: SplitModel, task: Task) -> str | None:
        """See `Adversary.not_applicable`."""
        return not_captioned(model, task)

    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """See `Adversary.run`."""
        victim, shown = captioned(model, task, self.name)
        tokens = LearnedTokens(victim, shown, benign)
        optimizer = OPTIMIZERS["adamw"]([tokens.table], self.learning_rate, self.weight_decay)
        yield torch.zeros((), device=device)
        for batch in shown.batches("train", self.batch_size, generator=generator, device=device):
            victim.eval()
            optimizer.zero_grad(set_to_none=True)
            loss = shown.loss(victim, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            tokens.put_others_back()
            yield loss.detach()
