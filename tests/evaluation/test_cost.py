"""Tests of the counts of parameters, MACs, operations and bytes against the papers."""

import math
from functools import cache

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from dmquant.diffusion.blocks import find_ends
from dmquant.diffusion.example_inputs import example_inputs
from dmquant.diffusion.layer_roles import Role, find_roles, named_layers
from dmquant.errors import InputError
from dmquant.evaluation.cost import Cost, measure_cost
from dmquant.nn.convert import pack_model
from dmquant.nn.fake_quant_layers import swap
from dmquant.nn.scheme import FLOAT, LayerScheme, Scheme
from dmquant.quantizers.dilated import Dilated
from dmquant.quantizers.uniform import LearnedStep
from dmquant.testing import TINY_UNET
from tests.diffusion.test_pipeline import TINY, every_denoiser, on_meta

GIGA, MIB = 1e9, 2**20
EDGES = (Role.FIRST, Role.LAST, Role.TIME_EMBEDDING)

# The UNets of the papers, as diffusers configs
LDM4_BEDS = dict(  # 224 channels, 1-2-3-4, attention at 32, 16 and 8 pixels
    sample_size=64,
    block_out_channels=(224, 448, 672, 896),
    attention_head_dim=32,
    down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
    up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
)
LDM8_CHURCH = dict(  # 192 channels, 1-2-2-4-4, scale-shift norms, resampling inside residual blocks
    sample_size=32,
    in_channels=4,
    out_channels=4,
    block_out_channels=(192, 384, 384, 768, 768),
    attention_head_dim=24,
    down_block_types=(*["AttnDownBlock2D"] * 4, "DownBlock2D"),
    up_block_types=("ResnetUpsampleBlock2D", *["AttnUpBlock2D"] * 4),
    resnet_time_scale_shift="scale_shift",
    downsample_type="resnet",
    upsample_type="resnet",
    attn_norm_num_groups=32,
)
LDM4_IMAGENET = dict(  # 192 channels, 1-2-3-5, one class token of 512 numbers
    sample_size=64,
    in_channels=3,
    out_channels=3,
    block_out_channels=(192, 384, 576, 960),
    cross_attention_dim=512,
    down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
    up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    attention_head_dim=1,
)
DDPM_CIFAR = dict(  # google/ddpm-cifar10-32
    sample_size=32, block_out_channels=(128, 256, 256, 256), attention_head_dim=None, downsample_padding=0,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


@pytest.fixture(scope="module")
def beds() -> UNet2DModel:
    return on_meta(UNet2DModel, **LDM4_BEDS)


def bits_of(denoiser: nn.Module, weight_bits: int, act_bits: int, edges: tuple[int, int] = (8, 8)) -> dict[str, tuple[int, int]]:
    return {name: edges if role in EDGES else (weight_bits, act_bits) for name, role in find_roles(denoiser).items()}


@cache
def cost_at(denoiser: nn.Module, weight_bits: int, act_bits: int, edges: tuple[int, int] = (8, 8)) -> Cost:
    return measure_cost(denoiser, bits=bits_of(denoiser, weight_bits, act_bits, edges))


# The papers' constants


@pytest.mark.parametrize(
    "kind, config, params, size_mib, macs, attention_macs",
    [
        (UNet2DModel, LDM4_BEDS, 274.06, 1045.4, 96.02, 5.18),
        (UNet2DModel, LDM8_CHURCH, 294.97, 1125.2, 18.64, None),
        (UNet2DConditionModel, LDM4_IMAGENET, 400.92, 1529.4, 99.77, 4.46),
        (UNet2DModel, DDPM_CIFAR, 35.75, 136.4, 6.05, 0.168),
    ],
    ids=["LDM-4 beds", "LDM-8 church", "LDM-4 ImageNet", "DDPM CIFAR-10"],
)
def test_parameters_sizes_and_macs_are_the_papers(kind, config, params, size_mib, macs, attention_macs):
    denoiser = on_meta(kind, **config)
    inputs = example_inputs(denoiser)
    if kind is UNet2DConditionModel:
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :1]
    cost = measure_cost(denoiser, inputs=inputs)
    assert round(cost.num_params / 1e6, 2) == params
    assert round(cost.float_size_bytes / MIB, 1) == size_mib
    assert cost.size_bytes - cost.header_bytes == cost.float_size_bytes == cost.scaled_size_bytes
    assert round(cost.macs / GIGA, 2) == macs and cost.ops == cost.macs
    assert attention_macs is None or cost.attention_macs / GIGA == pytest.approx(attention_macs, rel=2e-3)


