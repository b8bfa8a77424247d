"""Uniform grids: calibrated only (`Uniform`) or with a learned step and offset (`LearnedStep`: LSQ and LSQ+)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dmquant.kernels.packing import check_bits
from dmquant.kernels.rounding import quantize, widen
from dmquant.quantizers.base import SMALLEST_SCALE, Context, Quantizer

INITIALISATIONS = ("mse", "minmax", "lsq")
SEARCH_STEPS = 48  # candidates per end of the range


class Uniform(Quantizer):
    """A uniform grid set by calibration.

    Symmetric grids have codes -2^(b-1) .. 2^(b-1)-1 around a fixed zero. Affine grids have a range [low, high] that contains 0.0;
    their zero point is rounded to a whole code, so that the zero padding of a convolution is on the grid.

    Args:
        num_channels: for weights, grids along dimension 0 (1 for one grid per weight). None for activations: one grid.
        init: calibration by least squared error ("mse"), full range ("minmax") or LSQ's formula ("lsq").
        ndim: dimensions of the weight.
    """

    scale: Tensor
    offset: Tensor  # the lower end of an affine range

    def __init__(self, bits: int, *, num_channels: int | None = None, symmetric: bool = True, init: str = "mse", ndim: int = 4):
        super().__init__()
        check_bits(bits)
        if init not in INITIALISATIONS:
            raise ValueError(f"init must be one of {', '.join(INITIALISATIONS)}, got {init!r}")
        self.bits, self.symmetric, self.init = bits, symmetric, init
        shape = () if num_channels is None else (num_channels, *(1,) * (ndim - 1))
        self._hold("scale", torch.ones(shape))
        if not symmetric:
            self._hold("offset", torch.zeros(shape))

    def _hold(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        rows = x.detach().float().reshape(self.scale.numel(), -1)  # (channels or 1, values)
        if self.symmetric:
            scale = INIT_SYMMETRIC[self.init](rows, self.bits)
        else:
            low, high = INIT_AFFINE[self.init](rows, self.bits)
            scale = ((high - low) / self.max_code).clamp(min=SMALLEST_SCALE)
            self.offset.copy_(low.view_as(self.offset))
        self.scale.copy_(scale.clamp(min=SMALLEST_SCALE).view_as(self.scale))

    def grid(self) -> tuple[Tensor, Tensor]:
        scale = widen(self.scale).clamp(min=SMALLEST_SCALE)  # steps stay float32 in a model cast to half precision
        if self.symmetric:
            return scale, torch.full_like(scale, 1 << (self.bits - 1))
        return scale, (-widen(self.offset) / scale).round().clamp(0, self.max_code)

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.grid()
        return quantize(widen(x), scale, zero, self.bits).sub_(zero).mul_(scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, shape={tuple(self.scale.shape)}, symmetric={self.symmetric}"


class LearnedStep(Uniform):
    """Learned step size, and with `symmetric=False` a learned offset. LSQ (Esser et al., 2020), LSQ+ (Bhalgat et al., 2020).

    The gradient of the step is scaled by 1 / sqrt(n * max_level), n the values per grid and sample. We differ from LSQ+ in
    one point: the zero point is rounded (straight-through), so that integer kernels and zero padding stay exact.
    """

    def _hold(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        offset = None if self.symmetric else self.offset
        return _FakeQuantize.apply(x, self.scale, offset, self, self._gradient_scale(x))

    def _gradient_scale(self, x: Tensor) -> float:
        """Returns g = 1 / sqrt(n * max_level), with n the values of one sample or of one weight grid. LSQ, eq. 5 and below."""
        is_activation = self.scale.ndim == 0
        count = x.numel() / (len(x) if is_activation else self.scale.numel())
        max_level = self.max_code >> 1 if self.symmetric else self.max_code
        return (count * max(1, max_level)) ** -0.5


class _FakeQuantize(torch.autograd.Function):
    """Quantizes and dequantizes in four in-place passes over one new buffer.

    With y the output and g* the incoming gradient where x lies inside the range (zero elsewhere), the LSQ gradients are
    d scale = sum(g y - g* x) / scale  and  d offset = sum(g - g*): two dot products instead of elementwise chains.
    With an offset, which stays put when the scale moves, clipped values count 0 and max_code instead of -zero and
    max_code - zero: d scale grows by zero * sum(g - g*). LSQ+, eq. 5.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: Tensor, offset: Tensor | None, grid: Uniform, gradient_scale: float) -> Tensor:
        scale, zero = grid.grid()
        y = quantize(widen(x), scale, zero, grid.bits).sub_(zero).mul_(scale).to(x.dtype)
        ctx.save_for_backward(x, y, scale, zero)
        ctx.max_code, ctx.gradient_scale, ctx.has_offset = grid.max_code, gradient_scale, offset is not None
        return y

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, zero = ctx.saved_tensors
        inside = clip_gradient(gradient, x, -zero * scale, (ctx.max_code - zero) * scale)
        wanted = ctx.needs_input_grad
        by_scale = by_offset = None
        if wanted[1]:
            by_scale = (_inner(gradient, y, scale) - _inner(inside, x, scale)) / scale * ctx.gradient_scale
        if ctx.has_offset and (wanted[1] or wanted[2]):
            by_offset = (_total(gradient, scale) - _total(inside, scale)) * ctx.gradient_scale
            by_scale = by_scale + zero * by_offset if wanted[1] else None
        return inside, by_scale, by_offset if wanted[2] else None, None, None


