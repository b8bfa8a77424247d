"""Up blocks of diffusers whose residual blocks read what comes from below and what comes over a skip where each of them lies.

diffusers concatenates the two before it calls a residual block, which then reads them again for the moments of its norm, for its
first convolution and for its shortcut. A block that cannot do without gets the concatenation.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, nn

from dmquant.nn.fused.base import LAST, Fused

FREE_U = ("s1", "s2", "b1", "b2")  # factors of an up block, if it changes what comes over skips
Step = Callable[[Tensor], Tensor]


class Climbing(Fused):
    """An up block that calls its residual blocks itself, unless it changes what it hands them."""

    def can_fuse(self, hidden_states: Tensor, skips: object = None, *args: object, **kwargs: object) -> bool:
        is_changed = all(getattr(self, name, None) for name in FREE_U)
        return hidden_states.device.type == "cpu" and not is_changed and not torch.is_grad_enabled()


class FusedUpBlock2D(Climbing, UpBlock2D):
    """Residual blocks alone."""

    def run(
        self, hidden_states: Tensor, res_hidden_states_tuple: Sequence[Tensor], temb: Tensor | None = None,
        upsample_size: int | None = None, *args: object, **kwargs: object,
    ) -> Tensor:  # fmt: skip
        x = climb(self.resnets, hidden_states, res_hidden_states_tuple, temb)
        return enlarge(self.upsamplers, x, upsample_size)


class FusedAttnUpBlock2D(Climbing, AttnUpBlock2D):
    """An attention behind each of them."""

    def run(
        self, hidden_states: Tensor, res_hidden_states_tuple: Sequence[Tensor], temb: Tensor | None = None,
        upsample_size: int | None = None, *args: object, **kwargs: object,
    ) -> Tensor:  # fmt: skip
        x = climb(self.resnets, hidden_states, res_hidden_states_tuple, temb, self.attentions)
        return enlarge(self.upsamplers, x, **({"temb": temb} if self.upsample_type == "resnet" else {}))


class FusedCrossAttnUpBlock2D(Climbing, CrossAttnUpBlock2D):
    """Transformer blocks behind each of them."""

    def run(
        self, hidden_states: Tensor, res_hidden_states_tuple: Sequence[Tensor], temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None, cross_attention_kwargs: dict | None = None,
        upsample_size: int | None = None, attention_mask: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        context = {
            "encoder_hidden_states": encoder_hidden_states, "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": attention_mask, "encoder_attention_mask": encoder_attention_mask, "return_dict": False,
        }  # fmt: skip
        steps = [lambda x, attention=attention: attention(x, **context)[0] for attention in self.attentions]
        x = climb(self.resnets, hidden_states, res_hidden_states_tuple, temb, steps)
        return enlarge(self.upsamplers, x, upsample_size)


def climb(
    resnets: nn.ModuleList, x: Tensor, skips: Sequence[Tensor], temb: Tensor | None, steps: Sequence[Step] | None = None
) -> Tensor:
    """Residual blocks, each on what the one before it gave and on the last skip left, and a step behind each."""
    for number, (resnet, skip) in enumerate(zip(resnets, reversed(skips))):
        if isinstance(resnet, Fused) and resnet.can_join(x, skip):
            x = resnet.run(x, temb, skip=skip.contiguous(memory_format=LAST))
        else:
            x = resnet(torch.cat([x, skip], 1), temb)
        x = x if steps is None else steps[number](x)
    return x


def enlarge(upsamplers: nn.ModuleList | None, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    for upsampler in upsamplers or ():
        x = upsampler(x, *args, **kwargs)
    return x
