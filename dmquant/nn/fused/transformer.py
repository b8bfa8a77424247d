"""Transformer blocks of diffusers whose norms, modulation, activations and residuals are computed by the kernels of their layers.

Each projection computes the layer norm, and the scale and shift of an adaptive norm, in its prologue: that takes less time than
writing the normalized tokens once and reading them three times. The gates of an adaptive norm need a pass over the output.
"""

from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from dmquant.kernels import buffer_pool
from dmquant.kernels.conv_shape import ROW
from dmquant.kernels.layouts import fill_up
from dmquant.kernels.norm import GATED, TANH_GELU, moments_of
from dmquant.kernels.norm import GELU as EXACT_GELU
from dmquant.kernels.operands import NO_OPS, FusedOps
from dmquant.nn.attention import QuantAttention
from dmquant.nn.dispatch import can_fuse, is_fusible, is_readable, run_fused
from dmquant.nn.fused.base import LAST, Fused, images, is_free, is_training, is_watched
from dmquant.quantizers.base import FixedGrid

HIDDEN_BYTES = 8 << 20  # about, of the hidden values between two layers; they stay in the processor's cache
ACTIVATIONS: dict[type, dict[str | None, int]] = {GEGLU: {None: GATED}, GELU: {"none": EXACT_GELU, "tanh": TANH_GELU}}

Gates = tuple[Tensor | None, Tensor | None]  # of attention and of the feed-forward module, (B, C) each
NO_GATES: Gates = (None, None)


class FusedBasicTransformerBlock(Fused, BasicTransformerBlock):
    """Self-attention, cross-attention if there is any, and a feed-forward module on tokens (B, N, C)."""

    def forward_fused(
        self, hidden_states: Tensor, attention_mask: None = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: None = None, timestep: Tensor | None = None, cross_attention_kwargs: dict | None = None,
        class_labels: Tensor | None = None, added_cond_kwargs: dict | None = None,
    ) -> Tensor:  # fmt: skip
        x, gates = hidden_states, NO_GATES
        if self.norm_type == "ada_norm_zero":
            before, between, gates = self._modulate(timestep, class_labels, x)
        else:
            before, between = norm_of(self.norm1), norm_of(self.norm3)
        x = add_attention(self.attn1, x, None, before, gates[0])
        if self.attn2 is not None:
            x = add_attention(self.attn2, x, encoder_hidden_states, norm_of(self.norm2))
        return add_feed_forward(self.ff.net, x, between, gates[1])

    def can_fuse(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None, timestep: Tensor | None = None,
        cross_attention_kwargs: dict | None = None, *args: object, **kwargs: object,
    ) -> bool:  # fmt: skip
        masks = (attention_mask, encoder_attention_mask)
        is_plain = all(mask is None for mask in masks) and not cross_attention_kwargs and not torch.is_grad_enabled()
        is_plain &= hidden_states.device.type == "cpu" and self.norm_type in ("layer_norm", "ada_norm_zero")
        is_plain &= self.pos_embed is None and self._chunk_size is None and not self.only_cross_attention
        if not is_plain or not self._has_plain_norms() or not can_feed_forward(self.ff, hidden_states):
            return False
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        is_fusible = can_attend(self.attn1, hidden_states, hidden_states)
        return is_fusible and (self.attn2 is None or can_attend(self.attn2, hidden_states, context))

    def _has_plain_norms(self) -> bool:
        first = self.norm1.norm if self.norm_type == "ada_norm_zero" else self.norm1
        norms = [norm for norm in (first, self.norm2, self.norm3) if norm is not None]
        is_plain = all(isinstance(norm, nn.LayerNorm) and norm.eps > 0 for norm in norms)
        return is_plain and is_free(*norms) and not is_watched(self.norm1)

    def _modulate(self, timestep: Tensor | None, labels: Tensor | None, x: Tensor) -> tuple[FusedOps, FusedOps, Gates]:
        """Returns the prologues of attention and feed-forward module by an adaptive norm, and their gates (B, C)."""
        time = self.norm1.emb(timestep, labels, hidden_dtype=x.dtype)
        shift, scale, gate, other_shift, other_scale, other_gate = (
            part.contiguous() for part in self.norm1.linear(self.norm1.silu(time)).chunk(6, dim=1)
        )
        first = norm_of(self.norm1.norm, 1 + scale, shift)
        return first, norm_of(self.norm3, 1 + other_scale, other_shift), (gate, other_gate)


