"""Convolution of quantized images with a packed weight: an implicit GEMM on the int8 tensor cores.

A tile of the output is (outputs, pixels) in this order: Hopper's wgmma reads its first operand from registers, where the weights
are unpacked, and its second from shared memory with channels innermost, as in channels last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmquant.kernels.conv_shape import ConvGeometry
from dmquant.kernels.operands import NO_OPS, FusedOps, Operands
from dmquant.kernels.registry import TRITON
from dmquant.kernels.triton.quantize import quantize

TILES = ((128, 128), (64, 128), (64, 64), (64, 32))  # (outputs, pixels)
FEW_TILES = 128  # with fewer tiles, multiprocessors of a large GPU are idle
# not specialized: otherwise Triton compiles again for each argument that is 1 or a multiple of 16 in one call and not in another
ANY_NUMBER = (
    "pixels", "taps", "channels", "padded_height", "padded_width", "out_height", "out_width", "kernel_width", "stride_height",
    "stride_width", "act_stride",
)  # fmt: skip


def conv(x: Tensor, operands: Operands, geometry: ConvGeometry, fused: FusedOps = NO_OPS) -> Tensor:
    """Computes ops.quantized_conv in the dtype of x, on a CUDA device or, under Triton's interpreter, on the CPU."""
    weight, bias = operands.weight, operands.bias
    channels, block = x.shape[3], TRITON.block_for(x.shape[3])
    residual = None if fused.residual is None else fused.residual.contiguous()
    out_size = geometry.output_size(x.shape[1], x.shape[2], fused.upsample)
    out = x.new_empty(len(x), *out_size, weight.weight_sums.shape[1])
    pixels, outputs = out.shape[:3].numel(), out.shape[3]
    rows, columns = choose_tile(outputs, pixels)
    flags = bool(weight.half_scale), bias is not None and bias.dim() == 2
    with torch.cuda.device_of(x):
        codes = quantize(x, operands, geometry, fused, block)
        conv_tile[(triton.cdiv(outputs, rows) * triton.cdiv(pixels, columns),)](
            codes, weight.weight, weight.weight_sums, operands.scale, operands.zero, bias, operands.act_scale,
            operands.act_zero, residual, out, pixels, outputs, geometry.taps, channels, codes.shape[3], *codes.shape[1:3],
            *out.shape[1:3], geometry.kernel_size[1], *geometry.stride, weight.weight.shape[1],
            int(operands.act_scale.numel() > 1), weight.bits, operands.act_bits, len(weight.weight), *flags, rows, columns,
            block, num_warps=8 if (rows, columns) == TILES[0] else 4, num_stages=3,
        )  # fmt: skip
    return out


def choose_tile(outputs: int, pixels: int) -> tuple[int, int]:
    """Returns the outputs and pixels of a tile: the largest of which there are FEW_TILES, since larger tiles read less memory."""
    for rows, columns in TILES:
        if outputs >= rows and triton.cdiv(outputs, rows) * triton.cdiv(pixels, columns) >= FEW_TILES:
            return rows, columns
    return TILES[-1]


