"""Quantizer and grid with a scale and a zero per calibrated timestep.

The range of a layer's input changes during sampling. The clock holds the step of each sample of a batch, so a batch of mixed
timesteps gives the same result as its samples one by one. Sources: the temporal LSQ of EfficientDM (He et al., 2024) and the
temporal parallel quantizer of DilateQuant (Liu et al., 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmquant.kernels.packing import check_bits
from dmquant.kernels.rounding import quantize, widen
from dmquant.quantizers.base import SMALLEST_SCALE, Codes, Context, FixedGrid, Quantizer
from dmquant.quantizers.timestep_clock import Clock, Timed
from dmquant.quantizers.traits import GridSite, GridTrait
from dmquant.quantizers.uniform import INIT_AFFINE, INITIALISATIONS


@dataclass(frozen=True)
class PerTimestep(GridTrait):
    """The stored grid has one row per calibrated timestep."""

    name = "temporal"
    needs_clock = True

    def make_grid(self, make_part: Callable[[], FixedGrid], site: GridSite) -> nn.Module:
        if site.clock is None:
            raise ValueError("a grid per timestep needs the clock that it follows")
        return TemporalGrid(site.bits, site.clock, site.device)


class TemporalStep(Quantizer, Timed):
    """An affine grid (scale, zero) per timestep and layer, both learned: tables over the S steps of the clock.

    The scale is exp(log_scale), so that updates are relative and the scale stays positive; the absolute rate of the public code,
    5e-4, can change its sign. The zero point is rounded (straight-through), so that zero padding and integer kernels stay exact;
    the paper's zero is real, its formula has scales only.
    """

    traits = (PerTimestep(),)

    def __init__(self, bits: int, clock: Clock, *, init: str = "mse"):
        super().__init__()
        check_bits(bits)
        if init not in INITIALISATIONS:
            raise ValueError(f"init must be one of {', '.join(INITIALISATIONS)}, got {init!r}")
        self.bits, self.init = bits, init
        self.log_scale = nn.Parameter(torch.zeros(len(clock.timesteps)))
        self.zero = nn.Parameter(torch.zeros(len(clock.timesteps)))
        self.follow(clock)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Sets the grid of each step from the samples at that step; a step without samples copies the nearest one.

        The clock must be set to the timesteps of the samples.
        """
        steps = torch.arange(len(self.clock.timesteps), dtype=torch.float32, device=self.clock.timesteps.device)
        step = self._read(steps, x).round().long()
        seen, counts = step.unique(return_counts=True)
        for count in counts.unique():  # steps with equally many samples are searched together
            here = seen[counts == count]
            rows = torch.stack([x[step == index].detach().float().flatten() for index in here])
            low, high = INIT_AFFINE[self.init](rows, self.bits)
            scale = ((high - low) / self.max_code).clamp(min=SMALLEST_SCALE)
            self.log_scale[here], self.zero[here] = scale.log().to(self.log_scale), (-low / scale).to(self.zero)
        distance = (self.clock.timesteps.unsqueeze(1) - self.clock.timesteps[seen]).abs()
        nearest = seen[distance.argmin(1)]
        self.log_scale.copy_(self.log_scale[nearest])
        self.zero.copy_(self.zero[nearest])

    def tables(self) -> tuple[Tensor, Tensor]:
        """Returns scale and zero per step (S,) as floats; zeros are whole codes."""
        scale = widen(self.log_scale).exp().clamp(min=SMALLEST_SCALE)
        return scale, widen(self.zero).round().clamp(0, self.max_code)

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = (self._read(table, x).detach() for table in self.tables())
        return _FakeQuantize.apply(x, self._read(self.log_scale, x), self._read(self.zero, x), scale, zero.round(), self.bits)

    def encode(self, x: Tensor) -> Codes:
        scale, zero = (self._read(table, x).detach() for table in self.tables())
        scale, zero = per_sample(scale, x), per_sample(zero.round(), x)
        return Codes(quantize(widen(x), scale, zero, self.bits).to(torch.uint8), scale, zero, self.bits)

    def freeze(self) -> "TemporalGrid":
        fixed = TemporalGrid(self.bits, self.clock, self.log_scale.device)
        for table, value in zip((fixed.scale, fixed.zero), self.tables()):
            table.copy_(value.detach())
        return fixed

    def sizes(self) -> dict[str, float]:
        """Returns 1 for log_scale, which is relative already, and the mean of |zero| in codes, at least 1."""
        return {"log_scale": 1.0, "zero": max(1.0, self.zero.detach().abs().mean().item())}

    def _read(self, table: Tensor, x: Tensor) -> Tensor:
        return self.clock.read_table(table, len(x))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, steps={len(self.log_scale)}"


