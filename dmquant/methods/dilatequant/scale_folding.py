"""Folds the division of a layer's input by factors into the parameters that produce this input, where that is exact.

It is exact where the input is linear in these parameters:

- affine parameters of a norm, or its modulation by the time embedding, before attention projections and feed-forwards;
- the value projection before the output projection of an attention;
- the value half of GEGLU before the second layer of a feed-forward.

A SiLU or GELU in between makes it impossible.

Layers that read the same tensor share one factor, the smallest of theirs. It equals DilateQuant's eq. 10-12 for their
weights stacked along the output channels, so that every range is kept.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from dmquant.nn.attention import find_attentions
from dmquant.quantizers.dilated import spread


@dataclass(frozen=True)
class ParameterRows:
    """Rows of a parameter, one per channel. With `plus_one` the channel is proportional to 1 + row."""

    name: str
    start: int
    count: int
    plus_one: bool = False


@dataclass(frozen=True)
class Fold:
    """Layers that read the same tensor, and the parameters that each of its channels is proportional to."""

    readers: tuple[str, ...]
    producers: tuple[ParameterRows, ...]


def find_folds(network: nn.Module, among: Collection[str]) -> list[Fold]:
    """Returns the folds of a float or quantized network whose readers are all `among` these layers, in module order."""
    attentions = find_attentions(network)
    found = (fold for name, module in network.named_modules() for fold in _folds_of(name, module, attentions))
    return [fold for fold in found if fold.producers and all(reader in among for reader in fold.readers)]


def share_factors(factors: Mapping[str, Tensor], folds: Collection[Fold]) -> dict[str, Tensor]:
    """Returns factors (C,) by layer, where layers that read the same tensor have the smallest of their factors."""
    shared: dict[str, Tensor] = {}
    for fold in folds:
        smallest = torch.stack([factors[reader] for reader in fold.readers]).amin(0)
        shared |= dict.fromkeys(fold.readers, smallest)
    return {**factors, **shared}


@torch.no_grad()
def apply_fold(network: nn.Module, fold: Fold, factor: Tensor) -> None:
    """Divides the producers' parameters by a factor (C,) and multiplies the readers' weights by it, in place."""
    for rows in fold.producers:
        part = network.get_parameter(rows.name).narrow(0, rows.start, rows.count)
        column = factor.to(part.dtype).view(-1, *(1,) * (part.ndim - 1))
        part.copy_((part + 1) / column - 1 if rows.plus_one else part / column)
    for reader in fold.readers:
        weight, groups = network.get_parameter(f"{reader}.weight"), getattr(network.get_submodule(reader), "groups", 1)
        weight.mul_(spread(factor, weight, groups))


def _folds_of(name: str, module: nn.Module, attentions: Mapping[str, Attention]) -> Iterator[Fold]:
    if isinstance(module, Attention) and name in attentions:
        yield from _attention_folds(name, module)
    elif isinstance(module, BasicTransformerBlock):
        yield from _transformer_folds(name, module, attentions)
    elif isinstance(module, Transformer2DModel) and isinstance(getattr(module, "norm", None), nn.GroupNorm):
        yield Fold((f"{name}.proj_in",), _affine(f"{name}.norm", module.norm))


def _attention_folds(name: str, attention: Attention) -> Iterator[Fold]:
    if attention.group_norm is not None and not attention.is_cross_attention and attention.spatial_norm is None:
        yield Fold(_projections(name), _affine(f"{name}.group_norm", attention.group_norm))
    # each output channel is a weighted mean over tokens of one channel of the values
    yield Fold((f"{name}.to_out.0",), _rows(f"{name}.to_v", attention.to_v, 0, attention.to_v.out_features))


def _transformer_folds(name: str, block: BasicTransformerBlock, attentions: Mapping[str, Attention]) -> Iterator[Fold]:
    first, second, feed_forward = f"{name}.attn1", f"{name}.attn2", block.ff.net[0]
    is_plain = block.norm_type == "layer_norm" and block.pos_embed is None
    if first in attentions and block.attn1.group_norm is None:
        readers = (f"{first}.to_q",) if block.only_cross_attention else _projections(first)
        yield Fold(readers, _affine(f"{name}.norm1", block.norm1) if is_plain else _modulation(f"{name}.norm1", block, 0))
    if second in attentions and is_plain and block.attn2.is_cross_attention and block.attn2.group_norm is None:
        yield Fold((f"{second}.to_q",), _affine(f"{name}.norm2", block.norm2))
    is_affine = block.norm_type == "layer_norm"
    producers = _affine(f"{name}.norm3", block.norm3) if is_affine else _modulation(f"{name}.norm1", block, 3)
    yield Fold((f"{name}.ff.net.0.proj",), producers)
    if isinstance(feed_forward, GEGLU):
        yield Fold((f"{name}.ff.net.2",), _rows(f"{name}.ff.net.0.proj", feed_forward.proj, 0, block.ff.net[2].in_features))


def _projections(name: str) -> tuple[str, ...]:
    return tuple(f"{name}.{leaf}" for leaf in ("to_q", "to_k", "to_v"))


def _affine(name: str, norm: nn.Module) -> tuple[ParameterRows, ...]:
    """Returns weight and bias of a norm; an empty tuple for a norm without parameters."""
    if not isinstance(norm, nn.LayerNorm | nn.GroupNorm) or norm.weight is None:
        return ()
    return _rows(name, norm, 0, len(norm.weight))


def _modulation(name: str, block: BasicTransformerBlock, chunk: int) -> tuple[ParameterRows, ...]:
    """Returns the rows of adaLN-Zero's shift and scale: chunks `chunk` and `chunk + 1` of the six outputs of its linear layer."""
    if block.norm_type != "ada_norm_zero" or not isinstance(block.norm1, AdaLayerNormZero) or block.norm1.linear.bias is None:
        return ()
    dim, linear = block.norm1.linear.out_features // 6, block.norm1.linear
    shift = _rows(f"{name}.linear", linear, chunk * dim, dim)
    # 1 + scale is divided, with scale = W e + b: divide the rows of W, and 1 + b
    start = (chunk + 1) * dim
    scale = ParameterRows(f"{name}.linear.weight", start, dim), ParameterRows(f"{name}.linear.bias", start, dim, plus_one=True)
    return (*shift, *scale)


def _rows(name: str, module: nn.Module, start: int, count: int) -> tuple[ParameterRows, ...]:
    return tuple(
        ParameterRows(f"{name}.{leaf}", start, count) for leaf in ("weight", "bias") if getattr(module, leaf, None) is not None
    )
