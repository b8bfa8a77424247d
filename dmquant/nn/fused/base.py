"""The base class of fused blocks: it decides, at each call, whether a block runs by kernels or by the code of diffusers."""

from typing import Any

import torch
from torch import Tensor, nn

LAST = torch.channels_last


class Fused:
    """The first base of a fused block. Arguments have the names that the block's class in diffusers gives them."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.can_fuse(*args, **kwargs):
            block: Any = super()
            out: Tensor = block.forward(*args, **kwargs)
            # the first call of a layer chooses its kernel; its output must be that of all later calls
            if not self.can_fuse(*args, **kwargs):
                return out
        return self.forward_fused(*args, **kwargs)

    def can_fuse(self, *args: Any, **kwargs: Any) -> bool:
        """Returns whether kernels compute the block for these arguments."""
        raise NotImplementedError

    def forward_fused(self, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the block by kernels. Only called where `can_fuse` is true."""
        raise NotImplementedError


def images(x: Tensor) -> Tensor:
    """Returns a view (B, H, W, C) of images (B, C, H, W)."""
    return x.permute(0, 2, 3, 1)


def is_free(*norms: nn.Module) -> bool:
    """Returns whether gradients are off and these norms have no hooks and a dtype that kernels read."""
    if torch.is_grad_enabled() or is_watched(*norms):
        return False
    parameters = (own for norm in norms for own in norm._parameters.values() if own is not None)
    return all(own.dtype == torch.float32 or own.is_cuda for own in parameters)


def is_watched(*modules: nn.Module) -> bool:
    """Returns whether one of these modules has forward hooks, which a fused block would not call."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def is_training(dropout: nn.Dropout) -> bool:
    """Returns whether a dropout layer changes its input."""
    return dropout.training and dropout.p > 0
