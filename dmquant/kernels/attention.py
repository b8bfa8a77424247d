"""Attention on codes: softmax(q k^T * scale) v, where queries, keys, probabilities and values are rounded to grids of their own.

Products are exact in integers, the softmax is float32 and sees scores that were not rounded to float (below 2^24: up to 512
channels of 8 bits); the rounding expression is that of the quantizers. All variants of csrc/attention give the same floats
bit for bit. What stays with torch: masks, gradients, other dtypes and devices than float32 on the CPU, and factors of
different bits.
"""

import struct
import warnings
from functools import cache

import torch
from torch import Tensor

from dmquant.kernels import buffer_pool, registry
from dmquant.kernels.registry import (
    AMX,
    AVX2,
    AVX512,
    AVX_VNNI,
    EXACT,
    FLAGS_256,
    FLAGS_AMX,
    FLAGS_AVX_VNNI,
    FLAGS_VNNI,
    VNNI,
    Kernel,
    choice,
    library,
)
from dmquant.kernels.rounding import quantize

NAME, SOURCE = "attention", "attention/attention"
VARIANTS = (  # best first
    Kernel(NAME, AVX512 | AMX, FLAGS_AMX, needs_permission=True, source=SOURCE),
    Kernel(NAME, AVX512 | VNNI, FLAGS_VNNI, source=SOURCE),
    Kernel(NAME, AVX2 | AVX_VNNI, FLAGS_AVX_VNNI, source=SOURCE),
    Kernel(NAME, AVX2, FLAGS_256, source=SOURCE),
    Kernel(NAME, is_portable=True, source=SOURCE),
)
TOLERANCE = 1e-5  # of the largest output
LARGEST = 2**14  # channels of a head, and keys: three sums of their products fit 32 bits
POINTERS = ("query", "key", "value", "out", "grid_scale", "grid_zero")
STRIDES = tuple(f"{factor}_{step}" for factor in ("query", "key", "value") for step in ("image", "head", "token"))
NUMBERS = ("images", "heads", "queries", "keys", "channels", *STRIDES, "max_code", "threads")
ATTENTION = struct.Struct(f"{len(POINTERS)}P{len(NUMBERS)}qd")  # as in csrc/attention/params.h; the last is the scale


@torch.compiler.assume_constant_result
def chosen(bits: int) -> int | None:
    """The number of the best variant that runs here and agrees with the reference."""
    usable = (kernel for kernel in candidates() if not registry.find_missing(kernel) and not check(kernel, bits))
    return next((VARIANTS.index(kernel) for kernel in usable), None)


def candidates() -> tuple[Kernel, ...]:
    """The variants that may be used: plain C saves memory, not time, and has to be asked for."""
    wanted = choice()
    return tuple(kernel for kernel in VARIANTS if wanted == "c" or (wanted in ("auto", EXACT.name) and not kernel.is_portable))


def find_missing() -> str:
    """Empty if attention on codes is in use, or why it is not."""
    if not candidates():
        return f"DMQUANT_KERNELS={choice()}"
    last = candidates()[-1]
    return "" if chosen(8) is not None else registry.find_missing(last) or check(last, 8)


@cache
def check(kernel: Kernel, bits: int) -> str:
    """Empty if the variant agrees with the reference; otherwise, after a warning, what went wrong."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 20, generator=generator) for tokens in (19, 70, 70))
    scales = torch.rand(4, 2, 3, generator=generator).add_(1).mul_(4 / (1 << bits))
    zeros = torch.randint(1 << (bits - 1), (4, 2, 3), generator=generator).add_(1 << (bits - 2) if bits > 1 else 0).float()
    scales[2], zeros[2] = 0.5 / (1 << bits), 0.0
    found = attend(query, key, value, scales, zeros, bits, 0.3, VARIANTS.index(kernel))
    wanted = reference(query, key, value, scales, zeros, bits, 0.3)
    worst = float((found - wanted).abs().max() / wanted.abs().max())
    if worst <= TOLERANCE:
        return ""
    reason = f"wrong by {worst:.1e} at {bits} bits"
    warnings.warn(f"the kernel {kernel.name} is not used: it is {reason}", RuntimeWarning, stacklevel=2)
    return reason


def reference(query: Tensor, key: Tensor, value: Tensor, scales: Tensor, zeros: Tensor, bits: int, scale: float) -> Tensor:
    """The same in float64, after the factors are rounded in float32."""

    def rounded(x: Tensor, factor: int) -> Tensor:
        grid, zero = scales[factor, ..., None, None], zeros[factor, ..., None, None]
        return (quantize(x, grid, zero, bits) - zero).double() * grid.double()

    scores = rounded(query, 0) @ rounded(key, 1).mT * scale
    products = rounded(scores.softmax(-1).float(), 2) @ rounded(value, 3)
    return products.transpose(1, 2).flatten(2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scales: Tensor, zeros: Tensor, bits: int, scale: float, variant: int
) -> Tensor:
    """softmax(q k^T * scale) v by a variant: (B, N, heads * C). scales and zeros: (4, B, heads), contiguous."""
    images, heads, queries, channels = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = buffer_pool.empty((images, queries, heads * channels))
    job = ATTENTION.pack(
        *(tensor.data_ptr() for tensor in (query, key, value, out, scales, zeros)),
        images, heads, queries, key.shape[2], channels, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        (1 << bits) - 1, torch.get_num_threads(), scale,
    )  # fmt: skip
    if library(VARIANTS[variant]).dmquant_run(job) != 0:
        raise MemoryError("no memory for an attention")
    return out


@torch.library.custom_op("dmquant::attend", mutates_args=())
def attend_op(
    query: Tensor, key: Tensor, value: Tensor, scales: Tensor, zeros: Tensor, bits: int, scale: float, variant: int
) -> Tensor:
    return attend(query, key, value, scales, zeros, bits, scale, variant)


@attend_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, scales: Tensor, zeros: Tensor, bits: int, scale: float, variant: int
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1] * query.shape[3])
