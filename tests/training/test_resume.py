import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from PIL import Image
from torch import nn

from dmquant.checkpoint import atomic_folder
from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.errors import DamagedFile, DmquantError, InputError, Interrupted
from dmquant.nn.fake_quant_layers import swap
from dmquant.quantization import quantize
from dmquant.quantizers.uniform import LearnedStep
from dmquant.training import resume
from dmquant.training.resume import Run, SavedRun
from dmquant.training.trainer import Step, Training, fit

QUICK = dict(trajectories=1, sampling_steps=2, calibration_samples=2, max_steps=6, batch=2, init="minmax")


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    return open_pipeline(tiny_folder)


@pytest.fixture(scope="module")
def whole(pipeline):
    """The weights of a run that never stopped. Read them; do not change them."""
    return weights(quantize(pipeline, **QUICK))


@pytest.fixture(scope="module")
def stopped(pipeline, tmp_path_factory):
    """The folder of a run stopped after two steps, its state saved. Read it; do not write into it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted, match="stopped before step 2"):
        quantize(pipeline, run=SavedRun(folder, should_stop=after(2)), **QUICK)
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "run")


def weights(pipeline):
    return find_target(pipeline).denoiser.state_dict()


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def after(count):
    """A `should_stop` that is true once it was asked `count` times before."""
    asked = iter(range(1 << 30))
    return lambda: next(asked) >= count


# Continuing


@pytest.mark.parametrize("stops, settings", [((3,), {}), ((0, 1, 4), {"ema_decay": 0.9})], ids=["once", "thrice"])
def test_a_stopped_run_ends_with_the_weights_of_one_that_never_stopped(stops, settings, pipeline, whole, tmp_path):
    expected = weights(quantize(pipeline, **QUICK, **settings)) if settings else whole
    for taken in stops:
        with pytest.raises(Interrupted):
            quantize(pipeline, run=SavedRun(tmp_path / "run", should_stop=after(taken)), **QUICK, **settings)
    assert json.loads((tmp_path / "run" / "state" / "step.json").read_text()) == sum(stops)
    torch.manual_seed(123)
    assert_equal(weights(quantize(pipeline, run=SavedRun(tmp_path / "run"), **QUICK, **settings)), expected)


def test_an_interrupt_in_the_middle_of_a_step_costs_the_steps_since_the_last_save(pipeline, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SHARE", math.inf)

    def press(steps, label):
        for step in steps:
            yield step
            if label == "fine-tune" and step.number == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(pipeline, run=SavedRun(tmp_path / "run", period_s=0), track=press, **QUICK)
    assert json.loads((tmp_path / "run" / "state" / "step.json").read_text()) == 3
    assert_equal(weights(quantize(pipeline, run=SavedRun(tmp_path / "run"), **QUICK)), whole)


def test_samples_are_recorded_once(pipeline, folder, monkeypatch):
    monkeypatch.setattr("dmquant.quantization.record", None)
    quantize(pipeline, run=SavedRun(folder), **QUICK)


class Line(torch.nn.Module):
    """A denoiser of one layer."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(6, 6)

    def forward(self, sample, timestep, return_dict=True):
        return (self.body(sample),)


class Faulty:
    """Wants back what it gave; answers NaN at steps 4, 5 and 6, so that the guard rolls back."""

    def loss(self, student, batch, *, step, generator, device):
        x = torch.randn(batch, 6, generator=generator)
        loss = torch.nn.functional.mse_loss(student(x, 0)[0], x)
        return loss * math.nan if step in (4, 5, 6) else loss


@pytest.mark.parametrize("stop", [5, 6, 7, 9])
def test_the_guard_remembers_what_it_saw_before_the_stop(stop, tmp_path):
    torch.manual_seed(0)
    start, training = Line(), Training(12, 4, 1e-2, 1e-2)

    def student():
        line = Line()
        line.load_state_dict(start.state_dict())
        swap(line, lambda name, layer: (LearnedStep(3, num_channels=6, ndim=2), torch.nn.Identity()))
        line.body.weight_quantizer.observe(line.body.weight)
        return line

    whole, stopped, continued = student(), student(), student()
    losses = fit(whole, Faulty(), training, seed=0)
    for line, should_stop in ((stopped, after(stop)), (continued, after(99))):
        run = SavedRun(tmp_path / "run", should_stop=should_stop)
        run.open({}, {})
        with suppress(Interrupted):
            rest = fit(line, Faulty(), training, seed=0, run=run)
    assert_equal(continued.state_dict(), whole.state_dict())
    assert len(rest) == 12 - stop and rest[3:] == losses[stop + 3 :]