@pytest.mark.parametrize("weight_bits, act_bits, ops", [(32, 32, 96.0), (4, 4, 24.3), (2, 4, 12.3), (1, 4, 6.3)])
@pytest.mark.parametrize("edges", [(8, 8), (32, 32)])
def test_operations_of_ldm4_are_the_papers(beds, weight_bits, act_bits, ops, edges):
    assert round(cost_at(beds, weight_bits, act_bits, edges).ops / GIGA, 1) == ops


@pytest.mark.parametrize("weight_bits, ops", [(4, 24.3), (2, 12.3), (1, 6.3)])
def test_the_papers_formula_alone_leaves_a_constant_quarter_giga(beds, weight_bits, ops):
    cost = cost_at(beds, weight_bits, 4)
    formula = sum(layer.bops for layer in cost.layers) / 64
    assert ops - formula / GIGA == pytest.approx(0.25, abs=0.02)
    assert cost.ops == formula + cost.quantizer_ops


@pytest.mark.parametrize("weight_bits, size_mib", [(4, 134.9), (2, 69.8), (1, 37.3)])
def test_sizes_of_ldm4_are_the_papers_within_a_quarter_mib(beds, weight_bits, size_mib):
    # their 0.46 % of parameters in float32 are our 0.44 %: the edges, biases and norms; the W1 row is the first version's
    assert cost_at(beds, weight_bits, 4, (32, 32)).scaled_size_bytes / MIB == pytest.approx(size_mib, abs=0.25)


@pytest.mark.parametrize("weight_bits, size_mib", [(4, 144.2), (2, 74.1)])
def test_sizes_of_ldm8_church_are_the_papers_within_half_a_mib(weight_bits, size_mib):
    church = on_meta(UNet2DModel, **LDM8_CHURCH)
    assert cost_at(church, weight_bits, 4, (32, 32)).scaled_size_bytes / MIB == pytest.approx(size_mib, abs=0.5)


def test_the_ends_of_ldm4_hold_14_6_percent_of_parameters_and_two_thirds_of_macs(beds):
    cost = measure_cost(beds)
    ends = [module for block in find_ends(beds) for module in block.modules]
    params = sum(value.numel() for module in ends for value in beds.get_submodule(module).parameters())
    macs = sum(layer.macs for layer in cost.layers if f"{layer.name}.".startswith(tuple(f"{end}." for end in ends)))
    assert round(100 * params / cost.num_params, 1) == 14.6
    assert round(100 * macs / cost.macs, 1) == 66.4


def test_cifar_in_bit_operations_is_efficientdms_6_20_tera():
    assert round(measure_cost(on_meta(UNet2DModel, **DDPM_CIFAR)).bops / 1e12, 2) == 6.20


# Laws


def test_attention_products_are_two_per_pair_of_tokens(beds):
    attentions = ((5, 1024, 448), (5, 256, 672), (6, 64, 896))  # how many, of how many tokens and channels
    assert measure_cost(beds).attention_macs == sum(count * 2 * tokens**2 * channels for count, tokens, channels in attentions)


def test_macs_of_a_layer_are_output_pixels_times_kernel():
    layers = {layer.name: layer for layer in measure_cost(on_meta(UNet2DModel, **TINY_UNET)).layers}
    assert layers["conv_in"].macs == 8 * 8 * 3 * 8 * 3**2
    assert layers["down_blocks.0.downsamplers.0.conv"].macs == 4 * 4 * 8 * 8 * 3**2
    assert layers["time_embedding.linear_2"].macs == 32 * 32
    assert layers["mid_block.attentions.0.to_q"].macs == 16 * 16 * 16
    assert layers["conv_in"].num_inputs == 3 * 64 and layers["conv_in"].num_outputs == 8 * 64


