"""LSQ with weight steps that are powers of two: hardware can shift by them instead of multiplying."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from dmquant.methods.base import Method, setting
from dmquant.quantizers.uniform import LearnedStep


class PowerOfTwoStep(LearnedStep):
    """Rounds the learned step to the nearest power of two. The gradient passes as if it did not."""

    def grid(self) -> tuple[Tensor, Tensor]:
        scale, zero = super().grid()
        return scale.log2().round().exp2(), zero


@dataclass(frozen=True, kw_only=True)
class Example(Method):
    name: ClassVar[str] = "example"

    power_of_two: bool = setting(True, "weight steps are powers of two; false: any step, as in LSQ")

    def weight_quantizer(self, layer: nn.Module, bits: int) -> nn.Module:
        if not self.power_of_two or not 2 <= bits <= 8:  # one bit is a sign and a scale, 32 bits are float
            return super().weight_quantizer(layer, bits)
        return PowerOfTwoStep(bits, num_channels=len(layer.weight), ndim=layer.weight.ndim)
