"""A package of another author adds a method: installed by its entry point, used by name, tested by the contract."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmquant.checkpoint import serialization
from dmquant.diffusion.pipeline import find_target
from dmquant.methods.base import Method
from dmquant.nn.packed_layers import PackedConv2d

PLUGIN = Path(__file__).parents[1] / "plugin"
PAGE = Path(__file__).parents[2] / "docs" / "how-to-add-a-method.md"
PROGRAM = """
import sys

import pytest

import dmquant
from dmquant.cli import app

model, folder, tests = sys.argv[1:]
settings = ["--set", "trajectories=1", "--set", "sampling_steps=2", "--set", "calibration_samples=2", "--set", "batch=2"]
assert app.run_command(["methods"]) == 0
assert app.run_command(["methods", "example"]) == 0
line = ["quantize", model, "--method", "example", "--wbits", "4", "--max-steps", "1", "-o", folder, *settings]
assert app.run_command(line) == 0
dmquant.load(folder)
sys.exit(pytest.main([tests, "-v"]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the example outside this project: setuptools writes beside the sources, and pytest finds no settings of ours."""
    return shutil.copytree(PLUGIN, tmp_path_factory.mktemp("source") / "plugin")


@pytest.fixture(scope="module")
def site(source, tmp_path_factory) -> Path:
    """A folder into which the example is installed."""
    target = tmp_path_factory.mktemp("site")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", target, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_an_installed_method_is_listed_used_by_name_and_keeps_the_contract(source, site, tiny_folder, tmp_path):
    folder, path = tmp_path / "out", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny_folder, folder, source / "test_example.py"],
        env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plug-in dmquant_example:Example" in done.stdout and "weight steps are powers of two" in done.stdout
    assert all(name in done.stdout for name in ("TestExample::", "TestPowerOfTwoStep::", "a_power_of_two PASSED"))
    # the file needs the method no longer
    denoiser = find_target(serialization.load(folder)).denoiser
    steps = [layer.weight.scale for layer in denoiser.modules() if isinstance(layer, PackedConv2d)]
    assert steps and all((scale.log2() == scale.log2().round()).all() for scale in steps)


@pytest.mark.parametrize(
    "kind, name", [("toml", "pyproject.toml"), ("python", "src/dmquant_example.py"), ("python", "test_example.py")]
)
def test_the_page_on_adding_a_method_shows_the_files_of_the_example(kind, name):
    assert f"```{kind}\n{(PLUGIN / name).read_text(encoding='utf-8')}```" in PAGE.read_text(encoding="utf-8")


def test_the_page_on_adding_a_method_names_hooks_that_methods_have():
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    hooks = [hook for row in rows for hook in re.findall(r"`(\w+)", row)]
    assert len(hooks) > 8 and all(callable(getattr(Method, hook)) for hook in hooks)
