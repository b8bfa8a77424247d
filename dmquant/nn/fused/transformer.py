"""Transformer blocks of diffusers by kernels: the modulation, the activation and the residual are done on the way.

A layer norm is done to what is read, by each projection that reads it: that takes less time than writing it once and reading
that thrice. So are scales and shifts of an adaptive norm; its gates need a pass over the output.
"""

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

HIDDEN_BYTES = 8 << 20  # between two layers, about: little enough to stay in a cache
ACTIVATIONS = {GEGLU: {None: GATED}, GELU: {"none": EXACT_GELU, "tanh": TANH_GELU}}


class FusedBasicTransformerBlock(Fused, BasicTransformerBlock):
    """Attention to itself, to a context if there is one, and a feed-forward layer: (B, N, C)."""

    def run(
        self, hidden_states: Tensor, attention_mask: None = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: None = None, timestep: Tensor | None = None, cross_attention_kwargs: dict | None = None,
        class_labels: Tensor | None = None, added_cond_kwargs: dict | None = None,
    ) -> Tensor:  # fmt: skip
        x, gates = hidden_states, (None, None)
        if self.norm_type == "ada_norm_zero":
            before, between, gates = self._modulate(timestep, class_labels, x)
        else:
            before, between = norm_of(self.norm1), norm_of(self.norm3)
        x = attend(self.attn1, x, None, before, gates[0])
        if self.attn2 is not None:
            x = attend(self.attn2, x, encoder_hidden_states, norm_of(self.norm2))
        return feed_forward(self.ff.net, x, between, gates[1])

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

    def _modulate(self, timestep: Tensor, labels: Tensor, x: Tensor) -> tuple[FusedOps, FusedOps, tuple[Tensor, Tensor]]:
        """What an adaptive norm does before attention and before the feed-forward layer, and the gates behind both."""
        time = self.norm1.emb(timestep, labels, hidden_dtype=x.dtype)
        shift, scale, gate, other_shift, other_scale, other_gate = (
            part.contiguous() for part in self.norm1.linear(self.norm1.silu(time)).chunk(6, dim=1)
        )
        first = norm_of(self.norm1.norm, 1 + scale, shift)
        return first, norm_of(self.norm3, 1 + other_scale, other_shift), (gate, other_gate)


class FusedTransformer2DModel(Transformer2DModel):
    """Transformer blocks on an image: its norm goes into the first projection, its residual into the last, and no image is
    turned to channels first in between. diffusers asks for both by methods of their own."""

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
    """What a kernel has to do to tokens for them to be normed, and modulated by a gain and an offset (B, C) if there are any."""
    if norm.weight is not None:
        weight, bias = norm.weight, torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        pair = (weight, bias) if gain is None else (gain * weight, torch.addcmul(offset, gain, bias))
        gain, offset = (x.view(-1, len(weight)) for x in pair)
    return FusedOps(gain, offset, epsilon=norm.eps)


def attend(attention: Attention, x: Tensor, context: Tensor | None, before: FusedOps, gate: Tensor | None = None) -> Tensor:
    """x (B, N, C) plus what attention makes of it, once normed, and of a context; without one, of itself."""
    query = run_fused(attention.to_q, x, before)
    source, before = (x, before) if context is None else (context, NO_OPS)
    key, value = (run_fused(layer, source, before) for layer in (attention.to_k, attention.to_v))
    return add(attention.to_out[0], multiply(attention, query, key, value), x, gate)


def multiply(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The products of all heads, of factors (B, N, C): (B, N, C)."""
    heads = (attention.heads, query.shape[2] // attention.heads)
    query, key, value = (part.view(*part.shape[:2], *heads).transpose(1, 2) for part in (query, key, value))
    if isinstance(attention.processor, QuantAttention):
        return attention.processor.multiply(query, key, value, attention.scale)
    return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def can_attend(attention: Attention, tokens: Tensor, context: Tensor) -> bool:
    """Whether attention to a context is the plain one and its projections have kernels."""
    is_plain = has_plain_products(attention) and attention.group_norm is None and not attention.norm_cross
    is_plain = is_plain and not attention.residual_connection and attention.rescale_output_factor == 1
    if not is_plain or is_watched(attention, *attention.to_out) or not (is_readable(tokens) and is_readable(context)):
        return False
    pairs = ((attention.to_q, tokens), (attention.to_k, context), (attention.to_v, context), (attention.to_out[0], tokens))
    return all(is_fusible(layer, x) for layer, x in pairs)


def has_plain_products(attention: Attention) -> bool:
    """Whether nothing stands between the projections of an attention and its products."""
    is_known = isinstance(attention.processor, QuantAttention) or type(attention.processor) in (AttnProcessor, AttnProcessor2_0)
    norms = (attention.spatial_norm, attention.norm_q, attention.norm_k)
    return is_known and all(norm is None for norm in norms) and not is_training(attention.to_out[1])


def feed_forward(net: nn.ModuleList, x: Tensor, before: FusedOps, gate: Tensor | None) -> Tensor:
    """x (B, N, C) plus what two layers and the activation between them make of it, once normed, some tokens at a time."""
    first, last, activation = net[0].proj, net[2], activation_of(net[0])
    if gate is None and is_same_for_all(first, last):
        return feed_rows(first, last, activation, x, before)
    count = count_at_a_time(len(x) * first.out_features)
    parts = [add(last, run_fused(first, some, before), some, gate, activation) for some in x.split(count, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def count_at_a_time(values: int) -> int:
    """How many tokens of so many hidden values: whole rows, so that no tile of a kernel is filled up."""
    return fill_up(max(1, HIDDEN_BYTES // (4 * values)), ROW)


def is_same_for_all(*layers: nn.Module) -> bool:
    """Whether layers do the same to every image; a graph that is compiled writes to no part of a tensor."""
    return all(type(layer.input) is FixedGrid for layer in layers) and not torch.compiler.is_compiling()


def feed_rows(first: nn.Module, last: nn.Module, activation: int, x: Tensor, before: FusedOps) -> Tensor:
    """The same where nobody asks to which image a token belongs: parts lie in one piece, and so does what is made of them."""
    out, count = buffer_pool.empty(x.shape), count_at_a_time(first.out_features)
    hidden = buffer_pool.empty((min(count, x.shape[:-1].numel()), first.out_features))
    for some, part in zip(*(tokens.reshape(-1, tokens.shape[-1]).split(count) for tokens in (x, out))):
        between = run_fused(first, some, before, out=hidden[: len(some)])
        run_fused(last, between, FusedOps(activation=activation, residual=some), out=part)
    return out


def can_feed_forward(feed: FeedForward, tokens: Tensor) -> bool:
    """Whether a kernel knows the activation of a feed-forward layer and both its layers have one."""
    if is_watched(*feed.modules()) or is_training(feed.net[1]) or activation_of(feed.net[0]) is None or len(feed.net) != 3:
        return False
    return can_fuse(feed.net[0].proj, tokens) and can_fuse(feed.net[2], tokens)


def add(layer: nn.Module, x: Tensor, residual: Tensor, gate: Tensor | None, activation: int = 0) -> Tensor:
    """The residual plus a layer's output, times a gate (B, C) if there is one."""
    if gate is None:
        return run_fused(layer, x, FusedOps(activation=activation, residual=residual))
    return torch.addcmul(residual, gate.unsqueeze(1), run_fused(layer, x, FusedOps(activation=activation)))


def activation_of(module: nn.Module) -> int | None:
    """The number of the activation behind the first layer of a feed-forward module; None if no kernel knows it."""
    return ACTIVATIONS.get(type(module), {}).get(getattr(module, "approximate", None))
