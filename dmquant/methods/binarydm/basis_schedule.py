"""What changes during a run, as functions of its step: how many bases a weight has, and which layers are binary yet."""

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
class Evolution:
    """Two bases before step `switch`, one from there on; until then the second scales are drawn to zero. BinaryDM, eq. 9.

    The penalty is weight * mean |second_scale| over channels and layers. The paper leaves out the magnitude: its penalty
    would reward scales below zero.
    """

    objective: Objective
    quantizers: Sequence[EvolvableBasis]
    switch: int
    weight: float

    def loss(
        self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        set_bases(self.quantizers, 2 if step < self.switch else 1)
        loss = self.objective.loss(student, batch, step=step, generator=generator, device=device)
        if step >= self.switch:
            return loss
        return loss + self.weight * torch.stack([q.second_scale.abs().mean() for q in self.quantizers]).mean()


def set_bases(quantizers: Sequence[EvolvableBasis], count: int) -> None:
    for quantizer in quantizers:
        quantizer.bits = count


@dataclass(frozen=True)
class WarmUp:
    """Makes weights binary one group of layers after the other, `period` steps apart; until its turn a layer's are float."""

    objective: Objective
    groups: Sequence[Sequence[QuantLayer]]
    period: int

    def loss(
        self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        with float_weights([layer for group in self.groups[step // self.period + 1:] for layer in group]):
            return self.objective.loss(student, batch, step=step, generator=generator, device=device)


@contextmanager
def float_weights(layers: Sequence[QuantLayer]) -> Iterator[None]:
    """The layers with their latent weights while inside."""
    kept = [layer.weight_quantizer for layer in layers]
    try:
        for layer in layers:
            layer.weight_quantizer = nn.Identity()
        yield
    finally:
        for layer, quantizer in zip(layers, kept):
            layer.weight_quantizer = quantizer


def group_layers(student: nn.Module) -> list[list[QuantLayer]]:
    """The quantized layers of the blocks from the middle outwards.

    UNet: the middle block, then one resolution after the other; otherwise pairs of blocks at the same distance from the
    middle.
    """
    layers, blocks = quantized_layers(student), find_blocks(student)
    middle = (len(blocks) - 1) / 2

    def rank(index: int) -> float:
        block = blocks[index]
        if not is_unet(student):
            return abs(index - middle)
        return -1 if block.name == "mid_block" else 1 / block.stride

    order = sorted(range(len(blocks)), key=rank)
    return [[layer for i in ring for layer in inside(blocks[i], layers)] for _, ring in groupby(order, rank)]


def inside(block: Block, layers: Mapping[str, QuantLayer]) -> list[QuantLayer]:
    """Those of the layers that belong to the block."""
    return [layer for name, layer in layers.items() if f"{name}.".startswith(tuple(f"{module}." for module in block.modules))]
