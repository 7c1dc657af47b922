"""A linear layer that a defense inserts between body and head, and how it is merged into the head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.blocks import Block, copy_layers, split_blocks
from holdfast.models.introspection import Head, blank_layer, every_tensor
from holdfast.models.split_network import SplitNetwork
from holdfast.runtime.devices import dtype_of, widest

PLACES = 2
"""Maps are averaged over a grid of so many places a side; see `ExtractorNetwork.features_by_depth`."""


class ExtractedHead(nn.Sequential):
    """A head with a linear extractor, or an eraser, before it: layers `0` and `1`; see `SplitModel.insert_extractor`.

    Both compute in float64, whatever the network's precision: an extractor is badly conditioned on purpose, and float32
    could change the benign outputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the head's outputs, in the dtype of x."""
        extractor, head = self
        inside = extractor(x.to(dtype_of(extractor)))
        outputs: Tensor = head(inside.to(dtype_of(head)))
        return outputs.to(x.dtype)


class ExtractorNetwork(SplitNetwork):
    """A split network into which an extractor can be inserted.

    Attributes:
        spec: see `SplitModel`; it records whether there is an extractor.
    """

    spec: dict[str, Any] | None = None

    def insert_extractor(self, theta: Tensor) -> float:
        """Puts the linear map z -> z theta before the head and its inverse into the head: outputs stay what they were.

        The inserted layer has the head's name with `.0` appended, and the head becomes `.1`. A second extractor is
        merged into the first.

        Args:
            theta: invertible, shape (D, D), float64.

        Returns:
            The condition number of theta: outputs change by about this times the precision of float64.

        Raises:
            HoldfastError: if theta has another shape or cannot be inverted.

        Example:
            >>> from holdfast.models import SplitModel
            >>> model = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)), head="2")
            >>> x = torch.ones(1, 4)
            >>> before = model(x)
            >>> kappa = model.insert_extractor(torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64))
            >>> torch.allclose(model(x), before, atol=1e-6), model.head_name
            (True, '2.1')
        """
        head = self.head
        width = head.weight.shape[1]
        if theta.shape != (width, width):
            raise HoldfastError(
                f"{self.name}: the extractor has shape {tuple(theta.shape)}; the head takes {width} features, so "
                f"({width}, {width}) is expected."
            )
        sigma = torch.linalg.svdvals(torch.nan_to_num(theta, 0.0, 0.0, 0.0))
        if not bool(theta.isfinite().all()) or sigma[-1] <= width * torch.finfo(theta.dtype).eps * sigma[0]:
            raise HoldfastError(f"{self.name}: the extractor cannot be inverted, so the head cannot undo it.")
        with torch.no_grad():
            plain = head.weight.flatten(1).to(theta).T
            if not self.has_extractor:
                self.add_extractor()
            layer = self.extractor_layer()
            first = layer.weight.view(width, width).to(theta, copy=True).T
            layer.weight.copy_((first @ theta).T.reshape_as(layer.weight))
            if layer.bias is not None:  # an eraser, which cannot be inverted, stands before the new extractor
                layer.bias.copy_(layer.bias @ theta.to(layer.bias))
                solved = torch.linalg.solve(theta, plain)
            else:
                # The inverse of the stored product, which is rounded: otherwise the outputs would change.
                rounded = layer.weight.view(width, width).to(theta).T
                solved = torch.linalg.solve(rounded, first @ plain)
            self.head.weight.copy_(solved.T.reshape_as(head.weight))
        return float(sigma[0] / sigma[-1])

    def insert_eraser(self, projection: Tensor, shift: Tensor) -> None:
        """Puts the affine map z -> z P + c before the head, which stays as it is; what P maps to 0 is erased.

        Unlike in `insert_extractor`, P need not be invertible, and the outputs change. The layers are named in the same
        way; if there is an extractor already, the two are merged into one layer.

        Args:
            projection: P, shape (D, D), float64.
            shift: c, shape (D,), float64.

        Raises:
            HoldfastError: if a shape is wrong, or a value is not finite.

        Example:
            >>> from holdfast.models import SplitModel
            >>> model = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)), head="2")
            >>> first = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
            >>> model.insert_eraser(first, torch.tensor([0.0, 7.0], dtype=torch.float64))
            >>> model.features(torch.ones(1, 4))[:, 1].item(), model.spec, model.head_name
            (7.0, None, '2.1')
        """
        width = self.head.weight.shape[1]
        if projection.shape != (width, width) or shift.shape != (width,):
            raise HoldfastError(
                f"{self.name}: the eraser has shapes {tuple(projection.shape)} and {tuple(shift.shape)}; the head "
                f"takes {width} features, so ({width}, {width}) and ({width},) are expected."
            )
        if not bool(projection.isfinite().all() and shift.isfinite().all()):
            raise HoldfastError(f"{self.name}: the eraser has values that are not finite.")
        self.expect_extractor("affine")
        layer = self.extractor_layer()
        with torch.no_grad():
            first = layer.weight.view(width, width).to(projection).T
            layer.weight.copy_((first @ projection).T.reshape_as(layer.weight))
            assert layer.bias is not None
            layer.bias.copy_(layer.bias.to(projection) @ projection + shift)

    def expect_extractor(self, extractor: bool | str) -> None:
        """Adds the layer for the extractor that saved weights have, if there is none yet.

        Args:
            extractor: as `spec` has it: True for a linear one, "affine" for an eraser, False for none.
        """
        if not extractor:
            return
        if not self.has_extractor:
            self.add_extractor()
        layer = self.extractor_layer()
        if extractor == "affine" and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
            if self.spec is not None:
                self.spec = {**self.spec, "extractor": "affine"}

    def add_extractor(self) -> None:
        """Puts an identity layer before the head, for `insert_extractor` or for weights with an extractor."""
        head = self.head
        width, dtype = head.weight.shape[1], widest(head.weight.device)
        layer = blank_layer(head, width, bias=False, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(width).view_as(layer.weight))
        parent, _, leaf = self.head_name.rpartition(".")
        setattr(self.network.get_submodule(parent), leaf, ExtractedHead(layer, head.to(dtype)))
        self.head_name = f"{self.head_name}.1"
        if self.spec is not None:
            self.spec = {**self.spec, "extractor": True}

    def extractor_layer(self) -> Head:
        """Returns the inserted layer."""
        layer = self.network.get_submodule(self.head_name.removesuffix("1") + "0")
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer

    @property
    def has_extractor(self) -> bool:
        """Whether the layer before the head was inserted by `insert_extractor` or `insert_eraser`."""
        return isinstance(self.network.get_submodule(self.head_name.rpartition(".")[0]), ExtractedHead)

    def blocks(self) -> list[Block]:
        """Returns the body as a list of blocks, each a list of (dotted name in `network`, module).

        `holdfast.models.blocks` states the rule. An inserted extractor belongs to the last block.

        Example:
            >>> from holdfast.models import load_model
            >>> from holdfast.tasks import load_task
            >>> [block[0][0] for block in load_model("cnn", load_task("digits[0-4]")).blocks()]
            ['body.0', 'body.4', 'body.9']
        """
        if not self.has_extractor:
            return split_blocks(self.network, self.head_name)
        extracted_head = self.head_name.rpartition(".")[0]
        blocks = split_blocks(self.network, extracted_head) or [[]]
        blocks[-1].append((f"{extracted_head}.0", self.extractor_layer()))
        return blocks

    def not_probed(self, depth: int) -> str | None:
        """Returns why `features_by_depth` would fail, or None if it works."""
        blocks = max(1, len(self.blocks()))
        if 1 <= depth <= blocks:
            return None
        return f"the depth of a probe is {depth}; expected 1 to {blocks}, the blocks of the body"

    def features_by_depth(self, x: Tensor, depth: int) -> list[Tensor]:
        """Returns what the last blocks of the body make of inputs, the shallowest first, in one forward pass.

        Args:
            x: inputs as a task yields them.
            depth: how many blocks, from the last one back; the last one stands for what the head receives.

        Returns:
            Tensors of shape (N, D), with a D for each block. Maps over places are averaged over a grid of 2 x 2 places,
            and rows of tokens over the tokens; what the head receives is as it is.

        Raises:
            HoldfastError: if the body has fewer blocks.

        Example:
            >>> import torch
            >>> from holdfast.models import load_model
            >>> from holdfast.tasks import load_task
            >>> model = load_model("cnn", load_task("digits[0-4]"))
            >>> [z.shape[1] for z in model.features_by_depth(torch.zeros(2, 1, 8, 8), 2)]
            [128, 64]
        """
        reason = self.not_probed(depth)
        if reason is not None:
            raise HoldfastError(f"{self.name}: {reason}.")
        blocks = self.blocks()
        caught: list[Tensor] = []
        hooks = [
            block[-1][1].register_forward_hook(lambda _, __, output: caught.append(_pooled(output)))
            for block in blocks[-depth:-1]
        ]
        try:
            last = self.features(x)
        finally:
            for hook in hooks:
                hook.remove()
        return [*caught, last]

    def reinitialise(self, layers: Iterable[str], reference: ExtractorNetwork) -> None:
        """Gives layers the values that they have in a fresh model (see `fresh`), in place.

        Args:
            layers: dotted names in `network`; an inserted extractor, which a fresh model does not have, becomes the
                identity, and any other layer before the head stays as it is.
            reference: a fresh model of the same architecture.

        Raises:
            HoldfastError: if the reference lacks the layer's tensors.
        """
        inserted = f"{self.head_name.rpartition('.')[0]}.0" if self.head_name != reference.head_name else None
        for name in layers:
            if name != inserted:
                copy_layers(self.network, reference.network, [name])
                continue
            if not self.has_extractor:
                continue
            layer = self.extractor_layer()
            with torch.no_grad():
                layer.weight.copy_(torch.eye(len(layer.weight)).view_as(layer.weight))
                if layer.bias is not None:
                    layer.bias.zero_()

    @torch.no_grad()
    def without_extractor(self) -> Self:
        """Returns a copy whose head has the extractor merged into it: the original's layers, and the same outputs.

        The product is computed in float64 and rounded to the network's precision. The copy no longer has the
        extractor's protection.

        Raises:
            HoldfastError: if the extractor shifts features and the head has no bias to take the shift.

        Example:
            >>> from holdfast.models import SplitModel
            >>> model = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)), head="2")
            >>> kappa = model.insert_extractor(torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64))
            >>> merged = model.without_extractor()
            >>> merged.head_name, torch.allclose(merged(torch.ones(1, 4)), model(torch.ones(1, 4)), atol=1e-6)
            ('2', True)
        """
        model = self.clone()
        if not self.has_extractor:
            return model
        if self.extractor_layer().bias is not None and self.head.bias is None:
            raise HoldfastError(
                f"{self.name}: an eraser shifts the features, and the head has no bias to take the shift, so the two "
                "cannot be merged. Write both layers with save(FILE), which Holdfast reads."
            )
        merged = tensors_without_extractor(self)
        head = model.head
        model.head_name = model.head_name.removesuffix(".1")
        model.put_head(head.to(dtype_of(model.network)))
        for name, own in (("weight", head.weight), ("bias", head.bias)):
            if own is not None:
                own.copy_(merged[f"{model.head_name}.{name}"])
        if model.spec is not None:
            model.spec = {**model.spec, "extractor": False}
        return model


