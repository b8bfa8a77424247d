"""Weights as they are stored: bit planes with a grid, or with a scale each."""

import torch
from torch import Tensor, nn

from dmquant.formats import BASES
from dmquant.kernels.blocked import BlockedCodes
from dmquant.packing import check_bits, pack, unpack
from dmquant.quantizers.base import BasisCodes, Codes


class PackedWeight(BlockedCodes):
    """Bit planes with one scale and one zero per slice of dimension 0: value = (code - zero) * scale."""

    def __init__(self, shape: torch.Size, bits: int, *, dtype: torch.dtype, device: torch.device | str | None = None):
        super().__init__()
        check_bits(bits)
        self.shape, self.bits, self.dtype = torch.Size(shape), bits, dtype
        planes = (bits, -(-self.shape.numel() // 8))
        self.register_buffer("codes", torch.zeros(planes, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(shape[0], dtype=torch.float32, device=device))
        self.register_buffer("zero", torch.zeros(shape[0], dtype=torch.float32, device=device))

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def numel(self) -> int:
        return self.shape.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight, a new tensor, in the dtype given or the one the model was loaded in."""
        column = (-1, *(1,) * (len(self.shape) - 1))
        values = unpack(self.codes, self.shape).to(torch.float32)
        return values.sub_(self.zero.view(column)).mul_(self.scale.view(column)).to(dtype or self.dtype)

    def fill(self, codes: Codes) -> None:
        """One grid per tensor is written as the same grid for each slice, so that the shapes follow from the layer alone."""
        self.codes.copy_(pack(codes.codes, codes.bits))
        for target, value in ((self.scale, codes.scale), (self.zero, codes.zero)):
            if value.numel() not in (1, len(target)):
                raise ValueError(f"a packed weight holds one grid per output channel ({len(target)}), got {tuple(value.shape)}")
            target.copy_(value.reshape(-1))

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, bits={self.bits}"


class PackedBases(PackedWeight):
    """Bit planes of signs, each with its own scale per slice of dimension 0: value = sum over planes of scale * sign."""

    kinds = (BASES,)

    def __init__(self, shape: torch.Size, bits: int, *, dtype: torch.dtype, device: torch.device | str | None = None):
        super().__init__(shape, bits, dtype=dtype, device=device)
        del self.zero
        self.register_buffer("scale", torch.ones(bits, shape[0], dtype=torch.float32, device=device))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        scale = self.scale.view(self.bits, -1, *(1,) * (len(self.shape) - 1))
        return BasisCodes(unpack(self.codes, self.shape), scale).decode().to(dtype or self.dtype)

    def fill(self, codes: BasisCodes) -> None:
        self.codes.copy_(pack(codes.codes, codes.bits))
        self.scale.copy_(codes.scale.reshape(self.scale.shape))


def dense(weight: PackedWeight | nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The values of a weight; one of 32 bits is no PackedWeight."""
    return weight.dequantize(dtype) if isinstance(weight, PackedWeight) else weight
