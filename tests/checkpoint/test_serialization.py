"""A quantized pipeline folder is a plain diffusers pipeline: the same bytes every time, whole or refused."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)  # fmt: skip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dmquant.checkpoint import atomic_folder, serialization
from dmquant.diffusion.pipeline import find_target
from dmquant.errors import DamagedFile, DmquantError, InputError, MissingResource
from dmquant.nn import cuda_graph
from dmquant.nn.convert import packed_layers
from dmquant.nn.fake_quant_layers import swap
from dmquant.quantizers.uniform import LearnedStep, Uniform

WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
RECORD = {
    "method": "minmax", "settings": {"lr": 1e-4, "keep": ["conv_in"]}, "weight_bits": 4, "act_bits": 8,
    "base_model": "embedded", "seed": 0,
}  # fmt: skip


def quantize(model: nn.Module, quantizer: type[Uniform] = Uniform) -> nn.Module:
    def choose(name: str, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        bits = 8 if name in ("conv_in", "conv_out") else 4
        weight = quantizer(bits, num_channels=len(layer.weight), ndim=layer.weight.ndim, init="minmax")
        grid = quantizer(8, symmetric=False, init="minmax")
        weight.observe(layer.weight)
        grid.observe(torch.linspace(-3, 3, 9))
        return weight, grid

    swap(model, choose)
    model.dmquant_record = RECORD
    return model.eval().requires_grad_(False)


def make_unet(*channels: int) -> UNet2DModel:
    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownBlock2D"] * len(channels), "up_block_types": ["UpBlock2D"] * len(channels)}
    return UNet2DModel(8, block_out_channels=channels, norm_num_groups=4, layers_per_block=1, attention_head_dim=8, **kinds)


def run(pipeline: DiffusionPipeline) -> Tensor:
    with torch.no_grad():
        return pipeline.unet(torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8), torch.tensor([3, 700])).sample


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_config(folder: Path, change) -> None:
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    seal_again(folder)


def seal_again(folder: Path) -> None:
    """Hashes that match, so that the content is what is refused."""
    (folder / atomic_folder.MANIFEST).unlink()
    atomic_folder.seal(folder)


@pytest.fixture
def pipeline() -> DiffusionPipeline:
    return DDIMPipeline(quantize(make_unet(8, 16), LearnedStep), DDIMScheduler())


@pytest.fixture
def folder(pipeline: DiffusionPipeline, tmp_path: Path) -> Path:
    return serialization.save(pipeline, tmp_path / "out")


def test_what_is_loaded_computes_what_was_saved(pipeline, folder):
    before = run(pipeline)
    theirs = DiffusionPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(folder, device_map="cpu")
    for loaded in (serialization.load(folder), *theirs):
        assert torch.equal(run(loaded), before)
        assert len(packed_layers(loaded.unet)) > 20


def test_the_dtype_is_that_of_the_computation_and_never_of_the_grids(folder):
    unet = serialization.load(folder, dtype=torch.bfloat16, device="cpu").unet
    assert unet.dtype == torch.bfloat16
    assert {tensor.dtype for name, tensor in unet.state_dict().items() if name.endswith((".scale", ".zero"))} == {torch.float32}


def test_a_cuda_graph_needs_a_cuda_device_and_takes_the_denoiser(folder, monkeypatch):
    for device in (None, "cpu"):
        with pytest.raises(InputError, match="cuda_graph needs a CUDA device"):
            serialization.open_any(folder, device=device, cuda_graph=True)
    captured = []
    monkeypatch.setattr(cuda_graph, "capture", captured.append)
    monkeypatch.setattr(serialization, "place", lambda pipeline, device: pipeline)
    pipeline = serialization.open_any(folder, device="cuda:0", cuda_graph=True)
    assert captured == [pipeline.unet]


def test_a_captured_pipeline_is_saved_like_any_other(folder, tmp_path):
    loaded = serialization.load(folder)
    cuda_graph.capture(loaded.unet)
    saved = serialization.save(loaded, tmp_path / "again")
    assert (saved / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_saving_leaves_the_pipeline_as_it_was(pipeline, tmp_path):
    before, config = copy.deepcopy(pipeline.unet.state_dict()), dict(pipeline.unet.config)
    kinds = [type(module) for module in pipeline.unet.modules()]
    serialization.save(pipeline, tmp_path / "out")
    assert [type(module) for module in pipeline.unet.modules()] == kinds and dict(pipeline.unet.config) == config
    assert all(torch.equal(before[name], tensor) for name, tensor in pipeline.unet.state_dict().items())
    assert not hasattr(pipeline.unet, "hf_quantizer") and pipeline.unet.dmquant_record == RECORD


def test_saving_twice_and_saving_what_was_loaded_give_the_same_bytes(pipeline, folder, tmp_path):
    serialization.save(pipeline, tmp_path / "again")
    serialization.save(serialization.load(folder), tmp_path / "loaded")
    assert contents(folder) == contents(tmp_path / "again") == contents(tmp_path / "loaded")
    assert str(tmp_path).encode() not in b"".join(contents(folder).values())


def test_only_the_denoiser_differs_from_the_float_pipeline(pipeline, folder, tmp_path):
    DDIMPipeline(make_unet(8, 16), DDIMScheduler()).save_pretrained(tmp_path / "float")
    ours, theirs = contents(folder), contents(tmp_path / "float")
    assert {name for name in theirs if theirs[name] != ours[name]} == {"unet/config.json", WEIGHTS.as_posix()}
    assert set(ours) - set(theirs) == {atomic_folder.MANIFEST}
    assert json.loads(ours["model_index.json"])["unet"] == ["diffusers", "UNet2DModel"]
    config, plain = json.loads(ours["unet/config.json"]), json.loads(theirs["unet/config.json"])
    assert config.pop("quantization_config")["overrides"] == {"conv_in": [8, 8], "conv_out": [8, 8]} and config == plain


def test_the_umask_decides_who_may_read(folder):
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o666 & ~umask}


def test_four_bits_take_less_than_a_sixth_of_the_float_file(tmp_path):
    unet = make_unet(32, 64)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "float")
    serialization.save(DDIMPipeline(quantize(unet), DDIMScheduler()), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).stat().st_size < (tmp_path / "float" / WEIGHTS).stat().st_size / 6


def test_other_components_come_along_as_they_are(tmp_path):
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(2, 8, in_channels=4, out_channels=8, num_layers=1, sample_size=4)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    for parameter in (*dit.parameters(), *vae.parameters()):  # a DiT starts as the identity
        nn.init.normal_(parameter, std=0.1)
    pipeline = DiTPipeline(quantize(dit), vae, DDIMScheduler(), id2label={0: "cat"})
    folder = serialization.save(pipeline, tmp_path / "out")
    loaded = serialization.load(folder)
    assert all(torch.equal(loaded.vae.state_dict()[name], tensor) for name, tensor in vae.state_dict().items())
    arguments = {"num_inference_steps": 2, "output_type": "np", "class_labels": [1, 2]}
    twins = (loaded, serialization.pack(find_target(pipeline)).pipeline)
    first, second = (twin(generator=torch.Generator().manual_seed(0), **arguments).images for twin in twins)
    assert (first == second).all()
    name = "vae/diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(folder / name)
    tensors["decoder.conv_in.bias"][0] = torch.nan
    safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
    seal_again(folder)
    with pytest.raises(DamagedFile, match="decoder.conv_in.bias"):
        serialization.verify(folder)


def test_a_packed_pipeline_runs_without_being_saved(pipeline):
    packed = serialization.pack(find_target(pipeline)).pipeline
    assert torch.equal(run(packed), run(pipeline)) and packed.scheduler is pipeline.scheduler
    with pytest.raises(ValueError, match="dtype"):
        packed.unet.to(torch.bfloat16)


def test_the_record_of_the_run_can_be_read_from_the_folder_and_the_model(folder):
    assert serialization.read_record(folder) == serialization.load(folder).unet.dmquant_record == RECORD


def test_any_pipeline_opens_by_its_folder(folder, tiny_folder):
    assert packed_layers(serialization.open_any(folder).unet)
    assert not packed_layers(serialization.open_any(tiny_folder).unet)
    for name in (folder, tiny_folder):
        assert serialization.open_any(name, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_verify_names_every_file_that_it_checked(folder):
    assert set(serialization.verify(folder)) == set(contents(folder)) - {atomic_folder.MANIFEST}


def test_a_pipeline_that_is_not_quantized_is_not_saved(tmp_path):
    with pytest.raises(InputError, match="nothing in this pipeline is quantized"):
        serialization.save(DDIMPipeline(make_unet(8), DDIMScheduler()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["conv_norm_out.weight", "conv_in.bias", "conv_in.weight_quantizer.scale"])
def test_values_that_are_not_finite_are_never_saved(pipeline, tmp_path, name):
    pipeline.unet.get_parameter(name).view(-1)[0] = torch.nan
    with pytest.raises(DmquantError, match="finite|positive"):
        serialization.save(pipeline, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tensors_that_no_loader_expects_are_never_saved(pipeline, tmp_path):
    pipeline.unet.mid_block.register_buffer("forgotten", torch.zeros(1000))
    with pytest.raises(DmquantError, match="mid_block.forgotten is unexpected"):
        serialization.save(pipeline, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_setting_that_json_cannot_hold_is_never_saved(pipeline, tmp_path):
    pipeline.unet.dmquant_record = {**RECORD, "settings": {"lr": float("nan")}}
    with pytest.raises(ValueError, match="JSON compliant"):
        serialization.save(pipeline, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_keeps_the_old_checkpoint(pipeline, folder, monkeypatch):
    old = contents(folder)
    pipeline.unet.conv_norm_out.weight.fill_(2)

    def fail(*args: object, **kwargs: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(DmquantError, match="No space left"):
            serialization.save(pipeline, folder, force=True)
    assert contents(folder) == old and [path.name for path in folder.parent.iterdir()] == ["out"]
    serialization.save(pipeline, folder, force=True)
    assert torch.equal(run(serialization.load(folder)), run(pipeline))


def test_an_unusable_target_is_refused_before_anything_is_packed(folder, monkeypatch):
    monkeypatch.setattr(serialization, "pack", lambda pipeline: pytest.fail("packed"))
    with pytest.raises(InputError, match="--force"):
        serialization.save(None, folder)


def test_a_result_that_a_killed_process_left_aside_is_found(folder):
    os.rename(folder, folder.with_name(".out.4194305.00000000.old"))
    assert packed_layers(serialization.load(folder).unet)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(MissingResource, match="does not exist"):
        serialization.load(tmp_path / "org" / "name")


def test_a_folder_of_diffusers_own_save_opens_without_hashes_and_is_not_verified(folder, tmp_path):
    serialization.load(folder).save_pretrained(tmp_path / "plain")
    assert torch.equal(run(serialization.open_any(tmp_path / "plain")), run(serialization.load(folder)))
    with pytest.raises(DamagedFile, match="no MANIFEST.json.*dmquant.save"):
        serialization.verify(tmp_path / "plain")


def test_what_is_no_quantized_pipeline_cannot_be_verified(folder, tiny_folder, tmp_path):
    with pytest.raises(MissingResource, match="does not exist"):
        serialization.verify(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file"):
        serialization.verify(folder / "model_index.json")
    with pytest.raises(InputError, match="not quantized"):
        serialization.verify(tiny_folder)


FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "Unknown quantization type, got dmquant" in str(error), error
else:
    raise AssertionError("an unregistered process should not know dmquant")
import dmquant.checkpoint.diffusers_quantizer
unet = DiffusionPipeline.from_pretrained(sys.argv[1]).unet
expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    output = unet(expected["x"], torch.tensor([1, 9])).sample
assert torch.equal(output, expected["y"]), (output - expected["y"]).abs().max()
"""