class FusedTransformer2DModel(Transformer2DModel):
    """Transformer blocks on an image (B, C, H, W) that stays channels last.

    The first projection computes the norm, the last one adds the residual. diffusers has a method for each of the two, which are
    overridden here instead of `forward`.
    """

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        if not self._can_fuse(self.proj_in, hidden_states):
            plain = super()._operate_on_continuous_inputs(hidden_states)
            if not self._can_fuse(self.proj_in, hidden_states):
                return plain
        x = hidden_states.contiguous(memory_format=LAST)
        before = FusedOps(*moments_of(self.norm, x))
        if isinstance(self.proj_in, nn.Linear):
            tokens = run_fused(self.proj_in, images(x).flatten(1, 2), before)
        else:
            tokens = images(run_fused(self.proj_in, x, before)).flatten(1, 2)
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        sizes = (batch_size, height, width, inner_dim)
        if not self._can_fuse(self.proj_out, residual):
            plain = super()._get_output_for_continuous_inputs(hidden_states, residual, *sizes)
            if not self._can_fuse(self.proj_out, residual):
                return plain
        if isinstance(self.proj_out, nn.Linear):
            tokens = run_fused(self.proj_out, hidden_states, FusedOps(residual=images(residual).flatten(1, 2)))
            return tokens.view(batch_size, height, width, -1).permute(0, 3, 1, 2)
        return run_fused(self.proj_out, hidden_states.reshape(sizes).permute(0, 3, 1, 2), FusedOps(residual=residual))

    def _can_fuse(self, layer: nn.Module, image: Tensor) -> bool:
        return image.device.type == "cpu" and is_free(self.norm) and can_fuse(layer, image)


def norm_of(norm: nn.LayerNorm, gain: Tensor | None = None, offset: Tensor | None = None) -> FusedOps:
    """Returns the prologue of a layer norm on tokens, modulated by a gain and an offset (B, C) if they are given."""
    weight: Tensor | None = norm.weight
    if weight is not None:
        bias = torch.zeros_like(weight) if norm.bias is None else norm.bias
        if gain is None or offset is None:
            gain, offset = weight.view(1, -1), bias.view(1, -1)
        else:
            gain, offset = gain * weight, torch.addcmul(offset, gain, bias)
    return FusedOps(gain, offset, epsilon=norm.eps)


def add_attention(
    attention: Attention, x: Tensor, context: Tensor | None, before: FusedOps, gate: Tensor | None = None
) -> Tensor:
    """Returns x (B, N, C) plus the output of an attention module on the normalized x.

    Args:
        context: (B, M, C') for cross-attention, None for self-attention.
        before: prologue of the projections that read x.
        gate: (B, C) by which the output is multiplied, or None.
    """
    query = run_fused(attention.to_q, x, before)
    source, before = (x, before) if context is None else (context, NO_OPS)
    key, value = (run_fused(layer, source, before) for layer in (attention.to_k, attention.to_v))
    return add_output(attention.to_out[0], attend_heads(attention, query, key, value), x, gate)


