"""Norms on images channels last (N, H, W, C): group norm in two steps, its moments, then what a kernel does to what it reads.

A group norm is a gain and an offset for each channel of each image. A kernel applies them, and SiLU behind them, to what it is
about to quantize (ops.multiply), so that no normalized image is ever written. A layer norm it does on its own: that needs only
the pixel which is read. `normalize` writes a normalized image by the same C: it is what kernels are compared with.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor, nn

from dmquant.kernels import catalogue, compiler
from dmquant.kernels.catalogue import AVX2, AVX512, FLAGS_256, FLAGS_512, Kernel
from dmquant.kernels.compiler import CannotCompile
from dmquant.kernels.gpu.moments import moments as moments_on_gpu

VARIANTS = (Kernel("normal", AVX512, FLAGS_512), Kernel("normal", AVX2, FLAGS_256), Kernel("normal"))  # best first
ACTIVATIONS = NONE, SILU, GELU, TANH_GELU, GATED = range(5)  # as in csrc/normal.h
POINTERS = ("x", "beside", "weight", "bias", "gain", "offset", "sums", "factor", "out")
NUMBERS = ("images", "pixels", "channels", "beside_channels", "groups", "activate", "threads")


class Norm(ctypes.Structure):
    """The structure of csrc/normal.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int64) for name in NUMBERS),
        ("epsilon", ctypes.c_double),
    ]  # fmt: skip


def moments(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gain and offset (N, C) of a group norm over x (N, H, W, C): x * gain + offset is what it gives.

    The channels of `beside` (N, H, W, C') are counted as if they lay behind those of x; on a GPU there are none.
    """
    if x.is_cuda:
        return moments_on_gpu(x, weight, bias, groups, epsilon)
    x, beside = x.contiguous(), None if beside is None else beside.contiguous()
    images, channels = len(x), x.shape[-1] + (0 if beside is None else beside.shape[-1])
    gain, offset = x.new_empty(images, channels), x.new_empty(images, channels)
    sums = x.new_empty(images, 2, channels, dtype=torch.float64)
    if x.numel():
        job = _norm((x, beside, weight, bias, gain, offset, sums, None, None), channels, groups, NONE, epsilon)
        library().dmquant_moments(ctypes.byref(job))
    return gain, offset


def normalize(
    x: Tensor, gain: Tensor | None = None, offset: Tensor | None = None, *, factor: Tensor | None = None, activate: int = NONE,
    epsilon: float = 0,
) -> Tensor:  # fmt: skip
    """f(x * gain + offset) * factor: (N, H, W, C). GATED is x[:C] * gelu(x[C:]), with neither gain nor offset.

    With an epsilon x is normalized over its channels first, and f must be NONE.
    """
    x = x.contiguous()
    channels = x.shape[-1] // (2 if activate == GATED else 1)
    out = x.new_empty(*x.shape[:-1], channels)
    if x.numel():
        job = _norm((x, None, None, None, gain, offset, None, factor, out), channels, 1, activate, epsilon)
        library().dmquant_normalize(ctypes.byref(job))
    return out


@cache
def library() -> ctypes.CDLL:
    """Raises CannotCompile where there is none."""
    missing = "no variant"
    for variant in VARIANTS:
        try:
            if variant.needs & ~catalogue.instruction_sets():
                continue
            loaded = compiler.load(variant.name, variant.flags)
        except CannotCompile as error:
            missing = str(error)
            continue
        for function in (loaded.dmquant_moments, loaded.dmquant_normalize):
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
        return loaded
    raise CannotCompile(missing)


def _norm(tensors: tuple[Tensor | None, ...], channels: int, groups: int, activate: int, epsilon: float) -> Norm:
    x, beside = tensors[:2]
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    pixels = x.numel() // (len(x) * x.shape[-1])
    sizes = (len(x), pixels, channels, 0 if beside is None else beside.shape[-1])
    return Norm(*pointers, *sizes, groups, activate, torch.get_num_threads(), epsilon)


@torch.library.custom_op("dmquant::moments", mutates_args=())
def moments_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return moments(x, weight, bias, groups, epsilon, beside)


@moments_op.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, epsilon: float, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    channels = x.shape[-1] + (0 if beside is None else beside.shape[-1])
    return tuple(x.new_empty(len(x), channels, dtype=torch.float32) for _ in range(2))


def moments_of(norm: nn.GroupNorm, x: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gain and offset (N, C) of a layer over x (N, H, W, C), and over what lies beside it."""
    act = moments_op if torch.compiler.is_compiling() else moments
    return act(x, norm.weight, norm.bias, norm.num_groups, norm.eps, beside)
