"""Undoing a block that holds the resistance: a quarter of the body, or the blocks without gradient, starts anew."""

from __future__ import annotations

import torch

from holdfast.adversaries.undo.introspection import batch_statistics, repair
from holdfast.adversaries.undo.layer_scaling import norm_of
from holdfast.adversaries.undo.moves import Make, Reason, undo_move
from holdfast.models import SplitModel
from holdfast.models.blocks import Block
from holdfast.tasks import Task

QUARTERS = 4
STILL = 2
"""Number of blocks that `renew-still` starts anew, or half of them if there are fewer than four."""


def _quarter(model: SplitModel, number: int) -> list[Block]:
    """The blocks of the body's n-th quarter, counted from the input; the last ones get the rest of a division."""
    blocks = model.blocks()
    ends = [k * len(blocks) // QUARTERS for k in (number - 1, number)]
    return blocks[slice(*ends)]


def _names(blocks: list[Block]) -> list[str]:
    return [name for block in blocks for name, _ in block]


def _register_quarter(number: int) -> None:
    def no_block(model: SplitModel, task: Task) -> str | None:
        if _quarter(model, number):
            return None
        return f"its body has {len(model.blocks())} blocks, and none of them is in quarter {number}"

    def renew(
        model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
    ) -> None:
        model.reinitialise(_names(_quarter(model, number)), reference)

    renew.__doc__ = f"Starts the blocks of quarter {number} of the body anew, counted from the input."
    make: Make = renew
    reason: Reason = no_block
    undo_move(f"renew-quarter-{number}", needs_reference=True, impossible=reason, weights_only=True)(make)


for _number in range(1, QUARTERS + 1):
    _register_quarter(_number)


def _too_few(model: SplitModel, task: Task) -> str | None:
    return None if len(model.blocks()) > 1 else "its body has a single block, so none is stiller than the others"


@undo_move("renew-still", needs_reference=True, impossible=_too_few, weights_only=True)
def renew_still(
    model: SplitModel, reference: SplitModel, task: Task, generator: torch.Generator, device: torch.device
) -> None:
    """Starts the `STILL` blocks anew whose gradients with a fresh head are smallest, relative to their weights.

    A block that gets hardly a gradient is not trained by any optimizer that scales with it, and one behind it that
    passes hardly a gradient makes it look so: both are among the smallest.
    """
    repair(model, reference)
    twin = model.clone()
    twin.reset_head(task.num_outputs)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    batch = next(task.batches("train", 250, generator=generator, device=device))
    with batch_statistics(twin, batch.x):
        task.loss(twin, batch).backward()  # type: ignore[no-untyped-call]
    blocks = twin.blocks()
    moved = [_relative_gradient(block) for block in blocks]
    count = max(1, min(STILL, len(blocks) // 2))
    stillest = sorted(range(len(blocks)), key=lambda i: moved[i])[:count]
    model.reinitialise(_names([blocks[i] for i in stillest]), reference)


def _relative_gradient(block: Block) -> float:
    """Norm of a block's gradients relative to that of its weights; what is not finite counts as 0."""
    weights = [p for _, layer in block for p in layer.parameters() if p.dim() > 1 and p.is_floating_point()]
    gradients = norm_of(torch.nan_to_num(p.grad, 0.0, 0.0, 0.0) for p in weights if p.grad is not None)
    size = norm_of(weights)
    return gradients / size if size > 0 else 0.0
