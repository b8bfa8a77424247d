"""Which kernel multiplies a packed layer: by capability, a check against the reference and, on a CPU, a short race.

Those of C give the same bits, so that the fastest may win. oneDNN and the reference itself round otherwise, and images would
depend on chance: they join the race only where C has no 512-bit registers, and win by a margin only. On a
GPU there is one kernel, Triton's.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, nn

from dmquant.kernels import autotune, buffer_pool, onednn, ops, reference, registry, self_check, triton_support
from dmquant.kernels.conv_shape import POINTWISE, ConvGeometry
from dmquant.kernels.operands import NO_OPS, BlockedWeight, FusedOps, Operands
from dmquant.kernels.registry import BY_NAME, KERNELS, choice
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
    return launch(layer, blocked, x)


def run_sum(layers: Sequence[nn.Module], pieces: Sequence[Tensor]) -> Tensor | None:
    """The sum of the outputs of packed layers, each for a piece that is not divided yet; None where the reference has to compute
    all of them."""
    pairs = list(zip(layers, pieces, strict=True))
    if all(can_fuse(layer, piece) for layer, piece in pairs):
        return reduce(lambda total, pair: run_fused(*pair, FusedOps(residual=total)), pairs, None)
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
        weight, geometry = layer.weight, geometry_of(layer)
        is_settled = weight.blocked is not None or weight.is_left_alone
        if is_settled or weight.shape[1:].numel() >= LARGEST_SUM or not has_whole_zeros(layer):
            return
        is_uniform = "zero" in weight._buffers
        format = self_check.CodeFormat(weight.bits if is_uniform else 1, 1 if is_uniform else weight.bits, layer.input.bits)
        winner = choose(layer, x, format, geometry) if x.device.type == "cpu" else choose_on_gpu(format, x.device)
        if winner == self_check.REFERENCE:
            weight.is_left_alone = True
        else:
            weight.block(winner)


def choose(layer: nn.Module, x: Tensor, format: self_check.CodeFormat, geometry: ConvGeometry) -> str:
    """Who is fastest on the CPU, if nobody else was asked for."""
    if choice() == reference.NAME:
        return reference.NAME
    ours, shape = tuple(candidates(format, geometry)), (*as_images(layer, x).shape, layer.weight.shape[0])
    others = () if any(BY_NAME[name].is_wide for name in ours) else tuple(rivals(layer, format, is_alone=not ours))
    return autotune.fastest(ours, others, format, shape, geometry, torch.get_num_threads())


def choose_on_gpu(format: self_check.CodeFormat, device: torch.device) -> str:
    """Triton where it can be used and agrees with the reference; no race, for it has no rival that keeps weights packed."""
    is_wanted = choice() in ("auto", triton_support.NAME)
    is_usable = is_wanted and not triton_support.state(device) and not self_check.check(triton_support.NAME, format, device)
    return triton_support.NAME if is_usable else self_check.REFERENCE


def candidates(format: self_check.CodeFormat, geometry: ConvGeometry) -> Iterator[str]:
    """Names of the C kernels that support this format and geometry here and agree with the reference."""
    wanted, outdone = choice(), set()
    for kernel in KERNELS if wanted in ("auto", "c") else ():
        is_wanted = kernel.name not in outdone and kernel.fits(format.bits, format.act_bits, geometry)
        # plain C saves memory, not time: not unless it is asked for
        is_wanted &= wanted == "c" or not kernel.is_portable
        if is_wanted and not registry.state(kernel) and not self_check.check(kernel.name, format):
            outdone.update(kernel.outdoes)
            yield kernel.name


def rivals(layer: nn.Module, format: self_check.CodeFormat, *, is_alone: bool) -> Iterator[str]:
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


def can_fuse(layer: nn.Module, x: Tensor) -> bool:
    """Returns whether a kernel computes this layer on x with fused operations, and no hook watches the layer."""
    return is_readable(x) and is_fusible(layer, x)


def is_fusible(layer: nn.Module, x: Tensor) -> bool:
    """Returns the same for an x that `is_readable`."""
    if layer._forward_hooks or layer._forward_pre_hooks or not has_codes(layer, x):
        return False
    parts = layer._modules
    blocked = parts["weight"].blocked
    if blocked is None or blocked.kernel == onednn.NAME or type(parts["divide"]) not in (nn.Identity, Divide):
        return False
    return torch.compiler.is_compiling() or not self_check.check_fusion(blocked.kernel, parts["input"].bits, x.device)


def run_fused(
    layer: nn.Module, x: Tensor, fused: FusedOps = NO_OPS, *, bias: Tensor | None = None, geometry: ConvGeometry | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Computes a layer that `can_fuse`, with its division by channel and these operations around it.

    Args:
        bias: (B, O), instead of the layer's.
        geometry: instead of the layer's.
        out: of a linear layer, the tensor that takes the output.
    """
    divide = layer._modules["divide"]
    if isinstance(divide, Divide):
        fused = replace(fused, factor=divide.reciprocal)
    return launch(layer, layer._modules["weight"].blocked, x, fused, bias=bias, geometry=geometry, out=out)


