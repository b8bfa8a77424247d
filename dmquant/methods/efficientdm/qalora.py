"""QALoRA: a low-rank update that is merged into the weight before it is rounded, so that nothing of it remains in the file."""

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
    """inner(W + B A): the weight with its update, rounded. EfficientDM, eq. 6.

    A (rank, I, kh, kw) is a convolution with the layer's window, B (O, rank) a 1x1 one; a linear layer has neither window. B
    starts at zero, so that the layer starts as it was calibrated. Their product is made once per forward, where the public
    code sends an identity matrix through both.
    """

    def __init__(self, inner: Quantizer, shape: torch.Size, rank: int):
        super().__init__()
        self.inner, self.bits = inner, inner.bits
        rank = min(rank, shape[0], shape[1:].numel())  # more would say nothing new
        self.down = nn.Parameter(torch.zeros(rank, *shape[1:]))
        self.up = nn.Parameter(torch.zeros(shape[0], rank))

    @property
    def traits(self) -> tuple[GridTrait, ...]:
        return traits_of(self.inner)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """A uniform within 1 / sqrt(fan in), as layers of torch begin; B zero."""
        drawn = torch.rand(self.down.shape, generator=generator) * 2 - 1
        self.down.copy_(drawn / math.sqrt(self.down[0].numel()))
        self.up.zero_()

    def merge(self, weight: Tensor) -> Tensor:
        """W + B A, in the dtype of the adapter: the weight may wait in half precision."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight.to(self.up.dtype) + (self.up @ self.down.flatten(1)).view_as(weight)

    def observe(self, x: Tensor) -> None:
        self.inner.observe(self.merge(x))

    def forward(self, x: Tensor) -> Tensor:
        merged = self.merge(x)
        address = merged.data_ptr()
        # the sum is made once more for the backward pass: kept for it, the sums would be a float copy of all weights
        with saved_tensors_hooks(
            lambda tensor: None if tensor.data_ptr() == address else tensor,
            lambda kept: self._merge_again(x) if kept is None else kept,
        ):
            return self.inner(merged)

    @torch.no_grad()
    def _merge_again(self, weight: Tensor) -> Tensor:
        return self.merge(weight)

    def encode(self, x: Tensor) -> Codes | BasisCodes:
        return self.inner.encode(self.merge(x))

    def mean_step(self) -> float:
        """Mean distance between neighbouring codes, over output channels."""
        return self.inner.grid()[0].mean().item()

    def extra_repr(self) -> str:
        return f"rank={len(self.down)}"


def adapters_of(student: nn.Module) -> list[QALoRA]:
    """The adapters, in module order."""
    quantizers = (layer.weight_quantizer for layer in quantized_layers(student).values())
    return [quantizer for quantizer in quantizers if isinstance(quantizer, QALoRA)]


def adapted_layers(student: nn.Module) -> list[QuantLayer]:
    """The layers whose weights have an adapter, in module order."""
    return [layer for layer in quantized_layers(student).values() if isinstance(layer.weight_quantizer, QALoRA)]


def light_layers(student: nn.Module) -> list[QuantLayer]:
    """The adapted layers whose weights can wait in half precision: diffusers takes a model's dtype from its first parameter."""
    first = next(student.parameters())
    return [layer for layer in adapted_layers(student) if layer.weight is not first]


@contextmanager
def halved(layers: Sequence[QuantLayer]) -> Iterator[None]:
    """The frozen weights of the layers in float16 while inside."""
    try:
        for layer in layers:
            layer.weight.data = layer.weight.data.half()
        yield
    finally:
        for layer in layers:
            layer.weight.data = layer.weight.data.float()
