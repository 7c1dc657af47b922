"""Hidden states of a network, for losses that compare or change them."""

from __future__ import annotations

from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.models import SplitModel


def states_of(name: str, model: SplitModel, depth: int | None) -> int:
    """Returns of how many blocks, from the last one back, hidden states are taken.

    Args:
        name: of the defense, for the message.
        model: its body has the blocks.
        depth: the number that was set; None: all blocks.

    Raises:
        HoldfastError: if the model has no hidden states of this depth.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> states_of("tar", load_model("cnn", load_task("digits[0-4]")), None)
        3
    """
    wanted = depth if depth is not None else max(1, len(model.blocks()))
    reason = model.not_probed(wanted)
    if reason is not None:
        raise HoldfastError(f"{name}: depth is {depth}, and {model.name} has no hidden states of it: {reason}.")
    return wanted


def with_hidden_states(model: SplitModel, x: Tensor, depth: int) -> tuple[Tensor, list[Tensor]]:
    """Returns a network's outputs and its hidden states of several depths, from one forward pass.

    Args:
        model: in any mode.
        x: inputs as a task yields them.
        depth: how many blocks, from the last one back.

    Returns:
        The outputs, and the hidden states as `SplitModel.features_by_depth` returns them: shapes (rows, D).

    Example:
        >>> import torch
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> model = load_model("cnn", load_task("digits[0-4]"))
        >>> outputs, states = with_hidden_states(model, torch.zeros(2, 1, 8, 8), 3)
        >>> outputs.shape, [z.shape[1] for z in states]
        (torch.Size([2, 5]), [64, 128, 64])
    """
    caught: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, outputs: caught.append(outputs))
    try:
        states = model.features_by_depth(x, depth)
    finally:
        hook.remove()
    return caught[0], states
