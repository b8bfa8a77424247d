"""Watches a run: the clock on the wall, the time of all threads, the memory at the peak of each stage."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from dmquant.training.run_cost import Effort, Stage

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): the peak resident set becomes the present one


class Meter:
    """Watches a run from its beginning, stage by stage.

    On a GPU memory is what torch has allocated there; on a CPU the resident set of the process. A process that ran other work
    before keeps some memory for reuse, so that peaks look smaller: exact figures need a process of their own. Only Linux lets a
    process reset its peak; elsewhere the peak of a stage is known only if it is the highest of the process so far.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._held = _read_memory(device, peak=False)
        self.stages: dict[str, Stage] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the code inside the context; a stage that raises is not recorded."""
        is_reset = _reset_peak(self._device)
        held, earlier = (_read_memory(self._device, peak=peak) for peak in (False, True))
        started = time.perf_counter(), time.process_time()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        ended, peak = (time.perf_counter(), time.process_time()), _read_memory(self._device, peak=True)
        if not is_reset and peak == earlier:
            peak = None
        seconds, cpu_seconds = (end - start for end, start in zip(ended, started))
        self.stages[name] = Stage(seconds, cpu_seconds, _beyond(self._held, peak), _beyond(held, peak))

    def sum_up(self, *, trained_params: int, trained_share: float, is_whole: bool) -> Effort:
        return Effort(dict(self.stages), self._held, self._device.type, trained_params, trained_share, is_whole)


def _beyond(held: int | None, peak: int | None) -> int | None:
    """Bytes at the peak beyond those that were held; None where one of them is not known."""
    return None if held is None or peak is None else max(0, peak - held)


def _reset_peak(device: torch.device) -> bool:
    """Makes the memory held now the peak; False where that is not possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type == "cpu" and RESET.exists():
        with suppress(OSError):  # some containers forbid it
            RESET.write_text(RESET_PEAK)
            return True
    return False


def _read_memory(device: torch.device, *, peak: bool) -> int | None:
    """Bytes held now, or at most since the last reset; None where neither is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    return _read_peak() if peak else psutil.Process().memory_info().rss


def _read_peak() -> int:
    """The largest resident set of this process in bytes, which psutil tells on Windows only."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if STATUS.exists():
        # ru_maxrss cannot be reset, and it starts from the peak of the process that started this one
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
