"""Each stage has its own seconds and its own peak, beyond what was held when the run began."""

import subprocess
import sys
import time

import psutil
import pytest
import torch

from dmquant.training import profiler as module
from dmquant.training.profiler import Meter

CPU = torch.device("cpu")
MIB = 1 << 20


def summed(meter):
    return meter.sum_up(trained_params=3, trained_share=0.5, is_whole=True)


PROGRAM = f"""
import sys
from pathlib import Path
import torch
from dmquant.training import profiler as module
from dmquant.training.profiler import Meter

for name in sys.argv[1:]:
    setattr(module, name, Path("nowhere"))
meter = Meter(torch.device("cpu"))
with meter.stage("large"):
    torch.ones({256 * MIB // 4})
with meter.stage("small"):
    torch.ones(1)
print(*(meter.stages[name].peak_bytes for name in ("large", "small")))
"""


def peaks(*missing: str) -> list[str]:
    """The peaks of a large and a small stage, in a process that does not find these files of the system.

    A process of its own: systems take pages away that others left idle, and then it holds less in the middle of a stage.
    """
    done = subprocess.run([sys.executable, "-c", PROGRAM, *missing], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not module.RESET.exists(), reason="only Linux resets a peak")
def test_a_stage_has_its_own_peak_and_later_ones_do_not_inherit_it():
    large, small = map(int, peaks())
    assert 200 * MIB < large < 280 * MIB and small < 20 * MIB


@pytest.mark.skipif(not module.STATUS.exists(), reason="elsewhere a process inherits the peak of the one that started it")
def test_where_a_peak_cannot_be_reset_it_belongs_to_the_stage_that_reached_it():
    large, small = peaks("RESET")
    assert 200 * MIB < int(large) < 280 * MIB and small == "None"


def test_without_the_files_of_linux_the_peak_is_that_of_the_process_in_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "STATUS", tmp_path / "none")
    held = psutil.Process().memory_info().rss
    assert 0.9 * held < module._read_memory(CPU, peak=True) < psutil.virtual_memory().total


def test_what_a_stage_adds_is_beyond_what_was_held_as_it_began(monkeypatch):
    # at the beginning; as a stage begins, its memory and the peak so far, and the peak at its end; the same of the second
    held = iter([100, 100, 100, 230, 228, 228, 290])
    monkeypatch.setattr(module, "_read_memory", lambda device, peak: next(held))
    meter = Meter(CPU)
    for name in ("recording", "training"):
        with meter.stage(name):
            pass
    recording, training = meter.stages.values()
    assert (recording.peak_bytes, recording.added_bytes) == (130, 130)
    assert (training.peak_bytes, training.added_bytes) == (190, 62)
    assert summed(meter).peak_bytes == 190


def test_a_peak_that_may_not_be_reset_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RESET", tmp_path)  # a folder: writing to it fails
    meter = Meter(CPU)
    with meter.stage("any"):
        torch.ones(1)
    assert list(meter.stages) == ["any"]


def test_seconds_are_those_of_the_stages_and_a_stage_that_fails_has_none():
    meter = Meter(CPU)
    with meter.stage("sleep"):
        time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), meter.stage("fail"):
        raise ZeroDivisionError
    assert list(meter.stages) == ["sleep"] and 0.02 <= summed(meter).seconds < 1
    assert meter.stages["sleep"].cpu_seconds < 0.02, "sleep is no work"


def test_where_memory_is_not_to_be_known_the_line_is_silent_about_it():
    meter = Meter(torch.device("mps"))
    with meter.stage("all"):
        pass
    assert summed(meter).peak_bytes is None and "memory" not in summed(meter).describe()
