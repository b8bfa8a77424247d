"""Fake-quantized layers: subclasses of torch's layers with a quantizer for the weight and one for the input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

from torch import Tensor, nn

Layer = nn.Linear | nn.Conv1d | nn.Conv2d  # layers that can be quantized
Choice = tuple[nn.Module, nn.Module]  # weight quantizer, input quantizer; Identity stands for "not quantized"


class QuantLinear(nn.Linear):
    """An nn.Linear that quantizes its weight and its input."""

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        return nn.functional.linear(self.input_quantizer(x), weight, self.bias)


class QuantConv1d(nn.Conv1d):
    """An nn.Conv1d that quantizes its weight and its input."""

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        return self._conv_forward(self.input_quantizer(x), weight, self.bias)


class QuantConv2d(nn.Conv2d):
    """An nn.Conv2d that quantizes its weight and its input."""

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        return self._conv_forward(self.input_quantizer(x), weight, self.bias)


class QuantInput(nn.Module):
    """Quantizes one factor of an attention product."""

    def __init__(self, input_quantizer: nn.Module):
        super().__init__()
        self.input_quantizer = input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.input_quantizer(x)


QuantLayer = QuantLinear | QuantConv1d | QuantConv2d
QUANTIZED: dict[type[nn.Module], type[QuantLayer]] = {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d}
FLOAT = {quantized: plain for plain, quantized in QUANTIZED.items()}


def swap(model: nn.Module, choose: Callable[[str, Layer], Choice | None]) -> None:
    """Replaces the layers for which `choose(name, layer)` returns quantizers. Parameters are shared, not copied."""
    for name, layer in find_layers(model).items():
        choice = choose(name, layer)
        if choice is not None:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], quantized(layer, *choice))


def quantized(layer: Layer, weight_quantizer: nn.Module, input_quantizer: nn.Module) -> QuantLayer:
    """Returns the fake-quantized layer of a float one. It shares the parameters and has the same device and mode."""
    new = QUANTIZED[type(layer)].__new__(QUANTIZED[type(layer)])
    # copying the attributes keeps every option of the float layer; a constructor call would need them all
    new.__dict__ = {**layer.__dict__, "_parameters": dict(layer._parameters), "_modules": dict(layer._modules)}
    new.weight_quantizer = weight_quantizer.to(layer.weight.device)
    new.input_quantizer = input_quantizer.to(layer.weight.device)
    return new.train(layer.training)


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Returns float layers that can be quantized, by name, in module order. Subclasses of torch's layers are not among them."""
    return {name: layer for name, layer in model.named_modules() if _can_be_quantized(layer)}


def _can_be_quantized(module: nn.Module) -> TypeGuard[Layer]:
    return type(module) in QUANTIZED


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Returns fake-quantized layers by name, in module order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLayer)}


def quantized_inputs(model: nn.Module) -> dict[str, QuantLayer | QuantInput]:
    """Returns modules with an input quantizer by name, in module order: layers, and factors of attention products."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer | QuantInput)}


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Runs the model in float while inside: an Identity replaces every quantizer."""
    places = [(module, "input_quantizer") for module in quantized_inputs(model).values()]
    places += [(layer, "weight_quantizer") for layer in quantized_layers(model).values()]
    kept = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, nn.Identity())
        yield
    finally:
        for (module, name), quantizer in zip(places, kept):
            setattr(module, name, quantizer)
