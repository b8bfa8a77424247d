"""Conversion between codes and the blocked layouts that kernels read, at the same number of bits; blocks are filled with code 0.

planes: [block of 32 O][block of C][K][4 C][2 x 16 O][bit][64 bits]; bit o * 4 + j of the last dimension belongs to channel j of
output o. Weights of 8 bits are signed bytes instead of bit planes.

nibbles: [bit][block of 32 O][block of C][K][16 C][64 bytes]; byte o * 4 + g holds outputs o (low half) and o + 16 (high half) of
the four channels of group g. By group: byte h * 32 + o holds groups 2 h (low) and 2 h + 1 (high) of output o.

steps, for Triton: a code is divided into pieces of 1, 2, 4 and 8 bits as the binary digits of its width say, lowest bits first (3
bits are a piece of 1 and one of 2). For each piece: [K][block of C][O][bytes]; the first channel of a byte is in its lowest bits.
Only channels are filled up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

OUTPUTS = 32  # of a block of O
# dimensions of the cells of to_nibbles in memory order; the last two form a byte
NIBBLES = (0, 3, 8, 4, 2, 5, 6, 1, 7)
NIBBLES_BY_GROUP = (0, 3, 8, 4, 5, 1, 2, 6, 7)


def to_planes(codes: Tensor, bits: int, block: int) -> Tensor:
    """Returns the bytes of uint8 codes (O, C, K) in the layout "planes"."""
    cells = _blocks(codes, block)  # (O / 32, 2, 16, C / block, block / 4, 4, T)
    cells = cells.permute(0, 3, 6, 4, 1, 2, 5).contiguous()
    if bits == 8:
        return (cells ^ 128).view(-1)
    return torch.stack([_pack(cells >> bit & 1) for bit in range(bits)], -2).view(-1)


def from_planes(blocked: Tensor, shape: tuple[int, int, int], bits: int, block: int) -> Tensor:
    """Returns the uint8 codes (O, C, K) of `to_planes`."""
    num_outputs, channels, taps = _sizes(shape, block)
    if bits == 8:
        cells = blocked ^ 128
    else:
        planes = blocked.view(-1, bits, 8)
        cells = sum((_unpack(planes[:, bit]) << bit for bit in range(bits)), start=blocked.new_zeros(()))
    cells = cells.view(num_outputs // OUTPUTS, channels // block, taps, block // 4, 2, 16, 4)
    return _unblock(cells.permute(0, 4, 5, 1, 3, 6, 2), shape)


def to_nibbles(codes: Tensor, bits: int, block: int, *, by_group: bool = False) -> Tensor:
    """Returns the bytes of uint8 codes (O, C, K) in the layout "nibbles", or "nibbles by group"."""
    # output block, half, output, channel block, 16 channels, pair of groups, group, channel, tap
    cells = _blocks(codes, block).unflatten(4, (block // 16, 2, 2))
    cells = cells.permute(NIBBLES_BY_GROUP if by_group else NIBBLES)
    return torch.stack([_pack(cells >> bit & 1) for bit in range(bits)]).view(-1)


def from_nibbles(blocked: Tensor, shape: tuple[int, int, int], bits: int, block: int, *, by_group: bool = False) -> Tensor:
    """Returns the uint8 codes (O, C, K) of `to_nibbles`."""
    num_outputs, channels, taps = _sizes(shape, block)
    order = NIBBLES_BY_GROUP if by_group else NIBBLES
    sizes = (num_outputs // OUTPUTS, 2, 16, channels // block, block // 16, 2, 2, 4, taps)
    planes = enumerate(blocked.view(bits, -1))
    cells = sum((_unpack(plane) << bit for bit, plane in planes), start=blocked.new_zeros(()))
    cells = cells.view([sizes[dim] for dim in order])
    return _unblock(cells.permute([order.index(dim) for dim in range(len(order))]).flatten(4, 6), shape)


def to_steps(codes: Tensor, bits: int, block: int) -> Tensor:
    """Returns the bytes of uint8 codes (O, C, K) in the layout "steps"."""
    outputs, channels, taps = codes.shape
    codes = nn.functional.pad(codes, (0, 0, 0, fill_up(channels, block) - channels))
    cells = codes.view(outputs, -1, block, taps).permute(3, 1, 0, 2)
    return torch.cat([_pack_pieces(cells >> low & (1 << width) - 1, width) for low, width in pieces(bits)])


def from_steps(steps: Tensor, shape: tuple[int, int, int], bits: int, block: int) -> Tensor:
    """Returns the uint8 codes (O, C, K) of `to_steps`."""
    outputs, channels, taps = shape
    counts = [width * len(steps) // bits for _, width in pieces(bits)]
    parts = zip(steps.split(counts), pieces(bits))
    cells = sum((_unpack_pieces(part, width) << low for part, (low, width) in parts), start=steps.new_zeros(()))
    codes = cells.view(taps, -1, outputs, block).permute(2, 1, 3, 0).reshape(outputs, -1, taps)
    return codes[:, :channels].contiguous()


def pieces(bits: int) -> list[tuple[int, int]]:
    """Returns the lowest bit and the width of each piece of a code."""
    return [(bits & (width - 1), width) for width in (1, 2, 4, 8) if bits & width]


def fill_up(count: int, step: int) -> int:
    """Returns the smallest multiple of step that is not less than count."""
    return -(-count // step) * step


def _blocks(codes: Tensor, block: int) -> Tensor:
    """Fills up outputs and channels with code 0 and splits them: (O / 32, 2, 16, C / block, block / 4, 4, T)."""
    num_outputs, channels, taps = _sizes(codes.shape, block)
    codes = nn.functional.pad(codes, (0, 0, 0, channels - codes.shape[1], 0, num_outputs - codes.shape[0]))
    return codes.view(num_outputs // OUTPUTS, 2, 16, channels // block, block // 4, 4, taps)


def _unblock(cells: Tensor, shape: tuple[int, int, int]) -> Tensor:
    num_outputs, channels, taps = shape
    codes = cells.reshape(fill_up(num_outputs, OUTPUTS), -1, taps)
    return codes[:num_outputs, :channels].contiguous()


def _sizes(shape: Sequence[int], block: int) -> tuple[int, int, int]:
    return fill_up(shape[0], OUTPUTS), fill_up(shape[1], block), shape[2]


def _pack(bits: Tensor) -> Tensor:
    """Returns n zeros and ones as bytes (n / 64, 8), the first in the lowest bit."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    packed = (bits.reshape(-1, 8) << shifts).sum(1, dtype=torch.uint8)
    return packed.view(-1, 8)


def _unpack(packed: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return packed.reshape(-1, 1) >> shifts & 1


def _pack_pieces(cells: Tensor, width: int) -> Tensor:
    return (cells.reshape(-1, 8 // width) << _shifts(cells, width)).sum(1, dtype=torch.uint8)


def _unpack_pieces(packed: Tensor, width: int) -> Tensor:
    return (packed.view(-1, 1) >> _shifts(packed, width) & (1 << width) - 1).view(-1)


def _shifts(like: Tensor, width: int) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=like.device)