@every_denoiser
def test_every_known_denoiser_is_counted_layer_by_layer(kind):
    denoiser = on_meta(kind, **TINY[kind])
    cost = measure_cost(denoiser)
    assert [layer.name for layer in cost.layers] == list(named_layers(denoiser))
    assert all(layer.macs > 0 for layer in cost.layers) and cost.attention_macs > 0
    assert cost.num_params == sum(value.numel() for value in denoiser.parameters())


def test_a_weight_only_layer_computes_in_float(beds):
    cost = cost_at(beds, 1, 32)
    assert cost.scaled_size_bytes == cost_at(beds, 1, 4).scaled_size_bytes
    assert cost.ops == pytest.approx(cost.macs, rel=1e-3)
    assert not any(layer.is_integer for layer in cost.layers if layer.role not in EDGES)


def test_an_input_that_is_divided_costs_one_operation_more_per_value():
    format = LayerScheme(4, 4)
    scheme = Scheme(FLOAT, {"conv_out": format._replace(traits=(Dilated(),)), "conv_in": format})
    cost = measure_cost(on_meta(UNet2DModel, **TINY_UNET), scheme=scheme)
    divided, plain = (next(layer for layer in cost.layers if layer.name == name) for name in ("conv_out", "conv_in"))
    assert divided.quantizer_ops == 5 * divided.num_inputs + divided.num_outputs
    assert plain.quantizer_ops == 4 * plain.num_inputs + plain.num_outputs


def test_notes_stay_with_their_layers(beds):
    layers = measure_cost(beds, notes={"conv_in": "kept"}).layers
    assert [layer.name for layer in layers if layer.note] == ["conv_in"]


def test_bits_for_a_layer_that_is_not_there_are_refused(beds):
    with pytest.raises(InputError, match="no layer 'conv_inn'"):
        measure_cost(beds, bits={"conv_inn": (4, 4)})


# Quantized and packed


@pytest.fixture
def quantized() -> UNet2DModel:
    torch.manual_seed(0)
    student = UNet2DModel(**TINY_UNET).half()

    def choose(name: str, layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        if name == "conv_out":
            return None
        weight = LearnedStep(3, num_channels=len(layer.weight), ndim=layer.weight.ndim)
        weight.observe(layer.weight)
        return weight, nn.Identity() if name == "conv_in" else LearnedStep(8)

    swap(student, choose)
    return student


def test_bits_are_read_off_a_quantized_denoiser(quantized):
    bits = {layer.name: (layer.weight_bits, layer.act_bits) for layer in measure_cost(quantized).layers}
    assert bits.pop("conv_out") == (32, 32) and bits.pop("conv_in") == (3, 32)
    assert set(bits.values()) == {(3, 8)}


def test_a_packed_denoiser_costs_what_the_quantized_one_did(quantized):
    assert measure_cost(pack_model(quantized)) == measure_cost(quantized)


def test_size_is_the_bytes_of_the_tensors_that_are_written(quantized):
    tensors = pack_model(quantized).state_dict()
    cost = measure_cost(quantized)
    assert cost.size_bytes == cost.header_bytes + sum(value.numel() * value.element_size() for value in tensors.values())
    assert cost.size_bytes == len(safetensors.torch.save(tensors, {"format": "pt"}))
    assert cost.weight_bits_effective == 8 * cost.size_bytes / cost.num_params
    norms = sum(2 * value.numel() for name, value in quantized.named_parameters() if "norm" in name)
    assert cost.size_bytes == cost.header_bytes + norms + sum(layer.size_bytes for layer in cost.layers)


def test_a_layer_takes_whole_bytes_per_bit_plane(quantized):
    layer = next(layer for layer in measure_cost(quantized).layers if layer.name == "conv_in")
    count, channels = math.prod(layer.shape), layer.shape[0]
    assert layer.size_bytes == 3 * math.ceil(count / 8) + 8 * channels + 2 * channels  # planes, scale and zero, half bias
