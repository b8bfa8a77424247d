"""Stored weights: bit planes with one grid per output channel (`PackedWeight`) or a scale per plane (`PackedBases`).

A C or Triton kernel reads the codes in an order of its own. Both orders together would double the memory of the weights, so
`block` replaces the buffer `codes` by the order of the kernel, and `__getattr__` computes the stored order whenever somebody
reads `codes`. A property cannot do that: torch refuses a buffer whose name the class defines. `release` restores the buffer;
copies, pickles, moves to another device and loading do so by themselves. DMQUANT_KERNELS=torch leaves the codes in their
stored order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dmquant.kernels import onednn
from dmquant.kernels.operands import BlockedWeight
from dmquant.kernels.packing import check_bits, pack, unpack
from dmquant.kernels.weight_packing import arrange, restore
from dmquant.quantizers.base import BasisCodes, Codes, Float32Buffers, find_grid_fault
from dmquant.quantizers.traits import GridTrait


class BlockedCodes(Float32Buffers):
    """A module whose buffer `codes` may be kept in the order of a kernel. Reading `codes` always gives the stored order."""

    shape: torch.Size
    bits: int
    blocked: BlockedWeight | None = None
    is_left_alone = False  # no kernel supports this weight, or none is faster than the reference
    # codes, their version, and a layer for each part of a split input; made from the codes by packed_layers.slices_of
    slices: tuple[Tensor, int, list[nn.Module]] | None = None

    def block(self, kernel: str) -> None:
        """Replaces the codes by their order for this kernel."""
        codes = unpack(self.codes, self.shape).reshape(*self.shape[:2], -1)
        self.blocked = arrange(codes, self.bits, self._buffers.get("zero"), kernel)
        if kernel != onednn.NAME:
            self._buffers["codes"] = None

    def release(self) -> None:
        """Restores the codes in the order of the file."""
        self._buffers["codes"], self.blocked, self.is_left_alone, self.slices = self.codes, None, False, None

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name != "codes" or value is not None:
            return value
        shape = (*self.shape[:2], self.shape[2:].numel())
        return pack(restore(self.blocked, shape), self.bits)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the stored order and choose their own kernel."""
        released = {"blocked": None, "is_left_alone": False, "slices": None, "_buffers": {**self._buffers, "codes": self.codes}}
        return {**self.__dict__, **released}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.release()  # the other device may have other kernels
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "codes"] = self.codes
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)


class PackedWeight(BlockedCodes):
    """Bit planes with one scale and one zero per slice of dimension 0: value = (code - zero) * scale."""

    codes: Tensor  # uint8 (bits, bytes)
    scale: Tensor  # float32 (O,)
    zero: Tensor  # float32 (O,)

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
        """Returns the float weight, a new tensor, in the dtype given or the one in which the model was loaded."""
        column = (-1, *(1,) * (len(self.shape) - 1))
        values = unpack(self.codes, self.shape).to(torch.float32)
        return values.sub_(self.zero.view(column)).mul_(self.scale.view(column)).to(dtype or self.dtype)

    def fill(self, codes: Codes | BasisCodes) -> None:
        """Stores codes. One grid per tensor is stored once per output channel: shapes follow from the layer alone."""
        assert isinstance(codes, Codes)
        self.codes.copy_(pack(codes.codes, codes.bits))
        for target, value in ((self.scale, codes.scale), (self.zero, codes.zero)):
            if value.numel() not in (1, len(target)):
                raise ValueError(f"a packed weight holds one grid per output channel ({len(target)}), got {tuple(value.shape)}")
            target.copy_(value.reshape(-1))

    def find_fault(self, name: str, value: Tensor) -> str | None:
        if name == "codes":
            count = self.numel()
            has_rest = count % 8 != 0 and bool((value[:, -1] >> count % 8).any())
            return "has bits set after its last code" if has_rest else None
        if name == "zero" and self.bits == 1:
            value = value[value != 0.5]  # the middle of the codes of a binary weight, {-1, +1}
        return find_grid_fault(name, value, self.bits)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, bits={self.bits}"


class PackedBases(PackedWeight):
    """Bit planes of signs, each with its own scale per slice of dimension 0: value = sum over planes of scale * sign."""

    @property
    def traits(self) -> tuple[GridTrait, ...]:
        return (Bases(),)

    def __init__(self, shape: torch.Size, bits: int, *, dtype: torch.dtype, device: torch.device | str | None = None):
        super().__init__(shape, bits, dtype=dtype, device=device)
        del self.zero
        self.register_buffer("scale", torch.ones(bits, shape[0], dtype=torch.float32, device=device))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        scale = self.scale.view(self.bits, -1, *(1,) * (len(self.shape) - 1))
        return BasisCodes(unpack(self.codes, self.shape), scale).decode().to(dtype or self.dtype)

    def fill(self, codes: Codes | BasisCodes) -> None:
        assert isinstance(codes, BasisCodes)
        self.codes.copy_(pack(codes.codes, codes.bits))
        self.scale.copy_(codes.scale.reshape(self.scale.shape))


@dataclass(frozen=True)
class Bases(GridTrait):
    """Every bit plane of the weight is a binary basis with a scale of its own."""

    name = "bases"
    weight_class = PackedBases


def dense(weight: PackedWeight | nn.Parameter, dtype: torch.dtype) -> Tensor:
    """Returns the values of a weight. A weight of 32 bits is a plain parameter."""
    return weight.dequantize(dtype) if isinstance(weight, PackedWeight) else weight
