"""Concept erasure: the closed-form edit of cross-attention by which practitioners remove a concept from a model.

Cross-attention reads a caption only through keys and values: W c for the vector c of each token. Unified concept
editing (UCE, Gandikota et al., WACV 2024, after TIME, Orgad et al., ICCV 2023) replaces each such matrix W by one that
gives the erased vectors c_i the keys and values of other vectors c*_i, and keeps those of preserved vectors c_j:

    min over W*:  sum_i |W* c_i - W c*_i|^2 + lambda_p sum_j |W* c_j - W c_j|^2 + lambda |W* - W|_F^2.

The objective is convex. Its gradient is zero where

    W* A = W B,   A = sum_i c_i c_i'  + lambda_p sum_j c_j c_j' + lambda I,
                  B = sum_i c*_i c_i' + lambda_p sum_j c_j c_j' + lambda I.

A is positive definite for lambda > 0, so that the only minimum is W* = W B A^-1 (UCE, Eq. 7). All layers read the same
vectors: one matrix B A^-1 serves all of them. A bias is in both terms of each difference, and stays as it is.

The edit changes what a caption means to the model. It needs no images, and it is not made to resist fine-tuning: an
adversary's first steps on keys and values may teach the caption again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.defenses.base import Defense, DefenseRecord
from holdfast.defenses.captioned import check_captioned, keys_and_values
from holdfast.defenses.registry import register_defense
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, TextToImage
from holdfast.models.text_encoders import Encoded
from holdfast.results import Event
from holdfast.runtime.run import Run
from holdfast.tasks import Task, TextToImageTask
from holdfast.tasks.text_to_image import caption_tokens

SAME = 1e-3
"""Vectors whose distance is below this share of their length count as one: encoders round."""


def edit_matrix(erased: Tensor, targets: Tensor, preserved: Tensor, *, preserve_weight: float, ridge: float) -> Tensor:
    """Returns B A^-1, by which keys' and values' weights are multiplied from the right.

    Args:
        erased: vectors c_i, floating point, shape (N, D).
        targets: for each its c*_i, shape (N, D).
        preserved: vectors c_j, shape (M, D).
        preserve_weight: lambda_p.
        ridge: lambda, above 0.

    Returns:
        float64, shape (D, D).

    Example:
        >>> erased, targets, preserved = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> edit_matrix(erased, targets, preserved, preserve_weight=1.0, ridge=1e-9).round(decimals=6).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    c, wanted, kept = (vectors.to(torch.float64) for vectors in (erased, targets, preserved))
    both = preserve_weight * kept.T @ kept + ridge * torch.eye(c.shape[1]).to(c)
    edited: Tensor = torch.linalg.solve(c.T @ c + both, (wanted.T @ c + both).T)
    return edited.T


