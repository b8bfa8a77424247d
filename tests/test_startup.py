"""What needs no torch imports none: help, the list of methods and comparisons answer at once."""

import json
import subprocess
import sys

import pytest

from dmquant.report import Protocol, Report

HEAVY = ("torch", "diffusers", "torchmetrics", "accelerate", "transformers", "numpy", "matplotlib")
PROBE = f"""
import sys, dmquant.cli
code = dmquant.cli.run(sys.argv[1:])
sys.exit(code or str(set(sys.modules) & set({HEAVY})).replace("set()", "") or 0)
"""
COMMANDS = ("quantize", "eval", "compare", "methods", "inspect", "sample", "verify", "doctor", "fetch", "reference")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["methods"], *([name, "--help"] for name in COMMANDS)])
def test_help_and_lists_come_without_torch(arguments):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_comparison_of_report_files_comes_without_torch(tmp_path):
    protocol = Protocol(num_images=10, seed=0, steps=2, sampler="ddim", batch=5, image_size=8)
    report = Report(
        model="m", method="float", settings={}, weight_bits=32, act_bits=32, metrics={"psnr": 1.0}, protocol=protocol,
        size_bytes=4, float_size_bytes=4, bits_per_weight=32.0, ops=1.0, seconds_per_image=1.0, versions={},
    )  # fmt: skip
    done = run("compare", str(report.save(tmp_path)), "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["model"] == "m"
    page = tmp_path / "page.html"
    assert run("compare", str(tmp_path), "--html", str(page), "--samples", "0").returncode == 0 and page.is_file()


def test_the_package_itself_imports_nothing_heavy():
    code = f"import sys, dmquant, dmquant.methods\ndmquant.compare\nassert not set(sys.modules) & set({HEAVY})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_says_what_there_is():
    import dmquant

    with pytest.raises(AttributeError, match="quantize, load"):
        dmquant.quantise
    assert {"quantize", "load", "evaluate", "compare", "methods"} <= set(dir(dmquant))


def test_the_module_runs_like_the_program():
    done = subprocess.run([sys.executable, "-m", "dmquant", "--version"], capture_output=True, text=True)
    assert done.stdout.split(".")[0].isdigit() and done.returncode == 0
