"""What fused blocks have in common: they run by kernels where they can, and as diffusers wrote them elsewhere."""

import torch
from torch import Tensor, nn

LAST = torch.channels_last


class Fused:
    """A block that runs by kernels where it can, else as the class behind it does. Arguments have the names of that class."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        if not self.can_fuse(*args, **kwargs):
            out = super().forward(*args, **kwargs)
            # a first call chooses the kernels; what it gives is what every later one gives
            if not self.can_fuse(*args, **kwargs):
                return out
        return self.run(*args, **kwargs)


def images(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def is_free(*norms: nn.Module) -> bool:
    """Whether nobody wants gradients or watches these norms."""
    if torch.is_grad_enabled() or is_watched(*norms):
        return False
    parameters = (own for norm in norms for own in norm._parameters.values() if own is not None)
    return all(own.dtype == torch.float32 or own.is_cuda for own in parameters)


def is_watched(*modules: nn.Module) -> bool:
    """Whether somebody's hook waits for the calls of these modules."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def is_training(dropout: nn.Module) -> bool:
    return dropout.training and dropout.p > 0
