"""A network split at its head: its inputs, outputs and features, and how the head is replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.introspection import Head, blank_layer, duplicate, is_head, logits_of
from holdfast.runtime.devices import device_of, dtype_of


class SplitNetwork(nn.Module):
    """Input normalisation, a network, and the name of its last layer; the base of `SplitModel`.

    Args:
        network: see `SplitModel`.
        head: dotted name of the head.
        name: for messages.
        mean: of the input normalisation.
        std: likewise.
        channels_last: whether images are handed over in channels-last layout.
    """

    def __init__(
        self,
        network: nn.Module,
        head: str,
        *,
        name: str,
        mean: Iterable[float] | None,
        std: Iterable[float] | None,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.network = network
        self.head_name = head
        self.name = name
        self.channels_last = channels_last
        self.precision: torch.dtype | None = None
        """What inputs are cast to; None: the first parameter's."""
        self._check_head()
        if (mean is None) != (std is None):
            raise HoldfastError("Give mean and std of the input normalisation together, or neither.")
        for key, values in (("mean", mean), ("std", std)):
            buffer = None if values is None else torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(key, buffer, persistent=False)
        self.mean: Tensor | None
        self.std: Tensor | None
        if self.std is not None and not bool((self.std > 0).all()):
            raise HoldfastError(
                f"std of the input normalisation is {self.std.flatten().tolist()}; expected numbers above 0."
            )

    def _check_head(self) -> None:
        try:
            head = self.network.get_submodule(self.head_name)
        except AttributeError as error:
            layers = [n for n, m in self.network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            raise HoldfastError(
                f"{self.name}: there is no layer {self.head_name!r} to use as the head; the last ones are "
                f"{layers[-3:]}."
            ) from error
        if not isinstance(head, nn.Linear | nn.Conv2d):
            raise HoldfastError(
                f"{self.name}: the head {self.head_name!r} is {type(head).__name__}; expected Linear or Conv2d."
            )
        if not is_head(head):
            raise HoldfastError(
                f"{self.name}: the head {self.head_name!r} is {head}; as a head it must be 1x1, ungrouped."
            )

    @property
    def head(self) -> Head:
        """The layer that makes the logits."""
        head = self.network.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear | nn.Conv2d)
        return head

    @property
    def num_outputs(self) -> int:
        """Number of logits."""
        head = self.head
        return head.out_features if isinstance(head, nn.Linear) else head.out_channels

    @property
    def device(self) -> torch.device:
        """Where the network is; the CPU for a network without tensors."""
        return device_of(self.network)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the network computes in: that of its first weights, even if they are buffers."""
        return dtype_of(self.network)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape (N, classes) for inputs as a task yields them, cast to the network's precision.

        Token ids (int64) are not cast.
        """
        if x.dtype == torch.int64:
            return logits_of(self.network(x))
        x = x.to(self.precision or self.dtype)
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        if x.dim() == 4 and self.channels_last:
            # Channels last: convolutions of small networks run 2 to 3 times faster on a CPU.
            x = x.contiguous(memory_format=torch.channels_last)
        return logits_of(self.network(x))

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head receives, flattened to (N, D); see `with_features`."""
        return self.with_features(x)[1]

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits of one forward pass, and what the head receives, flattened to (N, D).

        Raises:
            HoldfastError: if the network does not use its head.
        """
        caught: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(
            lambda _, args, named: caught.append((*args, *named.values())[0]), with_kwargs=True
        )
        try:
            logits = self(x)
        finally:
            hook.remove()
        if not caught:
            raise HoldfastError(f"{self.name}: the network does not run its head {self.head_name!r}; name another.")
        return logits, caught[0].flatten(1)

    def reset_head(self, num_outputs: int | None = None) -> None:
        """Replaces the head by a freshly initialised one (torch's default, from its global generator)."""
        head = blank_layer(self.head, num_outputs or self.num_outputs)
        head.reset_parameters()
        self.put_head(head)

    def put_head(self, head: nn.Module) -> None:
        """Puts a layer in the head's place."""
        parent, _, leaf = self.head_name.rpartition(".")
        setattr(self.network.get_submodule(parent), leaf, head)

    def clone(self) -> Self:
        """Returns a deep copy whose training leaves this model alone."""
        return duplicate(self)

    def in_memory_format(self) -> Self:
        """Gives convolutions' weights the memory layout of the images, in place; returns this model."""
        if self.channels_last and any(p.dim() == 4 for p in self.parameters()):
            self.to(memory_format=torch.channels_last)
        return self
