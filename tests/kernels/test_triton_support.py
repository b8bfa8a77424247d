"""What is missing for a GPU's kernels is named."""

import re
from pathlib import Path

import pytest
import torch

import dmquant
from dmquant.kernels import triton_support


@pytest.fixture
def hopper(monkeypatch):
    """A machine that has everything."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")


state = triton_support.find_missing.__wrapped__


def test_nothing_is_missing_where_all_is_there(hopper):
    assert state() == ""


def test_what_is_missing_is_named(hopper, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(triton_support, "find_spec", lambda name: None)
        assert "pip install 'dmquant[gpu]'" in state()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert state() == "there is no CUDA device"
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)
        assert "NVIDIA" in state()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert state() == "compute capability 7.5: Triton needs 8.0"


def test_only_the_kernels_import_triton_and_nobody_imports_them_at_the_top():
    folder = Path(dmquant.__file__).parent
    sources = {file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") for file in folder.rglob("*.py")}
    importing = re.compile(r"^(import triton|from (triton|dmquant\.kernels\.triton\.(conv|quantize))\b)", re.MULTILINE)
    found = {name for name, source in sources.items() if importing.search(source)}
    assert found == {"kernels/triton/conv.py", "kernels/triton/quantize.py"}
