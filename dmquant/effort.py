"""What a run takes: seconds and peak memory of its stages, and how much of the model it trains.

Measured, so no two runs agree: it lies beside a pipeline's published files and not among them, which repeat byte for byte.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

FILE_NAME = "effort.json"
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): the peak resident set becomes the present one


@dataclass(frozen=True)
class Stage:
    """One part of a run."""

    seconds: float
    cpu_seconds: float  # of all threads: on a busy machine these grow less than the seconds on the wall
    peak_bytes: int | None  # the most that was held at a time, beyond what was when the run began; None: not to be known here


@dataclass(frozen=True)
class Effort:
    """What a run took. `held_bytes` is what its process held when it began: the float pipeline, on a CPU libraries too."""

    stages: dict[str, Stage]
    held_bytes: int | None
    device: str
    trained_params: int
    trained_share: float  # of the float model's parameters; above 1 where quantizers' are trained beside all of them
    is_whole: bool  # False: the run was continued, and what came before is not counted

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def peak_bytes(self) -> int | None:
        known = [stage.peak_bytes for stage in self.stages.values() if stage.peak_bytes is not None]
        return max(known, default=None)

    def describe(self) -> str:
        """One line for people."""
        parts = ", ".join(f"{name} {stage.seconds:.0f}" for name, stage in self.stages.items())
        memory = "" if self.peak_bytes is None else f"; {self.peak_bytes / 1e6:.0f} MB of memory at the peak"
        since = "" if self.is_whole else " since it was resumed"
        trained = f"trained {self.trained_params / 1e6:.2f} M parameters ({self.trained_share:.1%})"
        return f"{trained} in {self.seconds:.0f} s{since}: {parts}{memory}"

    def save(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Meter:
    """Watches a run from its beginning, stage by stage.

    On a GPU memory is what torch has allocated there; on a CPU the resident set of the process, which Linux tells. A process
    that ran other work before keeps some memory for reuse, so that peaks look smaller: exact figures need a process of their own.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._held = _read_memory(device, peak=False)
        self.stages: dict[str, Stage] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what happens inside; nothing is noted of a stage that fails."""
        _reset_peak(self._device)
        started = time.perf_counter(), time.process_time()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        ended, peak = (time.perf_counter(), time.process_time()), _read_memory(self._device, peak=True)
        seconds, cpu_seconds = (end - start for end, start in zip(ended, started))
        is_known = None not in (peak, self._held)
        self.stages[name] = Stage(seconds, cpu_seconds, max(0, peak - self._held) if is_known else None)

    def sum_up(self, *, trained_params: int, trained_share: float, is_whole: bool) -> Effort:
        return Effort(dict(self.stages), self._held, self._device.type, trained_params, trained_share, is_whole)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and RESET.exists():
        with suppress(OSError):  # some containers forbid it: the peak is then that of the process so far
            RESET.write_text(RESET_PEAK)


def _read_memory(device: torch.device, *, peak: bool) -> int | None:
    """Bytes held now, or at most since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not STATUS.exists():
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10