def clip_gradient(gradient: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns the gradient where low < x < high and zero elsewhere."""
    if low.numel() == 1 and x.device.type == "cpu":
        # one vectorised pass; torch.where with a mask is six times slower on CPU, item() would stall a GPU
        return torch.ops.aten.hardtanh_backward(gradient, x, low.item(), high.item())
    return torch.where((widen(x) > low) & (widen(x) < high), gradient, 0)


def _inner(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Returns the sum of a * b over the values of each grid, in the shape of the scale."""
    if scale.numel() > 1:
        return (a * b).float().sum_to_size(scale.shape)
    if a.stride() == b.stride() and a.dtype == b.dtype == torch.float32 and _is_dense(a):
        line = (a.numel(),)
        return torch.dot(a.as_strided(line, (1,)), b.as_strided(line, (1,))).view(scale.shape)
    return (a.float() * b.float()).sum().view(scale.shape)


def _total(a: Tensor, scale: Tensor) -> Tensor:
    return a.float().sum_to_size(scale.shape) if scale.numel() > 1 else a.float().sum().view(scale.shape)


def _is_dense(a: Tensor) -> bool:
    return a.is_contiguous() or (a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last))


# Initial grids. `rows` is (grids, values); results have shape (grids,).


def _symmetric_minmax(rows: Tensor, bits: int) -> Tensor:
    return rows.abs().amax(1) / max(1, (1 << (bits - 1)) - 1)


def _symmetric_lsq(rows: Tensor, bits: int) -> Tensor:
    """Returns s = 2 mean|v| / sqrt(max_level). LSQ, section 2.1."""
    return 2 * rows.abs().mean(1) / max(1, (1 << (bits - 1)) - 1) ** 0.5


def _symmetric_mse(rows: Tensor, bits: int) -> Tensor:
    """Returns the scale with the least squared error, among scales of the full range times 0.15 to 1."""
    full, zero = _symmetric_minmax(rows, bits), torch.tensor(float(1 << (bits - 1)), device=rows.device)
    best, least = full.clone(), torch.full_like(full, torch.inf)
    for factor in torch.linspace(1, 0.15, 2 * SEARCH_STEPS).tolist():
        scale = (full * factor).clamp(min=SMALLEST_SCALE)
        error = _squared_error(rows, scale, zero, bits)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _affine_minmax(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)


def _affine_lsq(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns a range that begins at the minimum and has LSQ's step for unsigned codes."""
    low = rows.amin(1).clamp(max=0)
    step = 2 * rows.abs().mean(1) / ((1 << bits) - 1) ** 0.5
    return low, low + step * ((1 << bits) - 1)


def _affine_mse(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns the range with the least squared error. The search shrinks the upper end, then the lower end, twice."""
    low, high = _affine_minmax(rows, bits)
    for _ in range(2):
        high = _best(((low, high * f) for f in _factors()), rows, bits)[1]
        low = _best(((low * f, high) for f in _factors()), rows, bits)[0]
    return low, high


def _factors() -> list[float]:
    return torch.linspace(1, 0.05, SEARCH_STEPS).tolist()


def _best(ranges: Iterator[tuple[Tensor, Tensor]], rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    best_low, best_high = next(ranges)
    least = _range_error(rows, best_low, best_high, bits)
    for low, high in ranges:
        error = _range_error(rows, low, high, bits)
        is_better = error < least
        best_low, best_high = torch.where(is_better, low, best_low), torch.where(is_better, high, best_high)
        least = torch.minimum(error, least)
    return best_low, best_high


def _range_error(rows: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    max_code = (1 << bits) - 1
    scale = ((high - low) / max_code).clamp(min=SMALLEST_SCALE)
    zero = (-low / scale).round().clamp(0, max_code)
    return _squared_error(rows, scale, zero.unsqueeze(1), bits)


def _squared_error(rows: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    scale = scale.unsqueeze(1)
    return quantize(rows, scale, zero, bits).sub_(zero).mul_(scale).sub_(rows).square_().sum(1)


INIT_SYMMETRIC = {"mse": _symmetric_mse, "minmax": _symmetric_minmax, "lsq": _symmetric_lsq}
INIT_AFFINE = {"mse": _affine_mse, "minmax": _affine_minmax, "lsq": _affine_lsq}
