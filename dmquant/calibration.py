"""Sets the grids of quantized layers from values: weights from themselves, inputs from recorded samples."""

import torch
from torch import Tensor, nn

from dmquant.layers import bypassed, quantized_layers
from dmquant.progress import Track, plain
from dmquant.quantizers.base import Quantizer
from dmquant.samples import Samples

VALUES_PER_SAMPLE = 2048  # drawn at random from each layer's input, beside its extremes


@torch.no_grad()
def observe_weights(student: nn.Module) -> None:
    for layer in quantized_layers(student).values():
        if isinstance(layer.weight_quantizer, Quantizer):
            layer.weight_quantizer.observe(layer.weight)


@torch.no_grad()
def observe_inputs(student: nn.Module, samples: Samples, *, batch: int, track: Track = plain) -> None:
    """Shows every input quantizer what its layer reads when the student runs in float."""
    layers = {name: layer for name, layer in quantized_layers(student).items() if isinstance(layer.input_quantizer, Quantizer)}
    collectors = {name: Collector(seed) for seed, name in enumerate(layers)}
    hooks = [layer.register_forward_pre_hook(collectors[name].note) for name, layer in layers.items()]
    device = next(student.parameters()).device
    try:
        with bypassed(student):
            for part in track(samples.split(batch), "calibrate"):
                part.on(device).call(student)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        if collectors[name].rows:  # a layer that never runs needs no grid
            layer.input_quantizer.observe(torch.cat(collectors[name].rows))


class Collector:
    """Keeps a random part of each sample's values, and its extremes, as rows (N, k)."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self.rows: list[Tensor] = []

    def note(self, layer: nn.Module, args: tuple) -> None:
        flat = args[0].detach().float().flatten(1)
        index = torch.randint(flat.shape[1], (min(VALUES_PER_SAMPLE, flat.shape[1]),), generator=self._generator)
        extremes = torch.stack(torch.aminmax(flat, dim=1), 1)
        self.rows.append(torch.cat([flat[:, index.to(flat.device)], extremes], 1))
