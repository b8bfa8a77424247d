"""diffusers loads packed models of every family, keeps their grids, and refuses what is not whole."""

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoModel,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    PipelineQuantizationConfig,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.quantizers import auto
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmquant.checkpoint import diffusers_quantizer
from dmquant.checkpoint.diffusers_quantizer import DmquantConfig, DmquantQuantizer
from dmquant.errors import DamagedFile, InputError
from dmquant.nn.convert import pack_model, packed_layers
from dmquant.nn.fake_quant_layers import swap
from dmquant.nn.packed_weight import PackedWeight
from dmquant.quantizers.base import FixedGrid
from dmquant.quantizers.per_timestep import TemporalStep
from dmquant.quantizers.timestep_clock import Clock, attach_clock
from dmquant.quantizers.uniform import Uniform
from dmquant.testing import TINY_UNET

WEIGHTS = "diffusion_pytorch_model.safetensors"
CROSS = dict(
    sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
    cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
PIXART = dict(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16,
    sample_size=8, caption_channels=12, norm_type="ada_norm_single", norm_elementwise_affine=False, patch_size=2,
)  # fmt: skip
SD3 = dict(
    sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8,
)  # fmt: skip
FLUX = dict(
    patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
DIT = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10)
TIME, TEXT, POOLED = {"timestep": torch.tensor([1, 9])}, {"encoder_hidden_states": (2, 5, 12)}, {"pooled_projections": (2, 10)}
FLUX_PLACES = {"img_ids": (16, 3), "txt_ids": (5, 3)}
LATENT = {"hidden_states": (2, 4, 8, 8), **TIME}
MODELS: dict[type[ModelMixin], tuple[dict, dict]] = {  # config, inputs: tensors or shapes
    UNet2DModel: (TINY_UNET, {"sample": (2, 3, 8, 8), **TIME}),
    UNet2DConditionModel: (CROSS, {"sample": (2, 4, 8, 8), **TIME, **TEXT}),
    DiTTransformer2DModel: (DIT, {**LATENT, "class_labels": torch.tensor([0, 3])}),
    PixArtTransformer2DModel: (PIXART, {**LATENT, **TEXT, "added_cond_kwargs": {}}),
    SD3Transformer2DModel: (SD3, {**LATENT, **TEXT, **POOLED}),
    FluxTransformer2DModel: (
        FLUX, {"hidden_states": (2, 16, 4), "timestep": torch.tensor([0.1, 0.9]), **TEXT, **POOLED, **FLUX_PLACES},
    ),
}  # fmt: skip


def make_packed(kind: type[ModelMixin] = UNet2DModel, timesteps: list[float] | None = None) -> ModelMixin:
    """Random codes and static grids; with timesteps, temporal grids with a row for each."""
    torch.manual_seed(0)
    model = kind(**MODELS[kind][0]).eval()
    for parameter in model.parameters():  # some models start at zero
        nn.init.normal_(parameter, std=0.1)

    def choose(name: str, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        bits = 8 if "time" in name or name.endswith(("_in", "_out")) else 4
        weight = Uniform(bits, num_channels=len(layer.weight), ndim=layer.weight.ndim, init="minmax")
        grid = Uniform(8, symmetric=False, init="minmax") if clock is None else TemporalStep(8, clock, init="minmax")
        weight.observe(layer.weight)
        with nullcontext() if clock is None else clock.at(clock.timesteps, len(clock.timesteps)):
            grid.observe(torch.randn(len(timesteps or [0]), 200))
        return weight, grid

    clock = None if timesteps is None else Clock(torch.tensor(timesteps))
    swap(model, choose)
    if clock is not None:
        attach_clock(clock, model)
    model.dmquant_record = {"method": "minmax", "settings": {"lr": 0.1}, "base_model": "tiny", "seed": 3}
    packed = pack_model(model)
    diffusers_quantizer.mark_as_quantized(packed)
    return packed


@torch.no_grad()
def run(model: ModelMixin, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(value, generator=generator).to(dtype) if isinstance(value, tuple) else value
        for name, value in MODELS[type(model)][1].items()
    }
    return model(**inputs).sample


def grids(model: nn.Module) -> dict[str, Tensor]:
    holders = {name: module for name, module in model.named_modules() if isinstance(module, (PackedWeight, FixedGrid))}
    return {f"{name}.{leaf}": getattr(module, leaf) for name, module in holders.items() for leaf in ("scale", "zero")}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    return make_packed()


@pytest.fixture(scope="module")
def folder(unet: UNet2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed UNet2DModel on the disk. Copy before you change it."""
    path = tmp_path_factory.mktemp("models") / "unet"
    unet.save_pretrained(path)
    return path


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    config["quantization_config"] = {key: value for key, value in config["quantization_config"].items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_packed_model_of_every_family_comes_back_bit_for_bit(kind, tmp_path):
    model = make_packed(kind)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert len(packed_layers(loaded)) == len(packed_layers(model)) > 15
    assert equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(run(loaded), run(model))
    size_bytes = len(json.dumps(loaded.config.quantization_config.to_dict()))
    assert size_bytes < 2048, "diffusers does not send a larger config along, older versions send it and fail"


@pytest.mark.parametrize("kind", [UNet2DModel, FluxTransformer2DModel], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}])
def test_scales_stay_in_float32_when_the_model_is_loaded_in_half_precision(tmp_path, kind, dtype, device_map):
    model = make_packed(kind)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, torch_dtype=dtype, device_map=device_map)
    assert equal(grids(loaded), grids(model))
    assert loaded.dtype == next(iter(packed_layers(loaded).values())).weight.dtype == dtype
    output = run(loaded, dtype)
    assert output.dtype == dtype and (output - run(model)).abs().mean() < 0.1 * run(model).abs().mean()


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_temporal_grids_of_every_family_come_back_with_their_clock_from_the_file_alone(kind, tmp_path):
    model = make_packed(kind, [9.0, 1.0, 0.9, 0.1])
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert equal(loaded.state_dict(), model.state_dict()) and torch.equal(run(loaded), run(model))
    assert loaded.clock.timesteps.tolist() == model.clock.timesteps.tolist()
    inputs = [layer.input for layer in packed_layers(loaded).values()]
    assert all(grid.clock is loaded.clock and grid.scale.shape == (4,) for grid in inputs)
    assert loaded.config.quantization_config.timing == {"num_steps": 4, "lookup": "nearest"}


@torch.no_grad()
def test_timesteps_and_temporal_grids_stay_in_float32_when_the_model_is_loaded_in_half_precision(tmp_path):
    model = make_packed(UNet2DModel, [999.0, 9.0, 1.0])
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.clock.timesteps.dtype == torch.float32 and equal(grids(loaded), grids(model))
    assert run(loaded, torch.bfloat16).isfinite().all()
    plain = UNet2DModel.from_pretrained(tmp_path).dequantize()
    assert not hasattr(plain, "clock") and run(plain).isfinite().all()


@pytest.mark.parametrize(
    "timing",
    [
        None, ..., {"num_steps": 2}, [2], {"num_steps": 0, "lookup": "nearest"}, {"num_steps": True, "lookup": "nearest"},
        {"num_steps": 3, "lookup": "nearest"}, {"num_steps": 2, "lookup": "cubic"}, {"num_steps": 1 << 40, "lookup": "linear"},
    ],
)  # fmt: skip
def test_a_timing_that_is_missing_or_wrong_is_refused(tmp_path, timing):
    make_packed(UNet2DModel, [9.0, 1.0]).save_pretrained(tmp_path)
    change_config(tmp_path, timing=timing)
    with pytest.raises(DamagedFile, match=r"timing|shape \(2,\) instead of \(3,\)"):
        UNet2DModel.from_pretrained(tmp_path)


def test_files_from_before_attention_bits_and_timing_load(damaged, unet):
    change_config(damaged, attention_bits=..., timing=...)
    assert torch.equal(run(UNet2DModel.from_pretrained(damaged)), run(unet))


def test_the_record_of_the_run_comes_back(unet, folder):
    run_record = {"method": "minmax", "settings": {"lr": 0.1}, "weight_bits": 4, "act_bits": 8, "base_model": "tiny", "seed": 3}
    assert unet.dmquant_record == UNet2DModel.from_pretrained(folder).dmquant_record == run_record


@pytest.mark.parametrize("name", [f"conv_in.{leaf}" for leaf in ("weight.codes", "weight.scale", "input.zero", "bias")])
def test_a_missing_or_renamed_tensor_is_named(damaged, name):
    tensors = load_file(damaged / WEIGHTS)
    moved = tensors.pop(name)
    save_file(tensors, damaged / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DamagedFile, match=name):
        UNet2DModel.from_pretrained(damaged)
    save_file(tensors | {f"{name}2": moved}, damaged / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DamagedFile, match=name):
        UNet2DModel.from_pretrained(damaged)


def test_an_extra_tensor_is_named(damaged):
    save_file(load_file(damaged / WEIGHTS) | {"../../etc/passwd": torch.zeros(1)}, damaged / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DamagedFile, match="has no ../../etc/passwd"):
        UNet2DModel.from_pretrained(damaged)


def set_value(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.view(-1).index_fill(0, torch.tensor([0]), value).view(tensor.shape)


CHANGES = {
    ("conv_in.weight.codes", "uint8"): lambda tensor: tensor.float(),
    ("conv_in.weight.codes", "instead of"): lambda tensor: tensor.to(torch.int8),
    ("conv_in.weight.codes", "shape"): lambda tensor: tensor[:, :-1].contiguous(),
    ("conv_in.weight.scale", "shape"): lambda tensor: tensor.view(-1, 1),
    ("conv_in.weight.scale", "float32"): lambda tensor: tensor.half(),
    ("conv_in.weight.scale", "not positive"): set_value(0.0),
    ("conv_in.weight.scale", "a scale that is not positive"): set_value(-1.0),
    ("conv_in.weight.scale", "not finite"): set_value(float("nan")),
    ("conv_in.weight.zero", "not finite"): set_value(float("inf")),
    ("conv_in.weight.zero", "float32"): lambda tensor: tensor.to(torch.uint8),
    ("conv_in.weight.zero", "no code of 8 bits"): set_value(256.0),
    ("conv_in.weight.zero", "no code of 8"): set_value(0.5),
    ("conv_in.input.zero", "no code of 8 bits"): set_value(-1.0),
    ("conv_in.input.scale", "not positive"): set_value(0.0),
    ("conv_in.input.zero", "float32"): lambda tensor: tensor.to(torch.bfloat16),
    ("conv_out.bias", "not finite"): set_value(float("-inf")),
    ("conv_out.bias", "instead of"): lambda tensor: tensor.to(torch.int32),
    ("conv_norm_out.weight", "shape"): lambda tensor: torch.cat([tensor, tensor]),
}


@pytest.mark.parametrize("name, reason", CHANGES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_tensor_of_the_wrong_shape_type_or_value_is_named(damaged, name, reason, dtype):
    tensors = load_file(damaged / WEIGHTS)
    tensors[name] = CHANGES[name, reason](tensors[name])
    save_file(tensors, damaged / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DamagedFile, match=f"{name}.*{reason}"):
        UNet2DModel.from_pretrained(damaged, torch_dtype=dtype)


def test_the_zero_of_a_binary_weight_may_lie_between_its_codes():
    diffusers_quantizer.check_tensor(PackedWeight((3, 3), 1, dtype=torch.float32), "zero", torch.tensor([0.5, 0, 1]), name="x")
    with pytest.raises(DamagedFile, match="x holds a zero"):
        diffusers_quantizer.check_tensor(FixedGrid(1), "zero", torch.tensor(0.5), name="x")


def test_padding_bits_are_zero():
    weight, planes = PackedWeight((3, 3), 2, dtype=torch.float32), torch.tensor([[255, 1], [0, 1]], dtype=torch.uint8)
    diffusers_quantizer.check_tensor(weight, "codes", planes, name="x")
    for plane in range(2):
        changed = planes.clone()
        changed[plane, -1] |= 2
        with pytest.raises(DamagedFile, match="x has bits set after its last code"):
            diffusers_quantizer.check_tensor(weight, "codes", changed, name="x")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"overrides": {"conv_inn": [8, 8]}}, "no layer 'conv_inn'"),
        ({"overrides": {"__class__": [8, 8]}}, "no layer '__class__'"),
        ({"overrides": {"conv_norm_out": [8, 8]}}, "no layer 'conv_norm_out'"),
        ({"weight_bits": 3}, "codes has shape|of 3 bits"),
        ({"weight_bits": 32}, "missing from the file"),
        ({"act_bits": 32}, "but the file does"),
    ],
)
def test_a_config_that_speaks_of_another_model_is_refused(damaged, changes, message):
    change_config(damaged, **changes)
    with pytest.raises(DamagedFile, match=message):
        UNet2DModel.from_pretrained(damaged)


def test_a_float_model_under_a_quantized_config_is_refused(unet, tmp_path):
    lying = UNet2DModel.from_config(unet.config)
    lying.register_to_config(quantization_config=unet.config.quantization_config)
    lying.save_pretrained(tmp_path)
    with pytest.raises(DamagedFile, match="missing from the file"):
        UNet2DModel.from_pretrained(tmp_path)


def test_a_float_single_file_under_our_config_is_refused(unet, tmp_path):
    model = make_packed(FluxTransformer2DModel)
    model.save_pretrained(tmp_path)
    FluxTransformer2DModel(**FLUX).save_pretrained(tmp_path / "float")
    options = {"config": str(tmp_path), "quantization_config": model.config.quantization_config}
    with pytest.raises(DamagedFile, match="but the file does"):
        FluxTransformer2DModel.from_single_file(tmp_path / "float" / WEIGHTS, **options)


def test_pickled_weights_are_refused(unet, tmp_path):
    unet.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="no safetensors file"):
        UNet2DModel.from_pretrained(tmp_path, use_safetensors=False)


def test_casts_are_refused_and_moves_are_not(unet):
    model = copy.deepcopy(unet)
    for cast in (lambda: model.to(torch.bfloat16), model.half, model.float, lambda: model.to(dtype=torch.float16)):
        with pytest.raises(ValueError, match="quantized|cast"):
            cast()
    assert equal(model.to("cpu").state_dict(), unet.state_dict())


def test_loading_options_that_would_round_the_grids_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    with pytest.raises(InputError, match="disk"):
        UNet2DModel.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path)
    with pytest.raises(InputError, match="float8"):
        UNet2DModel.from_pretrained(folder, torch_dtype=torch.float8_e4m3fn)
    with pytest.raises(InputError, match="offloaded"):
        UNet2DModel.from_pretrained(folder, offload_state_dict=True, torch_dtype=torch.bfloat16)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_changes_nothing(unet, folder, device_map):
    loaded = UNet2DModel.from_pretrained(folder, device_map=device_map)
    assert equal(loaded.state_dict(), unet.state_dict()) and torch.equal(run(loaded), run(unet))


def test_an_automatic_device_map_works_where_diffusers_has_one(tmp_path):
    model = make_packed(FluxTransformer2DModel)
    model.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(run(loaded), run(model))


def test_shards_variants_and_parallel_loading_change_nothing(unet, tmp_path, monkeypatch):
    unet.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    unet.save_pretrained(tmp_path / "variant", variant="w4a8")
    assert equal(UNet2DModel.from_pretrained(tmp_path / "shards").state_dict(), unet.state_dict())
    assert equal(UNet2DModel.from_pretrained(tmp_path / "variant", variant="w4a8").state_dict(), unet.state_dict())
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "yes")
    assert equal(UNet2DModel.from_pretrained(tmp_path / "shards").state_dict(), unet.state_dict())


def test_what_was_loaded_saves_and_loads_again_and_can_be_copied(unet, folder, tmp_path):
    loaded = UNet2DModel.from_pretrained(folder)
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    again = copy.deepcopy(UNet2DModel.from_pretrained(tmp_path))
    assert torch.equal(run(again), run(unet))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_model_without_its_class_name_is_found(unet, folder):
    assert torch.equal(run(AutoModel.from_pretrained(str(folder.parent), subfolder=folder.name)), run(unet))


def test_dequantizing_gives_a_plain_model_that_saves_as_one(folder, tmp_path):
    loaded = UNet2DModel.from_pretrained(folder)
    weight = loaded.conv_in.weight.dequantize()
    plain = loaded.dequantize()
    assert not packed_layers(plain) and plain.conv_in.weight.equal(weight)
    assert not plain.is_quantized and not hasattr(plain, "dmquant_record")  # free to be quantized again
    plain.half().save_pretrained(tmp_path)
    reloaded = UNet2DModel.from_pretrained(tmp_path)
    assert "quantization_config" not in reloaded.config
    assert reloaded.conv_in.weight.equal(weight.half().float()) and run(reloaded).isfinite().all()


def test_a_packed_model_does_not_offer_its_codes_for_training(unet):
    assert not unet.hf_quantizer.is_trainable and unet.hf_quantizer.is_compileable
    assert not any(".codes" in name or name.endswith(".scale") for name, _ in unet.named_parameters())


def test_diffusers_is_told_how_to_quantize_instead(tmp_path):
    model = UNet2DModel(**TINY_UNET)
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path)
    wanted = PipelineQuantizationConfig(quant_mapping={"unet": DmquantConfig(weight_bits=4, act_bits=8)})
    with pytest.raises(InputError, match="use dmquant.quantize"):
        DiffusionPipeline.from_pretrained(tmp_path, quantization_config=wanted)


def test_registering_again_is_free_and_pushes_nobody_out(monkeypatch):
    diffusers_quantizer.register()
    assert auto.AUTO_QUANTIZER_MAPPING["dmquant"] is DmquantQuantizer
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "dmquant", dict)
    with pytest.raises(RuntimeError, match="belongs to builtins.dict"):
        diffusers_quantizer.register()
