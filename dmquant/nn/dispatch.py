"""Which kernel multiplies a packed layer: by capability, a check against the reference and, on a CPU, a short race.

Those of C give the same bits, so that the fastest may win. oneDNN and the reference itself round otherwise, and images would
depend on chance: they join the race only where C has no 512-bit registers, and win by a margin only. On a
GPU there is one kernel, Triton's.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmquant.kernels import autotune, buffer_pool, onednn, ops, reference, registry, self_check, triton_support
from dmquant.kernels.conv_shape import size_behind
from dmquant.kernels.registry import BY_NAME, KERNELS, choice
from dmquant.kernels.weight_packing import Blocked
from dmquant.nn.packed_weight import BlockedCodes
from dmquant.quantizers.base import FixedGrid
from dmquant.quantizers.dilated import Divide
from dmquant.quantizers.per_timestep import TemporalGrid

DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}  # of inputs; no other devices
LARGEST_SUM = 2**16  # products of an output: 2^16 * 255 * 128 fits 32 bits
OTHERS = (onednn.NAME, triton_support.NAME, reference.NAME)  # kernels that are not of C
LOCK = threading.Lock()  # two threads may call a layer for the first time at once


def run(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The output of a packed layer, or None where the reference has to compute it."""
    if not is_supported(layer, x):
        return None
    weight = layer._modules["weight"]
    if weight.blocked is None and not weight.is_left_alone and not torch.compiler.is_compiling():
        prepare(layer, x)
    blocked = weight.blocked
    if blocked is None or (blocked.kernel == onednn.NAME and torch.compiler.is_compiling()):
        return None
    return apply(layer, blocked, x)


def run_sum(layers: Sequence[nn.Module], pieces: Sequence[Tensor]) -> Tensor | None:
    """The sum of the outputs of packed layers, each for a piece that is not divided yet; None where the reference has to compute
    all of them."""
    pairs = list(zip(layers, pieces, strict=True))
    if all(can_fuse(layer, piece) for layer, piece in pairs):
        return reduce(lambda total, pair: run_fused(*pair, Around(residual=total)), pairs, None)
    outputs = [run(layer, layer.divide(piece)) for layer, piece in pairs]
    if all(output is None for output in outputs):
        return None
    return reduce(torch.add, (layer(piece) if output is None else output for output, (layer, piece) in zip(outputs, pairs)))


def is_supported(layer: nn.Module, x: Tensor) -> bool:
    """Whether this is a product of codes by codes, in a float that kernels take, without gradients, of a plain shape."""
    return is_readable(x) and has_codes(layer, x)


def is_readable(x: Tensor) -> bool:
    """Whether kernels take an input of this kind."""
    kind = x.device.type
    if x.dtype not in DTYPES.get(kind, ()) or torch.is_autocast_enabled(kind):
        return False
    return x.numel() > 0 and not (torch.is_grad_enabled() and x.requires_grad)


