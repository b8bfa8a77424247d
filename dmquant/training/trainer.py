"""The training loop. Each step depends on (seed, step, rank) and on the trained state, so that a run can be continued exactly.

There are two objectives: `Distillation` (the teacher's recorded outputs, no data) and `Denoising` (the model's own training
loss on images).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from dmquant.errors import DmquantError
from dmquant.progress import Track, plain
from dmquant.quantizers.base import Quantizer
from dmquant.training.objectives import Objective
from dmquant.training.resume import Run

WARM_UP_STEPS = 10
PATIENCE = 3  # bad steps in a row before rolling back
SNAPSHOT_EVERY = 50  # steps between the states that a rollback returns to
DIVERGED = 100.0  # a loss this many times the first one is as bad as a NaN,
LOSS_OF_SILENCE = 1.0  # if it is also above what an answer of zero would have: noise has unit variance
LOWERED = 0.1  # factor on all rates after a rollback


@dataclass
class Step:
    """One step of the loop, as passed to `track`; `loss` is set at the end of the step."""

    number: int
    loss: float = math.nan


@dataclass(frozen=True)
class Training:
    """Settings of a run. Learning rates are AdamW's and decay to zero; quantizer_rate is relative to each scale or offset."""

    max_steps: int
    batch: int
    learning_rate: float
    quantizer_rate: float
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    precision: str = "no"
    decay: Literal["cosine", "linear"] = "cosine"


@dataclass(frozen=True)
class Group:
    """Parameters that are trained at one rate."""

    parameters: Sequence[nn.Parameter]
    rate: float  # AdamW's, at its peak
    weight_decay: float = 0.0


def fit(
    student: nn.Module,
    objective: Objective,
    training: Training,
    groups: Sequence[Group] | None = None,
    *,
    seed: int,
    run: Run = Run(),
    track: Track = plain,
) -> list[float]:
    """Trains the groups in place, by default all parameters, freezes the rest, and returns the loss of each step.

    Raises:
        DmquantError: the loss or the gradients diverge twice, or a trained value is not finite.
    """
    student.requires_grad_(False)
    if training.max_steps == 0:
        return []
    device = next(student.parameters()).device
    accelerator = start_accelerator(device, training.precision)
    trained, optimizer = start_optimizer(parameter_groups(student, training) if groups is None else groups)
    model, optimizer = accelerator.prepare(student.eval(), optimizer)
    average = EMAModel(trained, decay=training.ema_decay) if training.ema_decay else None
    guard = Guard(trained, optimizer, average)
    parts = {"student": student, "optimizer": optimizer, "guard": guard, "average": average, "objective": objective}
    parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
    steps = [Step(number) for number in range(run.restore(parts, device), training.max_steps)]
    for step in run.keep(track(steps, "fine-tune"), parts):
        set_rates(optimizer, guard.factor * schedule(step.number, training.max_steps, training.decay))
        generator = step_generator(seed, step.number, accelerator.process_index)
        loss = objective.loss(model, training.batch, step=step.number, generator=generator, device=device)
        step.loss = accelerator.gather(loss.detach().reshape(1)).mean().item()
        if guard.refuses(step.number, step.loss):
            continue
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(trained, training.clip_norm)
        if not guard.refuses(step.number, float(norm), is_gradient=True):
            guard.accept(step.number)
            optimizer.step()
            if average is not None:
                average.step(trained)
        optimizer.zero_grad()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(student).pop("forward", None)  # unwrapping leaves a bound method on the student
    if average is not None:
        average.copy_to(trained)
    check_finite(student)
    return [step.loss for step in steps]


def start_accelerator(device: torch.device, precision: str) -> Accelerator:
    """Returns an accelerator for one run on the student's device.

    accelerate keeps one global state per process; it is reset, because a second run may use another device or precision.
    """
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # a layer that never runs gets no gradient, which DDP refuses unless told
    spare = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, device_placement=False, kwargs_handlers=[spare])


