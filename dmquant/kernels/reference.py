"""The products of the kernels of C by torch, bit for bit: sums of whole numbers in float64, then the float expression that ends
every kernel. Slow, and what kernels are compared with: layer by layer before they are used, and in whole denoisers with
DMQUANT_KERNELS=exact. What is done to an image before it is quantized is done by C there too, where it compiles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmquant.kernels import norm
from dmquant.kernels.norm import NONE
from dmquant.kernels.registry import EXACT
from dmquant.kernels.rounding import quantize
from dmquant.kernels.weight_packing import levels

NAME = EXACT.name


def multiply(
    x: Tensor, weight: Tensor, total: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, act_scale: Tensor,
    act_zero: Tensor, format: Sequence[int], window: Sequence[int], gain: Tensor | None = None, offset: Tensor | None = None,
    factor: Tensor | None = None, residual: Tensor | None = None, activate: int = NONE, zoom: int = 1, epsilon: float = 0.0,
) -> Tensor:  # fmt: skip
    """As ops.multiply; weights are laid out as for plain C."""
    if gain is not None or factor is not None or activate or epsilon > 0:
        x = norm.normalize(x, gain, offset, factor=factor, activate=activate, epsilon=epsilon)
    act_scale, act_zero = (each.view(-1, 1, 1, 1) for each in (act_scale, act_zero))
    bits, halves, act_bits = format
    a = (quantize(x, act_scale, act_zero, act_bits) - act_zero).permute(0, 3, 1, 2).double()
    top, bottom, left, right = window[4:]
    a = nn.functional.pad(a.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), (left, right, top, bottom))
    act_scale = act_scale * 0.5 if halves else act_scale
    out = torch.zeros(()) if bias is None else bias.view(-1, total.shape[1], 1, 1)
    for plane, own in zip(weight, scale.view_as(total)):
        codes = EXACT.from_blocked(plane, (total.shape[1], x.shape[-1], window[0] * window[1]), bits)
        step, least = levels(bits)
        level = codes.double() * step + (least if zero is None else -step * zero.double().view(-1, 1, 1))
        sums = nn.functional.conv2d(a, level.unflatten(2, tuple(window[:2])), stride=tuple(window[2:4]))
        out = times_plus(sums.float(), own.view(1, -1, 1, 1) * act_scale, out)
    out = out.permute(0, 2, 3, 1).contiguous()
    return out if residual is None else out + residual


def times_plus(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32, rounded once: C's fmaf.

    The product is exact in float64 and the sum is not, so it is rounded to odd: away from its neighbour whose last bit is 0. To
    round that again, to a shorter mantissa, is to round the true sum (Boldo and Melquiond, 2008).
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)  # what the sum has lost (Knuth)
    is_even = total.view(torch.int64) & 1 == 0
    odd = total.nextafter(rest.sign() * torch.inf)
    return torch.where((rest.abs() > 0) & is_even, odd, total).float()