def attend_heads(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Computes softmax(q k^T * scale) v of all heads from projected query, key and value (B, N, C): (B, N, C)."""
    heads = (attention.heads, query.shape[2] // attention.heads)
    query, key, value = (part.view(*part.shape[:2], *heads).transpose(1, 2) for part in (query, key, value))
    if isinstance(attention.processor, QuantAttention):
        return attention.processor.attend_heads(query, key, value, attention.scale)
    return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def can_attend(attention: Attention, tokens: Tensor, context: Tensor) -> bool:
    """Returns whether an attention module has no unsupported options or hooks and its projections have kernels."""
    is_plain = has_plain_products(attention) and attention.group_norm is None and not attention.norm_cross
    is_plain = is_plain and not attention.residual_connection and attention.rescale_output_factor == 1
    if not is_plain or is_watched(attention, *attention.to_out) or not (is_readable(tokens) and is_readable(context)):
        return False
    pairs = ((attention.to_q, tokens), (attention.to_k, context), (attention.to_v, context), (attention.to_out[0], tokens))
    return all(is_fusible(layer, x) for layer, x in pairs)


def has_plain_products(attention: Attention) -> bool:
    """Returns whether an attention module has no norms or dropout around its products, and a known processor."""
    is_known = isinstance(attention.processor, QuantAttention) or type(attention.processor) in (AttnProcessor, AttnProcessor2_0)
    norms = (attention.spatial_norm, attention.norm_q, attention.norm_k)
    return is_known and all(norm is None for norm in norms) and not is_training(attention.to_out[1])


def add_feed_forward(net: nn.ModuleList, x: Tensor, before: FusedOps, gate: Tensor | None) -> Tensor:
    """Returns x (B, N, C) plus the output of a feed-forward module of two layers on the normalized x.

    Tokens are computed in groups of about HIDDEN_BYTES.
    """
    first, last, activation = first_layer(net), net[2], activation_of(net[0]) or 0
    if gate is None and is_same_for_all(first, last):
        return add_feed_forward_per_token(first, last, activation, x, before)
    count = count_at_a_time(len(x) * first.out_features)
    parts = [add_output(last, run_fused(first, some, before), some, gate, activation) for some in x.split(count, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def first_layer(net: nn.ModuleList) -> nn.Linear:
    """Returns the layer before the activation of a feed-forward module."""
    activation: Any = net[0]
    return activation.proj


def count_at_a_time(values: int) -> int:
    """Returns the number of tokens of a group, a multiple of ROW so that no tile of a kernel is filled up.

    Args:
        values: hidden values per token.
    """
    return fill_up(max(1, HIDDEN_BYTES // (4 * values)), ROW)


def is_same_for_all(*layers: nn.Module) -> bool:
    """Returns whether layers compute the same for every image. False while compiling: a graph writes to no part of a tensor."""
    return all(type(layer.input) is FixedGrid for layer in layers) and not torch.compiler.is_compiling()


def add_feed_forward_per_token(first: nn.Linear, last: nn.Module, activation: int, x: Tensor, before: FusedOps) -> Tensor:
    """Computes `add_feed_forward` where the result of a token does not depend on its image: groups are slices of all tokens."""
    out, count = buffer_pool.empty(x.shape), count_at_a_time(first.out_features)
    hidden = buffer_pool.empty((min(count, x.shape[:-1].numel()), first.out_features))
    for some, part in zip(*(tokens.reshape(-1, tokens.shape[-1]).split(count) for tokens in (x, out))):
        between = run_fused(first, some, before, out=hidden[: len(some)])
        run_fused(last, between, FusedOps(activation=activation, residual=some), out=part)
    return out


def can_feed_forward(feed: FeedForward, tokens: Tensor) -> bool:
    """Returns whether kernels support the activation of a feed-forward module and both its layers."""
    if is_watched(*feed.modules()) or is_training(feed.net[1]) or activation_of(feed.net[0]) is None or len(feed.net) != 3:
        return False
    return can_fuse(first_layer(feed.net), tokens) and can_fuse(feed.net[2], tokens)


def add_output(layer: nn.Module, x: Tensor, residual: Tensor, gate: Tensor | None, activation: int = 0) -> Tensor:
    """Returns residual + layer(activation(x)) * gate. gate: (B, C), or None for 1."""
    if gate is None:
        return run_fused(layer, x, FusedOps(activation=activation, residual=residual))
    return torch.addcmul(residual, gate.unsqueeze(1), run_fused(layer, x, FusedOps(activation=activation)))


def activation_of(module: nn.Module) -> int | None:
    """Returns the number of the activation after the first layer of a feed-forward module; None if kernels do not support it."""
    return ACTIVATIONS.get(type(module), {}).get(getattr(module, "approximate", None))