def has_codes(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer multiplies codes by codes, where x lies, and is of a plain shape."""
    parts = layer._modules  # to ask a module for its parts by name takes its time
    weight = parts.get("weight")
    if not isinstance(weight, BlockedCodes) or type(parts["input"]) not in (FixedGrid, TemporalGrid):
        return False
    if weight._buffers["scale"].device != x.device:
        return False
    if isinstance(layer, nn.Linear):
        return True
    is_plain = layer.groups == 1 and layer.padding_mode == "zeros" and set(layer.dilation) == {1}
    return is_plain and x.dim() == len(weight.shape)


def prepare(layer: nn.Module, x: Tensor) -> None:
    """Puts the weight of a layer in the order of the kernel that is fastest on inputs of this shape, or leaves it alone."""
    if choice() == "torch":
        return
    with LOCK:
        weight, window = layer.weight, window_of(layer)
        is_settled = weight.blocked is not None or weight.is_left_alone
        if is_settled or weight.shape[1:].numel() >= LARGEST_SUM or not has_whole_zeros(layer):
            return
        is_uniform = "zero" in weight._buffers
        format = self_check.Format(weight.bits if is_uniform else 1, 1 if is_uniform else weight.bits, layer.input.bits)
        winner = choose(layer, x, format, window) if x.device.type == "cpu" else choose_on_gpu(format, x.device)
        if winner == self_check.REFERENCE:
            weight.is_left_alone = True
        else:
            weight.block(winner)


def choose(layer: nn.Module, x: Tensor, format: self_check.Format, window: tuple[int, ...]) -> str:
    """Who is fastest on the CPU, if nobody else was asked for."""
    if choice() == reference.NAME:
        return reference.NAME
    ours, shape = tuple(candidates(format, window)), (*as_images(layer, x).shape, layer.weight.shape[0])
    others = () if any(BY_NAME[name].is_wide for name in ours) else tuple(rivals(layer, format, is_alone=not ours))
    return autotune.fastest(ours, others, format, shape, window, torch.get_num_threads())


def choose_on_gpu(format: self_check.Format, device: torch.device) -> str:
    """Triton where it can be used and agrees with the reference; no race, for it has no rival that keeps weights packed."""
    is_wanted = choice() in ("auto", triton_support.NAME)
    return triton_support.NAME if is_wanted and not triton_support.state(device) and not self_check.check(triton_support.NAME, format, device) else self_check.REFERENCE


def candidates(format: self_check.Format, window: tuple[int, ...]) -> Iterator[str]:
    """Names of the C kernels that can multiply this format and window here and agree with the reference."""
    wanted, outdone = choice(), set()
    for kernel in KERNELS if wanted in ("auto", "c") else ():
        is_wanted = kernel.name not in outdone and kernel.fits(format.bits, format.act_bits, window)
        # plain C saves memory, not time: not unless it is asked for
        is_wanted &= wanted == "c" or not kernel.is_portable
        if is_wanted and not registry.state(kernel) and not self_check.check(kernel.name, format):
            outdone.update(kernel.outdoes)
            yield kernel.name


def rivals(layer: nn.Module, format: self_check.Format, *, is_alone: bool) -> Iterator[str]:
    """What else may multiply a layer: oneDNN by bytes, unless fewer are stored and somebody reads those; the reference."""
    wanted = choice()
    is_wanted = wanted == "onednn" or (wanted == "auto" and (is_alone or format.bits == 8))
    is_known = format.planes == 1 and type(layer.input) is FixedGrid and onednn.is_centered(layer.weight)
    if is_wanted and is_known and not onednn.state() and not self_check.check(onednn.NAME, format):
        yield onednn.NAME
        if wanted == "onednn":
            return
    if wanted != "c" or is_alone:
        yield self_check.REFERENCE


def has_whole_zeros(layer: nn.Module) -> bool:
    """Whether every zero is a code: sums of levels are whole then. One half is whole where levels are odd."""
    act_zero, zero = layer.input.zero, layer.weight._buffers.get("zero")
    step = 2 if layer.weight.bits <= 2 else 1
    if isinstance(layer.input, TemporalGrid):
        act_zero = act_zero.round()  # as its rows are
    is_code = (act_zero == act_zero.round()) & (act_zero >= 0) & (act_zero < 1 << layer.input.bits)
    return bool(is_code.all()) and (zero is None or bool((zero * step == (zero * step).round()).all()))


class Around(NamedTuple):
    """What a kernel does on its way to a product and from it, beside what the layer itself says: see ops.multiply."""

    gain: Tensor | None = None  # (N, C); for tokens also (1, C)
    offset: Tensor | None = None
    activate: int = 0  # an activation of normal.py
    factor: Tensor | None = None  # (C,)
    bias: Tensor | None = None  # (N, O), instead of the layer's
    residual: Tensor | None = None  # of the shape of the output
    zoom: int = 1
    window: tuple[int, ...] | None = None  # instead of the layer's
    epsilon: float = 0.0  # of a layer norm before the gain; 0: none


NOTHING = Around()


def can_fuse(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is multiplied by a kernel that takes an Around, and nobody watches what it reads or gives."""
    return is_readable(x) and is_fusible(layer, x)


def is_fusible(layer: nn.Module, x: Tensor) -> bool:
    """The same for an input of which it is known that kernels take it."""
    if layer._forward_hooks or layer._forward_pre_hooks or not has_codes(layer, x):
        return False
    parts = layer._modules
    blocked = parts["weight"].blocked
    if blocked is None or blocked.kernel == onednn.NAME or type(parts["divide"]) not in (nn.Identity, Divide):
        return False
    return torch.compiler.is_compiling() or not self_check.check_fusion(blocked.kernel, parts["input"].bits, x.device)


def run_fused(layer: nn.Module, x: Tensor, around: Around = NOTHING, out: Tensor | None = None) -> Tensor:
    """The output of a layer that can be fused; of a linear layer in a tensor that is already there, if it is given."""
    parts = layer._modules
    if isinstance(parts["divide"], Divide):
        around = around._replace(factor=parts["divide"].reciprocal)
    return apply(layer, parts["weight"].blocked, x, around, out)


def apply(layer: nn.Module, blocked: Blocked, x: Tensor, around: Around = NOTHING, out: Tensor | None = None) -> Tensor:
    """The output of a layer by the kernel that its weight is arranged for."""
    if blocked.kernel in OTHERS or isinstance(layer, nn.Conv1d) or torch.compiler.is_compiling():
        made = apply_operator(layer, blocked, x, around)
        return made if out is None else out.copy_(made)
    weight, grid = layer._modules["weight"], layer._modules["input"]
    act_scale, act_zero = grid_of(grid, x)
    bias = layer._parameters["bias"] if around.bias is None else around.bias
    outputs, residual = blocked.total.shape[1], around.residual
    if isinstance(layer, nn.Linear):
        x, residual, window = x.contiguous(), residual if residual is None else residual.contiguous(), ops.POINT
        channels = x.shape[-1]
        images, around = share(around, act_scale.numel())
        size, out_size = (images, 1, x.numel() // (images * channels), channels), (1, x.numel() // (images * channels))
        stride = channels
        out = buffer_pool.empty((*x.shape[:-1], outputs)) if out is None else out
    else:
        x, stride = last_pixels(x)
        residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
        (images, channels, height, width), window = x.shape, around.window or window_of(layer)
        size, out_size = (images, height, width, channels), size_behind(height, width, window, around.zoom)
        out = buffer_pool.empty((images, outputs, *out_size), torch.channels_last)
    ops.write(
        out, out_size, x, size, stride, blocked.weight, blocked.total, weight._buffers["scale"],
        weight._buffers["zero"] if blocked.is_shifted else None, bias, act_scale, act_zero, blocked.kernel,
        (blocked.bits, blocked.halves, grid.bits), window, around.gain, around.offset, around.factor, residual,
        around.activate, around.zoom, around.epsilon,
    )  # fmt: skip
    return out


def last_pixels(x: Tensor) -> tuple[Tensor, int]:
    """Returns an image (N, C, H, W) as kernels of C read it, and the floats from one pixel to the next: more than C in a slice of
    the channels of an image that is channels last, which is not copied."""
    (_, channels, height, width), (image, channel, row, pixel) = x.shape, x.stride()
    if channel == 1 and pixel > channels and row == width * pixel and image == height * row:
        return x, pixel
    return x.contiguous(memory_format=torch.channels_last), channels


def apply_operator(layer: nn.Module, blocked: Blocked, x: Tensor, around: Around) -> Tensor:
    """The same by the operator that graphs and every kernel know, on views of the tensors as (N, H, W, C)."""
    weight, grid = layer.weight, layer.input
    act_scale, act_zero = grid_of(grid, x)
    multiply = ops.multiply_op if torch.compiler.is_compiling() else ops.multiply
    zero = weight.zero if blocked.is_shifted else None
    format = (blocked.bits, blocked.halves, grid.bits)
    count, around = share(around, act_scale.numel()) if isinstance(layer, nn.Linear) else (1, around)
    images = as_images(layer, x, count)
    residual = None if around.residual is None else as_images(layer, around.residual)
    bias = layer.bias if around.bias is None else around.bias
    out = multiply(
        images, blocked.weight, blocked.total, weight.scale, zero, bias, act_scale, act_zero, blocked.kernel, format,
        around.window or window_of(layer), around.gain, around.offset, around.factor, residual, around.activate, around.zoom,
        around.epsilon,
    )  # fmt: skip
    if isinstance(layer, nn.Linear):
        return out.view(*x.shape[:-1], -1)
    out = out.permute(0, 3, 1, 2)
    return out.squeeze(2) if isinstance(layer, nn.Conv1d) else out


def share(around: Around, grids: int) -> tuple[int, Around]:
    """How many images a linear layer's tokens are: one, unless there are more grids or gains or offsets; and those for each."""
    if around.gain is None:
        return grids if around.bias is None else around.bias.shape[0], around
    images = max(grids, around.gain.shape[0])
    if around.gain.shape[0] < images:
        gain, offset = (x.expand(images, -1).contiguous() for x in (around.gain, around.offset))
        around = around._replace(gain=gain, offset=offset)
    return images, around


def grid_of(grid: FixedGrid | TemporalGrid, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of an input, one each or one for each sample."""
    if not isinstance(grid, TemporalGrid):
        return grid._buffers["scale"], grid._buffers["zero"]
    return grid.row() or grid.rows(len(x))  # one image of many pixels is less work than many of few


def as_images(layer: nn.Module, x: Tensor, grids: int = 1) -> Tensor:
    """The input as (N, H, W, C). What a linear layer reads is one image, or one for each grid."""
    if isinstance(layer, nn.Linear):
        return x.reshape(grids, 1, -1, x.shape[-1])
    return (x.unsqueeze(2) if isinstance(layer, nn.Conv1d) else x).permute(0, 2, 3, 1)


def window_of(layer: nn.Module) -> tuple[int, ...]:
    """Kernel, stride and padding of a layer as ops.multiply takes them."""
    if isinstance(layer, nn.Linear):
        return (1, 1, 1, 1, 0, 0, 0, 0)
    kernel, stride, padding = layer.kernel_size, layer.stride, layer._reversed_padding_repeated_twice
    if isinstance(layer, nn.Conv1d):
        return (1, *kernel, 1, *stride, 0, 0, *padding)
    return (*kernel, *stride, *padding[2:], *padding[:2])
