"""Conversion between integer codes of 1 to 8 bits and bit planes. Padding bits are zero."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns the bit planes uint8 (bits, ceil(n / 8)) of n uint8 codes; bit i of byte j in plane b is bit b of code 8 j + i.

    Raises ValueError for codes of another dtype or that need more bits.
    """
    check_bits(bits)
    flat = codes.reshape(-1)
    if codes.dtype != torch.uint8 or (flat.numel() and int(flat.max()) >> bits):
        raise ValueError(f"codes must be uint8 below {1 << bits} for {bits} bits")
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [((padded >> bit & 1) << shifts).sum(1, dtype=torch.uint8) for bit in range(bits)]
    return torch.stack(planes)


def unpack(planes: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Returns the uint8 codes of bit planes uint8 (bits, ceil(n / 8)), in the shape given.

    Raises ValueError if the planes do not hold as many codes as the shape.
    """
    check_bits(planes.shape[0])
    count = torch.Size(shape).numel()
    if planes.dtype != torch.uint8 or planes.shape[1] != -(-count // 8):
        raise ValueError(f"{count} codes need planes of {-(-count // 8)} bytes, got {tuple(planes.shape)} {planes.dtype}")
    # eight codes at a time: an int64 holds one byte per code, so a shift by the plane's number never leaves its byte
    table = _spread_bits(planes.device)
    codes = table.index_select(0, planes[0].int())
    for bit, plane in enumerate(planes[1:], start=1):
        codes |= table.index_select(0, plane.int()) << bit
    return codes.view(torch.uint8)[:count].view(shape)


def _spread_bits(device: torch.device) -> Tensor:
    """Returns, for each byte value, the int64 whose byte i in memory is bit i of that value: (256,)."""
    byte, shift = (torch.arange(count, dtype=torch.uint8, device=device) for count in (256, 8))
    return (byte.unsqueeze(1) >> shift & 1).view(torch.int64).view(-1)


def check_bits(bits: int) -> None:
    """Raises ValueError unless bits is 1 to 8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
