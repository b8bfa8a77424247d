"""What a pipeline folder may hold is looked at before any of it is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from dmquant.diffusion.folder_checks import find_quantizer, list_components, refuse_foreign_code
from dmquant.diffusion.pipeline import DENOISERS, open_pipeline
from dmquant.errors import DamagedFile, InputError


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A private copy, free to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


@pytest.fixture(autouse=True)
def unloaded(monkeypatch) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_components_are_those_of_the_index(folder):
    (folder / "notes").mkdir()
    (folder / "notes" / "evil.py").write_text("raise SystemExit")
    assert {file.parts[0] for file in list_components(folder)} == {"unet", "scheduler"}
    refuse_foreign_code(folder, list_components(folder))


def test_local_pickles_are_refused(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="pickle weights"):
        open_pipeline(folder)


def test_foreign_code_is_never_run(folder):
    (folder / "unet/my_unet.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match="own code.*unet/my_unet.py"):
        open_pipeline(folder)
    (folder / "unet/my_unet.py").unlink()
    edit(folder / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    with pytest.raises(InputError, match="own code.*MyPipeline"):
        open_pipeline(folder)


def test_an_unknown_pipeline_class_is_named(folder):
    edit(folder / "model_index.json", _class_name="NoSuchPipeline")
    with pytest.raises(InputError, match="NoSuchPipeline"):
        open_pipeline(folder)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\x00"])
def test_damaged_json_is_named(folder, text):
    (folder / "unet/config.json").write_text(text)
    with pytest.raises(DamagedFile, match="config.json"):
        open_pipeline(folder)


def test_component_names_stay_inside_the_folder(folder):
    edit(folder / "model_index.json", **{"../unet": ["diffusers", "UNet2DModel"]})
    with pytest.raises(DamagedFile, match="impossible components"):
        open_pipeline(folder)


def test_a_quantizer_is_that_of_the_components_asked_for(folder):
    assert find_quantizer(folder, DENOISERS) is None
    edit(folder / "unet/config.json", quantization_config={"quant_method": "quanto"})
    assert find_quantizer(folder, DENOISERS) == "quanto" and find_quantizer(folder, ["transformer"]) is None
    edit(folder / "unet/config.json", quantization_config={})
    assert find_quantizer(folder, DENOISERS) == "unnamed"
