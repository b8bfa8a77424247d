"""The products of a packed layer as one operator of torch, which torch.compile and export take as it is.

Images are channels last throughout: (N, H, W, C) in, (N, H', W', O) out. A linear layer is one image of one row.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dmquant.kernels import gpu, onednn, pages
from dmquant.kernels.blocking import fill_up
from dmquant.kernels.catalogue import BY_NAME, library
from dmquant.kernels.normal import GATED

ROW = 32  # pixels of a row where the layer does not care: rows are what threads share

POINTERS = (
    "x", "out", "weight", "total", "scale", "zero", "bias", "act_scale", "act_zero", "gain", "offset", "factor", "residual",
    "beside",
)  # fmt: skip
NUMBERS = (
    "activate", "zoom", "bias_stride", "act_stride", "act_max", "bits", "planes", "plane_bytes", "halves", "block", "images",
    "height", "width", "channels", "outputs", "beside_channels", "last_width", "kernel_h", "kernel_w", "stride_h", "stride_w",
    "pad_top", "pad_left", "out_height", "out_width", "threads",
)  # fmt: skip


class Job(ctypes.Structure):
    """The structure of csrc/job.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in NUMBERS]
    _fields_ += [("epsilon", ctypes.c_double)]


def multiply(
    x: Tensor, weight: Tensor, total: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    act_scale: Tensor, act_zero: Tensor, kernel: str, format: Sequence[int], window: Sequence[int], gain: Tensor | None = None,
    offset: Tensor | None = None, factor: Tensor | None = None, residual: Tensor | None = None, activate: int = 0,
    zoom: int = 1, epsilon: float = 0.0, beside: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Quantizes x (N, H, W, C) and convolves it with a blocked weight: (N, H', W', O), in the dtype of x.

    format: bits of a plane, whether scales are halved, bits of activations. window: kernel, stride (both height, width) and
    padding (top, bottom, left, right). act_scale and act_zero hold one value, or one for each image; bias may be (N, O).
    With gain and offset (N, C), f(x * gain + offset) * factor is quantized instead of x: f is an activation of normal.py, factor
    (C) may be None; with an activation they may be None themselves. GATED reads x (N, H, W, 2 C). With an epsilon each pixel of x
    is normalized over its channels first, and nothing activates it. residual, of the output's shape, is added to it. Each pixel
    is read zoom times zoom times. The channels of `beside` (N, H, W, C') count as if they lay behind those of x, which must not
    be GATED. The output is written to `out` if there is one, contiguous. oneDNN knows none of these, Triton SiLU alone. x is
    float32, for Triton half as well.
    """
    bits, halves, act_bits = format
    if kernel == onednn.NAME:
        return onednn.multiply(x, weight, scale.view(-1) * (0.5 if halves else 1), bias, act_scale, act_zero, act_bits, window)
    if kernel == gpu.NAME:
        from dmquant.kernels.gpu import products  # Triton may be missing, and is slow to import

        arguments = (x, weight, total, scale, zero, bias, act_scale, act_zero, format, window)
        return products.multiply(*arguments, gain, offset, factor, residual, bool(activate), zoom)
    x, residual, beside = (None if tensor is None else tensor.contiguous() for tensor in (x, residual, beside))
    (images, height, width, channels), others = x.shape, 0 if beside is None else beside.shape[-1]
    channels = channels // 2 if activate == GATED else channels + others
    out = pages.empty((images, *output_size(x, window, zoom), total.shape[1])) if out is None else out
    if out.numel() == 0:
        return out
    tensors = (x, out, weight, total, scale, zero, bias, act_scale, act_zero, gain, offset, factor, residual, beside)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    per_image = out.shape[3] if bias is not None and bias.dim() == 2 else 0
    layout = (activate, zoom, per_image, act_scale.numel() > 1, (1 << act_bits) - 1, bits, len(weight), weight.shape[1], halves)
    sizes = (BY_NAME[kernel].block_for(channels), images, height * zoom, width * zoom, channels, out.shape[3])
    sizes += (others, width * zoom, *window[:5], window[6], *out.shape[1:3])
    job = Job(*pointers, *layout, *sizes, torch.get_num_threads(), epsilon)
    if tuple(window) == (1, 1, 1, 1, 0, 0, 0, 0) and zoom == 1:
        _even_rows(job)
    if library(BY_NAME[kernel]).dmquant_run(ctypes.addressof(job)) != 0:
        raise MemoryError(f"no memory for the kernel {kernel}")
    return out


def output_size(x: Tensor, window: Sequence[int], zoom: int = 1) -> tuple[int, int]:
    """Height and width of the output."""
    kernel_h, kernel_w, stride_h, stride_w, top, bottom, left, right = window
    height, width = x.shape[1] * zoom, x.shape[2] * zoom
    return (height + top + bottom - kernel_h) // stride_h + 1, (width + left + right - kernel_w) // stride_w + 1


def _even_rows(job: Job) -> None:
    """Cuts each image into rows of 32 pixels, the last one of what is left: its shape means nothing to a 1x1 convolution."""
    if not (job.act_stride or job.bias_stride or job.gain):
        job.height, job.images = job.height * job.images, 1
    pixels = job.height * job.width
    job.width = job.out_width = ROW
    job.height = job.out_height = fill_up(pixels, ROW) // ROW
    job.last_width = pixels - (job.height - 1) * ROW


@torch.library.custom_op("dmquant::multiply", mutates_args=())
def multiply_op(
    x: Tensor, weight: Tensor, total: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    act_scale: Tensor, act_zero: Tensor, kernel: str, format: Sequence[int], window: Sequence[int], gain: Tensor | None = None,
    offset: Tensor | None = None, factor: Tensor | None = None, residual: Tensor | None = None, activate: int = 0,
    zoom: int = 1, epsilon: float = 0.0, beside: Tensor | None = None,
) -> Tensor:  # fmt: skip
    arguments = (x, weight, total, scale, zero, bias, act_scale, act_zero, kernel, format, window)
    return multiply(*arguments, gain, offset, factor, residual, activate, zoom, epsilon, beside)


@multiply_op.register_fake
def _(
    x: Tensor, weight: Tensor, total: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    act_scale: Tensor, act_zero: Tensor, kernel: str, format: Sequence[int], window: Sequence[int], gain: Tensor | None = None,
    offset: Tensor | None = None, factor: Tensor | None = None, residual: Tensor | None = None, activate: int = 0,
    zoom: int = 1, epsilon: float = 0.0, beside: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], *output_size(x, window, zoom), total.shape[1])
