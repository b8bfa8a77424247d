"""Conversion of weights to the byte order of a kernel and back. No float copy is made."""

import torch
from torch import Tensor

from dmquant.kernels import onednn
from dmquant.kernels.operands import BlockedWeight
from dmquant.kernels.registry import BY_NAME


@torch.no_grad()
def arrange(codes: Tensor, bits: int, zero: Tensor | None, kernel: str) -> BlockedWeight:
    """Returns codes uint8 (O, C, K) in the byte order of a kernel.

    Without zero points, each bit is a plane of signs with a scale of its own (binary bases).
    """
    planes = [codes >> bit & 1 for bit in range(bits)] if zero is None else [codes]
    bits = 1 if zero is None else bits
    step, least = onednn.levels(bits) if kernel == onednn.NAME else levels(bits)
    sums = [plane.sum((1, 2), dtype=torch.int32) * step + least * codes[0].numel() for plane in planes]
    is_shifted = zero is not None and bool((zero * step + least).any())
    if kernel == onednn.NAME:
        weight = onednn.arrange(codes.to(torch.int16) * step + least)
    else:
        weight = torch.stack([BY_NAME[kernel].to_blocked(plane, bits) for plane in planes])
    return BlockedWeight(kernel, weight, torch.stack(sums), bits, is_shifted, zero is not None and step == 2)


def restore(blocked: BlockedWeight, shape: tuple[int, int, int]) -> Tensor:
    """Returns the codes uint8 (O, C, K) of a blocked weight."""
    planes = [BY_NAME[blocked.kernel].from_blocked(plane, shape, blocked.bits) for plane in blocked.weight]
    return sum((plane << bit for bit, plane in enumerate(planes)), start=torch.zeros((), dtype=torch.uint8))


def levels(bits: int) -> tuple[int, int]:
    """Returns (step, minimum) of level = step * code + minimum, as in csrc/conv/params.h.

    A level is a signed byte; for 1 and 2 bits it is an odd number (a sum of signs).
    """
    return (2, 1 - (1 << bits)) if bits <= 2 else (1, -(1 << (bits - 1)))
