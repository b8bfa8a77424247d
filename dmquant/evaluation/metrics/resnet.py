"""The network of the embedded extractor: a small ResNet classifier for 32x32 RGB images."""

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 256)
SPATIAL_CHANNELS = 7  # of the third block, at 8x8 positions; ADM takes 7 of Inception's channels too


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut. ResNet, fig. 2 (He et al., 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        is_same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNetExtractor(nn.Module):
    """Maps uint8 images (B, 3, 32, 32) to penultimate features (B, 256); `classify` returns class logits."""

    num_features = WIDTHS[-1]
    num_spatial = SPATIAL_CHANNELS * 8 * 8
    image_size = 32

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTHS[0])
        strides = (1, 2, 2, 2)
        inputs = (WIDTHS[0], *WIDTHS[:-1])
        self.blocks = nn.Sequential(*(Block(i, o, s) for i, o, s in zip(inputs, WIDTHS, strides)))
        self.head = nn.Linear(self.num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns penultimate features (B, 256) of float images (B, 3, 32, 32) in [-1, 1]."""
        return self.blocks(torch.relu(self.norm(self.stem(x)))).mean((2, 3))

    def classify(self, x: Tensor) -> Tensor:
        """Returns class logits (B, K) of float images (B, 3, 32, 32) in [-1, 1]."""
        return self.head(self.features(x))

    def read(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features (B, 256), channels of the third block (B, 448) and logits (B, K) of uint8 images (B, 3, 32, 32)."""
        *early, last = self.blocks
        x = torch.relu(self.norm(self.stem(images.float() / 127.5 - 1)))
        for block in early:
            x = block(x)
        features = last(x).mean((2, 3))
        # position before channel, as in ADM's Inception features
        return features, x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1), self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images.float() / 127.5 - 1)
