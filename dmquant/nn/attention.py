"""Quantized attention products: `QuantAttention`, a processor of diffusers that quantizes the factors of q k^T and p v.

The factors are no layers, so their quantizers are modules of the processor. `quantized_attention` computes the products with a
kernel where there is one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeGuard

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from dmquant.kernels.attention import LARGEST, attend, attend_op, choose_variant
from dmquant.nn.fake_quant_layers import QuantInput
from dmquant.quantizers.base import FixedGrid
from dmquant.quantizers.per_part import HeadGrids
from dmquant.quantizers.per_timestep import TemporalGrid

Grid = FixedGrid | HeadGrids  # the stored grid of a factor
PLAIN = (AttnProcessor, AttnProcessor2_0)  # processors with the same arithmetic as QuantAttention


class QuantAttention(nn.Module):
    """An attention processor of diffusers that quantizes query, key, probabilities and value before they are multiplied.

    The softmax is exact, in float32. Projections are layers of their own and are quantized as layers. A kernel multiplies the
    codes where there is one.
    """

    def __init__(self, make: Callable[[], nn.Module], replaces: AttnProcessor | AttnProcessor2_0):
        super().__init__()
        self.query, self.key = QuantInput(make()), QuantInput(make())
        self.probability, self.value = QuantInput(make()), QuantInput(make())
        self.replaces = replaces

    # not `forward`: diffusers reads the signature of __call__ to decide which arguments it passes
    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x  # (B, N, C)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        answer = self.attend(attn, tokens, context, attention_mask)
        for layer in attn.to_out:
            answer = layer(answer)
        if x.ndim == 4:
            answer = answer.transpose(1, 2).reshape(x.shape)
        if attn.residual_connection:
            answer = answer + hidden_states
        return answer / attn.rescale_output_factor

    def attend(self, attn: Attention, tokens: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the attention of all heads (B, N, C), with the projections and norms before it and without those after it."""
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)
            for layer, x in ((attn.to_q, tokens), (attn.to_k, context), (attn.to_v, context))
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], len(context))
            mask = mask.view(len(context), attn.heads, -1, mask.shape[-1])
        return self.attend_heads(query, key, value, attn.scale, mask)

    def attend_heads(self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Returns softmax(q k^T * scale + mask) v (B, N, C) of factors (B, heads, N, C / heads)."""
        factors = (self.query, self.key, self.probability, self.value)
        is_watched = any(factor._forward_hooks or factor._forward_pre_hooks for factor in factors)
        if mask is None and not is_watched:
            found = quantized_attention(query, key, value, [factor.input_quantizer for factor in factors], scale)
            if found is not None:
                return found
        scores = self.query(query) @ self.key(key).transpose(-1, -2) * scale
        if mask is not None:
            scores = scores + mask
        probability = scores.float().softmax(-1).to(value.dtype)
        return (self.probability(probability) @ self.value(value)).transpose(1, 2).flatten(2)


def find_attentions(denoiser: nn.Module) -> dict[str, Attention]:
    """Returns attention modules whose products are quantized or can be, by name, in module order."""
    return {
        name: module for name, module in denoiser.named_modules()
        if isinstance(module, Attention) and isinstance(module.processor, (*PLAIN, QuantAttention))
    }  # fmt: skip


def quantize_products(denoiser: nn.Module, make: Callable[[int], nn.Module]) -> None:
    """Gives every attention a `QuantAttention`; `make(heads)` returns a quantizer for one factor."""
    for attention in find_attentions(denoiser).values():
        device = next(attention.parameters()).device
        attention.set_processor(QuantAttention(partial(make, attention.heads), attention.processor).to(device))


def restore_products(denoiser: nn.Module) -> None:
    """Restores the processor that each attention had before."""
    for attention in find_attentions(denoiser).values():
        if isinstance(attention.processor, QuantAttention):
            attention.set_processor(attention.processor.replaces)


def product_bits(denoiser: nn.Module) -> int | None:
    """Returns the bits of the factors of attention products; None if they are float."""
    grids = (module.input_quantizer for module in denoiser.modules() if isinstance(module, QuantInput))
    return next((getattr(grid, "bits", None) for grid in grids), None)


def quantized_attention(query: Tensor, key: Tensor, value: Tensor, grids: Sequence[nn.Module], scale: float) -> Tensor | None:
    """Returns the products of an attention (B, N, heads * C); None where no kernel supports them.

    Args:
        query: (B, heads, N, C); key and value are (B, heads, M, C).
        grids: the stored grids of query, key, probability and value.
    """
    if not is_supported(grids, query, key, value):
        return None
    variant = choose_variant(grids[0].bits)
    if variant is None:
        return None
    scales, zeros = tables(grids, *query.shape[:2])
    is_compiling = torch.compiler.is_compiling()
    distinct = () if is_compiling else set(zeros.view(-1).tolist())
    if not all(zero.is_integer() and 0 <= zero < 1 << grids[0].bits for zero in distinct):
        return None
    return (attend_op if is_compiling else attend)(query, key, value, scales, zeros, grids[0].bits, scale, variant)


def is_supported(grids: Sequence[nn.Module], query: Tensor, key: Tensor, value: Tensor) -> TypeGuard[Sequence[Grid]]:
    """Returns whether all factors are float32 on the CPU, without gradients, and on grids of equal bits without hooks."""
    factors = (query, key, value)
    if any(x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel() for x in factors):
        return False
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and any(x.requires_grad for x in factors)):
        return False
    if key.shape[2] > LARGEST or key.shape[3] > LARGEST or value.shape[3] != key.shape[3]:
        return False
    bits = getattr(grids[0], "bits", None)
    is_known = all(type(grid) in (FixedGrid, TemporalGrid, HeadGrids) and grid.bits == bits for grid in grids)
    return is_known and not any(grid._forward_hooks or grid._forward_pre_hooks for grid in grids)


def tables(grids: Sequence[Grid], images: int, heads: int) -> tuple[Tensor, Tensor]:
    """Returns scales and zeros of the four factors, (4, B, heads) each."""
    if all(type(grid) is FixedGrid for grid in grids):  # the common case, in fewer operations
        values = torch.stack([getattr(grid, name) for name in ("scale", "zero") for grid in grids])
        scales, zeros = values.view(2, len(grids), 1, 1).expand(-1, -1, images, heads).contiguous()
        return scales, zeros
    rows = [_rows(grid, images, heads) for grid in grids]
    return torch.stack([scale for scale, _ in rows]), torch.stack([zero for _, zero in rows])


def _rows(grid: Grid, images: int, heads: int) -> tuple[Tensor, Tensor]:
    if isinstance(grid, HeadGrids):
        rows = [_rows(part, images, 1) for part in grid.grids]
        return torch.cat([scale for scale, _ in rows], 1), torch.cat([zero for _, zero in rows], 1)
    pair = (grid.row() or grid.rows(images)) if isinstance(grid, TemporalGrid) else (grid.scale, grid.zero)
    scale, zero = (values.reshape(-1, 1).expand(images, heads) for values in pair)
    return scale, zero
