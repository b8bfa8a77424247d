"""Tests of runs of the command line that are interrupted and continued."""

import os
import shlex
import signal
from pathlib import Path

import pytest

from dmquant.cli import app, console
from dmquant.cli.signals import StopRequest

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SMALL = ("trajectories=1", "sampling_steps=2", "calibration_samples=2", "batch=2", "init=minmax")
QUICK = ["--max-steps=5", *(f"--set={pair}" for pair in SMALL)]


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Pressing:
    """Returns a tracker that sends signals during the work on one item."""

    def __init__(self, label, number, *signals):
        self._where, self._signals = (label, number), signals

    def __call__(self, work, label):
        for number, item in enumerate(work):
            if (label, number) == self._where:
                for sent in self._signals:
                    os.kill(os.getpid(), sent)
            yield item


def press(monkeypatch, label, number, *signals):
    monkeypatch.setattr(console, "Tracker", lambda: Pressing(label, number, *signals))


def quantize(folder, *options, output="out"):
    return app.run_command(["quantize", str(folder), "-o", str(output), *QUICK, *options])


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """Returns the bytes of a run without interrupt."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert quantize(tiny_folder, output=folder) == 0
    return (folder / WEIGHTS).read_bytes()


def interrupt(monkeypatch, folder, *options):
    with monkeypatch.context() as patch:
        press(patch, "fine-tune", 2, signal.SIGINT)
        assert quantize(folder, *options) == 130


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_command_printed_after_a_signal_ends_with_the_same_bytes(sent, tiny_folder, whole, tmp_path, monkeypatch, capsys):
    press(monkeypatch, "fine-tune", 2, sent)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert quantize(tiny_folder, output="my out") == 130
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said = capsys.readouterr().err.splitlines()
    assert "stopping after this step" in said[-2] and not Path("my out").exists()
    monkeypatch.setattr(console, "Tracker", lambda: lambda work, label: work)
    command = shlex.split(said[-1].removeprefix("interrupted; to continue: "))
    assert command[0] == "dmquant" and app.run_command(command[1:]) == 0
    assert "continuing the run" in capsys.readouterr().err
    assert Path("my out", WEIGHTS).read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["my out"]


def test_a_second_signal_stops_at_once(tiny_folder, tmp_path, monkeypatch, capsys):
    press(monkeypatch, "fine-tune", 2, signal.SIGINT, signal.SIGINT)
    assert quantize(tiny_folder) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing to resume"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_before_fine_tuning_leaves_nothing_to_resume(tiny_folder, tmp_path, monkeypatch, capsys):
    press(monkeypatch, "calibrate", 0, signal.SIGINT)
    monkeypatch.setattr("dmquant.quantization.record", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert quantize(tiny_folder) == 130
    assert capsys.readouterr().err == "interrupted; nothing to resume\n"
    assert list(tmp_path.iterdir()) == []


def test_a_second_interruption_keeps_the_state_of_the_first(tiny_folder, monkeypatch, tmp_path, capsys):
    interrupt(monkeypatch, tiny_folder)
    monkeypatch.setattr("dmquant.quantization.copy.deepcopy", lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert quantize(tiny_folder, "--resume") == 130
    assert capsys.readouterr().err.count("interrupted; to continue: dmquant quantize") == 2


def test_an_interrupted_run_is_neither_continued_nor_deleted_without_an_option(tiny_folder, monkeypatch, tmp_path, capsys):
    interrupt(monkeypatch, tiny_folder)
    capsys.readouterr()
    assert quantize(tiny_folder) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "--resume" in err and "--force" in err
    assert quantize(tiny_folder, "--resume", "--seed=1") == 2
    assert "seed was 0, now 1" in capsys.readouterr().err
    assert quantize(tiny_folder, "--force", "--seed=1") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_without_a_saved_run_starts_from_the_beginning(tiny_folder, capsys):
    assert quantize(tiny_folder, "--resume") == 0
    assert "nothing to resume: starting from the beginning" in capsys.readouterr().err


def test_a_signal_before_the_first_poll_interrupts_at_once():
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
