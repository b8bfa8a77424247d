"""UNet blocks of diffusers whose norm, activation and residual are computed by the kernels of their layers.

State: `fuse` assigns another class to `__class__` of each block; `unfuse` assigns the original class again, and
DMQUANT_KERNELS=torch makes every block run by the code of diffusers. A new module in place of a block would have to share its
parameters, hooks and device moves with the old one, and references to blocks that diffusers and users hold would become stale. A
class has none of these problems: modules, names and files stay as they are. It costs a check of each block at each call; without
it a call takes 26 to 39 % more processor time (CIFAR-10 and embedded pipeline, W1A4 and W4A4, batch 4, one thread).

A block runs by the code of diffusers where a layer has no kernel or has hooks, gradients are on, or an option is not supported.
Not fused: the norm and activation before the last convolution (they belong to the root module), and attention processors other
than the plain ones and QuantAttention. Query, key and value quantize the tokens three times, because they have separate grids.
"""

from dataclasses import replace
from typing import Any

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
from dmquant.nn.dispatch import can_fuse, run_fused
from dmquant.nn.fused.base import LAST, Fused, images, is_free, is_training, is_watched
from dmquant.nn.fused.transformer import FusedBasicTransformerBlock, FusedTransformer2DModel, attend_heads, has_plain_products
from dmquant.nn.layer_shape import geometry_of


class FusedResnetBlock2D(Fused, ResnetBlock2D):
    """A residual block as two kernel calls with norm and activation in the prologue; the second one adds the residual."""

    def forward_fused(self, input_tensor: Tensor, temb: Tensor | None, *args: object, **kwargs: object) -> Tensor:
        x = input_tensor.contiguous(memory_format=LAST)
        own: dict[str, Any] = self._modules  # attribute access on a module is slow
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

    def _embed(self, temb: Tensor | None) -> Tensor:
        """Returns the projected time embedding: plus the first bias (B, O), or scale and shift of the second norm (B, 2 O)."""
        assert temb is not None  # diffusers gives an embedding to every block with a projection
        layer, bias = self.time_emb_proj, self.conv1.bias
        if self.skip_time_act:
            time = layer(temb)
        elif is_watched(self.nonlinearity) or not can_fuse(layer, temb):
            time = layer(self.nonlinearity(temb))
        else:
            time = run_fused(layer, temb, FusedOps(activation=SILU))
        return time if bias is None or self.time_embedding_norm == "scale_shift" else bias + time


class FusedAttention(Fused, Attention):
    """An attention block: the projections normalize and quantize the tokens, the output projection adds the residual."""

    def forward_fused(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        tokens = images(hidden_states.contiguous(memory_format=LAST)).flatten(1, 2)  # (B, N, C)
        gain, offset = moments_of(self.group_norm, tokens)
        query, key, value = (run_fused(layer, tokens, FusedOps(gain, offset)) for layer in (self.to_q, self.to_k, self.to_v))
        answer = attend_heads(self, query, key, value)
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
    """An upsampling block as one kernel call that enlarges in its prologue; the enlarged image is not written."""

    def forward_fused(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return run_fused(self._last_conv, hidden_states.contiguous(memory_format=LAST), FusedOps(upsample=2))

    def can_fuse(self, hidden_states: Tensor, output_size: int | None = None, *args: object, **kwargs: object) -> bool:
        is_plain = self.use_conv and self.interpolate and not self.use_conv_transpose and self.norm is None
        return is_plain and output_size is None and not torch.is_grad_enabled() and can_fuse(self._last_conv, hidden_states)

    @property
    def _last_conv(self) -> nn.Module:
        return self.conv if self.name == "conv" else self.Conv2d_0


class FusedDownsample2D(Fused, Downsample2D):
    """A downsampling block as one kernel call with asymmetric padding; the padded image is not written."""

    def forward_fused(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return run_fused(self.conv, hidden_states, geometry=replace(geometry_of(self.conv), padding=(0, 1, 0, 1)))

    def can_fuse(self, hidden_states: Tensor, *args: object, **kwargs: object) -> bool:
        is_padded = self.use_conv and self.padding == 0 and self.norm is None
        return is_padded and not torch.is_grad_enabled() and can_fuse(self.conv, hidden_states)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    ResnetBlock2D: FusedResnetBlock2D, Attention: FusedAttention, Upsample2D: FusedUpsample2D, Downsample2D: FusedDownsample2D,
    BasicTransformerBlock: FusedBasicTransformerBlock, Transformer2DModel: FusedTransformer2DModel,
}  # fmt: skip
PLAIN = {fused: plain for plain, fused in FUSED.items()}


def fuse(denoiser: nn.Module) -> None:
    """Replaces the classes of a packed denoiser's blocks by fused ones. Parameters, names and saved files do not change."""
    _replace_classes(denoiser, FUSED)


def unfuse(denoiser: nn.Module) -> None:
    """Undoes `fuse`."""
    _replace_classes(denoiser, PLAIN)


def _replace_classes(denoiser: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in denoiser.modules():
        module.__class__ = classes.get(type(module), type(module))
