"""What a run takes: each stage by itself, memory beyond the start, one line and one file."""

import json
import time

import pytest
import torch

from dmquant import checkpoint, effort, storage
from dmquant.denoiser import open_pipeline
from dmquant.effort import FILE_NAME, Effort, Meter, Stage
from dmquant.errors import Interrupted
from dmquant.quantization import quantize
from dmquant.runs import SavedRun

QUICK = dict(trajectories=2, sampling_steps=2, calibration_samples=4, max_steps=2, batch=2)
CPU = torch.device("cpu")
MIB = 1 << 20


def summed(meter):
    return meter.sum_up(trained_params=3, trained_share=0.5, is_whole=True)


def test_a_stage_has_its_own_peak_and_later_ones_do_not_inherit_it():
    meter = Meter(CPU)
    with meter.stage("large"):
        torch.ones(64 * MIB // 4)
    with meter.stage("small"):
        torch.ones(1)
    large, small = (meter.stages[name].peak_bytes for name in ("large", "small"))
    if not effort.STATUS.exists():  # only Linux tells a process what it holds
        assert large is small is None
        return
    assert 60 * MIB < large < 80 * MIB and small < 20 * MIB
    assert summed(meter).peak_bytes == meter.stages["large"].peak_bytes


def test_a_peak_that_may_not_be_reset_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(effort, "RESET", tmp_path)  # a folder: writing to it fails
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
    monkeypatch.setattr(effort, "STATUS", tmp_path / "none")
    meter = Meter(CPU)
    with meter.stage("all"):
        pass
    assert summed(meter).peak_bytes is None and "memory" not in summed(meter).describe()


def test_the_line_names_parameters_time_stages_and_memory():
    stages = {"recording": Stage(40.2, 80.4, None), "fine-tuning": Stage(259.9, 500.0, 812_000_000)}
    taken = Effort(stages, 0, "cpu", 1_078_432, 0.431, False)
    assert taken.describe() == (
        "trained 1.08 M parameters (43.1%) in 300 s since it was resumed: recording 40, fine-tuning 260; "
        "812 MB of memory at the peak"
    )


def test_a_quantized_pipeline_knows_what_it_took_and_its_file_lies_beside_what_is_published(tiny_folder, tmp_path):
    quantized = quantize(open_pipeline(tiny_folder), "lsq", **QUICK)
    taken, record = quantized.unet.dmquant_effort, quantized.unet.dmquant_record
    assert list(taken.stages) == ["recording", "calibration", "fine-tuning"] and taken.is_whole
    assert (taken.trained_params, taken.trained_share) == (record["trained_params"], record["trained_share"])
    taken.save(checkpoint.save(quantized, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / FILE_NAME).read_text())["trained_params"] == taken.trained_params
    assert FILE_NAME not in checkpoint.verify(tmp_path / "out")
    assert storage.check_target(tmp_path / "out", force=True)


def test_a_run_that_was_continued_says_that_it_counts_from_there(tiny_folder, tmp_path):
    pipeline, asked = open_pipeline(tiny_folder), []

    def stop_at_once():
        asked.append(None)
        return len(asked) == 2

    with pytest.raises(Interrupted):
        quantize(pipeline, "lsq", run=SavedRun(tmp_path / "run", should_stop=stop_at_once), **QUICK)
    assert not quantize(pipeline, "lsq", run=SavedRun(tmp_path / "run"), **QUICK).unet.dmquant_effort.is_whole
