"""Kernels on made-up layers: do they agree with the reference, and which one is the fastest?"""

import math
import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmquant.kernels import norm, onednn, ops, reference, triton_support
from dmquant.kernels.build import CannotCompile
from dmquant.kernels.norm import GATED, GELU, SILU, TANH_GELU
from dmquant.kernels.registry import BY_NAME
from dmquant.kernels.weight_packing import arrange

TOLERANCE = 1e-5  # of the largest output, where products are rounded otherwise than in exact.py
STRAYS = 0.05  # of the outputs, where normalized images are of two makers: each value has a hundred chances to round otherwise
REFERENCE = "torch"  # weights made float for each product
CPU = torch.device("cpu")
WINDOWS = ((3, 3, 1, 1, 1, 1, 1, 1), (3, 3, 2, 2, 0, 1, 0, 1), (1, 1, 1, 1, 0, 0, 0, 0))
FUSIONS = (*((activate, 0.0) for activate in norm.ACTIVATIONS), (norm.NONE, 1e-5))  # with the epsilon of a layer norm
ODD = (2, 5, 6, 67, 37)  # N, H, W, C, O that fill no block
LARGE = ((1, 128, 128, 128, 128), (1, 128, 128, 64, 64), (1, 64, 128, 64, 64))  # for each of the larger tiles of a GPU


class Format(NamedTuple):
    """What a kernel multiplies: bits of a weight in each plane, planes, bits of an activation."""

    bits: int
    planes: int
    act_bits: int


@cache
def check(kernel: str, format: Format, device: torch.device = CPU) -> str:
    """Empty if the kernel agrees with exact.py on this format, to the bit if it is of C; after a warning, what went wrong."""
    generator, limit = torch.Generator().manual_seed(0), TOLERANCE if kernel in (onednn.NAME, triton_support.NAME) else 0
    sizes = [(window, ODD) for window in WINDOWS if kernel == onednn.NAME or BY_NAME[kernel].is_made_for(window)]
    if device.type == "cuda":
        sizes += [(WINDOWS[-1], shape) for shape in LARGE]
    shifts = (False,) if kernel == onednn.NAME or format.planes > 1 else (False, True)
    cases = ((*size, is_shifted) for size in sizes for is_shifted in shifts)
    try:
        worst = max(_error(kernel, format, *case, generator, device) for case in cases)
        reason = f"it is wrong by {worst:.1e} at {format.bits * format.planes} bits times {format.act_bits}"
        reason = "" if worst <= limit else reason
    except failures(kernel) as error:
        reason = _first_line(error)
    if reason:
        warnings.warn(f"the kernel {kernel} is not used: {reason}", RuntimeWarning, stacklevel=2)
    return reason