def launch(
    layer: nn.Module, blocked: BlockedWeight, x: Tensor, fused: FusedOps = NO_OPS, *, bias: Tensor | None = None,
    geometry: ConvGeometry | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Computes a layer by the kernel that its weight is blocked for. Arguments as for `run_fused`."""
    operands, geometry = operands_of(layer, blocked, x, bias), geometry or geometry_of(layer)
    if isinstance(layer, nn.Linear):
        images, fused = share_images(operands, fused)
    if blocked.kernel in OTHERS or isinstance(layer, nn.Conv1d) or torch.compiler.is_compiling():
        made = _by_shape(layer, x, images if isinstance(layer, nn.Linear) else 1, operands, geometry, fused)
        return made if out is None else out.copy_(made)
    residual, outputs, pixel_stride = fused.residual, blocked.weight_sums.shape[1], None
    if isinstance(layer, nn.Linear):
        x, channels, order = x.contiguous(), x.shape[-1], torch.contiguous_format
        size = (images, 1, x.numel() // (images * channels), channels)
        out_size = size[1:3]
        out = buffer_pool.empty((*x.shape[:-1], outputs)) if out is None else out
    else:
        order = torch.channels_last
        x, pixel_stride = as_channels_last(x)
        size = (x.shape[0], *x.shape[2:], x.shape[1])
        out_size = geometry.output_size(*x.shape[2:], fused.upsample)
        out = buffer_pool.empty((len(x), outputs, *out_size), order)
    if residual is not None and not residual.is_contiguous(memory_format=order):
        fused = replace(fused, residual=residual.contiguous(memory_format=order))
    ops.write_conv(out, out_size, x, size, operands, geometry, fused, pixel_stride=pixel_stride)
    return out


def as_channels_last(x: Tensor) -> tuple[Tensor, int]:
    """Returns an image (B, C, H, W) as C kernels read it, and the number of floats from one pixel to the next.

    That is C, or more in a slice of the channels of an image that is channels last: the slice is not copied.
    """
    (_, channels, height, width), (image, channel, row, pixel) = x.shape, x.stride()
    if channel == 1 and pixel > channels and row == width * pixel and image == height * row:
        return x, pixel
    return x.contiguous(memory_format=torch.channels_last), channels


def _by_shape(
    layer: nn.Module, x: Tensor, images: int, operands: Operands, geometry: ConvGeometry, fused: FusedOps
) -> Tensor:  # fmt: skip
    """Computes the same on views (B, H, W, C) of the tensors, as graphs and all kernels take them."""
    if fused.residual is not None:
        fused = replace(fused, residual=as_images(layer, fused.residual))
    conv = ops.graph_conv if torch.compiler.is_compiling() else ops.quantized_conv
    out = conv(as_images(layer, x, images), operands, geometry, fused)
    if isinstance(layer, nn.Linear):
        return out.view(*x.shape[:-1], -1)
    out = out.permute(0, 3, 1, 2)
    return out.squeeze(2) if isinstance(layer, nn.Conv1d) else out


def operands_of(layer: nn.Module, blocked: BlockedWeight, x: Tensor, bias: Tensor | None = None) -> Operands:
    """Returns what a kernel reads of a layer; the bias given instead of the layer's."""
    weight, grid = layer._modules["weight"], layer._modules["input"]  # attribute access on a module is slow
    zero = weight._buffers["zero"] if blocked.is_shifted else None
    bias = layer._parameters["bias"] if bias is None else bias
    return Operands(blocked, weight._buffers["scale"], zero, *grid_of(grid, x), grid.bits, bias)


def share_images(operands: Operands, fused: FusedOps) -> tuple[int, FusedOps]:
    """Returns as how many images the tokens of a linear layer are computed, and the operations with a gain for each.

    It is one image, unless there are more grids, biases or gains: few images of many pixels take less time.
    """
    grids = operands.act_scale.numel()
    if fused.gain is None or fused.offset is None:
        bias = operands.bias
        return grids if bias is None or bias.dim() == 1 else bias.shape[0], fused
    images = max(grids, fused.gain.shape[0])
    if fused.gain.shape[0] < images:
        gain, offset = (x.expand(images, -1).contiguous() for x in (fused.gain, fused.offset))
        fused = replace(fused, gain=gain, offset=offset)
    return images, fused


def grid_of(grid: FixedGrid | TemporalGrid, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point of an input: one value, or one per sample (B,) where samples differ in their step."""
    if not isinstance(grid, TemporalGrid):
        return grid._buffers["scale"], grid._buffers["zero"]
    return grid.row() or grid.rows(len(x))


def as_images(layer: nn.Module, x: Tensor, images: int = 1) -> Tensor:
    """Returns the input or output of a layer as (B, H, W, C); the tokens of a linear layer as this many images of one row."""
    if isinstance(layer, nn.Linear):
        return x.reshape(images, 1, -1, x.shape[-1])
    return (x.unsqueeze(2) if isinstance(layer, nn.Conv1d) else x).permute(0, 2, 3, 1)


def geometry_of(layer: nn.Module) -> ConvGeometry:
    """Returns the geometry of a layer; a Conv1d is a convolution over images of one row."""
    if isinstance(layer, nn.Linear):
        return POINTWISE
    kernel, stride, padding = layer.kernel_size, layer.stride, layer._reversed_padding_repeated_twice
    if isinstance(layer, nn.Conv1d):
        return ConvGeometry((1, *kernel), (1, *stride), (0, 0, *padding))
    return ConvGeometry(kernel, stride, (*padding[2:], *padding[:2]))
