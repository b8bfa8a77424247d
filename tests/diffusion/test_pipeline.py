import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from dmquant.diffusion import pipeline as denoiser
from dmquant.diffusion.layer_roles import Role, find_roles, is_layer
from dmquant.diffusion.pipeline import Target, find_target, is_quantized, locate, open_pipeline, place
from dmquant.errors import DamagedFile, DmquantError, InputError, MissingResource
from dmquant.testing import TINY_UNET

TINY = {
    UNet2DModel: TINY_UNET,
    UNet2DConditionModel: dict(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
    ),
    DiTTransformer2DModel: dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8, out_channels=8),
    PixArtTransformer2DModel: dict(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8, cross_attention_dim=16, caption_channels=12,
    ),
    SD3Transformer2DModel: dict(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=4, out_channels=4,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=8,
    ),
    FluxTransformer2DModel: dict(
        num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, axes_dims_rope=(4, 4, 8),
        joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=True,
    ),
}  # fmt: skip
EXPECTED = {
    UNet2DModel: {
        "conv_in": Role.FIRST, "conv_out": Role.LAST, "time_embedding.linear_2": Role.TIME_EMBEDDING,
        "down_blocks.0.resnets.0.conv1": Role.BODY, "down_blocks.0.resnets.0.time_emb_proj": Role.TIME_PROJECTION,
        "down_blocks.1.resnets.0.conv_shortcut": Role.SKIP, "mid_block.attentions.0.to_out.0": Role.ATTENTION,
        "down_blocks.0.downsamplers.0.conv": Role.RESAMPLE, "up_blocks.0.upsamplers.0.conv": Role.RESAMPLE,
    },
    UNet2DConditionModel: {
        "add_embedding.linear_1": Role.TIME_EMBEDDING, "mid_block.attentions.0.proj_in": Role.ATTENTION,
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": Role.ATTENTION,
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": Role.FEED_FORWARD,
        "mid_block.attentions.0.proj_out": Role.ATTENTION, "conv_out": Role.LAST,
    },
    DiTTransformer2DModel: {
        "pos_embed.proj": Role.FIRST, "proj_out_2": Role.LAST, "proj_out_1": Role.TIME_EMBEDDING,
        "transformer_blocks.1.norm1.linear": Role.TIME_EMBEDDING, "transformer_blocks.1.ff.net.2": Role.FEED_FORWARD,
        "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1": Role.TIME_EMBEDDING,
    },
    PixArtTransformer2DModel: {
        "pos_embed.proj": Role.FIRST, "proj_out": Role.LAST, "adaln_single.linear": Role.TIME_EMBEDDING,
        "caption_projection.linear_1": Role.TIME_EMBEDDING, "transformer_blocks.0.attn2.to_v": Role.ATTENTION,
    },
    SD3Transformer2DModel: {
        "pos_embed.proj": Role.FIRST, "proj_out": Role.LAST, "context_embedder": Role.TIME_EMBEDDING,
        "norm_out.linear": Role.TIME_EMBEDDING, "transformer_blocks.0.norm1_context.linear": Role.TIME_EMBEDDING,
        "transformer_blocks.0.attn.add_k_proj": Role.ATTENTION, "transformer_blocks.0.ff_context.net.2": Role.FEED_FORWARD,
    },
    FluxTransformer2DModel: {
        "x_embedder": Role.FIRST, "proj_out": Role.LAST, "time_text_embed.guidance_embedder.linear_1": Role.TIME_EMBEDDING,
        "single_transformer_blocks.1.norm.linear": Role.TIME_EMBEDDING, "transformer_blocks.0.attn.to_add_out": Role.ATTENTION,
        "single_transformer_blocks.1.proj_mlp": Role.FEED_FORWARD, "single_transformer_blocks.1.proj_out": Role.FEED_FORWARD,
    },
}  # fmt: skip
every_denoiser = pytest.mark.parametrize("kind", TINY, ids=lambda kind: kind.__name__)


