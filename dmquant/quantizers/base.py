"""Base classes: `Quantizer` for training, `FixedGrid` for inference, and the codes that a quantizer produces.

Law of every quantizer q, bit for bit:  q(x) == q.encode(x).decode(). It makes export one function for all methods.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dmquant.kernels.packing import check_bits
from dmquant.kernels.rounding import quantize, widen

Context = Any  # torch's FunctionCtx, which declares neither saved_tensors nor what a forward keeps in it
SMALLEST_SCALE = 1e-8  # smaller learned scales are clamped to this, in forward and in export


@dataclass(frozen=True)
class Codes:
    """Integer codes on a uniform grid: value = (codes - zero) * scale."""

    codes: Tensor  # uint8, shape of the tensor
    scale: Tensor  # float32, broadcasts against codes
    zero: Tensor  # float32, the code that means 0.0; 1/2 for {-1, +1}
    bits: int

    def decode(self) -> Tensor:
        """Returns the values, in the dtype of the scale."""
        return (self.codes.to(self.scale.dtype) - self.zero) * self.scale


@dataclass(frozen=True)
class BasisCodes:
    """Codes of a sum of binary bases: value = sum over k of scale[k] * (+1 where bit k of the code is set, -1 elsewhere)."""

    codes: Tensor  # uint8, shape of the tensor
    scale: Tensor  # float32 (bases, ...), each broadcasts against codes

    @property
    def bits(self) -> int:
        return len(self.scale)

    def decode(self) -> Tensor:
        """Returns the values, in the dtype of the scale."""
        signed = (torch.where(self.codes >> bit & 1 == 1, scale, -scale) for bit, scale in enumerate(self.scale))
        return sum(signed, start=self.scale.new_zeros(()))


class Quantizer(nn.Module):
    """Rounds a tensor onto a grid. Law: q(x) == q.encode(x).decode()."""

    bits: int

    def observe(self, x: Tensor) -> None:
        """Sets the grid from example values (calibration)."""
        raise TypeError(f"{type(self).__name__} has no grid to calibrate")

    def leaves(self, x: Tensor) -> Iterator[tuple["Quantizer", Tensor]]:
        """Yields each quantizer that has a grid of its own, with the part of the tensor that it rounds. Here: itself."""
        yield self, x

    def forward(self, x: Tensor) -> Tensor:
        """Returns the values rounded onto the grid, in the shape and dtype of x; the gradient is straight-through."""
        return self.encode(x).decode().to(x.dtype)

    def encode(self, x: Tensor) -> Codes | BasisCodes:
        """Returns the codes of the values."""
        scale, zero = self.grid()
        return Codes(quantize(widen(x), scale, zero, self.bits).to(torch.uint8), scale, zero, self.bits)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Returns scale and zero as floats that broadcast against the tensor. The zero of a uniform grid is a whole number."""
        raise TypeError(f"{type(self).__name__} has no uniform grid")

    def sizes(self) -> dict[str, float]:
        """Returns the magnitude of each own parameter, to which its learning rate is relative.

        This is the mean of the absolute values, and at least one step of the grid.
        """
        own = {name: parameter.detach().abs().mean().item() for name, parameter in self.named_parameters(recurse=False)}
        return {name: max(size, own.get("scale", 0.0)) for name, size in own.items()}

    def freeze(self) -> nn.Module:
        """Returns the grid for inference, which has buffers only. Here a FixedGrid, for one grid per tensor."""
        scale, zero = self.grid()
        fixed = FixedGrid(self.bits, scale.device)
        fixed.scale.copy_(scale.detach().reshape(()))
        fixed.zero.copy_(zero.detach().reshape(()))
        return fixed


class Float32Buffers(nn.Module):
    """A module whose buffers move between devices but keep their dtype: a cast would change the values of the grid."""

    def find_fault(self, name: str, value: Tensor) -> str | None:
        """Says why a stored value cannot be the buffer of this name, or returns None.

        The loader has checked shape, dtype and finiteness before. The text completes a sentence: "<name of the tensor> ...".
        """
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class FixedGrid(Float32Buffers):
    """A per-tensor activation quantizer for inference: scale and zero are buffers that stay float32."""

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, device: torch.device | str | None = None):
        super().__init__()
        check_bits(bits)
        self.bits = bits
        self.register_buffer("scale", torch.ones((), device=device))
        self.register_buffer("zero", torch.zeros((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        codes = quantize(widen(x), self.scale, self.zero, self.bits)
        return codes.sub_(self.zero).mul_(self.scale).to(x.dtype)

    def find_fault(self, name: str, value: Tensor) -> str | None:
        return find_grid_fault(name, value, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def find_grid_fault(name: str, value: Tensor, bits: int) -> str | None:
    """Says why a tensor cannot be the "scale" or the "zero" of a uniform grid, or returns None."""
    if name == "scale" and not (value > 0).all():
        return "holds a scale that is not positive"
    if name == "zero" and not ((value == value.round()) & (value >= 0) & (value < 1 << bits)).all():
        return f"holds a zero that is no code of {bits} bits"
    return None
