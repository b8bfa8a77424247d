"""The blocks of a denoiser in order of execution, and those at its two ends."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from dmquant.diffusion.layer_roles import named_layers

ENDS_STRIDE = 2  # the ends of a UNet: feature maps of at least half the input's side
ENDS_SHARE = 0.15  # of the parameters: what these blocks hold in LDM-4, taken over for networks of one resolution


@dataclass(frozen=True)
class Block:
    """Consecutive modules that form one TimestepEmbed or transformer block; the output of the last one is the block's."""

    name: str
    modules: tuple[str, ...]
    stride: int = 1  # side of the denoiser's input divided by the side of the block's feature map


def find_blocks(denoiser: nn.Module) -> list[Block]:
    """Blocks in order of execution.

    UNet: conv_in, each residual + attention pair, each downsampler, the middle, each up pair (the last with its upsampler);
    LDM-4 has 12 + 1 + 12. These are the "TimestepEmbed blocks" of BinaryDM (sec. 3.2). Otherwise: the entries of the
    module lists at the root, which are the transformer blocks.
    """
    if is_unet(denoiser):
        return list(_unet_blocks(denoiser))
    lists = ((name, child) for name, child in denoiser.named_children() if isinstance(child, nn.ModuleList))
    names = (f"{name}.{index}" for name, child in lists for index, entry in enumerate(child) if named_layers(entry))
    return [Block(name, (name,)) for name in names]


def find_ends(denoiser: nn.Module) -> list[Block]:
    """Blocks at the head and the tail, where binary weights lose most. BinaryDM, sec. 3.2.

    UNet: those whose feature map has at least half of the input's side; the first six and the last six of LDM-4.
    Otherwise: from both ends in turn, as long as they hold at most 15 % of the parameters, and one at each end at least.
    """
    blocks = find_blocks(denoiser)
    if is_unet(denoiser):
        return [block for block in blocks if block.stride <= ENDS_STRIDE]
    budget = ENDS_SHARE * sum(parameter.numel() for parameter in denoiser.parameters())
    inwards = [block for pair in zip(blocks, reversed(blocks)) for block in pair][: len(blocks)]
    ends, used = inwards[:2], sum(_count(denoiser, block) for block in inwards[:2])
    for block in inwards[2:]:
        used += _count(denoiser, block)
        if used > budget:
            break
        ends.append(block)
    return [block for block in blocks if block in ends]


def is_unet(denoiser: nn.Module) -> bool:
    """Returns whether the denoiser has down and up blocks."""
    return hasattr(denoiser, "down_blocks") and hasattr(denoiser, "up_blocks")


def _unet_blocks(unet: Any) -> Iterator[Block]:
    yield Block("conv_in", ("conv_in",))
    stride = 1
    for index, level in enumerate(unet.down_blocks):
        pairs, rest = _pair(f"down_blocks.{index}", level)
        yield from (Block(pair[0], pair, stride) for pair in pairs)
        stride *= 2 if rest else 1
        yield from (Block(name, (name,), stride) for name in rest)
    if getattr(unet, "mid_block", None) is not None:
        yield Block("mid_block", ("mid_block",), stride)
    for index, level in enumerate(unet.up_blocks):
        pairs, rest = _pair(f"up_blocks.{index}", level)
        pairs[-1] += tuple(rest)
        yield from (Block(pair[0], pair, stride) for pair in pairs)
        stride //= 2 if rest else 1


def _pair(prefix: str, level: nn.Module) -> tuple[list[tuple[str, ...]], list[str]]:
    """(residual block, its attention) pairs of one resolution level, and the names of the resamplers."""
    counts = {name: len(child) for name, child in level.named_children() if isinstance(child, nn.ModuleList)}
    kinds = [kind for kind in ("resnets", "attentions") if counts.get(kind) == counts["resnets"]]
    pairs = [tuple(f"{prefix}.{kind}.{index}" for kind in kinds) for index in range(counts["resnets"])]
    rest = [f"{prefix}.{name}.{index}" for name in counts if name not in kinds for index in range(counts[name])]
    return pairs, rest


def _count(denoiser: nn.Module, block: Block) -> int:
    return sum(parameter.numel() for name in block.modules for parameter in denoiser.get_submodule(name).parameters())
