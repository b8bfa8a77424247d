"""Attention products on integer grids: the factors of q k^T and p v are no layers, so their quantizers live in the processor."""

from collections.abc import Callable
from functools import partial

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from dmquant.kernels import attention
from dmquant.kernels.attention import Products

PLAIN = (AttnProcessor, AttnProcessor2_0)  # the processors whose arithmetic is the one below
FACTORS = ("query", "key", "probability", "value")


class QuantInput(nn.Module):
    """One factor of a product, with its quantizer."""

    def __init__(self, input_quantizer: nn.Module):
        super().__init__()
        self.input_quantizer = input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.input_quantizer(x)


class QuantAttention(Products):
    """An attention processor of diffusers that quantizes query, key, probabilities and value before they are multiplied.

    The softmax is exact, in float32. Projections are layers of their own and not this module's business. A kernel multiplies the
    codes where there is one.
    """

    def __init__(self, make: Callable[[], nn.Module], replaces: AttnProcessor | AttnProcessor2_0):
        super().__init__()
        self.query, self.key, self.probability, self.value = (QuantInput(make()) for _ in range(4))
        self.replaces = replaces

    # not `forward`: diffusers reads this signature to find out what it may pass
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
        """The products of all heads, projections and norms of queries and keys before them: (B, N, C)."""
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
        return self.multiply(query, key, value, attn.scale, mask)

    def multiply(self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """softmax(q k^T * scale + mask) v of factors (B, heads, N, C / heads): (B, N, C)."""
        factors = [self._modules[name] for name in FACTORS]  # to ask a module for its parts by name takes its time
        is_watched = any(factor._forward_hooks or factor._forward_pre_hooks for factor in factors)
        if mask is None and not is_watched:
            found = attention.run(query, key, value, [factor._modules["input_quantizer"] for factor in factors], scale)
            if found is not None:
                return found
        scores = self.query(query) @ self.key(key).transpose(-1, -2) * scale
        if mask is not None:
            scores = scores + mask
        probability = scores.float().softmax(-1).to(value.dtype)
        return (self.probability(probability) @ self.value(value)).transpose(1, 2).flatten(2)


def find_attentions(denoiser: nn.Module) -> dict[str, Attention]:
    """Attention modules whose products can be quantized, or are, by name in module order."""
    return {
        name: module for name, module in denoiser.named_modules()
        if isinstance(module, Attention) and isinstance(module.processor, (*PLAIN, QuantAttention))
    }  # fmt: skip


def quantize_products(denoiser: nn.Module, make: Callable[[int], nn.Module]) -> None:
    """Gives every attention a processor with quantizers made by `make`, which is told the number of heads."""
    for attention in find_attentions(denoiser).values():
        device = next(attention.parameters()).device
        attention.set_processor(QuantAttention(partial(make, attention.heads), attention.processor).to(device))


def restore_products(denoiser: nn.Module) -> None:
    """Gives every attention back the processor that it had."""
    for attention in find_attentions(denoiser).values():
        if isinstance(attention.processor, QuantAttention):
            attention.set_processor(attention.processor.replaces)


def product_bits(denoiser: nn.Module) -> int | None:
    """Bits of the factors of the attention products; None where they are float."""
    grids = (module.input_quantizer for module in denoiser.modules() if isinstance(module, QuantInput))
    return next((grid.bits for grid in grids), None)
