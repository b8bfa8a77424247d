"""Operands of a quantized convolution, as every implementation of it reads them (C, Triton, oneDNN, the reference).

Tensors are channels last: x (B, H, W, C), output (B, H', W', O). A linear layer is one image of one row.
"""

from dataclasses import dataclass, fields
from operator import attrgetter

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockedWeight:
    """The codes of a weight in the byte order of one kernel."""

    kernel: str
    weight: Tensor  # uint8 (planes, bytes)
    weight_sums: Tensor  # int32 (planes, O): levels summed over C and K
    bits: int  # of a code in each plane
    is_shifted: bool  # whether a value differs from its level times its scale: zero points are needed
    half_scale: bool  # whether a step of codes is two steps of levels (1 and 2 bits): the scale is multiplied by 0.5

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.weight_sums.nbytes


@dataclass(frozen=True, slots=True)
class Operands:
    """Packed weight, its scales, the grid of the input and the bias of one layer.

    act_scale and act_zero hold one value, or one per image (B,).
    """

    weight: BlockedWeight
    scale: Tensor  # float32 (planes, O), of the weight
    zero: Tensor | None  # float32 (O,), zero points of the weight; None where levels times scales are the values
    act_scale: Tensor
    act_zero: Tensor  # integers from 0 to 2^act_bits - 1
    act_bits: int
    bias: Tensor | None = None  # float32 (O,), or (B, O) for a bias per image


@dataclass(frozen=True, slots=True)
class FusedOps:
    """Work that a kernel does on its input before quantizing it (prologue) and on its output (epilogue).

    Prologue, in this order: layer norm over channels if epsilon > 0; x * gain + offset; activation; times factor; quantization;
    nearest-neighbour enlargement by `upsample`. Epilogue: residual is added to the output. oneDNN supports none of them, Triton
    all but the layer norm and activations other than SiLU. With the activation GATED, x has 2 C channels.
    """

    gain: Tensor | None = None  # (B, C); for tokens of a linear layer also (1, C)
    offset: Tensor | None = None  # the same; given if and only if gain is
    activation: int = 0  # one of norm.ACTIVATIONS
    factor: Tensor | None = None  # (C,)
    residual: Tensor | None = None  # shape of the output
    upsample: int = 1
    epsilon: float = 0.0

    @property
    def has_prologue(self) -> bool:
        """Whether the quantizer reads anything but x itself."""
        return self.gain is not None or self.factor is not None or self.activation != 0 or self.epsilon > 0


NO_OPS = FusedOps()
FUSED_TENSORS = tuple(field.name for field in fields(FusedOps) if field.type == Tensor | None)  # as in csrc/conv/params.h
fused_tensors = attrgetter(*FUSED_TENSORS)
