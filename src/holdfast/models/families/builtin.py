"""Small architectures that train on two cores: an MLP, CNNs, the CIFAR residual networks, a ViT and a CAFormer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.families import diffusion
from holdfast.models.family import FAMILIES, Built, Family, Shape, Values, check_known, for_channels
from holdfast.models.spec import ModelSpec
from holdfast.tasks import Schedule, Task
from holdfast.tasks.schedule import SCHEDULES

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MNIST = ((0.1307,), (0.3081,))

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True, repr=False)
class BuiltIn(Family):
    """One built-in architecture.

    Attributes:
        builder: takes `input_shape` and `num_outputs`, and options by keyword only.
        head: dotted name of the head.
        norm: default mean and std of the input normalisation; None: inputs are not normalised.
    """

    builder: Callable[..., nn.Module]
    head: str
    norm: tuple[Values, Values] | None = None

    def __repr__(self) -> str:
        return f"{self.builder.__module__}.{self.builder.__qualname__}"

    def build(self, spec: ModelSpec, input_shape: Shape, num_outputs: int, data_dir: Path | str | None) -> Built:
        """See `Family.build`."""
        check_known(spec, inspect.getfullargspec(self.builder).kwonlyargs)
        for option, value in spec.options.items():
            if isinstance(value, int) and value < 1:
                raise HoldfastError(f"Model {spec.name!r}: {option} is {value}; expected at least 1.")
        try:
            network = self.builder(input_shape, num_outputs, **spec.options)
        except (RuntimeError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            raise HoldfastError(
                f"Model {spec.name!r} cannot be built for inputs of shape {input_shape} with {spec.options}: {error}."
            ) from error
        norm = for_channels(self.norm, input_shape) if self.norm and len(input_shape) == 3 else (None, None)
        return Built(network, spec, self.head, norm)

    def released_options(self, name: str, task: Task, *, own_head: bool) -> dict[str, Any]:
        """See `Family.released_options`; always refused."""
        self.build(ModelSpec(name=name), task.input_shape, task.num_outputs, None)
        raise HoldfastError(
            f"{name!r} is an architecture without weights; give its weights (.safetensors), or a "
            "model.safetensors that Holdfast saved."
        )


class BuiltInUNet(BuiltIn):
    """The U-Net, with the schedule of its noise."""

    def build(self, spec: ModelSpec, input_shape: Shape, num_outputs: int, data_dir: Path | str | None) -> Built:
        """See `Family.build`. Saved weights must not need a schedule's folder: its configuration replaces it."""
        network = super().build(spec, input_shape, num_outputs, data_dir).network
        named = spec.options.get("schedule", "linear")
        schedule = Schedule(named) if isinstance(named, Mapping) else Schedule.named(named)
        if named not in SCHEDULES:
            spec = spec.model_copy(update={"options": {**spec.options, "schedule": schedule.config}})
        return Built(network, spec, self.head, scheduler=schedule.config)


def built_in(
    name: str, head: str, norm: tuple[Values, Values] | None = None, family: type[BuiltIn] = BuiltIn
) -> Callable[[Builder], Builder]:
    """Returns a decorator that registers an architecture; see `BuiltIn`."""

    def added(builder: Builder) -> Builder:
        FAMILIES.register(name)(family(builder, head, norm))
        return builder

    return added


built_in("unet", diffusion.HEAD, family=BuiltInUNet)(diffusion.unet)


@built_in("mlp", "head")
class MLP(nn.Module):
    """Hidden layers of equal width with ReLU; images are flattened.

    Args:
        input_shape: shape of one input.
        num_outputs: number of logits.
        width: units a hidden layer.
        depth: hidden layers.
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, *, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        size = math.prod(input_shape)
        layers: list[nn.Module] = [nn.Flatten()]
        for _ in range(depth):
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(size, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape (N, num_outputs)."""
        logits: Tensor = self.head(self.body(x))
        return logits