CHILD = """
import sys
from dmquant.training import resume
from dmquant.diffusion.pipeline import open_pipeline
from dmquant.quantization import quantize
resume.SHARE = float("inf")
quantize(open_pipeline(sys.argv[1]), run=resume.SavedRun(sys.argv[2], period_s=0), **eval(sys.argv[3]))
"""


def test_a_killed_run_continues_with_the_same_weights(pipeline, tiny_folder, tmp_path):
    settings = {**QUICK, "max_steps": 400}
    step = tmp_path / "run" / "state" / "step.json"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tiny_folder), str(tmp_path / "run"), repr(settings)])
    while not step.exists() and child.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    run = SavedRun(tmp_path / "run", should_stop=after(2))
    assert run.is_there()
    begin = json.loads(step.read_text())
    with pytest.raises(Interrupted):
        quantize(pipeline, run=run, **settings)
    with pytest.raises(Interrupted):
        quantize(pipeline, run=SavedRun(tmp_path / "whole", should_stop=after(begin + 2)), **settings)
    for name in ("student", "optimizer", "guard"):
        continued, whole = (tmp_path / where / "state" / f"{name}.safetensors" for where in ("run", "whole"))
        assert continued.read_bytes() == whole.read_bytes()
    run.remove()
    assert not run.folder.exists()


# Refusing


