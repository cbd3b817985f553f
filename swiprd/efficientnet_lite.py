"""EfficientNet-Lite0, the architecture of the default bundle; torchvision has none of its family.

As specified in TensorFlow's TPU models (``efficientnet/lite``): EfficientNet-B0 without
squeeze-and-excitation, with ReLU6 for swish, and with stem and head of fixed width.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

# Repeats, kernel, stride, expansion, channels out.
STAGES: Final = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM: Final = 32
HEAD: Final = 1280
NORM_EPSILON: Final = 1e-3


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: the odd pixel goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in, h, w) to (n, out, ceil(h / stride), ceil(w / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        need = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:]]
        if need[0] == need[1] and need[0] % 2 == 0:
            half = need[0] // 2
            return functional.conv2d(
                x, self.weight, self.bias, self.stride, half, self.dilation, self.groups
            )
        high, wide = need
        x = functional.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [
        SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=NORM_EPSILON),
    ]


class Block(nn.Module):
    """An inverted residual: expand, filter each channel, project; added to its input if it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*_conv(inputs, hidden, 1), nn.ReLU6(inplace=True)]
        layers += [*_conv(hidden, hidden, kernel, stride, groups=hidden), nn.ReLU6(inplace=True)]
        layers += _conv(hidden, outputs, 1)
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for pictures of any side; trained at 224."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, STEM, 3, 2), nn.ReLU6(inplace=True))
        blocks = []
        inputs = STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for repeat in range(repeats):
                first = repeat == 0
                blocks.append(Block(inputs, outputs, kernel, stride if first else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_conv(inputs, HEAD, 1), nn.ReLU6(inplace=True))
        self.classifier = nn.Linear(HEAD, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 (n, 3, h, w) to logits (n, classes)."""
        x = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(torch.mean(x, dim=(2, 3)))
        return logits
