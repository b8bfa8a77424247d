"""Watches a run: the clock on the wall, the time of all threads, the memory at the peak of each stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from dmquant.training.run_cost import Effort, Stage

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): the peak resident set becomes the present one


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
        held = _read_memory(self._device, peak=False)
        started = time.perf_counter(), time.process_time()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        ended, peak = (time.perf_counter(), time.process_time()), _read_memory(self._device, peak=True)
        seconds, cpu_seconds = (end - start for end, start in zip(ended, started))
        self.stages[name] = Stage(seconds, cpu_seconds, _beyond(self._held, peak), _beyond(held, peak))

    def sum_up(self, *, trained_params: int, trained_share: float, is_whole: bool) -> Effort:
        return Effort(dict(self.stages), self._held, self._device.type, trained_params, trained_share, is_whole)


def _beyond(held: int | None, peak: int | None) -> int | None:
    """Bytes at the peak beyond those that were held; None where one of them is not known."""
    return None if held is None or peak is None else max(0, peak - held)


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
