"""Small architectures that train on two cores: an MLP, a CNN, and the CIFAR residual networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


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
        size = 1
        for n in input_shape:
            size *= n
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


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Builder = Callable[..., nn.Module]
BUILTIN: dict[str, tuple[Builder, str, tuple[tuple[float, ...], tuple[float, ...]] | None]] = {
    "mlp": (MLP, "head", None),
    "cnn": (CNN, "head", ((0.5,), (0.5,))),
    "cifar_resnet": (CifarResNet, "linear", IMAGENET),
}
"""Builder, name of the head, and (mean, std) of the input normalisation by default."""
