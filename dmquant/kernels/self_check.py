"""Compares kernels with the reference on random layers, on the user's machine, before they are used."""

import math
import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmquant.kernels import norm, onednn, ops, reference, triton_support
from dmquant.kernels.build import CannotCompile
from dmquant.kernels.conv_shape import POINTWISE, ConvGeometry
from dmquant.kernels.norm import GATED, GELU, SILU, TANH_GELU
from dmquant.kernels.operands import FusedOps, Operands
from dmquant.kernels.registry import BY_NAME
from dmquant.kernels.weight_packing import arrange

TOLERANCE = 1e-5  # relative to the largest output, for kernels that round differently from the reference
STRAYS = 0.05  # share of outputs that may differ from those of an image normalized by torch: some values get other codes
REFERENCE = "torch"  # name of the implementation with dequantized weights and torch's convolution
CPU = torch.device("cpu")
GEOMETRIES = (ConvGeometry((3, 3), (1, 1), (1, 1, 1, 1)), ConvGeometry((3, 3), (2, 2), (0, 1, 0, 1)), POINTWISE)
PROLOGUES = (*((activation, 0.0) for activation in norm.ACTIVATIONS), (norm.NONE, 1e-5))  # activation, epsilon of a layer norm
ODD = (2, 5, 6, 67, 37)  # (B, H, W, C, O), no multiple of any block
LARGE = ((1, 128, 128, 128, 128), (1, 128, 128, 64, 64), (1, 64, 128, 64, 64))  # one for each of Triton's larger tiles


class CodeFormat(NamedTuple):
    """Bits of a weight in each plane, number of planes, bits of an activation."""

    bits: int
    planes: int
    act_bits: int