def start_optimizer(groups: Sequence[Group]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Returns the trained parameters and their AdamW optimizer."""
    trained = [parameter for group in groups for parameter in group.parameters]
    for parameter in trained:
        parameter.requires_grad_(True)
    rates = [
        {"params": list(group.parameters), "lr": group.rate, "peak": group.rate, "weight_decay": group.weight_decay}
        for group in groups
    ]
    return trained, torch.optim.AdamW(rates, fused=trained[0].device.type in ("cpu", "cuda"))


def parameter_groups(student: nn.Module, training: Training) -> list[Group]:
    """Returns one group for weights, biases and norms, and one for each quantizer parameter, at a rate relative to its size."""
    quantizers = [module for module in student.modules() if isinstance(module, Quantizer)]
    groups = quantizer_groups(quantizers, training.quantizer_rate)
    taken = {parameter for group in groups for parameter in group.parameters}
    weights = [parameter for parameter in student.parameters() if parameter not in taken]
    return [*groups, Group(weights, training.learning_rate, training.weight_decay)]


def quantizer_groups(quantizers: Iterable[Quantizer], rate: float) -> list[Group]:
    """Returns one group for each parameter of the quantizers, at a rate relative to the size that the quantizer reports.

    Adam moves parameters by about the rate itself: with one absolute rate, a scale of 0.002 would change its sign where one of
    0.5 hardly moves.
    """
    sizes = ((quantizer.get_parameter(name), size) for quantizer in quantizers for name, size in quantizer.sizes().items())
    return [Group([parameter], rate * size) for parameter, size in sizes]


def schedule(step: int, max_steps: int, decay: str = "cosine") -> float:
    """Returns the factor on the peak rates: a linear warm-up of 10 steps times a half cosine or a straight line to zero."""
    rest = 0.5 * (1 + math.cos(math.pi * step / max_steps)) if decay == "cosine" else 1 - step / max_steps
    return min(1, (step + 1) / WARM_UP_STEPS) * rest


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """Returns the random generator of one step on one rank; it does not depend on earlier steps."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def check_finite(student: nn.Module) -> None:
    bad = [name for name, value in student.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise DmquantError(f"fine-tuning left non-finite values in {', '.join(bad[:5])}; nothing was saved")


class Guard:
    """Skips diverging steps; after several in a row rolls back once to the last good state with lower rates, then raises.

    All ranks see the same gathered loss and the same reduced gradient norm, so they take the same decisions.
    """

    def __init__(self, trained: Sequence[Tensor], optimizer: torch.optim.Optimizer, average: EMAModel | None = None):
        self._trained, self._optimizer, self._average = trained, optimizer, average
        self._bad_in_row = 0
        self._first_loss: float | None = None
        self.factor = 1.0
        self._copy()

    def refuses(self, step: int, value: float, *, is_gradient: bool = False) -> bool:
        """Returns whether the step must be skipped. Rolls back after three in a row; raises DmquantError the second time."""
        first = self._first_loss
        limit = math.inf if is_gradient or first is None else max(DIVERGED * first, LOSS_OF_SILENCE)
        if math.isfinite(value) and value <= limit:
            self._first_loss = value if first is None else first
            return False
        self._bad_in_row += 1
        if self._bad_in_row >= PATIENCE:
            self._roll_back(step, value, "gradient norm" if is_gradient else "loss")
        return True

    def accept(self, step: int) -> None:
        """Records a good step before its update, and every 50 steps copies the state that a rollback returns to."""
        self._bad_in_row = 0
        if step % SNAPSHOT_EVERY == 0:
            self._copy()

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "bad_in_row": self._bad_in_row, "first_loss": self._first_loss, "snapshot": self._snapshot}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.factor, self._bad_in_row = state_dict["factor"], state_dict["bad_in_row"]
        self._first_loss, self._snapshot = state_dict["first_loss"], [kept.cpu() for kept in state_dict["snapshot"]]

    def _tensors(self) -> list[Tensor]:
        return [*self._trained, *(self._average.shadow_params if self._average else ())]

    def _copy(self) -> None:
        self._snapshot = [p.detach().to("cpu", copy=True) for p in self._tensors()]

    @torch.no_grad()
    def _roll_back(self, step: int, value: float, what: str) -> None:
        if self.factor < 1:
            raise DmquantError(
                f"fine-tuning diverged at step {step} ({what} {value:g}) although its rates had been lowered once; "
                "nothing was saved. Lower learning_rate and quantizer_rate, or raise the bits"
            )
        for tensor, kept in zip(self._tensors(), self._snapshot):
            tensor.copy_(kept)
        self._optimizer.state.clear()
        self.factor, self._bad_in_row = LOWERED, 0
