"""Tests that help, the list of methods and comparisons do not import torch."""

import json
import subprocess
import sys

import pytest

from dmquant.evaluation.reports.report import Protocol, Report

HEAVY = ("torch", "diffusers", "torchmetrics", "accelerate", "transformers", "numpy", "matplotlib")
PROBE = f"""
import json, sys, dmquant.cli.app
for line in json.loads(sys.argv[1]):
    code = dmquant.cli.app.run_command(line)
    heavy = set(sys.modules) & set({HEAVY})
    if code or heavy:
        sys.exit(f"{{line}} ended with {{code}} and imported {{heavy}}")
    print(end="\\0", flush=True)
"""
COMMANDS = ("quantize", "eval", "compare", "methods", "inspect", "sample", "verify", "doctor", "fetch", "reference")


def run(*lines: list[str]) -> list[str]:
    """Returns the output of a process for each command line; fails if one fails or imports torch, diffusers or the like."""
    done = subprocess.run([sys.executable, "-c", PROBE, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def test_help_and_lists_import_no_torch():
    printed = run(["--help"], ["--version"], ["methods"], *([name, "--help"] for name in COMMANDS))
    assert len(printed) == 3 + len(COMMANDS) and all(printed)


def test_a_comparison_of_report_files_imports_no_torch(tmp_path):
    protocol = Protocol(num_images=10, seed=0, steps=2, sampler="ddim", batch=5, image_size=8)
    report = Report(
        model="m", method="float", settings={}, weight_bits=32, act_bits=32, metrics={"psnr": 1.0}, protocol=protocol,
        size_bytes=4, float_size_bytes=4, bits_per_weight=32.0, ops=1.0, seconds_per_image=1.0, versions={},
    )  # fmt: skip
    file, page = str(report.save(tmp_path)), tmp_path / "page.html"
    table, _ = run(["compare", file, "--format", "json"], ["compare", str(tmp_path), "--html", str(page), "--samples", "0"])
    assert json.loads(table)["rows"][0]["model"] == "m" and page.is_file()


def test_a_page_with_plots_imports_neither_torch_nor_pyplot(tmp_path):
    protocol = Protocol(num_images=10, seed=0, steps=2, sampler="ddim", batch=5, image_size=8)
    for name in ("a", "b"):
        Report(
            model=name, method="float", settings={}, weight_bits=32, act_bits=32, metrics={"fid": 1.0}, protocol=protocol,
            size_bytes=4, float_size_bytes=4, bits_per_weight=32.0, ops=1.0, seconds_per_image=1.0, versions={},
        ).save(tmp_path / name)  # fmt: skip
    page = tmp_path / "page.html"
    line = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(page), "--samples", "0"]
    unwanted = {"torch", "matplotlib.pyplot"}
    code = f"import sys\nfrom dmquant.cli import app\napp.run_command(sys.argv[1:])\nassert not {unwanted} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<svg" in page.read_text(encoding="utf-8")


def test_the_package_itself_imports_nothing_heavy():
    code = f"import sys, dmquant, dmquant.methods\ndmquant.compare\nassert not set(sys.modules) & set({HEAVY})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_is_refused_with_the_list():
    import dmquant

    with pytest.raises(AttributeError, match="quantize, load"):
        dmquant.quantise  # noqa: B018  reading it is what fails
    assert {"quantize", "load", "evaluate", "compare", "methods"} <= set(dir(dmquant))


def test_the_module_runs_like_the_program():
    done = subprocess.run([sys.executable, "-m", "dmquant", "--version"], capture_output=True, text=True)
    assert done.stdout.split(".")[0].isdigit() and done.returncode == 0
