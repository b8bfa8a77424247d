"""LSQ (Esser et al., 2020) with the offsets of LSQ+ (Bhalgat et al., 2020): all step sizes are trained."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from dmquant.methods.base import Method, setting
from dmquant.nn.fake_quant_layers import Layer
from dmquant.nn.scheme import FLOAT_BITS
from dmquant.quantizers.binary import Binary
from dmquant.quantizers.timestep_clock import Clock
from dmquant.quantizers.uniform import LearnedStep


@dataclass(frozen=True, kw_only=True)
class LSQ(Method):
    """Learned step size quantization with settings for its variants. Binary weights have a trained scale and a sign."""

    name: ClassVar[str] = "lsq"

    init: Literal["mse", "minmax", "lsq"] = setting("mse", "initial step: least squared error, full range or 2 mean|v| / sqrt(Q)")
    per_channel: bool = setting(True, "one weight step per output channel; false: one per layer")
    act_offset: bool = setting(True, "activations have a trained offset (LSQ+); false: signed grids (LSQ)")

    def weight_quantizer(self, layer: Layer, bits: int) -> nn.Module:
        if bits == FLOAT_BITS:
            return nn.Identity()
        num_channels, ndim = len(layer.weight) if self.per_channel else 1, layer.weight.ndim
        # a symmetric one-bit grid would be {-s, 0}; the papers compare with a sign and a trained scale
        if bits == 1:
            return Binary(num_channels=num_channels, ndim=ndim)
        return LearnedStep(bits, init=self.init, num_channels=num_channels, ndim=ndim)

    def input_quantizer(self, layer: Layer, bits: int, clock: Clock) -> nn.Module:
        return nn.Identity() if bits == FLOAT_BITS else LearnedStep(bits, symmetric=not self.act_offset, init=self.init)
