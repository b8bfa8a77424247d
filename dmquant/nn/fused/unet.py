"""Blocks of diffusers that hand a kernel their norm, their activation and their residual, instead of running them one by one.

`fuse` changes the class of a block and nothing else; `unfuse` changes it back. A fused block asks at every call: where a layer
has no kernel, is watched by a hook, or anything else is out of the ordinary, the block runs as diffusers wrote it.

Not fused: the norm and the activation before the last convolution (they belong to the root), processors of attention other than
the plain ones and ours. Query, key and value each quantize the tokens for themselves: they have grids of their own.
"""

from dataclasses import replace

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from dmquant.kernels.norm import SILU, moments_of
from dmquant.kernels.operands import FusedOps
from dmquant.nn.dispatch import can_fuse, geometry_of, run_fused
from dmquant.nn.fused.base import LAST, Fused, images, is_free, is_training, is_watched
from dmquant.nn.fused.transformer import FusedBasicTransformerBlock, FusedTransformer2DModel, has_plain_products, multiply


class FusedResnetBlock2D(Fused, ResnetBlock2D):
    """Two kernel calls: each normalizes, activates and quantizes what it reads, the second adds the residual."""

    def run(self, input_tensor: Tensor, temb: Tensor | None, *args: object, **kwargs: object) -> Tensor:
        x = input_tensor.contiguous(memory_format=LAST)
        own = self._modules  # to ask a module for its parts by name takes its time
        time = None if self.time_emb_proj is None else self._embed(temb)
        is_scaled = self.time_embedding_norm == "scale_shift"
        gain, offset = moments_of(own["norm1"], x)
        bias = None if is_scaled else time
        hidden = run_fused(own["conv1"], x, FusedOps(gain, offset, SILU), bias=bias)
        gain, offset = moments_of(own["norm2"], hidden)
        if time is not None and is_scaled:
            scale, shift = time.chunk(2, dim=1)
            gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        out = run_fused(own["conv2"], hidden, FusedOps(gain, offset, SILU, residual=residual))
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor

    def can_fuse(self, input_tensor: Tensor, *args: object, **kwargs: object) -> bool:
        is_plain = self.upsample is None and self.downsample is None and isinstance(self.nonlinearity, nn.SiLU)
        is_plain &= self.time_embedding_norm in ("default", "scale_shift") and not is_training(self.dropout)
        layers = (self.conv1, self.conv2)
        return is_plain and is_free(self.norm1, self.norm2) and all(can_fuse(layer, input_tensor) for layer in layers)

    def _embed(self, temb: Tensor) -> Tensor:
        """The bias of the first convolution with what the time adds to it (N, O), or scales and shifts of the second (N, 2 O)."""
        layer, bias = self.time_emb_proj, self.conv1.bias
        if self.skip_time_act:
            time = layer(temb)
        elif is_watched(self.nonlinearity) or not can_fuse(layer, temb):
            time = layer(self.nonlinearity(temb))
        else:
            time = run_fused(layer, temb, FusedOps(activation=SILU))
        return time if bias is None or self.time_embedding_norm == "scale_shift" else bias + time


class FusedAttention(Fused, Attention):
    """Three kernel calls that normalize and quantize the tokens, the products of attention, and one that adds the residual."""

    def run(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        tokens = images(hidden_states.contiguous(memory_format=LAST)).flatten(1, 2)  # (N, tokens, C)
        gain, offset = moments_of(self.group_norm, tokens)
        query, key, value = (
            run_fused(layer, tokens, FusedOps(gain, offset)) for layer in (self.to_q, self.to_k, self.to_v)
        )
        answer = multiply(self, query, key, value)
        answer = run_fused(self.to_out[0], answer, FusedOps(residual=tokens if self.residual_connection else None))
        answer = answer if self.rescale_output_factor == 1 else answer / self.rescale_output_factor
        return answer.unflatten(1, hidden_states.shape[2:]).permute(0, 3, 1, 2)

    def can_fuse(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> bool:  # fmt: skip
        if encoder_hidden_states is not None or attention_mask is not None or hidden_states.dim() != 4:
            return False
        is_plain = has_plain_products(self) and self.group_norm is not None and is_free(self.group_norm)
        layers = (self.to_q, self.to_k, self.to_v, self.to_out[0])
        return is_plain and all(can_fuse(layer, hidden_states) for layer in layers)


class FusedUpsample2D(Fused, Upsample2D):
    """A kernel call that reads each pixel four times: the enlarged image is never written."""

    def run(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return run_fused(self._last_conv, hidden_states.contiguous(memory_format=LAST), FusedOps(upsample=2))

    def can_fuse(self, hidden_states: Tensor, output_size: int | None = None, *args: object, **kwargs: object) -> bool:
        is_plain = self.use_conv and self.interpolate and not self.use_conv_transpose and self.norm is None
        return is_plain and output_size is None and not torch.is_grad_enabled() and can_fuse(self._last_conv, hidden_states)

    @property
    def _last_conv(self) -> nn.Module:
        return self.conv if self.name == "conv" else self.Conv2d_0


class FusedDownsample2D(Fused, Downsample2D):
    """A kernel call that knows of the row and the column of zeros: the padded image is never written."""

    def run(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return run_fused(self.conv, hidden_states, geometry=replace(geometry_of(self.conv), padding=(0, 1, 0, 1)))

    def can_fuse(self, hidden_states: Tensor, *args: object, **kwargs: object) -> bool:
        is_padded = self.use_conv and self.padding == 0 and self.norm is None
        return is_padded and not torch.is_grad_enabled() and can_fuse(self.conv, hidden_states)


FUSED = {
    ResnetBlock2D: FusedResnetBlock2D, Attention: FusedAttention, Upsample2D: FusedUpsample2D, Downsample2D: FusedDownsample2D,
    BasicTransformerBlock: FusedBasicTransformerBlock, Transformer2DModel: FusedTransformer2DModel,
}  # fmt: skip
PLAIN = {fused: plain for plain, fused in FUSED.items()}


def fuse(denoiser: nn.Module) -> None:
    """Makes the blocks of a packed denoiser fuse what they can. Parameters, names and everything saved stay as they are."""
    _change(denoiser, FUSED)


def unfuse(denoiser: nn.Module) -> None:
    """Makes them run as diffusers wrote them."""
    _change(denoiser, PLAIN)


def _change(denoiser: nn.Module, kinds: dict[type, type]) -> None:
    for module in denoiser.modules():
        module.__class__ = kinds.get(type(module), type(module))