def name_without_extractor(model: ExtractorNetwork, name: str) -> str | None:
    """Returns the name that a tensor or layer has without an extractor; None if it is the extractor's."""
    if not model.has_extractor:
        return name
    both = model.head_name.removesuffix(".1")
    if name in (both, f"{both}.0") or name.startswith(f"{both}.0."):
        return None
    return both + name.removeprefix(model.head_name) if name.startswith(model.head_name) else name


def tensors_without_extractor(model: ExtractorNetwork) -> dict[str, Tensor]:
    """Returns every tensor by the name that it has without an extractor, which is merged into the head."""
    # The state dict has shared tensors under all their names, `every_tensor` under one.
    tensors = {**dict(every_tensor(model.network)), **model.network.state_dict(keep_vars=True)}
    if model.has_extractor:
        inserted, head = model.extractor_layer(), model.head.weight
        merged = nn.Parameter((head.flatten(1) @ inserted.weight.flatten(1)).detach().reshape(head.shape))
        tensors[f"{model.head_name}.weight"] = merged
        if inserted.bias is not None and model.head.bias is not None:  # of an eraser
            shifted = (model.head.bias + head.flatten(1) @ inserted.bias).detach()
            tensors[f"{model.head_name}.bias"] = nn.Parameter(shifted)
    named = ((name_without_extractor(model, name), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def layers_without_extractor(model: ExtractorNetwork) -> dict[str, nn.Module]:
    """Returns every layer by the name that it has without an extractor."""
    named = ((name_without_extractor(model, name), layer) for name, layer in model.network.named_modules())
    return {name: layer for name, layer in named if name is not None}


def _pooled(output: Any) -> Tensor:
    """A vector a sample of what a block answers: a map, tokens, or vectors; of several tensors, the first counts."""
    found = output if isinstance(output, Tensor) else next(t for t in output if isinstance(t, Tensor))
    if found.dim() == 4:
        found = F.adaptive_avg_pool2d(found, (min(PLACES, found.shape[2]), min(PLACES, found.shape[3])))
    return found.mean(1) if found.dim() == 3 else found.flatten(1)
