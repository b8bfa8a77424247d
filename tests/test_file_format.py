"""The file format is what docs/file-format.md specifies: its reader decodes all weights, its tables name all keys and tensors."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

import dmquant
from dmquant.checkpoint.quantization_config import _IS_VALID, LATER
from tests.pages import ROOT, name, read, tables

PAGE = ROOT / "docs" / "file-format.md"
CHEAP = {"max_steps": 1, "trajectories": 2, "sampling_steps": 2, "calibration_samples": 2, "batch": 2, "clip_images": 0}
# beside the golden folders: layers that stay float, one bit around a zero of one half, and what this version writes
SETTINGS = {
    "lsq, some layers float": ("lsq", {"weight_bits": 3, "act_bits": 32, "keep": "skip,attention"}),
    "binarydm": ("binarydm", {"weight_bits": 1, "act_bits": 4}),
    "dilatequant": ("dilatequant", {"weight_bits": 4, "act_bits": 4, "attention_bits": 4, "head_grids": True}),
}
GOLDEN = sorted(path for path in (ROOT / "tests" / "golden").glob("*/*") if path.is_dir())


@pytest.fixture(scope="module")
def reader():
    spec = importlib.util.spec_from_file_location("reader", ROOT / "docs" / "reader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=[*SETTINGS, *GOLDEN], ids=lambda param: param if isinstance(param, str) else name(param))
def folder(request, pipeline, tmp_path_factory) -> Path:
    """A quantized folder: one that is made here, or one that an earlier version wrote."""
    if isinstance(request.param, Path):
        return request.param
    method, settings = SETTINGS[request.param]
    quantized = dmquant.quantize(pipeline, method, **CHEAP, **settings)
    return dmquant.save(quantized, tmp_path_factory.mktemp("folders") / "out")


def read_config(folder: Path) -> dict:
    return json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))


def float_model(folder: Path) -> UNet2DModel:
    config = read_config(folder)
    del config["quantization_config"]
    return UNet2DModel.from_config(config)


def test_the_reader_needs_torch_and_safetensors_only():
    text = read(ROOT / "docs" / "reader.py")
    assert set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)) == {"json", "re", "pathlib", "torch", "safetensors"}
    code = re.sub(r'""".*?"""', "", text, flags=re.DOTALL).splitlines()
    assert len([line for line in code if line.strip()]) <= 40


def test_the_reader_gives_the_weights_that_a_loaded_pipeline_computes_with(folder, reader):
    model = float_model(folder)
    weights = reader.read_weights(folder / "unet", {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})
    model.load_state_dict(weights)
    expected = dmquant.load(folder).unet.dequantize().state_dict()
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_the_reader_gives_the_stored_weight_of_a_layer_that_divides_nothing(folder, reader):
    packed = dict(dmquant.load(folder).unet.named_modules())
    shapes = {key: tuple(tensor.shape) for key, tensor in float_model(folder).state_dict().items()}
    plain = [key for key in shapes if hasattr(packed[key.rpartition(".")[0]], "divide") and key.endswith(".weight")]
    plain = [key for key in plain if not hasattr(packed[key.rpartition(".")[0]].divide, "reciprocal")]
    weights = reader.read_weights(folder / "unet", shapes)
    for key in plain:
        weight = packed[key.rpartition(".")[0]].weight
        assert torch.equal(weights[key], weight if isinstance(weight, torch.nn.Parameter) else weight.dequantize())
    assert plain


def test_the_reader_refuses_a_format_that_it_does_not_know(folder, reader, tmp_path):
    config = read_config(folder)
    config["quantization_config"]["format_version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="format version 1, got dmquant, 2"):
        reader.read_weights(tmp_path, {})


def test_the_specification_names_every_key(folder):
    rows = next(rows for rows in tables(PAGE) if "key" in rows[0])
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row["key"])}
    assert named == set(_IS_VALID)
    assert {key for key in named if key not in read_config(folder)["quantization_config"]} <= LATER


def test_the_specification_names_every_tensor(folder):
    rows = next(rows for rows in tables(PAGE) if "tensor" in rows[0])
    patterns = [pattern for row in rows for pattern in write_patterns(row["tensor"])]
    stored = dmquant.load(folder).unet.state_dict()
    float_names = set(float_model(folder).state_dict())
    for key, tensor in stored.items():
        assert key in float_names or any(re.fullmatch(pattern, key) for pattern in patterns), key
        if key not in float_names:
            assert tensor.dtype is (torch.uint8 if key.endswith(".codes") else torch.float32)


def write_patterns(cell: str) -> list[str]:
    """Regular expressions of the names in a cell such as "`L.input.scale`, `.zero`"."""
    names, last = [], ""
    for found in re.findall(r"`([\w.]+)`", cell):
        last = last.rpartition(".")[0] + found if found.startswith(".") else found
        names.append(last)
    places = {"L": r"[\w.]+", "A": r"[\w.]+", "F": "(query|key|probability|value)", "h": r"\d+"}
    return [r"\.".join(places.get(part, part) for part in found.split(".")) for found in names]


def test_every_method_has_a_golden_folder():
    assert {path.name for path in GOLDEN} == set(dmquant.methods.names())


def test_bit_planes_are_those_of_the_specification(reader):
    rows = dict(re.findall(r"^(plane \d) .*= (0b\d+)", read(PAGE), re.MULTILINE))
    planes = torch.tensor([[int(rows[f"plane {bit}"], 2)] for bit in range(3)], dtype=torch.uint8)
    bits = reader.unpack(planes, (3,))
    assert (bits * torch.tensor([[1], [2], [4]])).sum(0).tolist() == [5, 1, 6]
