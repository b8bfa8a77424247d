"""Prologue and quantization of an image in one pass: the bytes that conv.py reads, channels last, with their padding.

The float operations and their order are those of csrc/norm/norm.h and of the quantizer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmquant.kernels.conv_shape import ConvGeometry
from dmquant.kernels.layouts import fill_up
from dmquant.kernels.operands import FusedOps, Operands

PIXELS, CHANNELS = 32, 128  # per program
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to integers, ties to even


def quantize(x: Tensor, operands: Operands, geometry: ConvGeometry, fused: FusedOps, block: int) -> Tensor:
    """Applies the prologue to x (B, H, W, C) and quantizes it: int8 codes minus 2^(bits - 1), (B, H', W', C').

    H' and W' include enlargement and padding, whose code is the zero point; C' is C filled up with 0 to a multiple of the block.
    """
    images, height, width, channels = x.shape
    (top, bottom, left, right), upsample = geometry.padding, fused.upsample
    act_scale, act_zero, filled = operands.act_scale, operands.act_zero, fill_up(channels, block)
    padded = height * upsample + top + bottom, width * upsample + left + right
    codes = x.new_empty(images, *padded, filled, dtype=torch.int8)
    pixels = codes.shape[:3].numel()
    grid = triton.cdiv(pixels, PIXELS), triton.cdiv(filled, CHANNELS)
    write_codes[grid](
        x.contiguous(), codes, act_scale, act_zero, fused.gain, fused.offset, fused.factor, pixels, height, width, *padded,
        channels, filled, top, left, upsample, int(act_scale.numel() > 1), operands.act_bits, bool(fused.activation), PIXELS,
        CHANNELS,
    )  # fmt: skip
    return codes


@triton.jit(do_not_specialize=("pixels", "height", "width", "padded_height", "padded_width", "top", "left", "act_stride"))
def write_codes(
    x, codes, act_scale, act_zero, gain, offset, factor, pixels, height, width, padded_height, padded_width, channels,
    filled, top, left, upsample, act_stride, BITS: tl.constexpr, ACTIVATE: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    image = tl.minimum(pixel // (padded_height * padded_width), (pixels - 1) // (padded_height * padded_width))
    row, column = pixel // padded_width % padded_height - top, pixel % padded_width - left
    is_inside = (row >= 0) & (row < height * upsample) & (column >= 0) & (column < width * upsample) & (pixel < pixels)
    is_real = is_inside[:, None] & (c < channels)
    source = (image.to(tl.int64) * height + row // upsample) * width + column // upsample
    value = tl.load(x + source[:, None] * channels + c, is_real, 0.0).to(tl.float32)
    if gain is not None:
        at = image[:, None] * channels + c
        value = tl.fma(value, tl.load(gain + at, is_real, 0.0), tl.load(offset + at, is_real, 0.0))
    if ACTIVATE:
        value = silu(value)
    if factor is not None:
        value = value * tl.load(factor + c, c < channels, 0.0)
    inverse = tl.div_rn(1.0, tl.load(act_scale + image * act_stride))[:, None]
    zero = tl.load(act_zero + image * act_stride)[:, None]
    # clamped before rounding, so that no addition contracts with the product to an fma; the limits are integers, so the
    # order of the two does not matter
    value = tl.minimum(tl.maximum(value * inverse, -zero), (1 << BITS) - 1 - zero)
    level = tl.where(is_inside[:, None], (value + MAGIC) - MAGIC, 0.0) + (zero - (1 << (BITS - 1)))
    level = tl.where(c < channels, level, 0.0).to(tl.int8)
    tl.store(codes + pixel.to(tl.int64)[:, None] * filled + c, level, (pixel < pixels)[:, None] & (c < filled))


@triton.jit
def silu(x):
    x = tl.maximum(x, -80.0)
    return x * invert(1.0 + exponential(-tl.minimum(x, 80.0)))


@triton.jit
def invert(x):
    """Returns 1 / x for 1 <= x < 2^120 by Newton's method from a guess by the exponent."""
    y = (0x7EF311C7 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    y = tl.fma(y, tl.fma(-x, y, 1.0), y)
    y = tl.fma(y, tl.fma(-x, y, 1.0), y)
    return tl.fma(y, tl.fma(-x, y, 1.0), y)


@triton.jit
def exponential(x):
    """Returns e^x for |x| < 88 as 2^n e^r with |r| < 0.35, by the series of e^r."""
    z = tl.fma(x, 1.44269504, MAGIC)
    n = z - MAGIC
    r = tl.fma(n, 1.90465421e-9, tl.fma(n, -0.693147182, x))
    e = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    e = tl.fma(e, r, 1.0 / 120)
    e = tl.fma(e, r, 1.0 / 24)
    e = tl.fma(e, r, 1.0 / 6)
    e = tl.fma(e, r, 0.5)
    e = tl.fma(e, r, 1.0)
    e = tl.fma(e, r, 1.0)
    bits = e.to(tl.int32, bitcast=True) + (z.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)