def test_a_fresh_process_reads_a_folder_after_one_import(pipeline, folder, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.save({"x": x, "y": pipeline.unet(x, torch.tensor([1, 9])).sample}, tmp_path / "expected.pt")
    command = [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "expected.pt")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda config: config.pop("quantization_config"), InputError, "not quantized"),
        (lambda config: config.update(quantization_config=[]), DamagedFile, "should be a JSON object, not a list"),
        (lambda config: config["quantization_config"].update(quant_method="torchao"), InputError, "this is a torchao checkpoint"),
        (lambda config: config["quantization_config"].update(format_version=9), InputError, "needs dmquant >="),
        (lambda config: config["quantization_config"].pop("overrides"), DamagedFile, "overrides is missing"),
        (lambda config: config["quantization_config"].update(weight_bits=3), DamagedFile, "codes has shape|of 3 bits"),
        (lambda config: config.update(block_out_channels=[8, 32]), DamagedFile, "shape"),
        (lambda config: config.update(layers_per_block=2), DamagedFile, "missing"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, change, error, message):
    change_config(folder, change)
    with pytest.raises(error, match=message):
        serialization.load(folder)


@pytest.mark.parametrize("keep", [0, 6, 0.5])
def test_a_truncated_file_is_named_with_and_without_hashes(folder, keep):
    path = folder / WEIGHTS
    size_bytes = path.stat().st_size
    os.truncate(path, int(keep * size_bytes) if isinstance(keep, float) else keep)
    with pytest.raises(DamagedFile, match="safetensors is damaged"):
        serialization.load(folder)
    with pytest.raises(DamagedFile, match="cannot be loaded"):
        serialization.load(folder, verify=False)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("fuzz") / "out"
    folder = serialization.save(DDIMPipeline(quantize(make_unet(8)), DDIMScheduler()), path)
    return folder, serialization.load(folder).unet.state_dict()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_of_any_file_is_refused_or_changes_no_tensor(smallest, tmp_path, data):
    folder, expected = smallest
    copied = tmp_path / "copy"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(folder, copied)
    path = copied / data.draw(st.sampled_from(sorted(contents(folder))))
    changed = bytearray(path.read_bytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        found = serialization.load(copied).unet.state_dict()
    except DamagedFile:
        return
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