class TemporalGrid(FixedGrid, Timed):
    """A grid per timestep for inference: tables of scales and zeros (S,) that stay float32."""

    traits = (PerTimestep(),)

    def __init__(self, bits: int, clock: Clock, device: torch.device | str | None = None):
        super().__init__(bits, device)
        self.register_buffer("scale", torch.ones(len(clock.timesteps), device=device))
        self.register_buffer("zero", torch.zeros(len(clock.timesteps), device=device))
        self.follow(clock)

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns scale and zero (count,) for the rows of an input."""
        return self.clock.read_table(self.scale, count), self.clock.read_table(self.zero, count).round()

    def row(self) -> tuple[Tensor, Tensor] | None:
        """Returns scale and zero (1,) that all samples share; None if they differ, on a GPU, and while compiling."""
        if torch.compiler.is_compiling():
            return None
        scale, zero = self.clock.read_shared(self.scale), self.clock.read_shared(self.zero)
        return None if scale is None or zero is None else (scale, zero.round())

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = (per_sample(rows, x) for rows in self.rows(len(x)))
        return quantize(widen(x), scale, zero, self.bits).sub_(zero).mul_(scale).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    """Quantizes and dequantizes with a grid per sample, in four in-place passes over one new buffer.

    With y the output and g* the incoming gradient where x lies inside the range (zero elsewhere), each sample's row gets
    d log_scale = sum(g y - g* x)  and  d zero = -scale * sum(g - g*),  over 1 / sqrt(n * max_code) as in LSQ, n the values of
    a sample. Reading the tables is ordinary autograd: rows that no sample reads get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, log_scale: Tensor, latent_zero: Tensor, scale: Tensor, zero: Tensor, bits: int
    ) -> Tensor:
        column, shift = per_sample(scale, x), per_sample(zero, x)
        y = quantize(widen(x), column, shift, bits).sub_(shift).mul_(column).to(x.dtype)
        ctx.save_for_backward(x, y, scale, zero)
        ctx.max_code = (1 << bits) - 1
        return y

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, zero = ctx.saved_tensors
        inside = clip_samples(gradient, x, -zero * scale, (ctx.max_code - zero) * scale)
        by_scale = by_zero = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            factor = (x[0].numel() * ctx.max_code) ** -0.5
            by_scale = (_inner(gradient, y) - _inner(inside, x)).to(scale.dtype) * factor
            by_zero = (_total(inside) - _total(gradient)).to(scale.dtype) * scale * factor
        return inside, by_scale, by_zero, None, None, None


def per_sample(rows: Tensor, x: Tensor) -> Tensor:
    """Returns one value per sample (B,) as (B, 1, ..., 1), which broadcasts against x (B, ...)."""
    return rows.view(-1, *(1,) * (x.ndim - 1))


def clip_samples(gradient: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns the gradient where low < x < high and zero elsewhere; low and high (B,) are per sample."""
    if x.device.type != "cpu" or gradient.dtype != x.dtype:
        return torch.where((widen(x) > per_sample(low, x)) & (widen(x) < per_sample(high, x)), gradient, 0)
    # a vectorised pass per sample: torch.where with a mask is six times slower on CPU
    inside = torch.empty_like(gradient)
    for ours, theirs, values, bottom, top in zip(inside, gradient, x, low.tolist(), high.tolist()):
        torch.ops.aten.hardtanh_backward.grad_input(theirs, values, bottom, top, grad_input=ours)
    return inside


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Returns the sum of a * b over each sample: (B,)."""
    return _total(widen(a) * widen(b))


def _total(a: Tensor) -> Tensor:
    return widen(a).sum(tuple(range(1, a.ndim)))
