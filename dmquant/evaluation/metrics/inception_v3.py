"""Inception-v3 for FID: the TensorFlow network of 2015 with its resize; parameters have the names of pytorch-fid.

Architecture: Szegedy et al., 2016. FID's network differs from the paper: average pools exclude the padding from the
mean, and the last block has a maximum pool.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

INPUT_SIZE = 299
NUM_CLASSES = 1008  # outputs of the 2015 classifier
# sFID's layer is "mixed_6/conv" of the TensorFlow graph: the first branch of Mixed_6d, of which ADM (Dhariwal & Nichol, 2021)
# takes seven channels
SPATIAL_LAYER = "Mixed_6d"
SPATIAL_CHANNELS = 7


class Layer(NamedTuple):
    """One convolution of a block: its name in the weights file, output channels, kernel and stride."""

    name: str
    channels: int
    kernel: int | tuple[int, int]
    stride: int = 1


Branch = list[tuple[Layer, ...]]  # stages in sequence; the layers of one stage run in parallel


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | str = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu_()


class Mixed(nn.Module):
    """Concatenates parallel paths and a pool; `projection` is the width of the 1x1 convolution after the pool."""

    def __init__(self, inputs: int, paths: list[Branch], pool: nn.Module, projection: int | None):
        super().__init__()
        self.names = [[[layer.name for layer in stage] for stage in path] for path in paths]
        for path in paths:
            self._add(inputs, path)
        self.pool = pool
        self.branch_pool = ConvNorm(inputs, projection, 1) if projection else nn.Identity()

    def _add(self, channels: int, path: Branch) -> None:
        for stage in path:
            for name, outputs, kernel, stride in stage:
                self.add_module(name, ConvNorm(channels, outputs, kernel, stride, "same" if stride == 1 else 0))
            channels = sum(layer.channels for layer in stage)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(self._run(path, x) for path in self.names), self.branch_pool(self.pool(x))], 1)

    def _run(self, path: list[list[str]], x: Tensor) -> Tensor:
        for stage in path:
            x = torch.cat([self.get_submodule(name)(x) for name in stage], 1)
        return x


class InceptionV3(nn.Module):
    """Maps uint8 images (B, 3, H, W) of any size to pool3 features (B, 2048)."""

    num_features = 2048
    num_spatial = SPATIAL_CHANNELS * 17 * 17

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.maxpool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = block_35(192, projection=32)
        self.Mixed_5c = block_35(256, projection=64)
        self.Mixed_5d = block_35(288, projection=64)
        self.Mixed_6a = reduction_17(288)
        self.Mixed_6b = block_17(768, width=128)
        self.Mixed_6c = block_17(768, width=160)
        self.Mixed_6d = block_17(768, width=160)
        self.Mixed_6e = block_17(768, width=192)
        self.Mixed_7a = reduction_8(768)
        self.Mixed_7b = block_8(1280, average_pool())
        self.Mixed_7c = block_8(2048, nn.MaxPool2d(3, 1, 1))
        # its bias is in the weights file, which is loaded strictly, but the Inception score does not use it
        self.fc = nn.Linear(self.num_features, NUM_CLASSES)

    def read(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns pool3 features (B, 2048), spatial features for sFID (B, 2023) and logits (B, 1008) of uint8 images.

        Spatial features are ordered by row, column, channel as in ADM's reference files. Logits have no bias, as in the
        Inception score of Salimans et al. (2016).
        """
        x = (resize_tf1(images.float(), INPUT_SIZE) - 128) / 128
        for name, layer in self.named_children():
            x = x if name == "fc" else layer(x)
            if name == SPATIAL_LAYER:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        features = x.mean((2, 3))
        return features, spatial, features @ self.fc.weight.T

    def forward(self, images: Tensor) -> Tensor:
        return self.read(images)[0]


def resize_tf1(x: Tensor, size: int) -> Tensor:
    """Resizes (B, C, H, W) bilinearly to (B, C, size, size) as TensorFlow 1 does: source = target * in / out.

    Unlike `torch.nn.functional.interpolate`, it has no half-pixel centres.
    """
    for dim in (-1, -2):
        length = x.shape[dim]
        source = torch.arange(size, device=x.device, dtype=x.dtype) * (length / size)
        low = source.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        weight = (source - low).unflatten(0, (-1,) + (1,) * (-1 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


def average_pool() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def in_sequence(*layers: Layer) -> Branch:
    return [(layer,) for layer in layers]


def block_35(inputs: int, projection: int) -> Mixed:
    """Block for 35x35 maps: paths with 1x1, 5x5 and two 3x3 convolutions."""
    paths = [
        in_sequence(Layer("branch1x1", 64, 1)),
        in_sequence(Layer("branch5x5_1", 48, 1), Layer("branch5x5_2", 64, 5)),
        in_sequence(Layer("branch3x3dbl_1", 64, 1), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3)),
    ]
    return Mixed(inputs, paths, average_pool(), projection)


def reduction_17(inputs: int) -> Mixed:
    """Block that reduces 35x35 maps to 17x17."""
    paths = [
        in_sequence(Layer("branch3x3", 384, 3, 2)),
        in_sequence(Layer("branch3x3dbl_1", 64, 1), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3, 2)),
    ]
    return Mixed(inputs, paths, nn.MaxPool2d(3, 2), None)


def block_17(inputs: int, width: int) -> Mixed:
    """Block for 17x17 maps: paths with one and two 7x7 convolutions, each factored into 1x7 and 7x1."""
    paths = [
        in_sequence(Layer("branch1x1", 192, 1)),
        in_sequence(Layer("branch7x7_1", width, 1), Layer("branch7x7_2", width, (1, 7)), Layer("branch7x7_3", 192, (7, 1))),
        in_sequence(
            Layer("branch7x7dbl_1", width, 1),
            Layer("branch7x7dbl_2", width, (7, 1)),
            Layer("branch7x7dbl_3", width, (1, 7)),
            Layer("branch7x7dbl_4", width, (7, 1)),
            Layer("branch7x7dbl_5", 192, (1, 7)),
        ),
    ]
    return Mixed(inputs, paths, average_pool(), 192)


def reduction_8(inputs: int) -> Mixed:
    """Block that reduces 17x17 maps to 8x8."""
    paths = [
        in_sequence(Layer("branch3x3_1", 192, 1), Layer("branch3x3_2", 320, 3, 2)),
        in_sequence(
            Layer("branch7x7x3_1", 192, 1),
            Layer("branch7x7x3_2", 192, (1, 7)),
            Layer("branch7x7x3_3", 192, (7, 1)),
            Layer("branch7x7x3_4", 192, 3, 2),
        ),
    ]
    return Mixed(inputs, paths, nn.MaxPool2d(3, 2), None)


def block_8(inputs: int, pool: nn.Module) -> Mixed:
    """Block for 8x8 maps: the last 3x3 convolution of a path is split into parallel 1x3 and 3x1."""
    paths = [
        in_sequence(Layer("branch1x1", 320, 1)),
        [*in_sequence(Layer("branch3x3_1", 384, 1)), (Layer("branch3x3_2a", 384, (1, 3)), Layer("branch3x3_2b", 384, (3, 1)))],
        [
            *in_sequence(Layer("branch3x3dbl_1", 448, 1), Layer("branch3x3dbl_2", 384, 3)),
            (Layer("branch3x3dbl_3a", 384, (1, 3)), Layer("branch3x3dbl_3b", 384, (3, 1))),
        ],
    ]
    return Mixed(inputs, paths, pool, 192)
