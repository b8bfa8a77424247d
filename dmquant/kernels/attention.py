"""Attention on codes: softmax(q k^T * scale) v with queries, keys, probabilities and values on quantization grids of their own.

Products are summed in integers and the softmax is computed in float32. Scores are exact floats below 2^24, which holds for up to
512 channels of 8 bits. Values are rounded by the expression of the quantizers. All variants of csrc/attention give the same bits.
Not supported: masks, gradients, dtypes other than float32, devices other than the CPU, and factors of different bits.
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
TOLERANCE = 1e-5  # relative to the largest output
LARGEST = 2**14  # channels of a head, and keys: three sums of their products fit 32 bits
POINTERS = ("query", "key", "value", "out", "grid_scale", "grid_zero")
STRIDES = tuple(f"{factor}_{step}" for factor in ("query", "key", "value") for step in ("image", "head", "token"))
NUMBERS = ("images", "heads", "queries", "keys", "channels", *STRIDES, "max_code", "threads")
ATTENTION = struct.Struct(f"{len(POINTERS)}P{len(NUMBERS)}qd")  # as in csrc/attention/params.h; the last field is the scale


@torch.compiler.assume_constant_result
def choose_variant(bits: int) -> int | None:
    """Returns the index of the best variant that runs on this machine and agrees with the reference; None if there is none."""
    usable = (kernel for kernel in allowed_variants() if not registry.find_missing(kernel) and not check(kernel, bits))
    return next((VARIANTS.index(kernel) for kernel in usable), None)


def allowed_variants() -> tuple[Kernel, ...]:
    """Returns the variants that DMQUANT_KERNELS allows. Plain C saves memory but no time, so it is used on request only."""
    wanted = choice()
    return tuple(kernel for kernel in VARIANTS if wanted == "c" or (wanted in ("auto", EXACT.name) and not kernel.is_portable))


def find_missing() -> str:
    """Returns "" if attention on codes is in use, otherwise the reason why not."""
    if not allowed_variants():
        return f"DMQUANT_KERNELS={choice()}"
    last = allowed_variants()[-1]
    return "" if choose_variant(8) is not None else registry.find_missing(last) or check(last, 8)


@cache
def check(kernel: Kernel, bits: int) -> str:
    """Compares a variant with the reference. Returns "" where they agree; otherwise warns and returns what differs."""
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
    """Computes `attend` in float64 from factors that are rounded in float32."""

    def rounded(x: Tensor, factor: int) -> Tensor:
        grid, zero = scales[factor, ..., None, None], zeros[factor, ..., None, None]
        return (quantize(x, grid, zero, bits) - zero).double() * grid.double()

    scores = rounded(query, 0) @ rounded(key, 1).mT * scale
    products = rounded(scores.softmax(-1).float(), 2) @ rounded(value, 3)
    return products.transpose(1, 2).flatten(2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scales: Tensor, zeros: Tensor, bits: int, scale: float, variant: int
) -> Tensor:
    """Computes softmax(q k^T * scale) v by a variant: (B, N, heads * C).

    Args:
        query: (B, heads, N, C); key and value are (B, heads, M, C).
        scales: of query, key, probability and value: (4, B, heads), contiguous; zeros likewise.
        bits: of all four factors.
        variant: index in VARIANTS.
    """
    images, heads, queries, channels = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = buffer_pool.empty((images, queries, heads * channels))
    job = ATTENTION.pack(
        *(tensor.data_ptr() for tensor in (query, key, value, out, scales, zeros)),
        images, heads, queries, key.shape[2], channels, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        (1 << bits) - 1, torch.get_num_threads(), scale,
    )  # fmt: skip
    if library(VARIANTS[variant]).dmquant_run(job) != 0:
        raise MemoryError("no memory for the attention kernel")
    return out


@torch.library.custom_op("dmquant::attend", mutates_args=())
def attend_op(
    query: Tensor, key: Tensor, value: Tensor, scales: Tensor, zeros: Tensor, bits: int, scale: float, variant: int
) -> Tensor:
    return attend(query, key, value, scales, zeros, bits, scale, variant)


@attend_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scales: Tensor, zeros: Tensor, bits: int, scale: float, variant: int) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1] * query.shape[3])
