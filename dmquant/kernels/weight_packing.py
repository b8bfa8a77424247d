"""Weights as a kernel reads them, in place of the codes that were stored: never both, and never a float copy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmquant.kernels import onednn
from dmquant.kernels.registry import BY_NAME


@dataclass(frozen=True)
class Blocked:
    """The codes of a weight in the order of one kernel, with what the kernel needs to know of them."""

    kernel: str
    weight: Tensor  # uint8 (planes, bytes)
    total: Tensor  # int32 (planes, O): sums of the levels
    bits: int  # of a code in each plane
    is_shifted: bool  # whether a value is more than a level times a scale
    halves: bool  # whether the scale is that of a code and levels are twice as fine

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.total.nbytes


@torch.no_grad()
def arrange(codes: Tensor, bits: int, zero: Tensor | None, kernel: str) -> Blocked:
    """Codes uint8 (O, C, taps) in the order of a kernel. Without zeros each bit is a plane of signs with a scale of its own."""
    planes = [codes >> bit & 1 for bit in range(bits)] if zero is None else [codes]
    bits = 1 if zero is None else bits
    step, least = onednn.levels(bits) if kernel == onednn.NAME else levels(bits)
    totals = [plane.sum((1, 2), dtype=torch.int32) * step + least * codes[0].numel() for plane in planes]
    is_shifted = zero is not None and bool((zero * step + least).any())
    if kernel == onednn.NAME:
        weight = onednn.arrange(codes.to(torch.int16) * step + least)
    else:
        weight = torch.stack([BY_NAME[kernel].to_blocked(plane, bits) for plane in planes])
    return Blocked(kernel, weight, torch.stack(totals), bits, is_shifted, zero is not None and step == 2)


def restore(blocked: Blocked, shape: tuple[int, int, int]) -> Tensor:
    """The codes (O, C, taps) again."""
    planes = [BY_NAME[blocked.kernel].from_blocked(plane, shape, blocked.bits) for plane in blocked.weight]
    return sum((plane << bit for bit, plane in enumerate(planes)), start=torch.zeros((), dtype=torch.uint8))


def levels(bits: int) -> tuple[int, int]:
    """Level = step * code + least: a signed byte, odd for one and two bits (sums of signs). As in csrc/conv/params.h."""
    return (2, 1 - (1 << bits)) if bits <= 2 else (1, -(1 << (bits - 1)))
