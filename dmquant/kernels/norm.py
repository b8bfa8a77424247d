"""Norms and activations on images channels last (B, H, W, C), as the prologue of a kernel computes them.

A group norm is computed in two steps: `moments` returns a gain and an offset for each channel of each image, and a kernel applies
them and the activation to the values that it quantizes (FusedOps), so that no normalized image is written. A layer norm needs
only one pixel, so the kernel computes it entirely. `normalize` writes the normalized image with the same C code; kernels are
compared with it.
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
NORM = struct.Struct(f"{len(POINTERS)}P{len(NUMBERS)}qd")  # the structure of csrc/norm/norm.c; the last field is epsilon


def moments(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns gain and offset (B, C) of a group norm over x (B, H, W, C); x * gain + offset is its output."""
    if x.is_cuda:
        return moments_on_gpu(x, weight, bias, groups, epsilon)
    return _moments_by_c(x.contiguous(), x.shape[-1], weight, bias, groups, epsilon)


def _moments_by_c(
    x: Tensor, channels: int, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Computes `moments` in C for a tensor of B images whose memory is channels last; the order of its dimensions is not read."""
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
    """Computes activation(x * gain + offset) * factor: (B, H, W, C).

    Args:
        x: (B, H, W, C); for GATED, which is x[:C] * gelu(x[C:]), (B, H, W, 2 C) and neither gain nor offset.
        gain: (B, C); offset likewise.
        factor: (C,).
        epsilon: if it is not 0, x is layer-normalized over its channels first, and the activation must be NONE.
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
    """Returns the compiled library of the best variant for this processor. Raises CannotCompile if there is none."""
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
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    gain = x.new_empty(len(x), x.shape[-1], dtype=torch.float32)
    return gain, torch.empty_like(gain)


def moments_of(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns gain and offset (B, C) of a GroupNorm over images (B, C, H, W), or over tokens (B, N, C)."""
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    is_image = x.dim() == 4
    if x.is_cuda or torch.compiler.is_compiling():
        compute = moments_op if torch.compiler.is_compiling() else moments
        x = x.permute(0, 2, 3, 1) if is_image else x.unsqueeze(1)
        return compute(x, weight, bias, norm.num_groups, norm.eps)
    channels, order = (x.shape[1], torch.channels_last) if is_image else (x.shape[2], torch.contiguous_format)
    return _moments_by_c(x.contiguous(memory_format=order), channels, weight, bias, norm.num_groups, norm.eps)
