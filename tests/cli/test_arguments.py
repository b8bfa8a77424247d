"""Tests of parsing and checking arguments, and of the default folders."""

from pathlib import Path

import pytest

from dmquant.cli import arguments
from dmquant.cli.options import METRIC_NAMES
from dmquant.errors import InputError
from dmquant.evaluation.metrics.registry import NAMES


def test_results_are_named_after_model_method_and_bits():
    assert arguments.default_result_folder(None, "lsq", 4, 8) == Path("runs/embedded-lsq-w4a8")
    assert arguments.default_result_folder("google/ddpm-cifar10-32", "lsq", 2, 32) == Path("runs/ddpm-cifar10-32-lsq-w2a32")
    assert arguments.default_result_folder("some/where/", "lsq", 4, 4) == Path("runs/where-lsq-w4a4")


def test_the_working_folder_is_named_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arguments.default_result_folder(".", "lsq", 4, 8).name == f"{tmp_path.name}-lsq-w4a8"


def test_a_float_pipeline_is_evaluated_into_a_folder_of_its_own(tiny_folder):
    assert arguments.default_report_folder(str(tiny_folder)) == Path("runs/eval-tiny")
    assert arguments.default_report_folder(None) == Path("runs/eval-embedded")


def test_settings_keep_everything_after_the_first_equals_sign():
    assert arguments.merge_settings({"max_steps": None, "act_bits": 8}, ["a=b=c", "d="]) == {"act_bits": 8, "a": "b=c", "d": ""}


@pytest.mark.parametrize("line", [["eval", ""], ["eval", "--data="], ["eval", "--reference", ""], [""]])
def test_an_empty_argument_is_refused_by_name(line):
    with pytest.raises(InputError, match=f"{line[-1].rstrip('=') or line[-2:][0] or 'the first argument'} is empty"):
        arguments.refuse_empty(line)
    arguments.refuse_empty(["eval", "a=", "--set=a=", "--", "-o"])


def test_checking_a_folder_does_not_make_it(tmp_path):
    assert arguments.require_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; choose another with -o"):
        arguments.require_writable(tmp_path / "file" / "b")


@pytest.mark.parametrize("pairs", [["a"], ["=a"], ["a=1", "a=2"], ["act_bits=4"]])
def test_settings_that_are_no_pair_or_given_twice_are_refused(pairs):
    with pytest.raises(InputError):
        arguments.merge_settings({"act_bits": 8}, pairs)


def test_a_folder_of_folders_is_replaced_by_those_with_reports(tmp_path):
    for name in ("all/b", "all/a", "all/empty", "one"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("all/b", "all/a", "one"):
        (tmp_path / name / "report.json").touch()
    file, missing = tmp_path / "one" / "report.json", tmp_path / "nowhere"
    found = arguments.find_reports([tmp_path / "all", tmp_path / "one", file, missing, tmp_path / "all" / "empty"])
    inner = [tmp_path / "all" / "a", tmp_path / "all" / "b"]
    assert found == [*inner, tmp_path / "one", file, missing, tmp_path / "all" / "empty"]


def test_metrics_are_those_of_the_list_and_those_of_options_of_their_own_each_once():
    assert arguments.read_metrics("psnr, fid", ["fid", "kid"]) == ("psnr", "fid", "kid")
    assert arguments.read_metrics(None, ["kid"]) == ("kid",)
    assert arguments.read_metrics(None) is None


@pytest.mark.parametrize("text", ["fid,fdi", "fid,", ",", "FID"])
def test_an_unknown_metric_is_refused_with_the_list(text):
    with pytest.raises(InputError, match=f"there is no metric .*known: {', '.join(NAMES)}"):
        arguments.read_metrics(text)


def test_the_help_of_commands_lists_all_metrics():
    assert ", ".join(NAMES) == METRIC_NAMES


MISTAKES = [("a.txt", "must end in .npz"), ("taken.npz", "exists; remove it"), ("f/x.npz", "is a file")]


@pytest.mark.parametrize("name, message", MISTAKES)
def test_a_new_file_is_one_that_can_be_made(tmp_path, name, message):
    (tmp_path / "taken.npz").touch()
    (tmp_path / "f").touch()
    with pytest.raises(InputError, match=message):
        arguments.require_new(tmp_path / name, ".npz")
    arguments.require_new(tmp_path / "new" / "x.npz", ".npz")
