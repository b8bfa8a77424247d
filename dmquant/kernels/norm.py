"""Norms on images channels last (N, H, W, C): group norm in two steps, its moments, then what a kernel does to what it reads.

A group norm is a gain and an offset for each channel of each image. A kernel applies them, and SiLU behind them, to what it is
about to quantize (ops.multiply), so that no normalized image is ever written. A layer norm it does on its own: that needs only
the pixel which is read. `normalize` writes a normalized image by the same C: it is what kernels are compared with.
"""

import ctypes
import struct
from functools import cache

import torch
from torch import Tensor, nn

from dmquant.kernels import build, registry
from dmquant.kernels.build import CannotCompile
from dmquant.kernels.registry import AVX2, AVX512, FLAGS_256, FLAGS_512, Kernel
from dmquant.kernels.triton.norm import moments as moments_on_gpu

NAME, SOURCE = "norm", "norm/norm"
VARIANTS = (Kernel(NAME, AVX512, FLAGS_512), Kernel(NAME, AVX2, FLAGS_256), Kernel(NAME))  # best first
ACTIVATIONS = NONE, SILU, GELU, TANH_GELU, GATED = range(5)  # as in csrc/norm/norm.h
POINTERS = ("x", "weight", "bias", "gain", "offset", "sums", "factor", "out")
NUMBERS = ("images", "pixels", "channels", "groups", "activation", "threads")
NORM = struct.Struct(f"{len(POINTERS)}P{len(NUMBERS)}qd")  # the structure of csrc/norm/norm.c; the last is epsilon


def moments(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Gain and offset (N, C) of a group norm over x (N, H, W, C): x * gain + offset is what it gives."""
    if x.is_cuda:
        return moments_on_gpu(x, weight, bias, groups, epsilon)
    return measure(x.contiguous(), x.shape[-1], weight, bias, groups, epsilon)


def measure(
    x: Tensor, channels: int, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The same by C for x of N images with so many channels: shapes say nothing else here, memory is channels last."""
    images = x.shape[0]
    pixels = x.numel() // max(1, images * channels)
    shape = (images, channels)
    gain, offset, sums = torch.empty(shape), torch.empty(shape), torch.empty((2, *shape), dtype=torch.float64)
    if x.numel():
        params = NORM.pack(
            x.data_ptr(), address(weight), address(bias), gain.data_ptr(), offset.data_ptr(), sums.data_ptr(), 0, 0,
            images, pixels, channels, groups, NONE, torch.get_num_threads(), epsilon,
        )  # fmt: skip
        library().dmquant_group_norm(params)
    return gain, offset


def normalize(
    x: Tensor, gain: Tensor | None = None, offset: Tensor | None = None, *, factor: Tensor | None = None, activation: int = NONE,
    epsilon: float = 0,
) -> Tensor:  # fmt: skip
    """f(x * gain + offset) * factor: (N, H, W, C). GATED is x[:C] * gelu(x[C:]), with neither gain nor offset.

    With an epsilon x is normalized over its channels first, and f must be NONE.
    """
    x = x.contiguous()
    channels = x.shape[-1] // (2 if activation == GATED else 1)
    out = x.new_empty(*x.shape[:-1], channels)
    if x.numel():
        params = NORM.pack(
            x.data_ptr(), 0, 0, address(gain), address(offset), 0, address(factor), out.data_ptr(),
            len(x), x.numel() // (len(x) * x.shape[-1]), channels, 1, activation, torch.get_num_threads(), epsilon,
        )  # fmt: skip
        library().dmquant_normalize(params)
    return out


@cache
def library() -> ctypes.CDLL:
    """Raises CannotCompile where there is none."""
    missing = "no variant"
    for variant in VARIANTS:
        try:
            if variant.needs & ~registry.instruction_sets():
                continue
            loaded = build.load(SOURCE, variant.flags)
        except CannotCompile as error:
            missing = str(error)
            continue
        for function in (loaded.dmquant_group_norm, loaded.dmquant_normalize):
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
        return loaded
    raise CannotCompile(missing)


def address(tensor: Tensor | None) -> int:
    """Returns the memory address of a tensor, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@torch.library.custom_op("dmquant::moments", mutates_args=())
def moments_op(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    return moments(x, weight, bias, groups, epsilon)


@moments_op.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    gain = x.new_empty(len(x), x.shape[-1], dtype=torch.float32)
    return gain, torch.empty_like(gain)


def moments_of(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and offset (N, C) of a layer over images (N, C, H, W), or over tokens (N, T, C)."""
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    is_image = x.dim() == 4
    if x.is_cuda or torch.compiler.is_compiling():
        act = moments_op if torch.compiler.is_compiling() else moments
        x = x.permute(0, 2, 3, 1) if is_image else x.unsqueeze(1)
        return act(x, weight, bias, norm.num_groups, norm.eps)
    order = torch.channels_last if is_image else torch.contiguous_format
    return measure(x.contiguous(memory_format=order), x.shape[1 if is_image else 2], weight, bias, norm.num_groups, norm.eps)
