"""The state of a network during training: copies of it, their moving average, and the file to continue from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.runtime.distributed import process_group
from holdfast.runtime.storage import load_tensors, save_tensors

State = dict[str, Tensor]

FORMAT = 3
"""Version of the checkpoint's format; files with another number are refused."""


def snapshot(model: SplitModel) -> State:
    """Returns a copy of a network's parameters and buffers."""
    return {n: v.detach().clone() for n, v in model.network.state_dict().items()}


def restore(model: SplitModel, state: Mapping[str, Tensor]) -> None:
    """Puts parameters and buffers back into a network."""
    model.network.load_state_dict(dict(state))


class MovingAverage:
    """An exponential moving average of a network's state; without a decay, `state` stays empty.

    Args:
        decay: per round; None: no average.
        model: its state is the first value.
    """

    def __init__(self, decay: float | None, model: SplitModel) -> None:
        self.decay = decay
        self.state: State = {}
        self.reset(model)

    def reset(self, model: SplitModel) -> None:
        """Starts again from the current state of a model."""
        self.state = {} if self.decay is None else snapshot(model)

    @torch.no_grad()
    def update(self, model: SplitModel) -> None:
        """Adds the current state of a model to the average."""
        if self.decay is None:
            return
        for name, value in model.network.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - self.decay)
            else:
                self.state[name].copy_(value)


class Checkpoint:
    """The file from which an immunization continues: groups of tensors, and plain values.

    Args:
        path: of the file; None: nothing is saved.
        belongs_to: a hash of everything that the result depends on; the file of another immunization is refused.
    """

    def __init__(self, path: Path | None, belongs_to: str) -> None:
        self.path, self.belongs_to = path, belongs_to

    def write(self, groups: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """Saves tensors and plain values; with several processes, the main one writes the file."""
        path = self.path
        if path is None:
            return
        tensors = {f"{label}/{n}": v for label, group in groups.items() for n, v in group.items()}
        meta = {"format": FORMAT, "belongs_to": self.belongs_to, **values}
        process_group().on_main_process(lambda: save_tensors(path, tensors, meta))

    def read(self) -> tuple[dict[str, State], dict[str, Any]] | None:
        """Returns what `write` saved, or None if there is no file. Empty groups are not in it.

        Raises:
            HoldfastError: if another version of Holdfast or another immunization wrote the file.
        """
        path = self.path
        if path is None or not process_group().broadcast_object(path.exists()):
            return None
        tensors, meta = load_tensors(path)
        if meta.get("format") != FORMAT:
            raise HoldfastError(
                f"{str(path)!r} was written by another version of Holdfast, and this version cannot continue it. "
                "Choose another folder with --out, or finish it with the version that began it."
            )
        if meta.get("belongs_to") != self.belongs_to:
            raise HoldfastError(
                f"{str(path)!r} belongs to another immunization (model, data, seed, settings or number of processes "
                "differ). Choose another folder with --out."
            )
        groups: dict[str, State] = {}
        for key, value in tensors.items():
            label, _, name = key.partition("/")
            groups.setdefault(label, {})[name] = value
        return groups, meta
