"""Signal to quantization noise ratio (SQNR) of each layer's output, and the range of each layer's input by timestep.

Both models get the inputs of a few of the float model's own trajectories. Two errors are measured for every layer:

- local: the quantized layer gets the input of the float layer, so that it is the error of this layer alone;
- total: the quantized layer gets the input that its own model computes, which includes the errors of earlier layers.

SQNR in dB is 10 log10 of the energy of the float layer's output over the energy of the difference, both summed over all calls.
One bit corresponds to about 6 dB. Ranges are those of the float layers' inputs, which activation grids have to cover.
Left out: the operands of attention products, which are not layers.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusion.layer_roles import find_roles, named_layers
from dmquant.diffusion.pipeline import Target
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.evaluation.reports.report import LayerProfile, Range
from dmquant.nn.convert import layer_bits
from dmquant.progress import Track, plain
from dmquant.quantizers.timestep_clock import find_timestep_name

NAME = "layers"
MAX_BATCH = 4  # the outputs of all layers of one call are stored until the float model has run
TAILS = (0.001, 0.999)
MAX_SORTED = 2**14  # evenly spaced values of one input for its quantiles
DIGITS = 4  # significant digits of a range in the report


@torch.no_grad()
def measure_layers(
    target: Target, base: Target, seeds: Sequence[int], plan: SamplingPlan, *, track: Track = plain
) -> tuple[LayerProfile, ...]:
    """Returns the profiles of the layers that the float denoiser runs, in order of execution, over the seeds' trajectories."""
    comparison = LayerComparison(base.denoiser, target.denoiser)
    with comparison.hooked():
        for _ in generate(base.pipeline, seeds, replace(plan, batch=min(plan.batch, MAX_BATCH)), track=track):
            pass  # the hooks compare the layers
    return comparison.describe()


class LayerComparison:
    """Runs another denoiser before each call of the float one, on the same inputs, and compares the layers of both."""

    def __init__(self, denoiser: nn.Module, other: nn.Module):
        self._denoiser, self._other = denoiser, other
        self._layers, self._others = named_layers(denoiser), named_layers(other)
        self._is_calling, self._timestep = False, 0.0
        self._outputs: dict[str, list[Tensor]] = {}  # of the other's layers, in the current call
        # energies by layer and call
        self._signal: dict[str, list[float]] = defaultdict(list)
        self._local: dict[str, list[float]] = defaultdict(list)
        self._total: dict[str, list[float]] = defaultdict(list)
        self._ranges: dict[str, dict[float, list[Range]]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside the context, both models have hooks."""
        hooks = [self._denoiser.register_forward_pre_hook(self._call_other, with_kwargs=True)]
        try:
            for name, layer in self._others.items():
                hooks.append(layer.register_forward_hook(partial(self._record_output, name)))
            for name, layer in self._layers.items():
                hooks.append(layer.register_forward_hook(partial(self._compare, name), with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._outputs = {}

    def _call_other(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_calling:  # a call by this hook: a model is compared with itself
            return
        arguments = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
        self._timestep = float(torch.as_tensor(arguments[find_timestep_name(arguments)]).reshape(-1)[0])
        self._outputs, self._is_calling = defaultdict(list), True
        try:
            self._other(*args, **kwargs)
        finally:
            self._is_calling = False

    def _record_output(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._is_calling:
            self._outputs[name].append(output.clone())  # models change outputs of layers in place

    def _compare(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self._is_calling:
            return
        x = args[0] if args else next(iter(kwargs.values()))
        self._ranges.setdefault(name, {}).setdefault(self._timestep, []).append(range_of(x))
        if not self._outputs.get(name):  # the other model has no such layer
            return
        # forward, not a call, so that the hook above does not record it; the other model's clock is still at this timestep
        local, total = self._others[name].forward(*args, **kwargs), self._outputs[name].pop(0)
        self._signal[name].append(measure_energy(output))
        self._local[name].append(measure_energy(local.float() - output.float()))
        self._total[name].append(measure_energy(total.float() - output.float()))

    def describe(self) -> tuple[LayerProfile, ...]:
        """Returns the profile of each layer."""
        roles = find_roles(self._denoiser)
        return tuple(
            LayerProfile(
                name, str(roles[name]), *layer_bits(self._others.get(name, self._layers[name])),
                local_db=to_db(self._signal[name], self._local[name]), total_db=to_db(self._signal[name], self._total[name]),
                ranges={f"{timestep:g}": merge(found) for timestep, found in sorted(ranges.items(), reverse=True)},
            )
            for name, ranges in self._ranges.items()
        )  # fmt: skip


def range_of(x: Tensor) -> Range:
    """Returns minimum, 0.1 % quantile, 99.9 % quantile and maximum; the quantiles are of some 16 thousand values."""
    values = x.detach().flatten()
    # an odd stride reaches every column of an image, whose width is even
    some = values[:: values.numel() // MAX_SORTED | 1].float()
    low, high = some.quantile(some.new_tensor(TAILS)).tolist()
    least, largest = (value.item() for value in values.aminmax())
    return least, low, high, largest


def merge(ranges: Sequence[Range]) -> Range:
    """Returns the range over several calls: minimum, mean quantiles and maximum, rounded to four digits."""
    least, low, high, largest = zip(*ranges, strict=True)
    return _round(min(least)), _round(fmean(low)), _round(fmean(high)), _round(max(largest))


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def measure_energy(x: Tensor) -> float:
    """Returns the sum of squares."""
    return torch.linalg.vector_norm(x.float()).item() ** 2


def to_db(signal: Sequence[float], noise: Sequence[float]) -> float | None:
    """Returns 10 log10 of the ratio of the sums; None if either is zero or not finite."""
    energies = sum(signal), sum(noise)
    return round(10 * math.log10(energies[0] / energies[1]), 2) if all(0 < e < math.inf for e in energies) else None
