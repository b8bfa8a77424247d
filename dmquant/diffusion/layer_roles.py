"""Layers of a denoiser and their roles; methods choose bits by role."""

import re
from enum import StrEnum

from torch import nn


class Role(StrEnum):
    """Roles of a layer in the denoiser. Methods choose bits by role."""

    FIRST = "first"
    LAST = "last"
    TIME_EMBEDDING = "time_embedding"  # of time, class, caption; adaptive-norm modulation
    TIME_PROJECTION = "time_projection"  # the embedding brought into one residual block
    SKIP = "skip"  # 1x1 convolution on a residual branch
    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"
    RESAMPLE = "resample"
    BODY = "body"


# First match wins. Module names of UNet2D, UNet2DCondition, DiT, PixArt, Sana, SD3 and Flux in diffusers.
ROLES = [
    (role, re.compile(pattern))
    for role, pattern in (
        (Role.FIRST, r"^(conv_in|(pos_embed|patch_embed)\.proj|x_embedder|proj_in)$"),
        (Role.LAST, r"^(conv_out|proj_out|proj_out_2)$"),
        (Role.TIME_EMBEDDING, r"^(time_\w+|class_embedding|add_embedding|encoder_hid_proj|adaln_single)\b"),
        (Role.TIME_EMBEDDING, r"^(caption_projection|context_embedder|proj_out_1)\b"),
        (Role.TIME_EMBEDDING, r"\bnorm(\d|_out)?(_context)?\.(linear|emb\b.*)$"),
        (Role.TIME_PROJECTION, r"\.time_emb_proj$"),
        (Role.SKIP, r"\.conv_shortcut$"),
        (Role.ATTENTION, r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$|\battentions\.\d+\.proj_(in|out)$"),
        (Role.FEED_FORWARD, r"\.(ff|ff_context|mlp)\.|\bsingle_transformer_blocks\.\d+\.proj_(mlp|out)$"),
        (Role.RESAMPLE, r"\b(down|up)samplers\.\d+\.conv$"),
        (Role.BODY, r""),
    )
]


def is_layer(module: nn.Module) -> bool:
    """Returns whether a module is or replaces a Conv1d, Conv2d or Linear: float, fake-quantized or packed."""
    if getattr(module, "weight", None) is None:
        return False
    kernel_size = getattr(module, "kernel_size", None)
    is_conv = isinstance(kernel_size, tuple) and len(kernel_size) <= 2 and not getattr(module, "transposed", False)
    return is_conv or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def named_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Returns every layer for which `is_layer` holds, by module name, in module order."""
    return {name: module for name, module in denoiser.named_modules() if is_layer(module)}


def find_roles(denoiser: nn.Module) -> dict[str, Role]:
    """Returns the role of every layer by module name. Where no name matches FIRST or LAST, the first or last layer gets it."""
    roles = {name: next(role for role, pattern in ROLES if pattern.search(name)) for name in named_layers(denoiser)}
    for role, name in ((Role.FIRST, next(iter(roles))), (Role.LAST, next(reversed(roles)))):
        if role not in roles.values():
            roles[name] = role
    return roles
