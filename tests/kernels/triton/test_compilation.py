"""The kernels compile: the interpreter takes programs that the compiler refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.triton.ptx"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["mma", "wgmma"])
def test_products_are_those_of_the_tensor_cores_for_bytes(compiled, name):
    assert compiled[name] == [[name, "s8.s8"]]


def test_floats_are_divided_and_added_as_ieee_says(compiled):
    assert compiled["floats"] == ["div.rn.f32", "fma.rn.f32"]
