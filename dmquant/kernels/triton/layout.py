"""Codes <-> the order in which a product reads them, at the same number of bits.

A code of 3 bits is a piece of 1 bit and one of 2: the binary digits of its width say which pieces of 1, 2, 4 and 8 bits it has,
the lowest bits first. Of each piece: [tap][channel block][output][bytes], the first channel of a byte in its lowest bits. Only
channels are filled up.
"""

import torch
from torch import Tensor, nn

from dmquant.kernels.layouts import fill_up


def to_steps(codes: Tensor, bits: int, block: int) -> Tensor:
    """Bytes of uint8 codes (O, C, taps)."""
    outputs, channels, taps = codes.shape
    codes = nn.functional.pad(codes, (0, 0, 0, fill_up(channels, block) - channels))
    cells = codes.view(outputs, -1, block, taps).permute(3, 1, 0, 2)
    return torch.cat([_pack(cells >> low & (1 << width) - 1, width) for low, width in pieces(bits)])


def from_steps(steps: Tensor, shape: tuple[int, int, int], bits: int, block: int) -> Tensor:
    """The codes (O, C, taps) again."""
    outputs, channels, taps = shape
    counts = [width * len(steps) // bits for _, width in pieces(bits)]
    parts = zip(steps.split(counts), pieces(bits))
    cells = sum((_unpack(part, width) << low for part, (low, width) in parts), start=steps.new_zeros(()))
    codes = cells.view(taps, -1, outputs, block).permute(2, 1, 3, 0).reshape(outputs, -1, taps)
    return codes[:, :channels].contiguous()


def pieces(bits: int) -> list[tuple[int, int]]:
    """Lowest bit and width of each piece of a code."""
    return [(bits & (width - 1), width) for width in (1, 2, 4, 8) if bits & width]


def _pack(cells: Tensor, width: int) -> Tensor:
    return (cells.reshape(-1, 8 // width) << _places(cells, width)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, width: int) -> Tensor:
    return (packed.view(-1, 1) >> _places(packed, width) & (1 << width) - 1).view(-1)


def _places(like: Tensor, width: int) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=like.device)