@triton.jit(do_not_specialize=ANY_NUMBER)
def conv_tile(
    codes, weight, weight_sums, scale, zero, bias, act_scale, act_zero, residual, out, pixels, outputs, taps, channels, filled,
    padded_height, padded_width, out_height, out_width, kernel_width, stride_height, stride_width, plane_bytes, act_stride,
    BITS: tl.constexpr, ACT_BITS: tl.constexpr, PLANES: tl.constexpr, HALF_SCALE: tl.constexpr, PER_IMAGE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes a tile of ROWS outputs of COLUMNS pixels. Tiles of the same pixels are neighbours, to share codes."""
    across = tl.cdiv(outputs, ROWS)
    o = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    p = tl.program_id(0) // across * COLUMNS + tl.arange(0, COLUMNS)
    row, pixel = tl.minimum(o, outputs - 1), tl.minimum(p, pixels - 1)  # rows and pixels out of range are computed but not stored
    image, y, x = pixel // (out_height * out_width), pixel // out_width % out_height, pixel % out_width
    first = ((image * padded_height + y * stride_height).to(tl.int64) * padded_width + x * stride_width) * filled
    unit = tl.load(act_scale + image * act_stride) * (0.5 if HALF_SCALE else 1.0)
    excess = (1 << (ACT_BITS - 1)) - tl.load(act_zero + image * act_stride).to(tl.int32)  # a = code less half + excess
    at, is_real = p.to(tl.int64)[None, :] * outputs + o[:, None], (p < pixels)[None, :] & (o < outputs)[:, None]
    for plane in tl.static_range(PLANES):
        acc, box = accumulate(
            codes + first[None, :], weight + plane * plane_bytes, row, outputs, taps, filled, padded_width, kernel_width,
            zero is not None, BITS, ROWS, COLUMNS, BLOCK,
        )  # fmt: skip
        acc += tl.load(weight_sums + plane * outputs + row)[:, None] * excess[None, :]
        if zero is not None:
            shift = (tl.load(zero + row) * step(BITS) + least(BITS)).to(tl.int32)
            acc -= shift[:, None] * (box + excess * (channels * taps))[None, :]
        if plane == 0:
            value = load_bias(bias, row, image, outputs, PER_IMAGE, ROWS, COLUMNS)
        factor = tl.load(scale + plane * outputs + row)[:, None] * unit[None, :]
        value = tl.fma(acc.to(tl.float32), factor, value)
    if residual is not None:
        value += tl.load(residual + at, is_real, 0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), is_real)


@triton.jit
def load_bias(bias, row, image, outputs, PER_IMAGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the value (ROWS, COLUMNS) to which sums are added: 0, a bias (O,), or a bias per image (B, O)."""
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    if bias is not None:
        at = image[None, :] * outputs + row[:, None] if PER_IMAGE else row[:, None]
        value += tl.load(bias + at).to(tl.float32)
    return value


@triton.jit
def accumulate(
    pixel, packed, o, outputs, taps, filled, padded_width, kernel_width, SUMS: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns sums of level * code (ROWS, COLUMNS) and, if SUMS, sums of codes (COLUMNS)."""
    acc = tl.zeros((ROWS, COLUMNS), tl.int32)
    box = tl.zeros((COLUMNS,), tl.int32)
    blocks = filled // BLOCK
    c = tl.arange(0, BLOCK)[:, None]
    for index in range(taps * blocks):
        tap, block = index // blocks, index % blocks
        at = (tap // kernel_width * padded_width + tap % kernel_width) * filled + block * BLOCK
        a = tl.load(pixel + (at + c))
        levels = load_levels(packed, index, o, outputs, taps * filled // 8 * outputs, BITS, ROWS, BLOCK)
        acc = tl.dot(levels, a, acc, out_dtype=tl.int32)
        if SUMS:
            box += tl.sum(a.to(tl.int32), 0)
    return acc, box


@triton.jit
def load_levels(packed, index, o, outputs, bit_bytes, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the levels (ROWS, BLOCK) int8 of one step of a sum from the pieces of their codes (layouts.to_steps)."""
    code = tl.zeros((ROWS, BLOCK), tl.uint8)
    row = index * outputs + o
    if BITS & 1:
        code |= load_piece(packed, row, 1, ROWS, BLOCK)
    if BITS & 2:
        code |= load_piece(packed + (BITS & 1) * bit_bytes, row, 2, ROWS, BLOCK) << (BITS & 1)
    if BITS & 4:
        code |= load_piece(packed + (BITS & 3) * bit_bytes, row, 4, ROWS, BLOCK) << (BITS & 3)
    if BITS & 8:
        code |= load_piece(packed, row, 8, ROWS, BLOCK)
    return (code.to(tl.int16) * step(BITS) + least(BITS)).to(tl.int8)


@triton.jit
def load_piece(packed, row, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns pieces of WIDTH bits (ROWS, BLOCK). Each byte is read once and shifted 8 / WIDTH times."""
    BYTES: tl.constexpr = BLOCK * WIDTH // 8
    packed_bytes = tl.load(packed + row[:, None] * BYTES + tl.arange(0, BYTES)[None, :])
    shifts = (tl.arange(0, 8 // WIDTH) * WIDTH).to(tl.uint8)
    return (packed_bytes[:, :, None] >> shifts[None, None, :] & ((1 << WIDTH) - 1)).reshape(ROWS, BLOCK)


@triton.jit
def step(BITS: tl.constexpr):
    return 2 if BITS <= 2 else 1


@triton.jit
def least(BITS: tl.constexpr):
    return 1 - (1 << BITS) if BITS <= 2 else -(1 << (BITS - 1))
