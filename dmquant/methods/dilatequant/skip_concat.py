"""Convolutions of a UNet that read a concatenation: the output of the layer below, followed by a skip connection."""

from typing import Any

from torch import nn

from dmquant.diffusion.blocks import is_unet

SHORTCUT = "conv_shortcut"  # the 1x1 convolution on the residual path of a block


def find_skip_offsets(denoiser: nn.Module, *, which: str) -> dict[str, int]:
    """Returns, by layer name, the input channel at which the skip connection begins.

    It equals the number of output channels of the residual block before.

    Args:
        which: "skip" selects the 1x1 shortcuts, "all" the first convolution of each residual block too, "none" no layer.

    Returns:
        An empty dictionary for denoisers that are not UNets: transformers of diffusers have no such convolutions.
    """
    if which == "none" or not is_unet(denoiser):
        return {}
    unet: Any = denoiser  # is_unet has checked the attributes that are read here
    channels, offsets = _output_channels(unet.down_blocks[-1]), {}
    for number, level in enumerate(unet.up_blocks):
        for index, resnet in enumerate(level.resnets):
            for leaf in (SHORTCUT,) if which == "skip" else ("conv1", SHORTCUT):
                layer = getattr(resnet, leaf, None)
                if layer is not None and layer.in_channels > channels:
                    offsets[f"up_blocks.{number}.resnets.{index}.{leaf}"] = channels
            channels = resnet.out_channels
    return offsets


def _output_channels(level: Any) -> int:
    """Returns the output channels of the last level before the up blocks; the middle block keeps their number."""
    return level.resnets[-1].out_channels
