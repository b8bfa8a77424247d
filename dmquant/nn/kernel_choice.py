"""Chooses the kernel of a packed layer at its first call, by processor, self-check and, on a CPU, a short timing.

All C kernels give the same bits, so the fastest is taken. oneDNN and the reference round differently, and timing would decide
which image is drawn: they are timed only where no C kernel has 512-bit registers, and are taken only if they are faster by
autotune.MARGIN. On a GPU there is one kernel, Triton's.
"""

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmquant.kernels import autotune, onednn, reference, registry, self_check, triton_support
from dmquant.kernels.conv_shape import ConvGeometry
from dmquant.kernels.registry import BY_NAME, KERNELS, choice
from dmquant.kernels.self_check import CodeFormat
from dmquant.nn.layer_shape import as_images, geometry_of
from dmquant.quantizers.base import FixedGrid
from dmquant.quantizers.per_timestep import TemporalGrid

if TYPE_CHECKING:
    from dmquant.nn.packed_layers import PackedLayer

LARGEST_SUM = 2**16  # products per output: 2^16 * 255 * 128 fits 32 bits
# Two threads may make the first call of a layer at once, and rearranging a weight replaces its buffers. Without the lock one of
# them reads a weight that is half rearranged. Later calls of a layer do not take the lock.
LOCK = threading.Lock()


def prepare(layer: "PackedLayer", x: Tensor) -> None:
    """Rearranges the weight of a layer for the kernel that is fastest on inputs of this shape, or marks it as left alone."""
    if choice() == "torch":
        return
    with LOCK:
        weight: Any = layer.weight
        is_settled = weight.blocked is not None or weight.is_left_alone
        if is_settled or weight.shape[1:].numel() >= LARGEST_SUM or not has_integer_zeros(layer):
            return
        is_uniform, bits = "zero" in weight._buffers, input_bits(layer)
        format = CodeFormat(weight.bits, 1, bits) if is_uniform else CodeFormat(1, weight.bits, bits)
        is_cpu = x.device.type == "cpu"
        kernel = choose(layer, x, format, geometry_of(layer)) if is_cpu else choose_on_gpu(format, x.device)
        if kernel == self_check.REFERENCE:
            weight.is_left_alone = True
        else:
            weight.block(kernel)


def choose(layer: "PackedLayer", x: Tensor, format: CodeFormat, geometry: ConvGeometry) -> str:
    """Returns the name of the fastest implementation on the CPU among those that DMQUANT_KERNELS allows."""
    if choice() == reference.NAME:
        return reference.NAME
    exact, shape = tuple(exact_candidates(format, geometry)), (*as_images(layer, x).shape, layer.weight.shape[0])
    has_wide = any(BY_NAME[name].is_wide for name in exact)
    others = () if has_wide else tuple(rounding_candidates(layer, format, is_alone=not exact))
    return autotune.fastest(exact, others, format, shape, geometry, torch.get_num_threads())


def choose_on_gpu(format: CodeFormat, device: torch.device) -> str:
    """Returns Triton where it is usable and agrees with the reference, else the name of dequantized weights. Nothing is timed."""
    if choice() not in ("auto", triton_support.NAME) or triton_support.find_missing(device):
        return self_check.REFERENCE
    return self_check.REFERENCE if self_check.check(triton_support.NAME, format, device) else triton_support.NAME


def exact_candidates(format: CodeFormat, geometry: ConvGeometry) -> Iterator[str]:
    """Yields the names of C kernels that support this format and geometry on this machine and agree with the reference."""
    wanted = choice()
    superseded: set[str] = set()
    for kernel in KERNELS if wanted in ("auto", "c") else ():
        is_wanted = kernel.name not in superseded and kernel.fits(format.bits, format.act_bits, geometry)
        # plain C saves memory but no time, so it is used on request only
        is_wanted &= wanted == "c" or not kernel.is_portable
        if is_wanted and not registry.find_missing(kernel) and not self_check.check(kernel.name, format):
            superseded.update(kernel.supersedes)
            yield kernel.name


def rounding_candidates(layer: "PackedLayer", format: CodeFormat, *, is_alone: bool) -> Iterator[str]:
    """Yields oneDNN and the reference where they may compute the layer; both round sums.

    oneDNN stores bytes: where codes have fewer bits it is a candidate only if no C kernel is (`is_alone`).
    """
    wanted = choice()
    is_wanted = wanted == "onednn" or (wanted == "auto" and (is_alone or format.bits == 8))
    is_supported = format.planes == 1 and type(layer.input) is FixedGrid and onednn.is_centered(layer.weight)
    if is_wanted and is_supported and not onednn.find_missing() and not self_check.check(onednn.NAME, format):
        yield onednn.NAME
        if wanted == "onednn":
            return
    if wanted != "c" or is_alone:
        yield self_check.REFERENCE


def has_integer_zeros(layer: "PackedLayer") -> bool:
    """Returns whether all sums of levels are integers.

    Zero points of the input must be codes; those of the weight integers, or multiples of 0.5 where levels are odd numbers.
    """
    grid: Any = layer.input
    weight: Any = layer.weight
    zero, act_zero = weight._buffers.get("zero"), grid.zero
    step = 2 if weight.bits <= 2 else 1
    if isinstance(grid, TemporalGrid):
        act_zero = act_zero.round()  # TemporalGrid rounds the rows that it returns
    is_code = (act_zero == act_zero.round()) & (act_zero >= 0) & (act_zero < 1 << grid.bits)
    return bool(is_code.all()) and (zero is None or bool((zero * step == (zero * step).round()).all()))


def input_bits(layer: "PackedLayer") -> int:
    """Returns the bits of the input's codes."""
    grid: Any = layer.input
    return grid.bits
