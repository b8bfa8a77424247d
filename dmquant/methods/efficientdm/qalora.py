"""QALoRA of EfficientDM: a low-rank update that is added to the weight before rounding, and is not stored in the file."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dmquant.nn.fake_quant_layers import QuantLayer, quantized_layers
from dmquant.quantizers.base import BasisCodes, Codes, Quantizer
from dmquant.quantizers.traits import GridTrait, traits_of


class QALoRA(Quantizer):
    """Quantizes W + B A with the quantizer `inner`. EfficientDM, eq. 6.

    `down` is A (rank, I, kh, kw), or (rank, I) for a linear layer; `up` is B (O, rank). B starts at zero, so that the layer
    starts as calibrated. The product is computed directly; the public code passes an identity matrix through two layers.
    """

    def __init__(self, inner: Quantizer, shape: torch.Size, rank: int):
        super().__init__()
        self.inner, self.bits = inner, inner.bits
        rank = min(rank, shape[0], shape[1:].numel())  # a higher rank would be redundant
        self.down = nn.Parameter(torch.zeros(rank, *shape[1:]))
        self.up = nn.Parameter(torch.zeros(shape[0], rank))

    @property
    def traits(self) -> tuple[GridTrait, ...]:
        return traits_of(self.inner)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draws A uniformly within 1 / sqrt(fan-in), as torch initializes layers, and sets B to zero."""
        drawn = torch.rand(self.down.shape, generator=generator) * 2 - 1
        self.down.copy_(drawn / math.sqrt(self.down[0].numel()))
        self.up.zero_()

    def merge(self, weight: Tensor) -> Tensor:
        """Returns W + B A in the dtype of the adapter; the weight may be stored in half precision."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight.to(self.up.dtype) + (self.up @ self.down.flatten(1)).view_as(weight)

    def observe(self, x: Tensor) -> None:
        self.inner.observe(self.merge(x))

    def forward(self, x: Tensor) -> Tensor:
        merged = self.merge(x)
        address = merged.data_ptr()
        # the sum is recomputed in the backward pass: storing it would take a float copy of all weights
        with saved_tensors_hooks(
            lambda tensor: None if tensor.data_ptr() == address else tensor,
            lambda stored: self._merge_for_backward(x) if stored is None else stored,
        ):
            return self.inner(merged)

    @torch.no_grad()
    def _merge_for_backward(self, weight: Tensor) -> Tensor:
        return self.merge(weight)

    def encode(self, x: Tensor) -> Codes | BasisCodes:
        return self.inner.encode(self.merge(x))

    def mean_step(self) -> float:
        """Returns the distance between neighbouring codes, averaged over output channels."""
        return self.inner.grid()[0].mean().item()

    def extra_repr(self) -> str:
        return f"rank={len(self.down)}"


def find_adapters(student: nn.Module) -> list[QALoRA]:
    """Returns the adapters, in module order."""
    quantizers = (layer.weight_quantizer for layer in quantized_layers(student).values())
    return [quantizer for quantizer in quantizers if isinstance(quantizer, QALoRA)]


def adapted_layers(student: nn.Module) -> list[QuantLayer]:
    """Returns the layers whose weights have an adapter, in module order."""
    return [layer for layer in quantized_layers(student).values() if isinstance(layer.weight_quantizer, QALoRA)]


def half_precision_layers(student: nn.Module) -> list[QuantLayer]:
    """Returns the adapted layers whose weights may be stored in float16.

    All but a model's first parameter may: diffusers reads the model's dtype from it.
    """
    first = next(student.parameters())
    return [layer for layer in adapted_layers(student) if layer.weight is not first]


@contextmanager
def stored_in_half(layers: Sequence[QuantLayer]) -> Iterator[None]:
    """Inside the context, the frozen weights of the layers are stored in float16."""
    try:
        for layer in layers:
            layer.weight.data = layer.weight.data.half()
        yield
    finally:
        for layer in layers:
            layer.weight.data = layer.weight.data.float()