@cache
def check_fusion(kernel: str, act_bits: int, device: torch.device = CPU) -> str:
    """Empty if the kernel does around a product what is done step by step; otherwise, after a warning, what went wrong."""
    try:
        worst, is_same = _compare_fused(kernel, act_bits, torch.Generator().manual_seed(0), device)
        reason = "" if is_same else f"the outcome is not what {kernel} makes of a normalized image"
        reason = reason if worst <= TOLERANCE else f"the outcome is wrong by {worst:.1e}"
    except CannotCompile as error:
        return str(error)
    except failures(kernel) as error:
        reason = _first_line(error)
    if reason:
        warnings.warn(f"layers of {act_bits} bits are not fused: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def failures(kernel: str) -> tuple[type[Exception], ...]:
    """What a kernel that is compiled when it is called may raise; those of C are there or not."""
    return triton_support.failures() if kernel == triton_support.NAME else ()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _error(
    kernel: str, format: Format, window: tuple[int, ...], shape: tuple[int, ...], is_shifted: bool,
    generator: torch.Generator, device: torch.device,
) -> float:  # fmt: skip
    """How far it is from exact.py: shape is (N, H, W, C, O), is_shifted whether zeros of weights are not in the middle."""
    (height, width), (*size, channels, outputs) = window[:2], shape
    bits, planes, act_bits = format
    codes = torch.randint(1 << bits * planes, (outputs, channels, height * width), generator=generator).to(device, torch.uint8)
    scale = torch.rand(planes, outputs, generator=generator).to(device) + 0.1
    bias, x = (torch.randn(some, generator=generator).to(device) for some in (outputs, (*size, channels)))
    zero = None if planes > 1 else torch.full((outputs,), 0.5 if bits == 1 else float(1 << (bits - 1)), device=device)
    if is_shifted:
        zero[::2] = 0

    def arguments(name: str) -> tuple[tuple, tuple]:
        made = arrange(codes, bits * planes, zero, name)
        grids = (scale, zero if made.is_shifted else None, bias, *_middle_grid(act_bits, device))
        return (x, made.weight, made.total, *grids), ((made.bits, made.halves, act_bits), window)

    (first, last), (others, rest) = arguments(kernel), arguments(reference.NAME)
    return _distance(ops.multiply(*first, kernel, *last), reference.multiply(*others, *rest))


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value; infinite where there is something that is no number."""
    worst = float((found - wanted).abs().max() / wanted.abs().max())
    return math.inf if math.isnan(worst) else worst


def _compare_fused(
    kernel: str, act_bits: int, generator: torch.Generator, device: torch.device
) -> tuple[float, bool]:  # fmt: skip
    """How far a normalized or activated image is from torch's, and whether a fused product is bit for bit that of this image.

    On a GPU nothing writes such an image. It is torch's there, of which a few values round to another code.
    """
    x, weight, bias = (torch.randn(size, generator=generator).to(device) for size in ((2, 3, 5, 72), 36, 36))
    codes = torch.randint(2, (37, 36, 9), generator=generator).to(device, torch.uint8)
    blocked, scale = arrange(codes, 1, torch.full((37,), 0.5, device=device), kernel), torch.ones(1, 37, device=device)
    per_image, residual = (torch.randn(size, generator=generator).to(device) for size in ((2, 37), (2, 3, 5, 37)))
    common = (blocked.weight, blocked.total, scale, None, per_image, *_middle_grid(act_bits, device), kernel)
    common += ((1, blocked.halves, act_bits), WINDOWS[0])
    limit, strays = (TOLERANCE, STRAYS) if kernel == triton_support.NAME else (0, 0)
    worst, is_same = 0.0, True
    for activate, epsilon in ((SILU, 0.0),) if kernel == triton_support.NAME else FUSIONS:
        image = x if activate == GATED else x[..., :36].contiguous()
        gain, offset = _affine(activate, epsilon, image, weight, bias)
        wanted = _normalize(activate, epsilon, image, weight, bias)
        made = wanted if kernel == triton_support.NAME else norm.normalize(image, gain, offset, activate=activate, epsilon=epsilon)
        found = ops.multiply(image, *common, gain, offset, None, residual, activate, epsilon=epsilon)
        stepwise = ops.multiply(made, *common) + residual
        is_same &= bool((found - stepwise).abs().le(limit * stepwise.abs().max()).double().mean() >= 1 - strays)
        worst = max(worst, _distance(made, wanted))
    return worst, is_same


def _affine(activate: int, epsilon: float, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gain and offset of a norm of six groups before SiLU, of a layer norm where there is an epsilon, else none."""
    if activate == SILU:
        return norm.moments(x, weight, bias, 6, 1e-5)
    return (weight.expand(len(x), -1).contiguous(), bias.expand(len(x), -1).contiguous()) if epsilon else (None, None)


def _normalize(activate: int, epsilon: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By torch: a layer norm, SiLU behind a norm of six groups, another activation by itself."""
    if epsilon:
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    if activate == SILU:
        return nn.functional.silu(nn.functional.group_norm(x.permute(0, 3, 1, 2), 6, weight, bias, 1e-5)).permute(0, 2, 3, 1)
    if activate == GATED:
        values, gates = x.chunk(2, -1)
        return values * nn.functional.gelu(gates)
    if activate in (GELU, TANH_GELU):
        return nn.functional.gelu(x, approximate="tanh" if activate == TANH_GELU else "none")
    return x


def _middle_grid(act_bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and zero of activations from -3 to 3."""
    return torch.tensor(6.0 / (1 << act_bits), device=device), torch.tensor(float(1 << (act_bits - 1)), device=device)
