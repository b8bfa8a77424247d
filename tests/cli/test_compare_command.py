"""Tests of the command `compare`: over reports, with page and cards, and with experiments that it runs first."""

import html
import json
import sys
from pathlib import Path

import pytest
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from dmquant.checkpoint import serialization
from dmquant.cli import app
from dmquant.evaluation import sweep
from dmquant.evaluation.model_card import MARK
from dmquant.evaluation.reports.report import Protocol, Report
from dmquant.testing import TINY_UNET
from tests.text import make_text_pipeline

SMALL = "trajectories=1,sampling_steps=2,calibration_samples=2,batch=2,max_steps=1,init=minmax"
QUICK = ["--metrics", "psnr", "--num-images", 4, "--steps", 2, "--batch", 2, "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> int:
    return app.run_command(["compare", *(str(argument) for argument in arguments)])


def fails(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    code = run(*arguments)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    return code, err


def test_experiments_are_run_once_and_shown(tiny_folder, capsys):
    line = ["--model", tiny_folder, "--run", f"lsq:4/8,{SMALL}", "--run", f"lsq:2/8,{SMALL}", "-o", "all", *QUICK]
    assert run(*line, "--format", "json", "--html", "page.html", "--samples", 2, "--cards") == 0
    out, err = capsys.readouterr()
    assert [row["bits"] for row in json.loads(out)["rows"]] == ["32/32", "4/8", "2/8"]
    assert "2 of 2 experiments to do, about " in err and "wrote page.html" in err and err.count("README.md") == 2
    folders = sorted(path.name for path in Path("all").iterdir() if path.is_dir())
    assert len(folders) == 3 and folders[0] == "float" and MARK in (Path("all") / folders[1] / "README.md").read_text()
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 10 and "Layer by layer" in page  # two seeds of three models, two differences of two
    assert Report.load(f"all/{folders[1]}").layers
    assert app.run_command(["verify", f"all/{folders[1]}"]) == 0
    capsys.readouterr()
    assert run("all", "--format", "json") == 0
    assert [row["bits"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["32/32", "2/8", "4/8"]  # by name
    assert run(f"all/{folders[1]}", "all/float/report.json", "--effort", "--format", "json") == 0
    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert first["quantize_s"] is None and second["quantize_s"] > 0, "the float model's row comes first, and took nothing"
    assert run(*line, "--format", "json") == 0
    again = capsys.readouterr()
    assert again.out == out and "experiments to do" not in again.err


def test_a_file_of_experiments_contains_its_protocol(tiny_folder, capsys):
    pairs = (pair.split("=") for pair in SMALL.split(","))
    settings = {key: int(value) if value.isdigit() else value for key, value in pairs}
    protocol = {"num_images": 4, "steps": 2, "batch": 2}
    plan = {"protocol": protocol, "metrics": ["psnr"], "runs": [{"name": "a", "method": "lsq", **settings}]}
    Path("list.json").write_text(json.dumps(plan))
    assert run("--model", tiny_folder, "--experiments", "list.json", "-o", "all", "--device", "cpu") == 0
    assert Report.load("all/a").protocol.num_images == 4 and "PSNR" in capsys.readouterr().out
    code, err = fails(capsys, "--experiments", "list.json", "-o", "all", "--steps", 3)
    assert code == 2 and "contains its protocol" in err


def test_a_page_without_matplotlib_is_written_without_plots_and_a_line_says_how_to_get_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    protocol = Protocol(num_images=10, seed=0, steps=2, sampler="ddim", batch=5, image_size=8)
    for name, size in (("a", 4), ("b", 8)):
        Report(
            model=name, method="lsq", settings={}, weight_bits=4, act_bits=4, metrics={"fid": float(size)}, protocol=protocol,
            size_bytes=size, float_size_bytes=32, bits_per_weight=4.0, ops=1.0, seconds_per_image=1.0, versions={},
        ).save(tmp_path / name)  # fmt: skip
    assert run("a", "b", "--html", "page.html", "--samples", 0) == 0
    (warning, wrote) = capsys.readouterr().err.splitlines()
    advice = "plots need matplotlib; get it with: pip install 'dmquant[plots]'"
    assert warning == f"warning: page.html is written without plots: {advice}" and wrote == "wrote page.html"
    page = html.unescape(Path("page.html").read_text(encoding="utf-8"))
    assert advice in page and "<svg" not in page and "<table" in page


@pytest.mark.filterwarnings("ignore")  # from inside transformers
def test_experiments_on_a_text_pipeline_are_recorded_and_measured_by_its_prompts(tmp_path_factory, capsys):
    painter = tmp_path_factory.mktemp("text") / "painter"
    make_text_pipeline().save_pretrained(painter)
    Path("one.txt").write_text("a red cat\nx\n")
    Path("two.txt").write_text("two dogs\n")
    capsys.readouterr()  # messages of the libraries while they save
    line = ["--model", painter, "--run", f"lsq:8/8,{SMALL}", "-o", "all", *QUICK]
    code, err = fails(capsys, *line)
    assert code == 2 and "draws from text; give it prompts" in err
    assert run(*line, "--prompts", "one.txt", "--guidance-scale", 3) == 0
    out, err = capsys.readouterr()
    assert "2 prompts in turn, guidance 3" in out and "1 of 1 experiments to do" in err
    (folder,) = (path for path in Path("all").iterdir() if path.name != "float")
    record, asked = serialization.read_record(folder), Report.load(folder).protocol
    assert (record["guidance_scale"], record["conditions_sha256"]) == (asked.guidance_scale, asked.conditions_sha256)
    assert run(*line, "--prompts", "one.txt", "--guidance-scale", 3, "--html", "page.html", "--samples", 0) == 0
    capsys.readouterr()
    assert Report.load(folder).layers, "looked at under the prompts, of which the report has the hash only"
    assert run(*line, "--prompts", "two.txt", "--guidance-scale", 3) == 1
    assert "holds another experiment: num_conditions was 2, now 1" in capsys.readouterr().err


def test_a_file_of_experiments_contains_its_classes(tmp_path, capsys):
    unet = UNet2DModel(**TINY_UNET, num_class_embeds=10)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained("classes")
    settings = {key: int(value) if value.isdigit() else value for key, value in (pair.split("=") for pair in SMALL.split(","))}
    plan = {"metrics": ["psnr"], "runs": [{"name": "a", "method": "lsq", **settings}]}
    quick = {"num_images": 4, "steps": 2, "batch": 2}
    for labels in ([3, 5], None):
        protocol = quick if labels is None else {**quick, "class_labels": labels}
        Path("list.json").write_text(json.dumps({**plan, "protocol": protocol}))
        folder = f"all-{labels is None}"
        assert run("--model", "classes", "--experiments", "list.json", "-o", folder, "--device", "cpu") == 0
        assert Report.load(f"{folder}/a").protocol.num_conditions == (10 if labels is None else 2)
    for name, value in (("class_labels", "3,5"), ("guidance_scale", "3"), ("prompts", "nowhere.txt")):
        Path("list.json").write_text(json.dumps({**plan, "protocol": {name: value}}))
        capsys.readouterr()
        assert fails(capsys, "--model", "classes", "--experiments", "list.json", "-o", "new")[0] == 2


def test_a_failure_is_printed_after_the_table_of_the_rest(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "quantize_measured", lambda *_, **__: 1 / 0)
    assert run("--model", tiny_folder, "--run", f"lsq:4/8,{SMALL}", "-o", "all", *QUICK, "--format", "json") == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["rows"]) == 1 and err.splitlines()[-1].startswith("error: lsq-w4a8")


def test_an_interrupt_says_that_the_same_command_continues(tiny_folder, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "quantize_measured", stop)
    assert run("--model", tiny_folder, "--run", f"lsq:4/8,{SMALL}", "-o", "all", *QUICK) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to compare"),
        (["--run", "lsq:4/8"], "folder of the experiments with -o"),
        (["--run", "lsq", "-o", "x"], "a run is METHOD:W/A"),
        (["--run", "lsq:4/8", "-o", "x", "--metrics", "fid,fdi"], "did you mean 'fid'"),
        (["--experiments", "nowhere.json", "-o", "x"], "nowhere.json does not exist"),
        ([".", "-o", "x"], "need --run or --experiments"),
        ([".", "--steps", "3"], "need --run or --experiments"),
        ([".", "--guidance-scale", "3"], "need --run or --experiments"),
        ([".", "--html", "page.txt"], "ends in .html"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    code, err = fails(capsys, *arguments)
    assert code == 2 and message in err
    assert list(Path().iterdir()) == []
