"""Codes <-> the blocked layouts that the kernels read, at the same number of bits (and with blocks filled up).

planes: [output block of 32][channel block][tap][4 channels][2 x 16 outputs][bit][64 bits], bit o * 4 + j of the last being
channel j of output o. Weights of eight bits are signed bytes instead. nibbles: [bit][output block][channel block][tap]
[16 channels][64 bytes], byte o * 4 + g having outputs o (low) and o + 16 (high) of the four channels of group g; or, by group,
byte h * 32 + o having groups 2 h (low) and 2 h + 1 (high) of output o.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

OUTPUTS = 32  # of a block
# dimensions of to_nibbles' cells in the order of memory; the last two make a byte
NIBBLES = (0, 3, 8, 4, 2, 5, 6, 1, 7)
NIBBLES_BY_GROUP = (0, 3, 8, 4, 5, 1, 2, 6, 7)


def to_planes(codes: Tensor, bits: int, block: int) -> Tensor:
    """Blocked bytes of uint8 codes (O, C, taps)."""
    cells = _blocks(codes, block)  # (O / 32, 2, 16, C / block, block / 4, 4, T)
    cells = cells.permute(0, 3, 6, 4, 1, 2, 5).contiguous()
    if bits == 8:
        return (cells ^ 128).view(-1)
    return torch.stack([_pack(cells >> bit & 1) for bit in range(bits)], -2).view(-1)


def from_planes(blocked: Tensor, shape: tuple[int, int, int], bits: int, block: int) -> Tensor:
    """The codes (O, C, taps) again."""
    num_outputs, channels, taps = _sizes(shape, block)
    if bits == 8:
        cells = blocked ^ 128
    else:
        planes = blocked.view(-1, bits, 8)
        cells = sum((_unpack(planes[:, bit]) << bit for bit in range(bits)), start=blocked.new_zeros(()))
    cells = cells.view(num_outputs // OUTPUTS, channels // block, taps, block // 4, 2, 16, 4)
    return _unblock(cells.permute(0, 4, 5, 1, 3, 6, 2), shape)


def to_nibbles(codes: Tensor, bits: int, block: int, *, by_group: bool = False) -> Tensor:
    """Blocked bytes of uint8 codes (O, C, taps)."""
    # output block, half, output, channel block, 16 channels, pair of groups, group, channel, tap
    cells = _blocks(codes, block).unflatten(4, (block // 16, 2, 2))
    cells = cells.permute(NIBBLES_BY_GROUP if by_group else NIBBLES)
    return torch.stack([_pack(cells >> bit & 1) for bit in range(bits)]).view(-1)


def from_nibbles(blocked: Tensor, shape: tuple[int, int, int], bits: int, block: int, *, by_group: bool = False) -> Tensor:
    """The codes (O, C, taps) again."""
    num_outputs, channels, taps = _sizes(shape, block)
    order = NIBBLES_BY_GROUP if by_group else NIBBLES
    sizes = (num_outputs // OUTPUTS, 2, 16, channels // block, block // 16, 2, 2, 4, taps)
    planes = enumerate(blocked.view(bits, -1))
    cells = sum((_unpack(plane) << bit for bit, plane in planes), start=blocked.new_zeros(()))
    cells = cells.view([sizes[place] for place in order])
    return _unblock(cells.permute([order.index(place) for place in range(len(order))]).flatten(4, 6), shape)


def fill_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _blocks(codes: Tensor, block: int) -> Tensor:
    """Outputs and channels filled up with code 0 and split: (O / 32, 2, 16, C / block, block / 4, 4, T)."""
    num_outputs, channels, taps = _sizes(codes.shape, block)
    codes = nn.functional.pad(codes, (0, 0, 0, channels - codes.shape[1], 0, num_outputs - codes.shape[0]))
    return codes.view(num_outputs // OUTPUTS, 2, 16, channels // block, block // 4, 4, taps)


def _unblock(cells: Tensor, shape: tuple[int, int, int]) -> Tensor:
    num_outputs, channels, taps = shape
    whole = cells.reshape(fill_up(num_outputs, OUTPUTS), -1, taps)
    return whole[:num_outputs, :channels].contiguous()


def _sizes(shape: Sequence[int], block: int) -> tuple[int, int, int]:
    return fill_up(shape[0], OUTPUTS), fill_up(shape[1], block), shape[2]


def _pack(bits: Tensor) -> Tensor:
    """Zeros and ones -> bytes, the first in the lowest bit: (..., n / 64, 8) where the last dimensions allow it."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    packed = (bits.reshape(-1, 8) << places).sum(1, dtype=torch.uint8)
    return packed.view(-1, 8)


def _unpack(packed: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return packed.reshape(-1, 1) >> places & 1
