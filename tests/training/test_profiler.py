"""Each stage has its own seconds and its own peak, beyond what was held when the run began."""

import subprocess
import sys
import time

import pytest
import torch

from dmquant.training import profiler as module
from dmquant.training.profiler import Meter

CPU = torch.device("cpu")
MIB = 1 << 20


def summed(meter):
    return meter.sum_up(trained_params=3, trained_share=0.5, is_whole=True)


PROGRAM = f"""
import torch
from dmquant.training.profiler import Meter

meter = Meter(torch.device("cpu"))
with meter.stage("large"):
    torch.ones({256 * MIB // 4})
with meter.stage("small"):
    torch.ones(1)
print(*(meter.stages[name].peak_bytes for name in ("large", "small")))
"""


def test_a_stage_has_its_own_peak_and_later_ones_do_not_inherit_it():
    # a process of its own: systems take pages away that others left idle, and then it holds less in the middle of a stage
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout.split()
    if not module.STATUS.exists():  # only Linux tells a process what it holds
        assert found == ["None", "None"]
        return
    large, small = map(int, found)
    assert 200 * MIB < large < 280 * MIB and small < 20 * MIB


def test_what_a_stage_adds_is_beyond_what_was_held_as_it_began(monkeypatch):
    held = iter([100, 100, 230, 228, 290])  # at the beginning; as the first stage begins, at its peak; the same of the second
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


def test_where_memory_is_not_to_be_known_the_line_is_silent_about_it(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "STATUS", tmp_path / "none")
    meter = Meter(CPU)
    with meter.stage("all"):
        pass
    assert summed(meter).peak_bytes is None and "memory" not in summed(meter).describe()