def test_other_facts_are_refused_by_name(pipeline, folder, tmp_path, monkeypatch):
    def refuses(match, pipeline=pipeline, **settings):
        with pytest.raises(InputError, match=match):
            quantize(pipeline, run=SavedRun(folder), **{**QUICK, **settings})

    refuses("seed was 0, now 1", seed=1)
    refuses("batch was 2, now 3; learning_rate was .*, now 0.1", batch=3, learning_rate=0.1)
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a.png")
    refuses("data was", data=tmp_path / "data")
    other = open_pipeline(pipeline.config._name_or_path)
    torch.nn.init.zeros_(other.unet.conv_in.bias)
    refuses("model was", pipeline=other)
    monkeypatch.setattr(resume, "__version__", "0.0.7")
    refuses("dmquant was .*, now 0.0.7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses("ranks was 1, now 2")


def test_a_setting_that_came_after_the_run_was_saved_may_stay_off(pipeline, folder, whole):
    facts = folder / "start" / "facts.json"
    known = json.loads(facts.read_text())
    assert known.pop("eta") == 0
    facts.write_text(json.dumps(known))
    (facts.parent / atomic_folder.MANIFEST).unlink()
    atomic_folder.seal(facts.parent)
    assert_equal(weights(quantize(pipeline, run=SavedRun(folder), **QUICK)), whole)


@pytest.mark.parametrize("name", ["state/optimizer.safetensors", "state/step.json", "start/samples.safetensors"])
def test_a_damaged_state_is_refused_and_can_be_removed(name, pipeline, folder):
    file = folder / name
    file.write_bytes(file.read_bytes()[:-1])
    run = SavedRun(folder)
    with pytest.raises(DamagedFile, match=f"{file.name} is damaged.*--force"):
        quantize(pipeline, run=run, **QUICK)
    run.remove()
    assert not run.is_there() and not run.folder.exists()


def test_what_somebody_else_put_there_is_not_removed(folder):
    (folder / "diary.txt").write_text("mine")
    SavedRun(folder).remove()
    assert [path.name for path in folder.iterdir()] == ["diary.txt"]
    (folder / "state").mkdir()
    (folder / "state" / "diary.txt").write_text("mine too")
    with pytest.raises(InputError, match="does not delete"):
        SavedRun(folder).remove()


# Saving


def test_a_run_that_is_not_interrupted_leaves_no_files(pipeline, tmp_path):
    quantize(pipeline, run=SavedRun(tmp_path / "run"), **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_before_the_first_step_leaves_no_files(pipeline, tmp_path):
    def press(work, label):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(pipeline, run=SavedRun(tmp_path / "run", period_s=0), track=press, **QUICK)
    assert list(tmp_path.iterdir()) == []


def enter_storeroom(run, steps):
    """Keeps a file beside the state, and takes that many steps before somebody asks to stop."""
    run.open({}, {})
    with run.storeroom() as room:
        (room / "rows").touch(exist_ok=False)
        for step in run.keep([Step(number) for number in range(3)], {}):
            if step.number == steps:
                raise KeyboardInterrupt
    return room


def test_what_is_kept_beside_the_state_is_gone_with_the_run_unless_it_can_be_continued(tmp_path):
    assert not enter_storeroom(Run(), 3).exists()
    folder = tmp_path / "run"
    assert enter_storeroom(SavedRun(folder), 3) == folder / "store" / "0" and not folder.exists()
    with pytest.raises(KeyboardInterrupt):
        enter_storeroom(SavedRun(folder), 1)
    assert not folder.exists(), "nothing was saved"
    with pytest.raises(KeyboardInterrupt):
        enter_storeroom(SavedRun(folder, period_s=0), 1)
    run = SavedRun(folder)
    run.open({}, {})
    with pytest.raises(KeyboardInterrupt), run.storeroom() as room:
        assert [file.name for file in room.iterdir()] == ["rows"]
        raise KeyboardInterrupt
    run.remove()
    assert not folder.exists()


def test_a_save_that_fails_leaves_the_state_before_it(pipeline, whole, folder, monkeypatch):
    save, done = resume.save_file, []
    while True:
        calls = iter(range(1 << 30))

        def fail(tensors, path):
            if next(calls) == len(done):
                raise resume.SafetensorError("No space left on device")
            save(tensors, path)

        monkeypatch.setattr(resume, "save_file", fail)
        try:
            quantize(pipeline, run=SavedRun(folder, should_stop=after(1)), **QUICK)
        except Interrupted:
            break
        except DmquantError as error:
            done.append(str(error))
    assert len(done) == 3 and all("No space left" in text for text in done)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert_equal(weights(quantize(pipeline, run=SavedRun(folder), **QUICK)), whole)


def test_saving_copies_nothing_but_what_shares_memory(folder, monkeypatch):
    plain, tied = torch.arange(6.0), nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"one": tied, "other": nn.Linear(2, 2, bias=False)})
    model["other"].weight = tied.weight
    save, written = resume.save_file, []
    monkeypatch.setattr(resume, "save_file", lambda tensors, path: [written.append(tensors), save(tensors, path)])
    resume._write(folder, "state", {"model": model.state_dict(), "plain": plain})
    first, second, last = written[0].values()
    assert first.data_ptr() == tied.weight.data_ptr() != second.data_ptr() and last.data_ptr() == plain.data_ptr()
    found = resume._read(folder, "state", torch.device("cpu"))
    assert_equal(found["model"], model.state_dict())
    assert torch.equal(found["plain"], plain)


def test_a_large_state_is_saved_less_often(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    run, saved = SavedRun(tmp_path / "run", period_s=10), []
    steps = [Step(number) for number in range(200)]

    def save(number, parts):
        saved.append(number)
        now[0] += 0.5

    monkeypatch.setattr(run, "_save", save)
    for _ in run.keep(steps, {}):
        now[0] += 1.0
    assert saved == [10, 60, 110, 160]


def test_all_ranks_stop_when_one_is_asked_and_only_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "gather_object", lambda wishes: [*wishes, True])
    for rank, is_writer in ((1, False), (0, True)):
        monkeypatch.setenv("RANK", str(rank))
        run = SavedRun(tmp_path / "run")
        run.open({}, {})
        with pytest.raises(Interrupted):
            list(run.keep([Step(0)], {}))
        assert run.is_there() == is_writer


def test_a_run_that_another_rank_is_about_to_remove_is_not_continued(tmp_path, monkeypatch):
    (tmp_path / "run" / "state").mkdir(parents=True)
    monkeypatch.setenv("RANK", "1")
    run = SavedRun(tmp_path / "run")
    assert run.is_there()
    run.remove()
    assert not run.is_there() and (tmp_path / "run" / "state").is_dir()


def test_files_follow_the_umask_and_hold_no_pickle(stopped):
    files = [path for path in stopped.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~_umask())}


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
