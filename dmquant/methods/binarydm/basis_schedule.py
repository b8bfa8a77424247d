"""Schedules of BinaryDM as functions of the step: the number of bases of a weight, and the layers that are binarized."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from dmquant.diffusion.blocks import Block, find_blocks, is_unet
from dmquant.methods.binarydm.evolvable_basis import EvolvableBasis
from dmquant.nn.fake_quant_layers import QuantLayer, quantized_layers
from dmquant.training.objectives import Objective


@dataclass(frozen=True)
class BasisSchedule:
    """Objective that trains with two bases before step `switch` and with one after, and penalizes the second scales before it.

    The penalty is weight * mean |second_scale| over channels and layers: BinaryDM, eq. 9. The paper takes the mean without
    absolute values, which would reward negative scales.
    """

    objective: Objective
    quantizers: Sequence[EvolvableBasis]
    switch: int
    weight: float

    def loss(self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device) -> Tensor:
        set_num_bases(self.quantizers, 2 if step < self.switch else 1)
        loss = self.objective.loss(student, batch, step=step, generator=generator, device=device)
        if step >= self.switch:
            return loss
        return loss + self.weight * torch.stack([q.second_scale.abs().mean() for q in self.quantizers]).mean()


def set_num_bases(quantizers: Sequence[EvolvableBasis], count: int) -> None:
    """Sets the number of bases, 1 or 2, of each quantizer in place."""
    for quantizer in quantizers:
        quantizer.bits = count


@dataclass(frozen=True)
class BinarizationWarmup:
    """Objective that binarizes one more group of layers every `period` steps. The weights of later groups stay float."""

    objective: Objective
    groups: Sequence[Sequence[QuantLayer]]
    period: int

    def loss(self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device) -> Tensor:
        with unquantized_weights([layer for group in self.groups[step // self.period + 1 :] for layer in group]):
            return self.objective.loss(student, batch, step=step, generator=generator, device=device)


@contextmanager
def unquantized_weights(layers: Sequence[QuantLayer]) -> Iterator[None]:
    """Inside the context, the layers use their float weights."""
    kept = [layer.weight_quantizer for layer in layers]
    try:
        for layer in layers:
            layer.weight_quantizer = nn.Identity()
        yield
    finally:
        for layer, quantizer in zip(layers, kept):
            layer.weight_quantizer = quantizer


def group_layers(student: nn.Module) -> list[list[QuantLayer]]:
    """Returns the quantized layers in groups of blocks, from the middle of the network outwards.

    In a UNet the first group is the middle block, and each resolution is a group. In other networks a group is a pair of
    blocks at the same distance from the middle.
    """
    layers, blocks = quantized_layers(student), find_blocks(student)
    middle = (len(blocks) - 1) / 2

    def rank(index: int) -> float:
        block = blocks[index]
        if not is_unet(student):
            return abs(index - middle)
        return -1 if block.name == "mid_block" else 1 / block.stride

    order = sorted(range(len(blocks)), key=rank)
    return [[layer for i in group for layer in layers_in_block(blocks[i], layers)] for _, group in groupby(order, rank)]


def layers_in_block(block: Block, layers: Mapping[str, QuantLayer]) -> list[QuantLayer]:
    """Returns the layers, out of those given by name, that belong to the block."""
    return [layer for name, layer in layers.items() if f"{name}.".startswith(tuple(f"{module}." for module in block.modules))]
