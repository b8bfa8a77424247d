"""Each stage has its own seconds and its own peak, beyond what was held when the run began."""

import gc
import time

import pytest
import torch

from dmquant import meter as module
from dmquant.meter import Meter

CPU = torch.device("cpu")
MIB = 1 << 20


def summed(meter):
    return meter.sum_up(trained_params=3, trained_share=0.5, is_whole=True)


def test_a_stage_has_its_own_peak_and_later_ones_do_not_inherit_it():
    gc.collect()  # what earlier tests left is not to be given back in the middle of this one
    meter = Meter(CPU)
    with meter.stage("large"):
        torch.ones(256 * MIB // 4)
    with meter.stage("small"):
        torch.ones(1)
    large, small = (meter.stages[name].peak_bytes for name in ("large", "small"))
    if not module.STATUS.exists():  # only Linux tells a process what it holds
        assert large is small is None
        return
    assert 200 * MIB < large < 280 * MIB and small < 20 * MIB
    assert summed(meter).peak_bytes == meter.stages["large"].peak_bytes


def test_what_a_stage_adds_is_beyond_what_was_held_as_it_began():
    meter, held = Meter(CPU), []
    with meter.stage("recording"):
        held.append(torch.ones(128 * MIB // 4))
    with meter.stage("training"):
        torch.ones(64 * MIB // 4)
    training = meter.stages["training"]
    if not module.STATUS.exists():
        assert training.added_bytes is None
        return
    assert training.peak_bytes > 160 * MIB and 40 * MIB < training.added_bytes < 90 * MIB
    assert summed(meter).peak_bytes == training.peak_bytes


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
