"""Times kernels on random layers of a given shape and returns the fastest."""

import math
import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from dmquant.kernels import onednn, ops
from dmquant.kernels.conv_shape import ConvGeometry
from dmquant.kernels.layouts import fill_up
from dmquant.kernels.operands import BlockedWeight, Operands
from dmquant.kernels.packing import pack, unpack
from dmquant.kernels.registry import BY_NAME
from dmquant.kernels.rounding import quantize
from dmquant.kernels.self_check import REFERENCE, CodeFormat

PIXELS = 4096  # about, of the input that is timed
REPEATS = 8
GIVE_UP_RATIO = 2  # a candidate slower than the best by this factor is not timed again
RANDOM_BYTES = 1 << 12  # drawn once, then repeated
MARGIN = 1.25  # a candidate that rounds otherwise must be this much faster


@cache
def fastest(
    exact: tuple[str, ...], others: tuple[str, ...], format: CodeFormat, shape: tuple[int, ...], geometry: ConvGeometry,
    threads: int,
) -> str:  # fmt: skip
    """Returns the name of the candidate that takes the least time on inputs of this shape.

    Args:
        exact: candidates that give the same bits; the fastest of them is taken.
        others: candidates that round otherwise; they must be faster by MARGIN.
        shape: (B, H, W, C, O).
        threads: part of the cache key only.
    """
    if len(exact) + len(others) == 1:
        return (*exact, *others)[0]
    images, height, width, channels, outputs = shape
    size = (max(1, min(images, PIXELS // (height * width))), height, width, channels)
    x = (_random_bytes(math.prod(size)) & (1 << format.act_bits) - 1).float().view(size)
    makers = {name: _reference if name == REFERENCE else partial(_kernel, name) for name in (*exact, *others)}
    seconds = _least_seconds({name: make(format, x, outputs, geometry) for name, make in makers.items()})
    best = min(exact or others, key=seconds.__getitem__)
    other = min(others or exact, key=seconds.__getitem__)
    return other if seconds[other] * MARGIN < seconds[best] else best


@torch.no_grad()
def _least_seconds(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Times the calls in turns, so that a disturbance meets all of them; returns the least time of each."""
    # processor time leaves out other programs, but counts the calling thread only
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    for call in calls.values():  # warm-up
        call()
    least = dict.fromkeys(calls, math.inf)
    for number in range(REPEATS):
        limit = GIVE_UP_RATIO * min(least.values()) if number > 1 else math.inf
        for name in [name for name, seconds in least.items() if seconds <= limit]:
            started = clock()
            calls[name]()
            least[name] = min(least[name], clock() - started)
    return least


def _kernel(kernel: str, format: CodeFormat, x: Tensor, outputs: int, geometry: ConvGeometry) -> Callable[[], Tensor]:
    """Returns a call of a kernel on random weights."""
    channels = x.shape[-1]
    if kernel == onednn.NAME:
        weight = _random_bytes(outputs * channels * geometry.taps).view(torch.int8).view(1, outputs, channels, geometry.taps)
    else:
        filled = fill_up(outputs, 32) * fill_up(channels, BY_NAME[kernel].block_for(channels)) * geometry.taps
        weight = _random_bytes(format.planes * filled * format.bits // 8).view(format.planes, -1)
    sums, scale = torch.zeros(format.planes, outputs, dtype=torch.int32), torch.ones(format.planes, outputs)
    blocked = BlockedWeight(kernel, weight, sums, format.bits, is_shifted=False, half_scale=False)
    operands = Operands(blocked, scale, None, torch.ones(()), torch.zeros(()), format.act_bits)
    return lambda: ops.quantized_conv(x, operands, geometry)


def _random_bytes(count: int) -> Tensor:
    """Returns `count` random bytes. They are not zeros, which AMX multiplies in a fifth less time."""
    drawn = torch.randint(256, (RANDOM_BYTES,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return drawn.repeat(-(-count // RANDOM_BYTES))[:count]


def _reference(format: CodeFormat, x: Tensor, outputs: int, geometry: ConvGeometry) -> Callable[[], Tensor]:
    """Returns a call of what a packed layer does without a kernel: unpack, dequantize, fake-quantize the input, convolve."""
    shape, bits = (outputs, x.shape[-1], *geometry.kernel_size), format.bits * format.planes
    planes, one, zero = pack(torch.zeros(shape, dtype=torch.uint8), bits), torch.ones(()), torch.zeros(())
    top, bottom, left, right = geometry.padding
    padded = nn.functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))

    def call() -> Tensor:
        weight = unpack(planes, torch.Size(shape)).to(torch.float32).sub_(zero).mul_(one)
        a = quantize(padded, one, zero, format.act_bits).sub_(zero).mul_(one)
        return nn.functional.conv2d(a, weight, stride=geometry.stride)

    return call
