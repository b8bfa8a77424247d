"""The convolution of quantized inputs with packed weights, by the implementation that the weight is blocked for.

Python calls `quantized_conv`; `graph_conv` is the same as one operator, which torch.compile and torch.export do not trace.
Tensors are channels last: (B, H, W, C) in, (B, H', W', O) out. A linear layer is one image of one row.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dmquant.kernels import buffer_pool, onednn, reference, triton_support
from dmquant.kernels.conv_shape import POINTWISE, ConvGeometry, split_rows
from dmquant.kernels.norm import GATED, address
from dmquant.kernels.operands import FUSED_TENSORS, NO_OPS, BlockedWeight, FusedOps, Operands, fused_tensors
from dmquant.kernels.registry import BY_NAME, library

# The structure of csrc/conv/params.h; the last field is epsilon.
POINTERS = ("x", "out", "weight", "weight_sums", "scale", "zero", "bias", "act_scale", "act_zero", *FUSED_TENSORS)
NUMBERS = (
    "activation", "upsample", "bias_stride", "act_stride", "act_max", "bits", "planes", "plane_bytes", "half_scale",
    "channel_block", "images", "height", "width", "channels", "outputs", "pixel_stride", "last_width", "kernel_h", "kernel_w",
    "stride_h", "stride_w", "pad_top", "pad_left", "out_height", "out_width", "threads",
)  # fmt: skip
PARAMS = struct.Struct(f"{len(POINTERS)}P{len(NUMBERS)}qd")


def quantized_conv(x: Tensor, operands: Operands, geometry: ConvGeometry, fused: FusedOps = NO_OPS) -> Tensor:
    """Quantizes x (B, H, W, C) and convolves it with a packed weight: (B, H', W', O), in the dtype of x.

    x is float32; Triton also takes float16 and bfloat16.
    """
    kernel = operands.weight.kernel
    if kernel == onednn.NAME:
        return onednn.conv(x, operands, geometry)
    if kernel == triton_support.NAME:
        from dmquant.kernels.triton import conv  # Triton may be missing, and is slow to import

        return conv.conv(x, operands, geometry, fused)
    if kernel == reference.NAME:
        return reference.conv(x, operands, geometry, fused)
    x = x.contiguous()
    if fused.residual is not None and not fused.residual.is_contiguous():
        fused = replace(fused, residual=fused.residual.contiguous())
    out_size = geometry.output_size(x.shape[1], x.shape[2], fused.upsample)
    out = buffer_pool.empty((len(x), *out_size, operands.weight.weight_sums.shape[1]))
    write_conv(out, out_size, x, x.shape, operands, geometry, fused)
    return out


def write_conv(
    out: Tensor, out_size: tuple[int, int], x: Tensor, size: Sequence[int], operands: Operands, geometry: ConvGeometry,
    fused: FusedOps, *, pixel_stride: int | None = None,
) -> None:  # fmt: skip
    """Writes the convolution into `out` by a C kernel.

    Args:
        out_size: (H', W').
        size: (B, H, W, C) of x. The shapes of the tensors are not read; their memory is channels last.
        pixel_stride: floats from one pixel of x to the next, C by default; more if x is a slice of channels.
    """
    if out.numel() == 0:
        return
    weight, bias, act_scale, activation, upsample = (
        operands.weight, operands.bias, operands.act_scale, fused.activation, fused.upsample
    )  # fmt: skip
    (images, height, width, channels), (out_height, out_width) = size, out_size
    pixel_stride = channels if pixel_stride is None else pixel_stride
    channels = channels // 2 if activation == GATED else channels
    (planes, plane_bytes), outputs = weight.weight.shape, weight.weight_sums.shape[1]
    bias_stride = outputs if bias is not None and bias.numel() > outputs else 0
    act_stride = act_scale.numel() > 1
    height, width = height * upsample, width * upsample
    last_width = width
    if geometry == POINTWISE and upsample == 1:
        if not (act_stride or bias_stride or fused.gain is not None):
            height, images = height * images, 1
        height, width, last_width = split_rows(height * width)
        out_height, out_width = height, width
    pad_top, _, pad_left, _ = geometry.padding
    call, block = entry_point(weight.kernel, channels)
    params = PARAMS.pack(
        x.data_ptr(), out.data_ptr(), weight.weight.data_ptr(), weight.weight_sums.data_ptr(), operands.scale.data_ptr(),
        address(operands.zero), address(bias), act_scale.data_ptr(), operands.act_zero.data_ptr(),
        *map(address, fused_tensors(fused)), activation, upsample, bias_stride, act_stride, (1 << operands.act_bits) - 1,
        weight.bits, planes, plane_bytes, weight.half_scale, block, images, height, width, channels, outputs, pixel_stride,
        last_width, *geometry.kernel_size, *geometry.stride, pad_top, pad_left, out_height, out_width, torch.get_num_threads(),
        fused.epsilon,
    )  # fmt: skip
    failed = call(params)
    if failed == 1:
        raise MemoryError(f"no memory for the kernel {weight.kernel}")
    if failed:
        raise ValueError(f"the kernel {weight.kernel} does not support {geometry}")


@cache
def entry_point(kernel: str, channels: int) -> tuple[Callable[[bytes], int], int]:
    """Returns the C function of a kernel, and the number of channels of its blocks."""
    return library(BY_NAME[kernel]).dmquant_run, BY_NAME[kernel].block_for(channels)


# The operator takes the fields of the four dataclasses one after another, since a graph holds tensors and numbers only.
_FIELDS = tuple(
    (part, field.name, field.type)
    for part in (BlockedWeight, Operands, ConvGeometry, FusedOps)
    for field in fields(part)
    if field.type != BlockedWeight
)
_SCHEMA_TYPES: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", bool: "bool", float: "float", str: "str"}
_SCHEMA = ", ".join(f"{_SCHEMA_TYPES.get(kind, 'int[]')} {name}" for _, name, kind in _FIELDS)


def graph_conv(x: Tensor, operands: Operands, geometry: ConvGeometry, fused: FusedOps = NO_OPS) -> Tensor:
    """Computes `quantized_conv` by the operator dmquant::quantized_conv."""
    return conv_op(x, *flatten(operands, geometry, fused))


def flatten(operands: Operands, geometry: ConvGeometry, fused: FusedOps) -> list[Any]:
    """Returns the arguments of the operator after x."""
    parts = {BlockedWeight: operands.weight, Operands: operands, ConvGeometry: geometry, FusedOps: fused}
    return [getattr(parts[part], name) for part, name, _ in _FIELDS]


def _unflatten(arguments: Sequence[Any]) -> tuple[Operands, ConvGeometry, FusedOps]:
    found: dict[type, dict[str, Any]] = {}
    for (part, name, kind), value in zip(_FIELDS, arguments, strict=True):
        found.setdefault(part, {})[name] = value if kind in _SCHEMA_TYPES else tuple(value)
    weight = BlockedWeight(**found[BlockedWeight])
    return Operands(weight=weight, **found[Operands]), ConvGeometry(**found[ConvGeometry]), FusedOps(**found[FusedOps])


@torch.library.custom_op("dmquant::quantized_conv", mutates_args=(), schema=f"(Tensor x, {_SCHEMA}) -> Tensor")
def conv_op(x: Tensor, *arguments: Any) -> Tensor:
    return quantized_conv(x, *_unflatten(arguments))


@conv_op.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    operands, geometry, fused = _unflatten(arguments)
    out_size = geometry.output_size(x.shape[1], x.shape[2], fused.upsample)
    return x.new_empty(x.shape[0], *out_size, operands.weight.weight_sums.shape[1])
