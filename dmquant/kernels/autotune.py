"""."""

import math
import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from dmquant.kernels import onednn, ops
from dmquant.kernels.layouts import fill_up
from dmquant.kernels.packing import pack, unpack
from dmquant.kernels.registry import BY_NAME
from dmquant.kernels.rounding import quantize
from dmquant.kernels.self_check import REFERENCE, Format

PIXELS = 4096  # of the input of a race, about
REPEATS = 8
HOPELESS = 2  # times as slow as another: no repeat will change that
NOISE = 1 << 12  # bytes that are drawn; then they repeat
MARGIN = 1.25  # how much faster somebody must be who rounds otherwise


@cache
def fastest(
    kernels: tuple[str, ...], rivals: tuple[str, ...], format: Format, shape: tuple[int, ...], window: tuple[int, ...],
    threads: int,
) -> str:  # fmt: skip
    """Who takes the least time on inputs like this one: shape is (N, H, W, C, O). Kernels give the same floats, rivals others."""
    if len(kernels) + len(rivals) == 1:
        return (*kernels, *rivals)[0]
    images, height, width, channels, outputs = shape
    size = (max(1, min(images, PIXELS // (height * width))), height, width, channels)
    x = (_noise(math.prod(size)) & (1 << format.act_bits) - 1).float().view(size)
    makers = {name: _reference if name == REFERENCE else partial(_product, name) for name in (*kernels, *rivals)}
    taken = _race({name: make(format, x, outputs, window) for name, make in makers.items()})
    best = min(kernels or rivals, key=taken.__getitem__)
    other = min(rivals or kernels, key=taken.__getitem__)
    return other if taken[other] * MARGIN < taken[best] else best


@torch.no_grad()
def _race(runs: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """The least time of each in some rounds: what disturbs one of them for a while disturbs all."""
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time  # the latter knows nothing of other programs
    for run in runs.values():  # warms up
        run()
    least = dict.fromkeys(runs, math.inf)
    for number in range(REPEATS):
        limit = HOPELESS * min(least.values()) if number > 1 else math.inf
        for name in [name for name, seconds in least.items() if seconds <= limit]:
            started = clock()
            runs[name]()
            least[name] = min(least[name], clock() - started)
    return least


def _product(kernel: str, format: Format, x: Tensor, outputs: int, window: tuple[int, ...]) -> Callable[[], Tensor]:
    channels, taps = x.shape[-1], window[0] * window[1]
    if kernel == onednn.NAME:
        weight = _noise(outputs * channels * taps).view(torch.int8).view(1, outputs, channels, taps)
    else:
        filled = fill_up(outputs, 32) * fill_up(channels, BY_NAME[kernel].block_for(channels)) * taps
        weight = _noise(format.planes * filled * format.bits // 8).view(format.planes, -1)
    total, scale = torch.zeros(format.planes, outputs, dtype=torch.int32), torch.ones(format.planes, outputs)
    grid, form = (torch.ones(()), torch.zeros(())), (format.bits, 0, format.act_bits)
    return lambda: ops.multiply(x, weight, total, scale, None, None, *grid, kernel, form, window)


def _noise(count: int) -> Tensor:
    """Bytes that look drawn, quickly: AMX multiplies zeros in a fifth less time than others."""
    drawn = torch.randint(256, (NOISE,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return drawn.repeat(-(-count // NOISE))[:count]


def _reference(format: Format, x: Tensor, outputs: int, window: tuple[int, ...]) -> Callable[[], Tensor]:
    """What a packed layer does without a kernel: unpack, make float, quantize the input, multiply."""
    shape, bits = (outputs, x.shape[-1], *window[:2]), format.bits * format.planes
    planes, one, zero = pack(torch.zeros(shape, dtype=torch.uint8), bits), torch.ones(()), torch.zeros(())
    top, bottom, left, right = window[4:]
    padded = nn.functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))

    def run() -> Tensor:
        weight = unpack(planes, torch.Size(shape)).to(torch.float32).sub_(zero).mul_(one)
        a = quantize(padded, one, zero, format.act_bits).sub_(zero).mul_(one)
        return nn.functional.conv2d(a, weight, stride=window[2:4])

    return run
