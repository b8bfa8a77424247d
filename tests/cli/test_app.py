"""Tests of the commands on a tiny pipeline: results on stdout, and for every mistake one line on stderr and its exit code."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dmquant.cli import app, evaluate_command
from dmquant.evaluation.reports.report import Report
from dmquant.training.run_cost import Effort

SMALL = ("trajectories=1", "sampling_steps=2", "calibration_samples=2", "batch=2", "init=minmax")
QUICK = ["--max-steps=1", *(f"--set={pair}" for pair in SMALL)]


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def quantized(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the tiny pipeline at W4A8 as `dmquant quantize` writes it. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-w4a8"
    assert app.run_command(["quantize", str(tiny_folder), "--wbits", "4", "--abits", "8", "-o", str(folder), *QUICK]) == 0
    return folder


def fails(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    """Returns exit code and the one line on stderr of a command line that must fail without a result."""
    code = app.run_command([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    return code, err


# The usual way


def test_quantize_writes_a_pipeline_that_verifies_and_is_smaller(quantized, tiny_folder, capsys):
    assert app.run_command(["verify", str(quantized)]) == 0
    assert "unet/diffusion_pytorch_model.safetensors" in capsys.readouterr().out
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (quantized / weights).stat().st_size < (tiny_folder / weights).stat().st_size / 2


def test_the_run_is_named_after_model_method_and_bits(tiny_folder, tmp_path, capsys):
    assert app.run_command(["quantize", str(tiny_folder), "--wbits", "2", "--abits", "32", *QUICK]) == 0
    assert (tmp_path / "runs" / "tiny-lsq-w2a32" / "model_index.json").is_file()
    out, err = capsys.readouterr()
    assert out == "" and "runs/tiny-lsq-w2a32" in err
    assert re.search(r"trained [\d.]+ M parameters \(1\d\d.\d%\) in \d+ s: recording \d+, calibration \d+, fine-tuning \d+", err)
    assert json.loads((tmp_path / "runs" / "tiny-lsq-w2a32" / "effort.json").read_text())["is_whole"]
    assert 1 < float(re.search(r"MB on disk, 1/([\d.]+) of float32", err)[1]) < 16


def test_dry_run_shows_every_layer_and_writes_nothing(tiny_folder, tmp_path, capsys):
    assert app.run_command(["quantize", str(tiny_folder), "--wbits", "4", "--abits", "4", "--dry-run"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "first: kept at 8/8" in rows["conv_in"] and "16x8x3x3" in rows["down_blocks.1.resnets.0.conv1"]
    assert "size:" in out and "OPs:" in out
    assert list(tmp_path.iterdir()) == []


def test_eval_writes_the_report_into_the_folder_of_a_quantized_pipeline_and_compare_reads_it(
    quantized, tiny_folder, tmp_path, capsys
):
    run = shutil.copytree(quantized, tmp_path / "run")
    how = ["--psnr", "--num-images", "4", "--steps", "2", "--batch", "2", "--sampler", "ddim"]
    assert app.run_command(["eval", str(run), *how]) == 0
    assert "PSNR to float, dB" in capsys.readouterr().out
    report = Report.load(run)
    assert (report.method, report.weight_bits, report.act_bits, report.protocol.num_images) == ("lsq", 4, 8, 4)
    assert report.base_model == str(tiny_folder)
    assert app.run_command(["verify", str(run)]) == 0
    capsys.readouterr()
    assert app.run_command(["compare", str(run), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["bits"] == "4/8"


def test_eval_json_is_one_document_on_stdout(quantized, capsys):
    how = ["--psnr", "--num-images", "2", "--steps", "1", "-o", "here"]
    assert app.run_command(["eval", str(quantized), *how, "--json"]) == 0
    assert Report.from_json(capsys.readouterr().out) == Report.load("here")


def test_metrics_by_list_by_shorthand_and_by_both_are_measured_alike(quantized, capsys):
    how = [str(quantized), "--num-images", "2", "--steps", "1", "--json"]
    shown = []
    for asked in (["--psnr", "--cosine"], ["--metrics", "psnr,cosine"], ["--metrics", "psnr", "--cosine", "--psnr"]):
        assert app.run_command(["eval", *how, *asked, "-o", "here"]) == 0
        shown.append(json.loads(capsys.readouterr().out) | {"seconds_per_image": 0.0})
    assert shown[0]["metrics"]["psnr"] > 0 < shown[0]["metrics"]["cosine"] and shown[0] == shown[1] == shown[2]


def test_sample_is_repeatable_and_beside_adds_a_row(quantized, tiny_folder, capsys):
    how = ["-n", "4", "--steps", "2", "--seed", "7"]
    assert app.run_command(["sample", str(quantized), *how, "-o", "a.png"]) == 0
    assert app.run_command(["sample", str(quantized), *how, "--batch", "3", "-o", "b.png"]) == 0
    assert app.run_command(["sample", str(quantized), *how, "--beside", str(tiny_folder), "-o", "c.png"]) == 0
    a, b, c = (Image.open(name) for name in ("a.png", "b.png", "c.png"))
    # another batch size rounds differently, by one level at most
    assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1
    assert a.size[0] == a.size[1] and c.size[0] > c.size[1]
    assert capsys.readouterr().out == ""


def test_inspect_shows_whether_a_pipeline_is_quantized(quantized, tiny_folder, capsys):
    assert app.run_command(["inspect", str(quantized)]) == 0
    shown = capsys.readouterr().out
    assert "lsq" in shown and str(tiny_folder) in shown and "first: kept at 8/8" in shown
    assert Effort.load(quantized).describe() in shown
    assert app.run_command(["inspect", str(tiny_folder)]) == 0
    shown = capsys.readouterr().out
    assert "layers: 0 of" in shown and "effort" not in shown


def test_measured_layers_are_summarized_on_the_terminal(quantized, capsys):
    line = ["eval", str(quantized), "--layers", "--num-images", "4", "--steps", "2", "-o", "new", "--device", "cpu"]
    assert app.run_command(line) == 0
    worst = min((layer for layer in Report.load("new").layers if layer.total_db is not None), key=lambda layer: layer.total_db)
    shown = capsys.readouterr().out
    assert "worst layer on the float model's input: " in shown
    assert f"worst layer on its own model's input: {worst.name} ({worst.role}, " in shown
    assert f"SQNR {worst.total_db:.1f} dB" in shown
    assert app.run_command([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]


def test_the_defaults_of_eval_and_sample_are_those_of_the_library():
    from dmquant.diffusion.sampling import SamplingPlan
    from dmquant.evaluation.evaluator import evaluate

    for command, function in ((evaluate_command.evaluate, evaluate), (app.sample, SamplingPlan)):
        offered, taken = (inspect.signature(f).parameters for f in (command, function))
        shared = (offered.keys() & taken.keys()) - {"pipeline", "conditioning"}
        assert shared and {name: offered[name].default for name in shared} == {name: taken[name].default for name in shared}


def test_methods_shows_settings_with_defaults(capsys):
    assert app.run_command(["methods", "lsq"]) == 0
    assert "weight_bits" in capsys.readouterr().out


def test_doctor_reports_versions_as_table_and_json(capsys):
    app.run_command(["doctor"])
    assert "torch" in capsys.readouterr().out
    app.run_command(["doctor", "--json"])
    found = {item["name"]: item["value"] for item in json.loads(capsys.readouterr().out)}
    assert {"dmquant", "torch", "cpu", "kernels", "inception weights"} <= set(found)


# Mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["quantize", "--wbits", "x"], "--wbits"),
        (["quantize", "--wbits", "9"], "weight_bits must be 1 to 8, or 32"),
        (["quantize", "--abits", "1"], "act_bits must be 2 to 8"),
        (["quantize", "--method", "lqs"], "did you mean 'lsq'"),
        (["quantize", "--set", "learning_rat=1"], "did you mean 'learning_rate'"),
        (["quantize", "--set", "learning_rate"], "key=value"),
        (["quantize", "--wbits", "4", "--set", "weight_bits=2"], "given twice"),
        (["quantize", "--seed", "-1"], "--seed"),
        (["quantize", "--seed", str(2**63)], "--seed"),
        (["quantize", "--seed", "1.5"], "--seed"),
        (["eval", "--metod", "x"], "--metod"),
        (["eval", "--num-images", "1"], "--num-images"),
        (["compare"], "nothing to compare"),
        (["compare", "nowhere.json"], "nowhere.json does not exist"),
        (["compare", ".", "--format", "xls"], "--format"),
        (["methods", "lqs"], "did you mean 'lsq'"),
        (["sample", "embedded", "-o", "grid.txt"], ".png"),
        (["fetch", "everything"], "inception"),
        (["quantise"], "quantize"),
        (["eval", "--metrics", "fid,fdi"], "there is no metric 'fdi' (did you mean 'fid'?); known: fid, sfid, kid, is"),
        (["eval", "no/such/folder", "--kid", "--metrics", "speed"], "there is no metric 'speed'; known: fid, sfid"),
        (["eval", "--metrics", ""], "--metrics is empty"),
        (["eval", "--reference", ""], "--reference is empty"),
        (["eval", "--psnr", "--reference", "cifar10-train"], "reference: without effect"),
        (["eval", "--inception-weights", "x.pth"], "inception weights are for the extractor 'inception'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    code, err = fails(capsys, *arguments)
    assert code == 2 and message in err


@pytest.mark.parametrize("command", [["quantize", "-o", "new"], ["eval", "-o", "new"], ["sample", "-o", "new.png"], ["doctor"]])
def test_kernels_that_do_not_exist_are_refused_before_any_work(command, tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DMQUANT_KERNELS", "fast")
    code, err = fails(capsys, *command, *([] if command == ["doctor"] else [tiny_folder]))
    assert code == 2 and "DMQUANT_KERNELS must be one of auto, c, onednn" in err
    assert not list(tmp_path.iterdir())


def test_an_existing_result_is_refused_before_any_work(tiny_folder, capsys):
    folder = Path("taken")
    folder.mkdir()
    (folder / "diary.txt").write_text("mine")
    code, err = fails(capsys, "quantize", tiny_folder, "-o", folder)
    assert code == 2 and "--force" in err
    code, err = fails(capsys, "quantize", tiny_folder, "-o", folder, "--force")
    assert code == 2 and (folder / "diary.txt").read_text() == "mine"


def test_force_replaces_a_result(quantized, tiny_folder, capsys):
    shutil.copytree(quantized, "run")
    assert app.run_command(["quantize", str(tiny_folder), "--wbits", "2", "--abits", "8", "-o", "run", "--force", *QUICK]) == 0
    capsys.readouterr()
    assert app.run_command(["inspect", "run"]) == 0
    assert ["weight_bits", "2"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_missing_model_is_named(capsys):
    code, err = fails(capsys, "eval", "no/such/folder")
    assert code == 3 and "no/such/folder" in err


def test_a_damaged_pipeline_fails_verification_and_loading(quantized, tmp_path, capsys):
    run = shutil.copytree(quantized, tmp_path / "run")
    file = run / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fails(capsys, "verify", run)[0] == 1
    assert fails(capsys, "sample", run, "--steps", "1", "-n", "1")[0] == 1


def test_a_quantized_pipeline_is_not_quantized_again(quantized, capsys):
    code, err = fails(capsys, "quantize", quantized, "-o", "again")
    assert code == 2 and "quantized" in err


def test_missing_inception_weights_exit_with_3_and_say_where_to_get_them(tiny_folder, capsys, monkeypatch):
    monkeypatch.setenv("DMQUANT_INCEPTION_WEIGHTS", "nowhere.pth")
    code, err = fails(capsys, "eval", tiny_folder, "--fid", "--extractor", "inception", "--num-images", "2")
    assert code == 3 and "dmquant fetch inception" in err


def test_a_folder_that_cannot_be_made_is_refused(tiny_folder, capsys):
    Path("file").write_text("")
    for command in (["eval", tiny_folder, "-o", "file/x"], ["sample", tiny_folder, "-o", "file/x.png"]):
        code, err = fails(capsys, *command)
        assert code == 2 and "file" in err and "-o" in err


def test_no_folder_is_made_for_a_missing_model(tmp_path, capsys):
    Path("empty").mkdir()
    for line in (["eval", "nosuch"], ["sample", "nosuch", "-o", "new/x.png"], ["quantize", "nosuch"]):
        assert fails(capsys, *line)[0] == 3
    code, err = fails(capsys, "eval", "empty")
    assert code == 2 and "model_index.json" in err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_report_is_written_to_the_json_file_that_is_named(quantized, capsys):
    assert app.run_command(["eval", str(quantized), "--psnr", "--num-images", "2", "--steps", "1", "-o", "new/named.json"]) == 0
    assert Path("new/named.json").is_file() and capsys.readouterr().err == f"wrote {Path('new/named.json')}\n"


def test_a_picture_may_be_a_jpeg_in_a_new_folder(tiny_folder):
    assert app.run_command(["sample", str(tiny_folder), "-n", "1", "--steps", "1", "-o", "new/a.jpeg"]) == 0
    assert Image.open("new/a.jpeg").format == "JPEG"


# Failures


def failing_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("dmquant.evaluation.reports.report.Report.load", fail)


def test_out_of_memory_exits_with_4_and_advice(capsys, monkeypatch):
    import torch

    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        failing_with(monkeypatch, error)
        code, err = fails(capsys, "compare", ".")
        assert code == 4 and "--batch" in err


def test_a_bug_exits_with_70_and_leaves_a_traceback_file(capsys, monkeypatch):
    failing_with(monkeypatch, ZeroDivisionError("division\nby zero"))
    code, err = fails(capsys, "compare", ".")
    assert code == 70 and "ZeroDivisionError" in err
    file = Path(err.split()[-1])
    assert "Traceback" in file.read_text()
    file.unlink()


def test_a_full_disk_or_a_forbidden_file_is_not_reported_as_a_bug(capsys, monkeypatch):
    for error in (OSError(28, "No space left on device"), PermissionError(13, "Permission denied", "weights")):
        failing_with(monkeypatch, error)
        code, err = fails(capsys, "compare", ".")
        assert code == 1 and error.strerror in err


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("DMQUANT_DEBUG", "1")
    assert app.run_command(["compare", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_with_130(capsys, monkeypatch):
    failing_with(monkeypatch, KeyboardInterrupt())
    assert app.run_command(["compare", "."]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_is_no_error():
    program = "import sys; from dmquant.cli import app; sys.argv = ['dmquant', 'methods', '--help']; app.main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_without_a_command_the_help_is_shown(capsys):
    assert app.run_command([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "quantize" in err
