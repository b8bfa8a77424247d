"""Tests of the commands `eval`, `reference` and `compare`: one process or several, with and without stored images."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmquant.cli import app
from dmquant.cli.evaluate_command import describe_worst
from dmquant.evaluation import image_cache
from dmquant.evaluation.reports.report import LayerProfile, Report
from dmquant.quantizers import uniform
from dmquant.training import distributed
from tests.text import make_text_pipeline, save_clip

QUICK = ["--num-images", "10", "--steps", "2", "--batch", "4", "--seed", "5"]
ALONE = ["--fid", "--is", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a saved pipeline with the embedded extractor's image size."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    unet = UNet2DModel(sample_size=32, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    path = tmp_path_factory.mktemp("pipelines") / "plain"
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    path, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


def run(*arguments: object) -> int:
    return app.run_command([str(argument) for argument in arguments])


def test_two_processes_measure_the_same_as_one(folder, tmp_path):
    import torch

    line = ["eval", folder, "--fid", "--sfid", "--kid", "--is", "--prdc", *QUICK, "--device", "cpu", "--no-cache"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another order of summation rounds differently
    try:
        assert run(*line, "-o", "one") == 0
    finally:
        torch.set_num_threads(threads)
    program = [sys.executable, "-m", "dmquant", *map(str, line), "-o", "two", "--num-processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("protocol: ") == 1 and done.stderr.count("wrote ") == 1
    assert "destroy_process_group" not in done.stderr
    one, two = Report.load("one"), Report.load("two")
    assert one.metrics == two.metrics and one.protocol == two.protocol and one.seconds_per_image > 0 < two.seconds_per_image


def test_a_launched_process_launches_no_others(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed.subprocess, "run", lambda *_, **__: pytest.fail("launched"))
    assert run("eval", "nosuch", "--num-processes", 2) == 3


def test_several_processes_get_the_command_line_and_their_exit_code_comes_back(monkeypatch):
    calls = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(distributed.subprocess, "run", lambda *a, **how: calls.append(a[0]) or subprocess.CompletedProcess(a, 1))
    assert run("eval", "model", "--num-processes", 2, "--fid") == 1
    assert calls[0][-7:] == ["--nproc_per_node=2", "-m", "dmquant", "eval", "model", "--num-processes", "2", "--fid"][-7:]


def test_stored_images_are_reused_without_no_cache(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("DMQUANT_CACHE", str(tmp_path / "images"))
    assert run("eval", folder, *ALONE, *QUICK, "-o", "first") == 0
    assert len(list((tmp_path / "images").rglob("*.safetensors"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "generate", lambda *_, **__: pytest.fail("an image was drawn"))
        assert run("eval", folder, "--kid", "--prdc", "--device", "cpu", *QUICK, "-o", "second") == 0
        assert run("eval", folder, *ALONE, *QUICK, "-o", "third") == 0
    assert Report.load("third") == Report.load("first")
    drawn = []
    real = image_cache.generate
    monkeypatch.setattr(image_cache, "generate", lambda *a, **how: drawn.append(1) or real(*a, **how))
    assert run("eval", folder, *ALONE, *QUICK, "-o", "fourth", "--no-cache") == 0
    assert len(drawn) == 3 and Report.load("fourth").metrics == Report.load("first").metrics


def test_an_interrupt_keeps_the_stored_images(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DMQUANT_CACHE", str(tmp_path / "images"))
    real = image_cache.generate

    def stop(pipeline, seeds, plan):
        if seeds[0] == 9:
            raise KeyboardInterrupt
        return real(pipeline, seeds, plan)

    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "generate", stop)
        assert run("eval", folder, *ALONE, *QUICK, "-o", "run") == 130
    assert "the same command continues" in capsys.readouterr().err and not Path("run").exists()
    assert run("eval", folder, *ALONE, *QUICK, "-o", "run") == 0
    assert run("eval", folder, *ALONE, *QUICK, "-o", "again", "--no-cache") == 0
    assert Report.load("run").metrics == Report.load("again").metrics


def test_a_reference_is_made_and_compared_with(folder, pictures, capsys):
    assert run("reference", pictures, "-o", "new/mine.npz", "--size", 32, "--device", "cpu") == 0
    assert "wrote new/mine.npz: 8 images, features of 8" in capsys.readouterr().err
    assert run("eval", folder, "--fid", "--sfid", "--kid", "--prdc", *QUICK, "--reference", "new/mine.npz", "-o", "by-file") == 0
    assert run("eval", folder, "--fid", "--sfid", "--kid", "--prdc", *QUICK, "--reference", pictures, "-o", "by-images") == 0
    by_file, by_images = Report.load("by-file"), Report.load("by-images")
    assert by_file.metrics == pytest.approx(by_images.metrics, rel=1e-6) and by_file.protocol.reference_images == 8


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["reference", "nowhere", "-o", "x.npz"], 2, "nowhere does not exist"),
        (["reference", ".", "-o", "x.txt"], 2, "must end in .npz"),
        (["reference", ".", "-o", "taken.npz"], 2, "exists; remove it"),
        (["reference", "."], 2, "--output"),
        (["eval", "--num-processes", "0"], 2, "--num-processes"),
    ],
)
def test_mistakes_are_one_line(arguments, code, message, capsys):
    Path("taken.npz").touch()
    assert run(*arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_compare_writes_a_page_beside_its_table(folder, capsys, monkeypatch):
    assert run("eval", folder, *ALONE, *QUICK, "-o", "float") == 0
    capsys.readouterr()
    assert run("compare", "float", "--format", "latex", "--html", "new/page.html", "--samples", 2, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert out.startswith(r"\begin{tabular}") and "wrote new/page.html" in err
    assert Path("new/page.html").read_text(encoding="utf-8").count("data:image/png") == 2  # a picture for each sample
    assert run("compare", "float", "--html", "page.txt") == 2 and run("compare", "float", "--html", "new") == 2


# Prompts and classes


def test_the_worst_layer_is_named_on_the_float_input_and_on_its_own_models():
    errors = [(20.0, 9.0), (12.0, 15.0)]  # dB, on the float input and on its own model's
    layers = [LayerProfile(f"l{n}", "body", 4, 8, alone, total, {}) for n, (alone, total) in enumerate(errors)]
    silent = replace(layers[0], local_db=None, total_db=None)  # one without an error
    assert describe_worst([*layers, silent]) == [
        "worst layer on the float model's input: l1 (body, 4/8), SQNR 12.0 dB",
        "worst layer on its own model's input: l0 (body, 4/8), SQNR 9.0 dB",
    ]  # fmt: skip
    assert describe_worst([silent]) == describe_worst([]) == []


@pytest.fixture(scope="module")
def painter(tmp_path_factory) -> Path:
    """A saved text pipeline, a CLIP beside it, and prompts in two kinds of file."""
    path = tmp_path_factory.mktemp("text")
    make_text_pipeline().save_pretrained(path / "painter")
    save_clip(path / "clip")
    (path / "prompts.txt").write_text("a red cat\nx\n")
    (path / "captions.csv").write_text("id,caption\n1,a red cat\n2,x\n")
    return path


@pytest.mark.filterwarnings("ignore")  # from inside transformers
def test_a_text_pipeline_is_evaluated_and_sampled_by_a_file_of_prompts(painter, capfd):
    line = ["eval", painter / "painter", "--clip-score", "--clip", painter / "clip", *QUICK, "--device", "cpu"]
    assert run(*line, "--prompts", painter / "prompts.txt", "-o", "text") == 0
    out, err = capfd.readouterr()
    assert "CLIP score" in out and "2 prompts in turn, guidance 7.5, CLIP clip" in out
    assert "torchvision" not in err and "Loading" not in err
    assert run(*line, "--prompts", painter / "captions.csv", "-o", "table") == 0
    assert Report.load("text") == Report.load("table")
    prompts = painter / "prompts.txt"
    assert run("sample", painter / "painter", "-n", 2, "--steps", 2, "--prompts", prompts, "-o", "new/cats.png") == 0
    assert Path("new/cats.png").is_file()
    assert run("compare", "text", "--html", "page.html", "--samples", 2, "--device", "cpu") == 0
    assert "of which a report has the hash only" in Path("page.html").read_text()


@pytest.mark.filterwarnings("ignore")  # from inside transformers
def test_a_text_pipeline_is_quantized_along_its_prompts_and_stands_beside_the_float_one(painter, capsys, monkeypatch):
    monkeypatch.setattr(uniform, "SEARCH_STEPS", 4)
    prompts = ["--prompts", painter / "prompts.txt", "--device", "cpu"]
    settings = [part for pair in ("trajectories=2", "sampling_steps=2") for part in ("--set", pair)]
    assert run("quantize", painter / "painter", "-o", "out", "--max-steps", 0, *settings, "--device", "cpu") == 2
    assert "draws from text; give it prompts" in capsys.readouterr().err
    assert run("quantize", painter / "painter", "-o", "out", "--max-steps", 0, *settings, *prompts) == 0
    for model, name in ((painter / "painter", "float"), ("out", "packed")):
        line = ["eval", model, "--clip-score", "--clip", painter / "clip", *QUICK, *prompts, "-o", name]
        assert run(*line, *(["--psnr"] if name == "packed" else [])) == 0
    capsys.readouterr()
    assert run("compare", "float", "packed") == 0
    assert "CLIP score" in capsys.readouterr().out and Report.load("packed").metrics["psnr"] > 10


@pytest.mark.filterwarnings("ignore")  # from inside transformers
@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--prompts", "nowhere.txt"], 2, "nowhere.txt cannot be read"),
        ([], 2, "draws from text; give it prompts (--prompts FILE"),
        (["--class-labels", "1,x"], 2, "--class-labels takes whole numbers"),
        (["--prompts", "prompts.txt", "--clip-score"], 3, "get it with: dmquant fetch clip"),
        (["--prompts", "prompts.txt", "--clip-score", "--clip", "org/clip"], 3, "get it with: hf download org/clip"),
        (["--prompts", "prompts.txt", "--is", "--clip", "x"], 2, "clip: without effect on is"),
        (["--prompts", "prompts.txt", "--guidance-scale", "nan"], 2, "no finite number"),
    ],
)
def test_a_missing_input_of_a_text_pipeline_is_one_line(painter, arguments, code, message, capsys):
    Path("prompts.txt").write_text("a red cat\n")
    assert run("eval", painter / "painter", *QUICK, "--device", "cpu", *arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_folder_of_another_tool_is_evaluated_where_the_tool_is_and_refused_by_quantize(folder, tmp_path, capsys):
    shutil.copytree(folder, "peer")
    config = Path("peer/unet/config.json")
    entry = {"quant_method": "quanto", "weights_dtype": "int8"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": entry}))
    assert run("eval", "peer", *ALONE, *QUICK) == 3
    assert "pip install optimum-quanto" in capsys.readouterr().err
    assert run("quantize", "peer", "-o", "out") == 2
    assert "this is a quanto checkpoint; give the float pipeline" in capsys.readouterr().err