@built_in("cnn", "head", ((0.5,), (0.5,)))
class CNN(nn.Module):
    """Two stages of 3x3 convolutions, each ending in pooling, and one hidden layer; for images of 4 to 64 pixels.

    Args:
        input_shape: (channels, height, width), at least 4 pixels a side.
        num_outputs: number of logits.
        width: channels of the first stage; the second has twice as many.
        depth: convolutions a stage.
        hidden: units of the hidden layer.
        norm: "batch" for BatchNorm behind each convolution, or "none".
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        *,
        width: int = 16,
        depth: int = 1,
        hidden: int = 64,
        norm: Literal["batch", "none"] = "batch",
    ) -> None:
        super().__init__()
        channels, height, _ = input_shape
        pooled = 2 if height < 16 else 4
        layers: list[nn.Module] = []
        for out, pool in ((width, nn.MaxPool2d(2)), (2 * width, nn.AdaptiveAvgPool2d(pooled))):
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=norm == "none"))
                layers += [nn.BatchNorm2d(out), nn.ReLU()] if norm == "batch" else [nn.ReLU()]
                channels = out
            layers.append(pool)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * pooled**2, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape (N, num_outputs)."""
        logits: Tensor = self.head(self.body(x))
        return logits


class _ResidualBlock(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.grown = stride, out - into

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.grown:
            # The parameter-free shortcut ("option A") of He et al. 2016, section 4.2: new channels are zero.
            x = F.pad(x, (0, 0, 0, 0, self.grown // 2, self.grown - self.grown // 2))
        return F.relu(x + residual)


@built_in("cifar_resnet", "linear", IMAGENET)
class CifarResNet(nn.Module):
    """The CIFAR residual network of He et al. 2016, section 4.2, with parameter-free shortcuts.

    Layers are named as in the widely used PyTorch weights (`conv1`, `layer1.0.bn2`, `linear`).

    Args:
        input_shape: (channels, height, width).
        num_outputs: number of logits.
        depth: 6n + 2 layers: 20, 32, 44, 56, ...
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, *, depth: int = 20) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def stage(into: int, out: int, stride: int) -> nn.Sequential:
            first = _ResidualBlock(into, out, stride)
            return nn.Sequential(first, *(_ResidualBlock(out, out, 1) for _ in range(blocks - 1)))

        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.linear = nn.Linear(64, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape (N, num_outputs)."""
        x = F.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return logits


@built_in("mnist_cnn", "fc2", MNIST)
class MnistCNN(nn.Module):
    """Two 5x5 convolutions with pooling and a hidden layer, as in PyTorch's first MNIST example; at least 16 pixels.

    Layers are named as in the common weights: `conv1`, `conv2`, `fc1`, `fc2`.

    Args:
        input_shape: (channels, height, width).
        num_outputs: number of logits.
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        # Each stage: a convolution without padding removes 4 pixels a side, pooling halves the rest.
        rows, columns = (((n - 4) // 2 - 4) // 2 for n in (height, width))
        if min(rows, columns) < 1:
            raise ValueError(
                f"images of {height}x{width} pixels are too small for its convolutions; give at least 16x16"
            )
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * rows * columns, 500)
        self.fc2 = nn.Linear(500, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape (N, num_outputs)."""
        for convolution in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class _Attention(nn.Module):
    """Self-attention whose tensors are named and shaped as in `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        query, key, value = (p.reshape(*p.shape[:-1], self.heads, -1).transpose(-3, -2) for p in parts)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out: Tensor = self.out_proj(mixed.transpose(-3, -2).flatten(-2))
        return out


class _EncoderLayer(nn.Module):
    """A post-norm transformer layer with ReLU, its tensors named as in `nn.TransformerEncoderLayer`.

    In evaluation, PyTorch's own layer has a fast path that reads weights without calling their layers: a module that
    replaces a layer, such as a low-rank adapter, would be trained but not scored.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = _Attention(width, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        out: Tensor = self.norm2(x + self.dropout(self.linear2(hidden)))
        return out


@built_in("cifar_vit", "mlp_head.1", IMAGENET)
class CifarViT(nn.Module):
    """A vision transformer for small images: class token, learned positions, post-norm layers with ReLU.

    Args:
        input_shape: (channels, height, width); sides are multiples of `patch`.
        num_outputs: number of logits.
        patch: pixels a side of a patch.
        width: of the tokens.
        depth: encoder layers.
        heads: of the attention; they divide the width.
        hidden: units between the two linear layers of an encoder layer.
        dropout: share that is dropped in training.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        *,
        patch: int = 4,
        width: int = 128,
        depth: int = 6,
        heads: int = 8,
        hidden: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        channels, rows, columns = input_shape
        if rows % patch or columns % patch:
            raise ValueError(f"images of {rows}x{columns} pixels are not a whole number of {patch}x{patch} patches")
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        tokens = 1 + (rows // patch) * (columns // patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, width), std=0.02))
        layers = (_EncoderLayer(width, heads, hidden, dropout) for _ in range(depth))
        self.transformer = nn.ModuleDict({"layers": nn.Sequential(*layers)})
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape (N, num_outputs)."""
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1) + self.pos_embed
        logits: Tensor = self.mlp_head(self.transformer["layers"](tokens)[:, 0])
        return logits


_VGG = {11: "A", 13: "B", 16: "D", 19: "E"}


@built_in("cifar_vgg", "head", IMAGENET)
class CifarVGG(nn.Module):
    """VGG's convolutions, pooled to one position, and two small hidden layers; for images of at least 32 pixels.

    Args:
        input_shape: (channels, height, width).
        num_outputs: number of logits.
        depth: 11, 13, 16 or 19, as the original counts its layers.
        hidden: units of each of the two hidden layers.
        dropout: share of these units that is dropped in training.
        norm: "batch" for BatchNorm behind each convolution, or "none".
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        *,
        depth: int = 13,
        hidden: int = 256,
        dropout: float = 0.5,
        norm: Literal["batch", "none"] = "batch",
    ) -> None:
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        if depth not in _VGG:
            raise ValueError(f"depth is {depth}; expected one of {', '.join(map(str, _VGG))}")
        if min(input_shape[1:]) < 32:
            raise ValueError("images are too small for its five poolings; give at least 32x32")
        self.features = make_layers(cfgs[_VGG[depth]], batch_norm=norm == "batch")
        if input_shape[0] != 3:
            self.features[0] = nn.Conv2d(input_shape[0], 64, 3, padding=1)
        self.hidden = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(512, hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout),
        )  # fmt: skip
        self.head = nn.Linear(hidden, num_outputs)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits of shape (N, num_outputs)."""
        logits: Tensor = self.head(self.hidden(self.features(x)))
        return logits


@built_in("small_caformer", "head.fc.fc2", IMAGENET)
def small_caformer(
    input_shape: tuple[int, ...],
    num_outputs: int,
    *,
    widths: Sequence[int] = (32, 64, 160, 256),
    depths: Sequence[int] = (1, 1, 3, 1),
    drop_path: float = 0.0,
) -> nn.Module:
    """Returns timm's CAFormer (convolutions in two stages, attention in two), small enough to train on two cores.

    Args:
        input_shape: (channels, height, width), at least 32 pixels a side.
        num_outputs: number of logits.
        widths: channels of the four stages; those of the last two in steps of 32, the width of an attention head.
        depths: blocks of the four stages.
        drop_path: share of the residual branches that is dropped in training.
    """
    from timm.models import metaformer

    if len(widths) != 4 or len(depths) != 4:
        raise ValueError("widths and depths need four numbers each, one a stage")
    network: nn.Module = metaformer.MetaFormer(
        in_chans=input_shape[0],
        num_classes=num_outputs,
        dims=tuple(widths),
        depths=tuple(depths),
        drop_path_rate=drop_path,
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    )
    return network
