"""What a run took: one line and one file."""

import json

import pytest

from dmquant.checkpoint import atomic_folder, serialization
from dmquant.diffusion.pipeline import open_pipeline
from dmquant.errors import DamagedFile, Interrupted
from dmquant.methods import get
from dmquant.quantization import quantize, quantize_measured
from dmquant.training.resume import SavedRun
from dmquant.training.run_cost import FILE_NAME, Effort, Stage

QUICK = dict(trajectories=2, sampling_steps=2, calibration_samples=4, max_steps=2, batch=2)
STAGES = {"recording": Stage(40.2, 80.4, None), "fine-tuning": Stage(259.9, 500.0, 812_000_000)}
TAKEN = Effort(STAGES, 0, "cpu", 1_078_432, 0.431, False)


def test_the_line_names_parameters_time_stages_and_memory():
    assert TAKEN.describe() == (
        "trained 1.08 M parameters (43.1%) in 300 s since it was resumed: recording 40, fine-tuning 260; "
        "812 MB of memory at the peak"
    )


def test_a_quantized_pipeline_knows_what_it_took_and_its_file_lies_beside_what_is_published(tiny_folder, tmp_path):
    measured = quantize_measured(open_pipeline(tiny_folder), get("lsq").parse(QUICK))
    quantized, taken = measured.pipeline, measured.effort
    record = quantized.unet.dmquant_record
    assert list(taken.stages) == ["recording", "calibration", "fine-tuning", "clipping"] and taken.is_whole
    assert (taken.trained_params, taken.trained_share) == (record["trained_params"], record["trained_share"])
    taken.save(serialization.save(quantized, tmp_path / "out"))
    assert Effort.load(tmp_path / "out") == taken
    assert FILE_NAME not in serialization.verify(tmp_path / "out")
    assert atomic_folder.check_target(tmp_path / "out", force=True)


def test_a_run_that_was_continued_says_that_it_counts_from_there(tiny_folder, tmp_path):
    pipeline, asked = open_pipeline(tiny_folder), []

    def stop_at_once():
        asked.append(None)
        return len(asked) == 2

    with pytest.raises(Interrupted):
        quantize(pipeline, "lsq", run=SavedRun(tmp_path / "run", should_stop=stop_at_once), **QUICK)
    assert not quantize_measured(pipeline, get("lsq").parse(QUICK), run=SavedRun(tmp_path / "run")).effort.is_whole


def test_what_was_not_kept_is_none_and_what_was_damaged_is_refused(tmp_path):
    assert Effort.load(tmp_path) is None
    TAKEN.save(tmp_path)
    whole = json.loads((tmp_path / FILE_NAME).read_text())
    worded = ({**whole, "more": 1}, {**whole, "stages": {"a": {"seconds": "1"}}}, {**whole, "trained_params": "x"})
    for damage in ("{", "[]", *worded):
        (tmp_path / FILE_NAME).write_text(damage if isinstance(damage, str) else json.dumps(damage))
        with pytest.raises(DamagedFile, match="does not say what a run took"):
            Effort.load(tmp_path)
