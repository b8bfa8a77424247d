"""Convolutions that read a concatenation: in the up blocks of a UNet what comes from below and, behind it, a skip."""

from typing import Any

from torch import nn

from dmquant.diffusion.blocks import is_unet

SHORTCUT = "conv_shortcut"  # the 1x1 convolution of a residual block's own skip


def find_places(denoiser: nn.Module, *, which: str) -> dict[str, int]:
    """Channels that come from below, where the skip begins, by the name of each convolution that reads both.

    They are those that the residual block before answers. `which` is "skip" for the 1x1 shortcuts only, "all", or "none".
    Nothing in denoisers that are no UNets: the transformers of diffusers concatenate nothing that a convolution reads.
    """
    if which == "none" or not is_unet(denoiser):
        return {}
    unet: Any = denoiser  # is_unet has looked at what is read here
    before, places = _answered(unet.down_blocks[-1]), {}
    for number, level in enumerate(unet.up_blocks):
        for index, resnet in enumerate(level.resnets):
            for leaf in (SHORTCUT,) if which == "skip" else ("conv1", SHORTCUT):
                layer = getattr(resnet, leaf, None)
                if layer is not None and layer.in_channels > before:
                    places[f"up_blocks.{number}.resnets.{index}.{leaf}"] = before
            before = resnet.out_channels
    return places


def _answered(level: Any) -> int:
    """Channels of what a level answers; the middle keeps their number."""
    return level.resnets[-1].out_channels
