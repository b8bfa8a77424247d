"""Every folder that a version wrote loads forever: tests/golden holds sets of them (tests/golden/make.py)."""

import json
from pathlib import Path

import pytest
import safetensors.torch
from safetensors import safe_open

import dmquant
from dmquant import methods
from dmquant.checkpoint import atomic_folder, serialization
from dmquant.nn.scheme import TRAITS
from tests.golden import make

SETS = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(file.parent for file in SETS.glob("*/*/model_index.json"))
pytestmark = pytest.mark.filterwarnings("ignore:sampling at timesteps that were not calibrated")  # one is not, on purpose
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(SETS).as_posix())


def check(folder: Path) -> None:
    """Asserts that a folder is read as it was written: decoded weights bit for bit, the denoiser's output up to rounding."""
    file = folder.with_suffix(".safetensors")
    call, unet = safetensors.torch.load_file(file), dmquant.load(folder, device="cpu").unet
    with safe_open(file, "pt") as content:
        assert make.hash_weights(unet) == content.metadata()
    assert make.is_close(make.denoise(unet, call["x"], call["timestep"]), call["output"])


@every_folder
def test_weights_and_outputs_are_those_of_the_version_that_wrote_them(folder):
    check(folder)


@every_folder
def test_every_file_verifies(folder):
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(serialization.verify(folder)) == written - {atomic_folder.MANIFEST}


def test_every_method_and_every_kind_of_grid_is_in_a_golden_folder():
    advice = "add it to tests/golden/make.py and make a set: python tests/golden/make.py tests/golden/VERSION"
    configs = [json.loads((folder / "unet" / "config.json").read_text())["quantization_config"] for folder in FOLDERS]
    assert {config["method"] for config in configs} == set(methods.names()) == set(make.METHODS), advice
    of_layers = [kind for config in configs for entry in config["overrides"].values() for kind in entry[2:]]
    of_models = [kind for config in configs for kind in config["kinds"] + config["attention_kinds"]]
    assert {kind.partition(":")[0] for kind in of_layers + of_models} == {trait.name for trait in TRAITS}, advice


def test_what_the_script_writes_is_what_these_tests_read(tmp_path):
    check(make.make("lsq", tmp_path))


def test_another_weight_or_another_grid_is_noticed(tmp_path):
    folder = make.make("lsq", tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, change in (("conv_out.weight.codes", lambda codes: codes ^ 1), ("conv_out.input.scale", lambda scale: scale * 2)):
        changed = tensors | {name: change(tensors[name])}
        safetensors.torch.save_file(changed, file, metadata={"format": "pt"})
        (folder / atomic_folder.MANIFEST).unlink()
        atomic_folder.seal(folder)
        with pytest.raises(AssertionError):
            check(folder)
