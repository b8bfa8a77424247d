"""Computes packed layers by kernels: which layers and inputs kernels support, and what a kernel is given of a layer.

The kernel of a layer is chosen at its first call (kernel_choice.py). Functions here read `_modules`, `_buffers` and `_parameters`
of a layer: attribute access on a module costs about a microsecond, and a denoiser has hundreds of layers.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from dmquant.kernels import buffer_pool, onednn, ops, reference, self_check, triton_support
from dmquant.kernels.conv_shape import ConvGeometry
from dmquant.kernels.operands import NO_OPS, BlockedWeight, FusedOps, Operands
from dmquant.nn.kernel_choice import prepare
from dmquant.nn.layer_shape import as_images, geometry_of
from dmquant.nn.packed_weight import BlockedCodes
from dmquant.quantizers.base import FixedGrid
from dmquant.quantizers.dilated import Divide
from dmquant.quantizers.per_timestep import TemporalGrid

if TYPE_CHECKING:
    from dmquant.nn.packed_layers import PackedLayer

DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}  # of inputs; no other devices
NOT_C = (onednn.NAME, triton_support.NAME, reference.NAME)  # implementations that are not written in C


def run_kernel(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Returns the output of a packed layer, or None where no kernel computes it and the caller has to dequantize the weight."""
    if not is_supported(layer, x):
        return None
    weight: Any = layer._modules["weight"]
    if weight.blocked is None and not weight.is_left_alone and not torch.compiler.is_compiling():
        prepare(layer, x)
    blocked: BlockedWeight | None = weight.blocked
    if blocked is None or (blocked.kernel == onednn.NAME and torch.compiler.is_compiling()):
        return None
    return launch(layer, blocked, x)


def run_kernel_on_parts(layers: Sequence[nn.Module], parts: Sequence[Tensor]) -> Tensor | None:
    """Returns the sum of the outputs of packed layers, each on its own part of an input before the division by channel.

    Returns None where no kernel computes any of the layers.
    """
    pairs: list[tuple[Any, Tensor]] = list(zip(layers, parts, strict=True))
    if all(can_fuse(layer, part) for layer, part in pairs):
        total = None
        for layer, part in pairs:
            total = run_fused(layer, part, FusedOps(residual=total))
        return total
    outputs = [run_kernel(layer, layer.divide(part)) for layer, part in pairs]
    if all(output is None for output in outputs):
        return None
    return reduce(torch.add, (layer(part) if output is None else output for output, (layer, part) in zip(outputs, pairs)))


def is_supported(layer: nn.Module, x: Tensor) -> "TypeGuard[PackedLayer]":
    """Returns whether a kernel can compute this layer on x."""
    return is_readable(x) and has_codes(layer, x)


def is_readable(x: Tensor) -> bool:
    """Returns whether kernels read x: a supported device and dtype, not empty, without gradients and autocast."""
    device_type = x.device.type
    if x.dtype not in DTYPES.get(device_type, ()) or torch.is_autocast_enabled(device_type):
        return False
    return x.numel() > 0 and not (torch.is_grad_enabled() and x.requires_grad)


def has_codes(layer: nn.Module, x: Tensor) -> "TypeGuard[PackedLayer]":
    """Returns whether a layer has packed weights and a quantized input on the device of x, no groups, dilation or odd padding."""
    parts: dict[str, Any] = layer._modules
    weight = parts.get("weight")
    if not isinstance(weight, BlockedCodes) or type(parts["input"]) not in (FixedGrid, TemporalGrid):
        return False
    scale: Any = weight._buffers["scale"]
    if scale.device != x.device:
        return False
    if isinstance(layer, nn.Linear):
        return True
    conv: Any = layer
    is_plain = conv.groups == 1 and conv.padding_mode == "zeros" and set(conv.dilation) == {1}
    return is_plain and x.dim() == len(weight.shape)


def can_fuse(layer: nn.Module, x: Tensor) -> "TypeGuard[PackedLayer]":
    """Returns whether a kernel computes this layer on x with fused operations, and the layer has no hooks."""
    return is_readable(x) and is_fusible(layer, x)


def is_fusible(layer: nn.Module, x: Tensor) -> "TypeGuard[PackedLayer]":
    """Returns the same for an x that `is_readable`."""
    if layer._forward_hooks or layer._forward_pre_hooks or not has_codes(layer, x):
        return False
    parts: dict[str, Any] = layer._modules
    blocked: BlockedWeight | None = parts["weight"].blocked
    if blocked is None or blocked.kernel == onednn.NAME or type(parts["divide"]) not in (nn.Identity, Divide):
        return False
    return torch.compiler.is_compiling() or not self_check.check_fusion(blocked.kernel, parts["input"].bits, x.device)


