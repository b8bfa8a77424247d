"""The products of a packed layer as one operator of torch, which torch.compile and export take as it is.

Images are channels last throughout: (N, H, W, C) in, (N, H', W', O) out. A linear layer is one image of one row.
"""

import struct
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from dmquant.kernels import buffer_pool, onednn, reference, triton_support
from dmquant.kernels.conv_shape import POINT, output_size, rows_of
from dmquant.kernels.norm import GATED, place
from dmquant.kernels.registry import BY_NAME, library

POINTERS = (
    "x", "out", "weight", "weight_sums", "scale", "zero", "bias", "act_scale", "act_zero", "gain", "offset", "factor",
    "residual",
)  # fmt: skip
NUMBERS = (
    "activation", "upsample", "bias_stride", "act_stride", "act_max", "bits", "planes", "plane_bytes", "half_scale",
    "channel_block", "images", "height", "width", "channels", "outputs", "pixel_stride", "last_width", "kernel_h", "kernel_w", "stride_h",
    "stride_w", "pad_top", "pad_left", "out_height", "out_width", "threads",
)  # fmt: skip
JOB = struct.Struct(f"{len(POINTERS)}P{len(NUMBERS)}qd")  # as in csrc/conv/params.h; the last is epsilon


def multiply(
    x: Tensor, weight: Tensor, total: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    act_scale: Tensor, act_zero: Tensor, kernel: str, format: Sequence[int], window: Sequence[int], gain: Tensor | None = None,
    offset: Tensor | None = None, factor: Tensor | None = None, residual: Tensor | None = None, activate: int = 0,
    zoom: int = 1, epsilon: float = 0.0,
) -> Tensor:  # fmt: skip
    """Quantizes x (N, H, W, C) and convolves it with a blocked weight: (N, H', W', O), in the dtype of x.

    format: bits of a plane, whether scales are halved, bits of activations. window: kernel, stride (both height, width) and
    padding (top, bottom, left, right). act_scale and act_zero hold one value, or one for each image; bias may be (N, O).
    With gain and offset (N, C), f(x * gain + offset) * factor is quantized instead of x: f is an activation of normal.py, factor
    (C) may be None; with an activation or a factor the others may be None. GATED reads x (N, H, W, 2 C). With an epsilon each
    pixel of x is normalized over its channels first, and nothing activates it. residual, of the output's shape, is added to it.
    Each pixel is read zoom times zoom times. oneDNN knows none of these, Triton SiLU alone. x is float32, for Triton half as
    well.
    """
    _, halves, act_bits = format
    if kernel == onednn.NAME:
        return onednn.multiply(x, weight, scale.view(-1) * (0.5 if halves else 1), bias, act_scale, act_zero, act_bits, window)
    arguments = (x, weight, total, scale, zero, bias, act_scale, act_zero, format, window, gain, offset, factor, residual)
    if kernel == triton_support.NAME:
        from dmquant.kernels.triton import conv  # Triton may be missing, and is slow to import

        return conv.multiply(*arguments, bool(activate), zoom)
    if kernel == reference.NAME:
        return reference.multiply(*arguments, activate, zoom, epsilon)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out = buffer_pool.empty((len(x), *output_size(x, window, zoom), total.shape[1]))
    arguments = (weight, total, scale, zero, bias, act_scale, act_zero, kernel, format, tuple(window), gain, offset, factor)
    write(out, out.shape[1:3], x, x.shape, x.shape[-1], *arguments, residual, activate, zoom, epsilon)
    return out


def write(
    out: Tensor, out_size: Sequence[int], x: Tensor, size: Sequence[int], pixel_stride: int, weight: Tensor, total: Tensor,
    scale: Tensor, zero: Tensor | None, bias: Tensor | None, act_scale: Tensor, act_zero: Tensor, kernel: str,
    format: Sequence[int], window: tuple[int, ...], gain: Tensor | None, offset: Tensor | None, factor: Tensor | None,
    residual: Tensor | None, activate: int, zoom: int, epsilon: float,
) -> None:  # fmt: skip
    """The same by a kernel of C, written to `out`. size is (N, H, W, C) of x and out_size (H', W'): shapes of the tensors are not
    read. Memory is channels last, without gaps but between the pixels of x, which are pixel_stride floats apart."""
    if out.numel() == 0:
        return
    (images, height, width, channels), (out_height, out_width) = size, out_size
    channels = channels // 2 if activate == GATED else channels
    bits, halves, act_bits = format
    (planes, plane_bytes), outputs = weight.shape, total.shape[1]
    bias_stride, act_stride = outputs if bias is not None and bias.numel() > outputs else 0, act_scale.numel() > 1
    height, width, last_width = height * zoom, width * zoom, width * zoom
    if window == POINT and zoom == 1:
        if not (act_stride or bias_stride or gain is not None):
            height, images = height * images, 1
        height, width, last_width = rows_of(height * width)
        out_height, out_width = height, width
    run, block = entry(kernel, channels)
    job = JOB.pack(
        x.data_ptr(), out.data_ptr(), weight.data_ptr(), total.data_ptr(), scale.data_ptr(), place(zero), place(bias),
        act_scale.data_ptr(), act_zero.data_ptr(), place(gain), place(offset), place(factor), place(residual),
        activate, zoom, bias_stride, act_stride, (1 << act_bits) - 1, bits, planes, plane_bytes, halves, block, images,
        height, width, channels, outputs, pixel_stride, last_width, *window[:5], window[6], out_height, out_width,
        torch.get_num_threads(), epsilon,
    )  # fmt: skip
    failed = run(job)
    if failed == 1:
        raise MemoryError(f"no memory for the kernel {kernel}")
    if failed:
        raise ValueError(f"the kernel {kernel} is not made for the window {window}")


@cache
def entry(kernel: str, channels: int) -> tuple[Callable[[bytes], int], int]:
    """What runs a job of a kernel, and how many channels its blocks have."""
    return library(BY_NAME[kernel]).dmquant_run, BY_NAME[kernel].block_for(channels)


@torch.library.custom_op("dmquant::multiply", mutates_args=())
def multiply_op(
    x: Tensor, weight: Tensor, total: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    act_scale: Tensor, act_zero: Tensor, kernel: str, format: Sequence[int], window: Sequence[int], gain: Tensor | None = None,
    offset: Tensor | None = None, factor: Tensor | None = None, residual: Tensor | None = None, activate: int = 0,
    zoom: int = 1, epsilon: float = 0.0,
) -> Tensor:  # fmt: skip
    arguments = (x, weight, total, scale, zero, bias, act_scale, act_zero, kernel, format, window)
    return multiply(*arguments, gain, offset, factor, residual, activate, zoom, epsilon)


@multiply_op.register_fake
def _(
    x: Tensor, weight: Tensor, total: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    act_scale: Tensor, act_zero: Tensor, kernel: str, format: Sequence[int], window: Sequence[int], gain: Tensor | None = None,
    offset: Tensor | None = None, factor: Tensor | None = None, residual: Tensor | None = None, activate: int = 0,
    zoom: int = 1, epsilon: float = 0.0,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], *output_size(x, window, zoom), total.shape[1])
