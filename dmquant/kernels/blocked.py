"""Weights as a kernel reads them, in place of the codes that were stored: never both, and never a float copy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from dmquant.kernels import onednn
from dmquant.kernels.catalogue import BY_NAME
from dmquant.packing import pack, unpack
from dmquant.quantizers.base import Float32Buffers


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


class BlockedCodes(Float32Buffers):
    """A module with a buffer `codes` that may live in the order of a kernel. Whoever reads `codes` gets the stored order."""

    shape: torch.Size
    bits: int
    blocked: Blocked | None = None
    is_left_alone = False  # where nobody is faster than the reference, or nobody can

    def block(self, kernel: str) -> None:
        """Puts the codes in the order of a kernel."""
        codes = unpack(self.codes, self.shape).reshape(*self.shape[:2], -1)
        self.blocked = arrange(codes, self.bits, self._buffers.get("zero"), kernel)
        if kernel != onednn.NAME:
            self._buffers["codes"] = None

    def release(self) -> None:
        """Puts the codes in the order of the file again."""
        self._buffers["codes"], self.blocked, self.is_left_alone = self.codes, None, False

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name != "codes" or value is not None:
            return value
        shape = (*self.shape[:2], self.shape[2:].numel())
        return pack(restore(self.blocked, shape), self.bits)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the stored order and choose their own kernel."""
        return {**self.__dict__, "blocked": None, "is_left_alone": False, "_buffers": {**self._buffers, "codes": self.codes}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.release()  # the device to which it goes may have other kernels
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "codes"] = self.codes
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)


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
    return sum(plane << bit for bit, plane in enumerate(planes))


def levels(bits: int) -> tuple[int, int]:
    """Level = step * code + least: a signed byte, odd for one and two bits (sums of signs). As in csrc/job.h."""
    return (2, 1 - (1 << bits)) if bits <= 2 else (1, -(1 << (bits - 1)))