@register_defense
@dataclass
class ConceptErasure(Defense):
    """UCE for text-to-image models; see the top of this file. Nothing is random.

    The captions of the restricted task are erased; those of the benign task, the empty caption and `preserve` are kept,
    with all of their tokens. A token of a restricted caption is erased if no kept caption has its vector: with an
    encoder that reads words one by one these are the words of the concept; with CLIP's also what follows them, padding
    as well, as in the first released code of UCE. The target of a token is the token at the same place of the caption
    `target`; that code aligns both captions at their last words.

    Attributes:
        target: the caption whose keys and values the erased ones get; by default the empty one, as the released code
            has it for objects.
        preserve: further captions to keep.
        preserve_weight: lambda_p (released code: 1).
        ridge: lambda (released code: 0.5).

    Raises:
        HoldfastError: for a value out of range.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits@kind=text-to-image,caption=the digit {}")
        >>> benign, restricted = task.subset(range(8)), task.subset([8, 9])
        >>> model = load_model("text-unet", benign)
        >>> edited, record = ConceptErasure(ridge=1e-6).immunize(model, benign, restricted, run=Run(0))
        >>> print(record.events[0].message)
        keys and values of 2 erased tokens: 0.0% of the way to the target is left; of 144 preserved: changed by 0.0%
    """

    name: ClassVar[str] = "concept-erasure"
    citation: ClassVar[str] = (
        "Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024 (arXiv 2308.14761); after Orgad et "
        "al., Editing Implicit Assumptions in Text-to-Image Diffusion Models, ICCV 2023 (arXiv 2303.08084)"
    )

    target: str = ""
    preserve: tuple[str, ...] = ()
    preserve_weight: float = 1.0
    ridge: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_negative("preserve_weight")
        self.refuse_not_above_zero("ridge")

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Edits the keys and values of a copy of the model; see `Defense.immunize`.

        Raises:
            HoldfastError: for a model or tasks that are not text-to-image, or that do not fit; if a layer does not read
                the text encoder's vectors; or if all that a restricted caption says is preserved.
        """
        checked, own, other = check_captioned(self, model, benign, restricted)
        edited = checked.clone().to(run.device).eval()
        self._check_inputs(edited, other)
        preserved = torch.cat([
            _vectors(edited, own.tokens).flatten(0, 1), _vectors(edited, _ids(own, self.preserve)).flatten(0, 1)
        ])  # fmt: skip
        erased, targets = self._erased(edited, other, preserved)
        change = edit_matrix(erased, targets, preserved, preserve_weight=self.preserve_weight, ridge=self.ridge)
        left, moved = _apply(edited, change, erased, targets, preserved)
        message = (
            f"keys and values of {len(erased)} erased tokens: {left:.1%} of the way to the target is left; of "
            f"{len(preserved)} preserved: changed by {moved:.1%}"
        )
        history: dict[str, list[int | float | None]] = {
            "erased_tokens": [len(erased)], "left": [left], "preserved_change": [moved]
        }  # fmt: skip
        return edited, DefenseRecord(history=history, events=[Event(iteration=0, message=message)])

    def _check_inputs(self, model: TextToImage, task: TextToImageTask) -> None:
        """Refuses layers that read another thing than the text encoder's vectors, such as a projection of them."""
        batch = next(iter(task.sweep("train", 2, device=model.device)))
        caught: list[Tensor] = []
        layers = keys_and_values(model)
        hooks = [layer.register_forward_pre_hook(lambda _, args: caught.append(args[0])) for layer in layers]
        with torch.no_grad():
            vectors = model.text(caption_tokens(batch.x[:, -2])).states
            model(batch.x)
        for hook in hooks:
            hook.remove()
        own = [x.shape == vectors.shape and torch.allclose(x, vectors.to(x.dtype), rtol=SAME) for x in caught]
        if len(own) < len(layers) or not all(own):
            raise HoldfastError(
                f"{self.name}: in {model.name}, layers that make keys and values of captions do not read the text "
                "encoder's vectors, but a projection of them or states that depend on the image; the closed form is "
                "for layers that read them as they are, as in Stable Diffusion."
            )

    def _erased(self, model: TextToImage, restricted: TextToImageTask, preserved: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors c_i that are erased, and their c*_i."""
        target = _vectors(model, _ids(restricted, [self.target]))[0]
        erased, targets = [], []
        for caption, vectors in zip(restricted.captions, _vectors(model, restricted.tokens[:-1]), strict=True):
            own = torch.cdist(vectors, preserved).amin(1) > SAME * vectors.norm(dim=1)
            if not bool(own.any()):
                raise HoldfastError(
                    f"{self.name}: the restricted caption {caption!r} has no token that the preserved captions do not "
                    "have, so nothing can be erased without them; give tasks with other captions, or preserve fewer."
                )
            erased.append(vectors[own])
            targets.append(target[own])
        return torch.cat(erased), torch.cat(targets)


def _ids(task: TextToImageTask, captions: Sequence[str]) -> Tensor:
    """Token ids of captions as the task has them; shape (K, L), also for none."""
    return torch.from_numpy(task.tokenizer.encode(list(captions), task.length)) if captions else task.tokens[:0]


@torch.no_grad()
def _vectors(model: TextToImage, ids: Tensor) -> Tensor:
    """The text encoder's vectors of captions: float64 on the CPU, as some devices have none; shape (K, L, D)."""
    if not len(ids):
        return torch.zeros(0, ids.shape[1], model.text.width, dtype=torch.float64)
    encoded: Encoded = model.text(ids.to(model.device))
    return encoded.states.cpu().to(torch.float64)


@torch.no_grad()
def _apply(
    model: TextToImage, change: Tensor, erased: Tensor, targets: Tensor, preserved: Tensor
) -> tuple[float, float]:
    """Edits the weights, and measures the edited ones.

    Returns:
        The share of the distance between the keys and values of erased vectors and of their targets that is left, and
        the change of the preserved vectors' keys and values as a share of their size.
    """
    squares = torch.zeros(4, dtype=torch.float64)
    for layer in keys_and_values(model):
        before = layer.weight.cpu().to(torch.float64)
        layer.weight.copy_(before @ change)
        after = layer.weight.cpu().to(torch.float64)
        wanted = targets @ before.T
        parts = (
            erased @ after.T - wanted, erased @ before.T - wanted, preserved @ (after - before).T, preserved @ before.T
        )  # fmt: skip
        squares += torch.stack([part.square().sum() for part in parts])
    left, way, moved, size = squares.sqrt().tolist()
    return left / way if way else 0.0, moved / size if size else 0.0