@cache
def check(kernel: str, format: CodeFormat, device: torch.device = CPU) -> str:
    """Compares a kernel with the reference on this format: bit for bit for C, else within TOLERANCE.

    Returns "" where they agree. Otherwise warns and returns what went wrong.
    """
    generator, limit = torch.Generator().manual_seed(0), TOLERANCE if kernel in (onednn.NAME, triton_support.NAME) else 0
    sizes = [(each, ODD) for each in GEOMETRIES if kernel == onednn.NAME or BY_NAME[kernel].supports(each)]
    if device.type == "cuda":
        sizes += [(POINTWISE, shape) for shape in LARGE]
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
    """Compares fused prologues and epilogues of a kernel with the same operations one by one.

    Returns "" where they agree. Otherwise warns and returns what went wrong.
    """
    try:
        worst, is_same = _compare_fused(kernel, act_bits, torch.Generator().manual_seed(0), device)
        reason = "" if is_same else f"the output of {kernel} differs from its output on a normalized image"
        reason = reason if worst <= TOLERANCE else f"the output is wrong by {worst:.1e}"
    except CannotCompile as error:
        return str(error)
    except failures(kernel) as error:
        reason = _first_line(error)
    if reason:
        warnings.warn(f"layers of {act_bits} bits are not fused: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def failures(kernel: str) -> tuple[type[Exception], ...]:
    """Returns the exceptions that a call of this kernel may raise because of the machine: Triton compiles when it is called."""
    return triton_support.failures() if kernel == triton_support.NAME else ()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _error(
    kernel: str, format: CodeFormat, geometry: ConvGeometry, shape: tuple[int, ...], is_shifted: bool,
    generator: torch.Generator, device: torch.device,
) -> float:  # fmt: skip
    """Returns the relative error against the reference. shape: (B, H, W, C, O); is_shifted: zero points are not in the middle."""
    *size, channels, outputs = shape
    bits, planes, act_bits = format
    codes = torch.randint(1 << bits * planes, (outputs, channels, geometry.taps), generator=generator).to(device, torch.uint8)
    scale = torch.rand(planes, outputs, generator=generator).to(device) + 0.1
    bias, x = (torch.randn(some, generator=generator).to(device) for some in (outputs, (*size, channels)))
    zero = None if planes > 1 else torch.full((outputs,), 0.5 if bits == 1 else float(1 << (bits - 1)), device=device)
    if zero is not None and is_shifted:
        zero[::2] = 0

    def operands(name: str) -> Operands:
        weight = arrange(codes, bits * planes, zero, name)
        return Operands(weight, scale, zero if weight.is_shifted else None, *_middle_grid(act_bits, device), act_bits, bias)

    found = ops.quantized_conv(x, operands(kernel), geometry)
    return _distance(found, reference.conv(x, operands(reference.NAME), geometry))


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference over the largest value; infinity where a value is NaN."""
    worst = float((found - wanted).abs().max() / wanted.abs().max())
    return math.inf if math.isnan(worst) else worst


def _compare_fused(
    kernel: str, act_bits: int, generator: torch.Generator, device: torch.device
) -> tuple[float, bool]:  # fmt: skip
    """Returns the error of prologues against torch, and whether a fused product equals that of the image a prologue gives.

    C is compared bit for bit. On a GPU torch writes that image, of which a few values round to other codes.
    """
    is_triton = kernel == triton_support.NAME
    x, weight, bias = (torch.randn(size, generator=generator).to(device) for size in ((2, 3, 5, 72), 36, 36))
    codes = torch.randint(2, (37, 36, 9), generator=generator).to(device, torch.uint8)
    blocked, scale = arrange(codes, 1, torch.full((37,), 0.5, device=device), kernel), torch.ones(1, 37, device=device)
    per_image, residual = (torch.randn(size, generator=generator).to(device) for size in ((2, 37), (2, 3, 5, 37)))
    operands = Operands(blocked, scale, None, *_middle_grid(act_bits, device), act_bits, per_image)
    limit, strays = (TOLERANCE, STRAYS) if is_triton else (0, 0)
    worst, is_same = 0.0, True
    for activation, epsilon in ((SILU, 0.0),) if is_triton else PROLOGUES:
        image = x if activation == GATED else x[..., :36].contiguous()
        gain, offset = _affine(activation, epsilon, image, weight, bias)
        wanted = _normalize(activation, epsilon, image, weight, bias)
        made = wanted if is_triton else norm.normalize(image, gain, offset, activation=activation, epsilon=epsilon)
        fused = FusedOps(gain, offset, activation, residual=residual, epsilon=epsilon)
        found = ops.quantized_conv(image, operands, GEOMETRIES[0], fused)
        stepwise = ops.quantized_conv(made, operands, GEOMETRIES[0]) + residual
        is_same &= bool((found - stepwise).abs().le(limit * stepwise.abs().max()).double().mean() >= 1 - strays)
        worst = max(worst, _distance(made, wanted))
    return worst, is_same


def _affine(
    activation: int, epsilon: float, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Returns gain and offset of a group norm of six groups for SiLU, of a layer norm for an epsilon, else None twice."""
    if activation == SILU:
        return norm.moments(x, weight, bias, 6, 1e-5)
    return (weight.expand(len(x), -1).contiguous(), bias.expand(len(x), -1).contiguous()) if epsilon else (None, None)


def _normalize(activation: int, epsilon: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes by torch a layer norm for an epsilon, a group norm of six groups before SiLU, else the activation alone."""
    if epsilon:
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    if activation == SILU:
        return nn.functional.silu(nn.functional.group_norm(x.permute(0, 3, 1, 2), 6, weight, bias, 1e-5)).permute(0, 2, 3, 1)
    if activation == GATED:
        values, gates = x.chunk(2, -1)
        return values * nn.functional.gelu(gates)
    if activation in (GELU, TANH_GELU):
        return nn.functional.gelu(x, approximate="tanh" if activation == TANH_GELU else "none")
    return x


def _middle_grid(act_bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point of a grid from -3 to 3."""
    return torch.tensor(6.0 / (1 << act_bits), device=device), torch.tensor(float(1 << (act_bits - 1)), device=device)
