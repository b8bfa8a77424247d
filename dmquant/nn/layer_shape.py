"""The geometry of a layer, and its tensors as images channels last."""

from typing import Any

from torch import Tensor, nn

from dmquant.kernels.conv_shape import POINTWISE, ConvGeometry


def geometry_of(layer: nn.Module) -> ConvGeometry:
    """Returns the geometry of a linear layer or convolution; a Conv1d is a convolution over images of one row."""
    if isinstance(layer, nn.Linear):
        return POINTWISE
    conv: Any = layer
    kernel, stride, padding = conv.kernel_size, conv.stride, conv._reversed_padding_repeated_twice
    if isinstance(layer, nn.Conv1d):
        return ConvGeometry((1, *kernel), (1, *stride), (0, 0, *padding))
    return ConvGeometry(kernel, stride, (*padding[2:], *padding[:2]))


def as_images(layer: nn.Module, x: Tensor, images: int = 1) -> Tensor:
    """Returns the input or output of a layer as (B, H, W, C); the tokens of a linear layer as `images` images of one row."""
    if isinstance(layer, nn.Linear):
        return x.reshape(images, 1, -1, x.shape[-1])
    return (x.unsqueeze(2) if isinstance(layer, nn.Conv1d) else x).permute(0, 2, 3, 1)