def run_fused(
    layer: nn.Module, x: Tensor, fused: FusedOps = NO_OPS, *, bias: Tensor | None = None, geometry: ConvGeometry | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Computes a layer for which `can_fuse` is true, with its division by channel and the fused operations.

    Args:
        bias: (B, O), used instead of the layer's bias.
        geometry: used instead of the layer's geometry.
        out: tensor into which the output of a linear layer is written.
    """
    parts: dict[str, Any] = layer._modules
    divide = parts["divide"]
    if isinstance(divide, Divide):
        fused = replace(fused, factor=divide.reciprocal)
    return launch(layer, parts["weight"].blocked, x, fused, bias=bias, geometry=geometry, out=out)


def launch(
    layer: nn.Module, blocked: BlockedWeight, x: Tensor, fused: FusedOps = NO_OPS, *, bias: Tensor | None = None,
    geometry: ConvGeometry | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Computes a layer by the kernel that its weight is blocked for. Arguments as for `run_fused`."""
    operands, geometry = operands_of(layer, blocked, x, bias), geometry or geometry_of(layer)
    images, fused = share_images(operands, fused) if isinstance(layer, nn.Linear) else (1, fused)
    if blocked.kernel in NOT_C or isinstance(layer, nn.Conv1d) or torch.compiler.is_compiling():
        made = _compute_on_images(layer, x, images, operands, geometry, fused)
        return made if out is None else out.copy_(made)
    residual, outputs, pixel_stride = fused.residual, blocked.weight_sums.shape[1], None
    if isinstance(layer, nn.Linear):
        x, channels, order = x.contiguous(), x.shape[-1], torch.contiguous_format
        size = (images, 1, x.numel() // (images * channels), channels)
        out_size = size[1:3]
        out = buffer_pool.empty((*x.shape[:-1], outputs)) if out is None else out
    else:
        order = torch.channels_last
        x, pixel_stride = as_channels_last(x)
        size = (x.shape[0], *x.shape[2:], x.shape[1])
        out_size = geometry.output_size(x.shape[2], x.shape[3], fused.upsample)
        out = buffer_pool.empty((len(x), outputs, *out_size), order)
    if residual is not None and not residual.is_contiguous(memory_format=order):
        fused = replace(fused, residual=residual.contiguous(memory_format=order))
    ops.write_conv(out, out_size, x, size, operands, geometry, fused, pixel_stride=pixel_stride)
    return out


def as_channels_last(x: Tensor) -> tuple[Tensor, int]:
    """Returns an image (B, C, H, W) as C kernels read it, and the number of floats from one pixel to the next.

    That is C, or more in a slice of the channels of an image that is channels last: the slice is not copied.
    """
    (_, channels, height, width), (image, channel, row, pixel) = x.shape, x.stride()
    if channel == 1 and pixel > channels and row == width * pixel and image == height * row:
        return x, pixel
    return x.contiguous(memory_format=torch.channels_last), channels


def _compute_on_images(
    layer: nn.Module, x: Tensor, images: int, operands: Operands, geometry: ConvGeometry, fused: FusedOps
) -> Tensor:  # fmt: skip
    """Computes a layer on views (B, H, W, C) of the tensors, which graphs and all kernels support."""
    if fused.residual is not None:
        fused = replace(fused, residual=as_images(layer, fused.residual, images))
    conv = ops.graph_conv if torch.compiler.is_compiling() else ops.quantized_conv
    out = conv(as_images(layer, x, images), operands, geometry, fused)
    if isinstance(layer, nn.Linear):
        return out.view(*x.shape[:-1], -1)
    out = out.permute(0, 3, 1, 2)
    return out.squeeze(2) if isinstance(layer, nn.Conv1d) else out


def operands_of(layer: nn.Module, blocked: BlockedWeight, x: Tensor, bias: Tensor | None = None) -> Operands:
    """Returns the operands of a layer, with `bias` instead of the layer's if it is given."""
    parts: dict[str, Any] = layer._modules
    weight, grid = parts["weight"], parts["input"]
    zero = weight._buffers["zero"] if blocked.is_shifted else None
    bias = layer._parameters["bias"] if bias is None else bias
    return Operands(blocked, weight._buffers["scale"], zero, *grid_of(grid, x), grid.bits, bias)


def share_images(operands: Operands, fused: FusedOps) -> tuple[int, FusedOps]:
    """Returns the number of images into which the tokens of a linear layer are divided, and `fused` with a gain for each image.

    All tokens form one image unless there are several grids, biases or gains: few images of many pixels take less time.
    """
    grids, gain, offset = operands.act_scale.numel(), fused.gain, fused.offset
    if gain is None or offset is None:
        bias = operands.bias
        return grids if bias is None or bias.dim() == 1 else bias.shape[0], fused
    images = max(grids, gain.shape[0])
    if gain.shape[0] < images:
        gain, offset = gain.expand(images, -1).contiguous(), offset.expand(images, -1).contiguous()
        fused = replace(fused, gain=gain, offset=offset)
    return images, fused


def grid_of(grid: FixedGrid | TemporalGrid, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point of an input: one value, or one per sample (B,) where samples are at different timesteps."""
    if not isinstance(grid, TemporalGrid):
        buffers: dict[str, Any] = grid._buffers
        return buffers["scale"], buffers["zero"]
    return grid.row() or grid.rows(len(x))