def on_meta(kind: type, **config) -> nn.Module:
    with torch.device("meta"):
        return kind(**config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    DDIMPipeline(UNet2DModel(**TINY_UNET).half(), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A private copy, free to be damaged."""
    for path in saved.rglob("*.*"):
        target = tmp_path / "copy" / path.relative_to(saved)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "copy"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Opening


@pytest.fixture(autouse=True)
def online(monkeypatch) -> None:
    """The hub may be asked, whatever the environment says: each test puts its own answer in its place."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_half_precision_folder_opens_in_float32_and_remembers_where_it_came_from(saved, capfd):
    pipeline = open_pipeline(saved)
    assert pipeline.unet.dtype == torch.float32 and not pipeline.unet.training
    assert pipeline.name_or_path == str(saved)
    assert "Loading" not in capfd.readouterr().err


@pytest.mark.parametrize("model", [None, "embedded"])
def test_no_model_means_the_embedded_pipeline(saved, monkeypatch, model):
    monkeypatch.setattr(denoiser, "ASSETS", saved.parent)
    assert open_pipeline(model).name_or_path == "embedded"


def test_a_missing_embedded_pipeline_is_a_missing_resource(tmp_path, monkeypatch):
    monkeypatch.setattr(denoiser, "ASSETS", tmp_path)
    with pytest.raises(MissingResource, match="missing"):
        open_pipeline()


PATHS = ["./org/name", "nowhere", "/nowhere/at/all", "a/b/c", "~/no-such-folder", "org/.hidden", Path("org/name")]


@pytest.mark.parametrize("model", PATHS)
def test_what_cannot_be_a_hub_id_is_tried_as_a_path_only(model, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(MissingResource, match="local path"):
        open_pipeline(model)


def test_a_local_folder_wins_over_a_hub_id(folder, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: pytest.fail("asked the hub"))
    monkeypatch.chdir(folder.parents[1])
    assert locate(f"{folder.parent.name}/{folder.name}").samefile(folder)


def test_an_unreachable_hub_is_said_to_be_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(MissingResource, match="no local folder.*hub id.*not in the cache.*cannot be reached"):
        open_pipeline("nobody/dmquant-test-nothing")


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(MissingResource, match="HF_HUB_OFFLINE is set"):
        open_pipeline("nobody/dmquant-test-nothing")


@pytest.mark.parametrize("kind, words", [(RepositoryNotFoundError, "neither a local folder nor"), (GatedRepoError, "gated")])
def test_a_hub_that_refuses_is_quoted(kind, words, monkeypatch):
    def refuse(*args, **kwargs):
        raise kind("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(MissingResource, match=words):
        open_pipeline("nobody/nothing")


def test_a_hub_model_with_pickles_only_is_refused_before_download(monkeypatch):
    files = [SimpleNamespace(rfilename=name) for name in ("model_index.json", "unet/diffusion_pytorch_model.bin")]
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: SimpleNamespace(siblings=files))
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *args, **kwargs: pytest.fail("downloaded"))
    with pytest.raises(InputError, match="pickle.*unet"):
        open_pipeline("somebody/pickles")


def test_a_file_or_a_single_component_is_no_pipeline(folder):
    with pytest.raises(InputError, match="is a file"):
        open_pipeline(folder / "model_index.json")
    with pytest.raises(InputError, match="no model_index.json"):
        open_pipeline(folder / "unet")


@pytest.mark.parametrize("keep", [0, 6, 1000])
def test_truncated_weights_are_damage_not_a_traceback(folder, keep):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(DamagedFile, match="cannot be loaded"):
        open_pipeline(folder)


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_missing_and_broken_tensors_are_named(folder, kind):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    value = tensors.pop("conv_out.weight")
    save_file(tensors if kind == "missing" else tensors | {"conv_out.weight": value * torch.nan}, weights)
    with pytest.raises(DamagedFile, match="1 tensors are missing or not finite: conv_out.weight"):
        open_pipeline(folder)


@pytest.mark.parametrize("name, words", [("conv_in.extra", "$"), ("conv_in.weight_quantizer.scale", "before dmquant.save")])
def test_tensors_without_a_place_in_the_model_are_refused(folder, name, words):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {name: torch.ones(1)}, weights)
    with pytest.raises(DamagedFile, match=f"unet: 1 tensors have no place in the model: {name}.*{words}"):
        open_pipeline(folder)


def test_attention_under_its_early_names_still_opens(saved, folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(weights).items()
    save_file({re.sub("to_[qkv]|to_out.0", lambda hit: early[hit[0]], key): value for key, value in tensors}, weights)
    found, expected = open_pipeline(folder).unet.state_dict(), open_pipeline(saved).unet.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


UNET, INDEX = "unet/config.json", "model_index.json"
BAD_VALUES = [
    (INDEX, {"_class_name": "UNet2DModel"}, InputError, "no pipeline class 'UNet2DModel'"),
    (INDEX, {"_class_name": "__doc__"}, InputError, "no pipeline class '__doc__'"),
    (INDEX, {"_class_name": None}, DamagedFile, "_class_name should name a pipeline class, not null"),
    (INDEX, {"_class_name": 3}, DamagedFile, "_class_name should name a pipeline class, not 3"),
    (INDEX, {"unet": None}, DamagedFile, "unet should be .library, class., not null"),
    (INDEX, {"unet": [1, 2]}, DamagedFile, "unet should be"),
    (INDEX, {"scheduler": {}}, DamagedFile, "scheduler should be"),
    (INDEX, {"unet": ["diffusers", "NoSuchModel"]}, DamagedFile, "NoSuchModel"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}, DamagedFile, "cannot be loaded"),
    (UNET, {"sample_size": None}, DamagedFile, "sample_size cannot be null"),
    (UNET, {"sample_size": "x"}, DamagedFile, "sample_size cannot be"),
    (UNET, {"norm_num_groups": 0}, DamagedFile, "cannot be loaded"),
    (UNET, {"quantization_config": []}, DamagedFile, "quantization_config should be a JSON object, not a list"),
    (UNET, {"quantization_config": "int4"}, DamagedFile, "quantization_config should be a JSON object, not a str"),
]


@pytest.mark.parametrize("file, changes, error, words", BAD_VALUES)
def test_a_wrong_value_is_named_with_its_file(folder, file, changes, error, words):
    edit(folder / file, **changes)
    with pytest.raises(error, match=words) as caught:
        open_pipeline(folder)
    assert file in str(caught.value)


def test_quantized_folders_are_recognised_by_their_json(folder):
    assert not is_quantized(folder)
    edit(folder / "unet/config.json", quantization_config={"quant_method": "torchao"})
    assert not is_quantized(folder)
    with pytest.raises(InputError, match="this is a torchao checkpoint"):
        open_pipeline(folder)
    # a tool may be asked for, and then it must be there
    edit(folder / "unet/config.json", quantization_config={"quant_method": "quanto", "weights_dtype": "int8"})
    with pytest.raises(MissingResource, match="pip install optimum-quanto"):
        open_pipeline(folder, any_tool=True)
    edit(folder / "unet/config.json", quantization_config={"quant_method": "dmquant"})
    assert is_quantized(folder)
    with pytest.raises(InputError, match="dmquant.load"):
        open_pipeline(folder, any_tool=True)
    with pytest.raises(InputError, match="dmquant.load"):
        open_pipeline(folder)


def test_a_folder_without_a_pipeline_is_not_quantized(tmp_path):
    assert not is_quantized(tmp_path) and not is_quantized(tmp_path / "missing")


def test_a_dtype_is_that_of_the_weights(saved):
    assert open_pipeline(saved, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["banana", "cuda:x", "meta", "", "cpu:7", "mps:9", "hpu"])
def test_a_device_that_no_one_has_is_refused(device):
    with pytest.raises(InputError, match=f"device {device!r} cannot be used"):
        place(SimpleNamespace(to=lambda device: pytest.fail("moved")), device)


def test_a_device_that_is_not_there_is_refused(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device"):
        open_pipeline(saved, device="cuda")


class Bare(DiffusionPipeline):
    def __init__(self, **parts):
        super().__init__()
        self.register_modules(**parts)


def test_the_denoiser_is_found_by_component_name():
    network = nn.Sequential(nn.Linear(2, 2))
    pipeline = Bare()
    pipeline.__class__ = type("Named", (DiffusionPipeline,), {"components": {"vae": nn.Conv2d(1, 1, 1), "transformer": network}})
    assert find_target(pipeline) == Target(pipeline, "transformer", network)


@pytest.mark.parametrize("part", [None, nn.Sequential(nn.GroupNorm(1, 1))])
def test_a_pipeline_without_a_denoiser_says_what_was_found(part):
    pipeline = Bare()
    pipeline.__class__ = type("Odd", (DiffusionPipeline,), {"components": {"unet": part, "vae": nn.Conv2d(1, 1, 1)}})
    with pytest.raises(DmquantError, match="Odd has no denoiser.*looked for unet.*found.*vae \\(Conv2d\\)"):
        find_target(pipeline)


# Layers, roles, blocks


def test_layers_are_told_by_what_they_carry():
    stand_in = nn.Module()
    stand_in.weight, stand_in.in_features, stand_in.out_features = nn.Module(), 4, 4
    assert all(map(is_layer, [nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Linear(1, 1), stand_in]))
    convolutions = [nn.ConvTranspose2d(1, 1, 1), nn.Conv3d(1, 1, 1)]
    assert not any(map(is_layer, [*convolutions, nn.Embedding(2, 2), nn.GroupNorm(1, 1), nn.Bilinear(1, 1, 1), nn.AvgPool2d(2)]))


@every_denoiser
def test_every_layer_has_the_role_that_its_name_says(kind):
    network = on_meta(kind, **TINY[kind])
    roles = find_roles(network)
    layers = (nn.Conv1d, nn.Conv2d, nn.Linear)
    assert list(roles) == [name for name, module in network.named_modules() if isinstance(module, layers)]
    assert {name: roles[name] for name in EXPECTED[kind]} == EXPECTED[kind]
    assert list(roles.values()).count(Role.FIRST) == list(roles.values()).count(Role.LAST) == 1


def test_without_known_names_module_order_says_first_and_last():
    roles = find_roles(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 3)))
    assert roles == {"0": Role.FIRST, "1": Role.BODY, "2": Role.LAST}
