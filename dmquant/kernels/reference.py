"""The arithmetic of the C kernels in torch, with the same bits: integer sums in float64, then one float expression.

It is slow. Kernels are compared with it before they are used; DMQUANT_KERNELS=exact uses it for all layers of a denoiser. The
prologue is computed in C (norm.normalize).
"""

import torch
from torch import Tensor, nn

from dmquant.kernels import norm
from dmquant.kernels.conv_shape import ConvGeometry
from dmquant.kernels.operands import NO_OPS, FusedOps, Operands
from dmquant.kernels.registry import EXACT
from dmquant.kernels.rounding import quantize
from dmquant.kernels.weight_packing import levels

NAME = EXACT.name


def conv(x: Tensor, operands: Operands, geometry: ConvGeometry, fused: FusedOps = NO_OPS) -> Tensor:
    """Computes ops.quantized_conv for a weight that is blocked as for the portable C kernel."""
    if fused.has_prologue:
        x = norm.normalize(x, fused.gain, fused.offset, factor=fused.factor, activation=fused.activation, epsilon=fused.epsilon)
    act_scale, act_zero = (each.view(-1, 1, 1, 1) for each in (operands.act_scale, operands.act_zero))
    a = (quantize(x, act_scale, act_zero, operands.act_bits) - act_zero).permute(0, 3, 1, 2).double()  # (B, C, H, W)
    top, bottom, left, right = geometry.padding
    a = a.repeat_interleave(fused.upsample, 2).repeat_interleave(fused.upsample, 3)
    sums = _integer_sums(nn.functional.pad(a, (left, right, top, bottom)), operands, geometry)
    outputs = sums.shape[2]
    act_scale = act_scale * 0.5 if operands.weight.half_scale else act_scale
    out = torch.zeros(()) if operands.bias is None else operands.bias.view(-1, outputs, 1, 1)
    for plane, scale in zip(sums, operands.scale.view(-1, outputs)):
        out = fma(plane.float(), scale.view(1, -1, 1, 1) * act_scale, out)
    out = out.permute(0, 2, 3, 1).contiguous()
    return out if fused.residual is None else out + fused.residual


def _integer_sums(a: Tensor, operands: Operands, geometry: ConvGeometry) -> Tensor:
    """Returns the sums of (level - shift) * a over C and K for each plane: float64 (planes, B, O, H', W')."""
    weight = operands.weight
    shape = (weight.weight_sums.shape[1], a.shape[1], geometry.taps)
    step, minimum = levels(weight.bits)
    shift = 0 if operands.zero is None else minimum + step * operands.zero.double().view(-1, 1, 1)
    planes = []
    for plane in weight.weight:
        level = EXACT.from_blocked(plane, shape, weight.bits).double() * step + minimum - shift
        planes.append(nn.functional.conv2d(a, level.unflatten(2, geometry.kernel_size), stride=geometry.stride))
    return torch.stack(planes)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Returns a * b + c of float32, rounded once, as C's fmaf does.

    The product is exact in float64, but the sum is not. It is rounded to odd: to the neighbour whose last bit is 1. Rounding that
    to float32 gives the same value as rounding the exact sum (Boldo and Melquiond, 2008).
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)  # rounding error of the sum (Knuth, TwoSum)
    is_even = total.view(torch.int64) & 1 == 0
    odd = total.nextafter(rest.sign() * torch.inf)
    return torch.where((rest.abs() > 0) & is_even, odd, total).float()
