"""Group norm on a GPU as a gain and an offset for each channel of each image; quantize.py applies them."""

import torch
from torch import Tensor


def moments(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns gain and offset (B, C), float32, of a group norm over x (B, H, W, C). torch adds in float32."""
    variance, mean = torch.var_mean(x.float().unflatten(3, (groups, -1)), (1, 2, 4), correction=0)  # (B, groups)
    inverse, mean = ((value.repeat_interleave(x.shape[3] // groups, 1)) for value in ((variance + epsilon).rsqrt(), mean))
    gain = inverse if weight is None else inverse * weight.float()
    offset = -mean * gain if bias is None else bias.float() - mean * gain
    return gain, offset
