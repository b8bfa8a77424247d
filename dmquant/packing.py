"""Integer codes <-> bit planes: one rule for 1 to 8 bits, no code straddles a byte, padding bits are zero."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bit planes uint8 (bits, ceil(n / 8)) of uint8 codes with n elements; bit i of byte j in plane b is bit b of code 8 j + i."""
    check_bits(bits)
    flat = codes.reshape(-1)
    if codes.dtype != torch.uint8 or (flat.numel() and int(flat.max()) >> bits):
        raise ValueError(f"codes must be uint8 below {1 << bits} for {bits} bits")
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [((padded >> bit & 1) << places).sum(1, dtype=torch.uint8) for bit in range(bits)]
    return torch.stack(planes)


def unpack(planes: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Codes uint8 of the shape given, from bit planes uint8 (bits, ceil(n / 8))."""
    check_bits(planes.shape[0])
    count = torch.Size(shape).numel()
    if planes.dtype != torch.uint8 or planes.shape[1] != -(-count // 8):
        raise ValueError(f"{count} codes need planes of {-(-count // 8)} bytes, got {tuple(planes.shape)} {planes.dtype}")
    places = torch.arange(8, dtype=torch.uint8, device=planes.device)
    codes = planes.new_zeros(planes.shape[1], 8)
    for bit, plane in enumerate(planes):
        codes |= (plane.unsqueeze(1) >> places & 1) << bit
    return codes.view(-1)[:count].view(shape)


def check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
