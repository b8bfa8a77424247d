"""Records denoiser calls along the teacher's own trajectories, as data for calibration and training without images.

Each sample contains its timestep, so that training code does not count steps.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from dmquant.diffusion.conditioning import Conditioning, complete
from dmquant.diffusion.pipeline import evaluating, find_target
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.errors import InputError
from dmquant.progress import Track, plain
from dmquant.quantizers.timestep_clock import find_timestep_name

# above the small seeds that evaluations use; torch's CPU generator reads only 32 bits of a seed
FIRST_RECORDING_SEED = 1 << 31
POSITIONS = ("img_ids", "txt_ids")  # Flux: token positions (N, 3); N may equal the number of samples by chance


@dataclass(frozen=True)
class Samples:
    """Calls of a denoiser, on the CPU; `on` moves a batch to a device.

    Outputs, recorded or new, keep only the channels that the sampler uses. A denoiser with a learned variance returns twice the
    channels (DiT, PixArt), and its pipelines drop the second half.
    """

    x: Tensor  # (N, ...) noisy inputs
    timestep: Tensor  # (N,)
    target: Tensor  # (N, C, ...) the teacher's outputs, in the C channels that the sampler uses
    conditioning: dict[str, Tensor]  # one row per sample; nested arguments are written "outer.inner"
    shared: dict[str, Tensor]  # arguments without a batch dimension, equal for all samples
    names: tuple[str, str] = ("sample", "timestep")  # what the denoiser calls x and timestep
    guidance: float | None = None  # guidance scale, if the sampler calls with and without condition

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor | slice) -> Self:
        rows = {name: value[index] for name, value in self.conditioning.items()}
        x, timestep, target = self.x[index], self.timestep[index], self.target[index]
        return replace(self, x=x, timestep=timestep, target=target, conditioning=rows)

    def spread(self, count: int) -> Self:
        """Returns at most `count` samples, evenly over the timesteps; every timestep is included if count allows it."""
        order = self.timestep.argsort(stable=True)
        return self[order[torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()]]

    def split(self, batch: int) -> list[Self]:
        return [self[slice(start, start + batch)] for start in range(0, len(self), batch)]

    def on(self, device: torch.device) -> Self:
        rows, shared = _move(self.conditioning, device), _move(self.shared, device)
        x, timestep, target = self.x.to(device), self.timestep.to(device), self.target.to(device)
        return replace(self, x=x, timestep=timestep, target=target, conditioning=rows, shared=shared)

    def call(self, denoiser: nn.Module) -> Tensor:
        """Returns the denoiser's output for these samples, in the channels of the target."""
        # by name: in some denoisers the second argument is not the timestep
        arguments = dict(zip(self.names, (self.x, self.timestep))) | _nest({**self.conditioning, **self.shared})
        return denoiser(**arguments, return_dict=False)[0][:, : self.target.shape[1]]


def record(
    pipeline: DiffusionPipeline,
    trajectories: int,
    *,
    steps: int,
    seed: int,
    batch: int = 32,
    eta: float = 0.0,
    conditioning: Conditioning = Conditioning(),
    track: Track = plain,
) -> Samples:
    """Records every denoiser call of `trajectories` runs of the pipeline's own sampler with `steps` steps each.

    Args:
        eta: share of fresh noise in each step, 0 to 1. DDIM, eq. 16 (Song et al., 2021).

    Raises:
        InputError: eta is not 0 and the sampler takes none.
    """
    denoiser, recorder, conditioning = find_target(pipeline).denoiser, Recorder(), complete(pipeline, conditioning)
    seeds, plan = recording_seeds(seed, trajectories), SamplingPlan(steps, batch, conditioning)
    with evaluating(denoiser), stepping(pipeline.scheduler, eta) as given:
        hook = denoiser.register_forward_hook(recorder.note, with_kwargs=True)
        try:
            for _ in generate(pipeline, seeds, plan, track=track):
                pass  # the hook records the calls
        finally:
            hook.remove()
    samples = recorder.take()
    return replace(samples, target=keep_used(samples.target, given), guidance=conditioning.guidance)


@contextmanager
def stepping(scheduler: SchedulerMixin, eta: float) -> Iterator[set[torch.Size]]:
    """Passes eta to the scheduler's steps inside the context; yields the set of shapes (C, ...) that the steps were given.

    The one place that replaces a method of a diffusers object. Schedulers have no hooks, and some pipelines (DiT) do not pass
    eta on; a subclass of each scheduler would change the type that diffusers stores. The method is restored at the end.
    """
    own, given = scheduler.step, set()
    if eta and "eta" not in inspect.signature(own).parameters:
        raise InputError(f"eta of {eta:g}: {type(scheduler).__name__} takes none; leave it at 0, or use a pipeline with DDIM")

    @wraps(own)  # pipelines inspect its signature
    def step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.add(model_output.shape[1:])
        return own(model_output, *args, **({**kwargs, "eta": eta} if eta else kwargs))

    scheduler.step = step
    try:
        yield given
    finally:
        del scheduler.step


def keep_used(answers: Tensor, given: set[torch.Size]) -> Tensor:
    """Returns the leading channels of outputs (N, C, ...) that the sampler was given; all channels if the shapes differ."""
    alike = {shape[0] for shape in given if shape[1:] == answers.shape[2:]}
    return answers[:, : max(alike, default=None)].contiguous()


def recording_seeds(seed: int, count: int) -> range:
    """Returns the seeds of the trajectories that a run records; they differ by run and from those of evaluations."""
    first = FIRST_RECORDING_SEED + int(np.random.SeedSequence(seed).generate_state(1)[0]) % (1 << 30)
    return range(first, first + count)


class Recorder:
    """Records the arguments and outputs of a denoiser by a forward hook."""

    def __init__(self) -> None:
        self._calls: list[Samples] = []

    def note(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
        name, x = next(iter(arguments.items()))
        clock = find_timestep_name(arguments)
        extra = _flatten({k: v for k, v in arguments.items() if k not in (name, clock)})
        rows = {k: _keep(v) for k, v in extra.items() if v.ndim and len(v) == len(x) and not (k in POSITIONS and v.ndim == 2)}
        shared = {k: _keep(v) for k, v in extra.items() if k not in rows}
        timestep = torch.as_tensor(arguments[clock]).reshape(-1).expand(len(x))
        answer = output[0] if isinstance(output, tuple) else output.sample
        self._calls.append(Samples(_keep(x), _keep(timestep), _keep(answer), rows, shared, (name, clock)))

    def take(self) -> Samples:
        """Returns all calls in order and empties the recorder, so that only one tensor at a time exists twice in memory."""
        first, calls, self._calls = self._calls[0], self._calls, []
        rows = {name: [call.conditioning[name] for call in calls] for name in first.conditioning}
        main = {name: [getattr(call, name) for call in calls] for name in ("x", "timestep", "target")}
        shared, names = first.shared, first.names
        del first, calls
        joined, joined_rows = ({name: torch.cat(columns.pop(name)) for name in list(columns)} for columns in (main, rows))
        return Samples(joined["x"], joined["timestep"], joined["target"], conditioning=joined_rows, shared=shared, names=names)


def _keep(value: Tensor) -> Tensor:
    """Returns a copy on the CPU; samplers write into their tensors."""
    return value.detach().to("cpu", copy=True)


def _flatten(arguments: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Returns the tensors of nested arguments by dotted name; other arguments take their defaults when called again."""
    flat: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            flat[prefix + name] = value
    return flat


def _nest(flat: dict[str, Tensor]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[outer] = value
    return nested


def _move(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
