"""What becomes of each layer: the error of its output, and the range of its input timestep by timestep.

Both models are asked the same questions, those of a few of the float model's own trajectories, and two errors are taken of
every layer. The *local* one is what the layer does by itself: the quantized layer reads what the float layer read. The *total*
one also holds what came before: the quantized layer reads what its own model gives it. Both are signal to quantization noise
(SQNR) in dB, energy of the float layer's output over energy of the difference, summed over all calls: a ratio would need six
decades for the same picture, and a bit is worth some 6 dB.

Ranges are those of the float layers' inputs, which is what the grids of activations have to hold.
Left out: the factors of attention products, which are no layers.
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
MAX_BATCH = 4  # the outputs of all layers of one call are held until the float model's are there
TAILS = (0.001, 0.999)
MAX_SORTED = 2**14  # values of one input that quantiles are taken of, evenly spread
DIGITS = 4  # of a range in the report


@torch.no_grad()
def measure_layers(
    target: Target, base: Target, seeds: Sequence[int], plan: SamplingPlan, *, track: Track = plain
) -> tuple[LayerProfile, ...]:
    """Every layer that the float denoiser runs, in that order, over the trajectories of the seeds."""
    probe = Probe(base.denoiser, target.denoiser)
    with probe.listening():
        small = replace(plan, batch=min(plan.batch, MAX_BATCH))
        for _ in generate(base.pipeline, seeds, small, track=track):
            pass  # the probe listens
    return probe.describe()


class Probe:
    """Asks another denoiser whatever the float one is asked, just before, and looks at the layers of both."""

    def __init__(self, denoiser: nn.Module, other: nn.Module):
        self._denoiser, self._other = denoiser, other
        self._layers, self._others = named_layers(denoiser), named_layers(other)
        self._is_asking, self._timestep = False, 0.0
        self._answers: dict[str, list[Tensor]] = {}  # of the other's layers, in the call that is running
        # energies by layer, one per call
        self._signal: dict[str, list[float]] = defaultdict(list)
        self._local: dict[str, list[float]] = defaultdict(list)
        self._total: dict[str, list[float]] = defaultdict(list)
        self._ranges: dict[str, dict[float, list[Range]]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on both models while inside."""
        hooks = [self._denoiser.register_forward_pre_hook(self._ask, with_kwargs=True)]
        try:
            for name, layer in self._others.items():
                hooks.append(layer.register_forward_hook(partial(self._keep, name)))
            for name, layer in self._layers.items():
                hooks.append(layer.register_forward_hook(partial(self._compare, name), with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._answers = {}

    def _ask(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_asking:  # a model that is compared with itself
            return
        arguments = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
        self._timestep = float(torch.as_tensor(arguments[find_timestep_name(arguments)]).reshape(-1)[0])
        self._answers, self._is_asking = defaultdict(list), True
        try:
            self._other(*args, **kwargs)
        finally:
            self._is_asking = False

    def _keep(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._is_asking:
            self._answers[name].append(output.clone())  # models add to the outputs of layers in place

    def _compare(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if self._is_asking:
            return
        x = args[0] if args else next(iter(kwargs.values()))
        self._ranges.setdefault(name, {}).setdefault(self._timestep, []).append(measure_range(x))
        if not self._answers.get(name):  # the other model works without this layer
            return
        # forward, not a call: the hook above is for the other model's own calls. Its clock stands at this timestep still
        alone, within = self._others[name].forward(*args, **kwargs), self._answers[name].pop(0)
        self._signal[name].append(measure_energy(output))
        self._local[name].append(measure_energy(alone.float() - output.float()))
        self._total[name].append(measure_energy(within.float() - output.float()))

    def describe(self) -> tuple[LayerProfile, ...]:
        """What was seen of each layer."""
        roles = find_roles(self._denoiser)
        return tuple(
            LayerProfile(
                name, str(roles[name]), *layer_bits(self._others.get(name, self._layers[name])),
                local_db=to_db(self._signal[name], self._local[name]), total_db=to_db(self._signal[name], self._total[name]),
                ranges={f"{timestep:g}": merge(found) for timestep, found in sorted(ranges.items(), reverse=True)},
            )
            for name, ranges in self._ranges.items()
        )  # fmt: skip


def measure_range(x: Tensor) -> Range:
    """Least value, 0.1 % and 99.9 % quantile, largest value; the quantiles are those of some 16 thousand values."""
    values = x.detach().flatten()
    # an odd stride meets every column of a picture, whose width is even
    some = values[:: values.numel() // MAX_SORTED | 1].float()
    low, high = some.quantile(some.new_tensor(TAILS)).tolist()
    least, largest = (value.item() for value in values.aminmax())
    return least, low, high, largest


def merge(ranges: Sequence[Range]) -> Range:
    """The range of several calls: the outermost ends, and the mean of the quantiles; to four digits."""
    least, low, high, largest = zip(*ranges, strict=True)
    return _round(min(least)), _round(fmean(low)), _round(fmean(high)), _round(max(largest))


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def measure_energy(x: Tensor) -> float:
    """Sum of squares."""
    return torch.linalg.vector_norm(x.float()).item() ** 2


def to_db(signal: Sequence[float], noise: Sequence[float]) -> float | None:
    """10 log10 of the ratio of the sums; None where there is no noise, or nothing to compare it with."""
    energies = sum(signal), sum(noise)
    return round(10 * math.log10(energies[0] / energies[1]), 2) if all(0 < e < math.inf for e in energies) else None
