"""Attention with quantized factors: without quantizers it is diffusers' own arithmetic, with them it survives the file."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

import dmquant
from dmquant.errors import InputError
from dmquant.evaluation.cost import measure_cost
from dmquant.methods.lsq.method import LSQ
from dmquant.nn.attention import QuantAttention, find_attentions, product_bits, quantize_products, restore_products
from dmquant.quantization import make_student, quantize
from dmquant.quantizers.base import FixedGrid
from dmquant.quantizers.timestep_clock import Clock
from dmquant.quantizers.uniform import LearnedStep

QUICK = dict(trajectories=4, sampling_steps=3, calibration_samples=8, max_steps=3, batch=4, init="minmax")
KINDS = {
    "plain": dict(query_dim=16, heads=2, dim_head=8),
    "of an image, with norm and residual": dict(
        query_dim=16, heads=4, dim_head=4, norm_num_groups=4, bias=True, residual_connection=True, rescale_output_factor=1.5
    ),
    "cross": dict(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8, cross_attention_norm="layer_norm"),
    "of normed queries": dict(query_dim=16, heads=2, dim_head=8, qk_norm="layer_norm"),
}


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if "image" in name:
        return {"hidden_states": torch.randn(2, 16, 3, 5, generator=generator)}
    tokens = {"hidden_states": torch.randn(2, 7, 16, generator=generator)}
    if name == "cross":
        tokens["encoder_hidden_states"] = torch.randn(2, 5, 12, generator=generator)
    return tokens


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_without_quantizers_it_is_the_attention_of_diffusers(name, has_mask):
    torch.manual_seed(0)
    attention, arguments = Attention(**KINDS[name]).eval(), inputs(name)
    if has_mask and "image" not in name:
        keys = arguments.get("encoder_hidden_states", arguments["hidden_states"]).shape[1]
        arguments["attention_mask"] = torch.where(torch.arange(keys) < keys - 2, 0.0, -1e4).expand(2, 1, keys)
    expected = attention(**arguments)
    quantize_products(attention, nn.Identity)
    assert isinstance(attention.processor, QuantAttention)
    assert torch.allclose(attention(**arguments), expected, atol=1e-6)
    restore_products(attention)
    assert isinstance(attention.processor, AttnProcessor2_0) and torch.equal(attention(**arguments), expected)


@torch.no_grad()
def test_each_factor_is_rounded_to_its_grid():
    attention = Attention(query_dim=16, heads=2, dim_head=8).eval()
    quantize_products(attention, lambda heads: FixedGrid(4))
    factors = {name: getattr(attention.processor, name).input_quantizer for name in ("query", "key", "probability", "value")}
    seen = {}
    for name, grid in factors.items():
        grid.scale.fill_(0.1)
        grid.register_forward_hook(lambda grid, args, output, name=name: seen.update({name: (args[0], output)}))
    attention(**inputs("plain"))
    for name, (x, y) in seen.items():
        assert torch.equal(y, factors[name](x)) and not torch.equal(x, y)
    assert seen["query"][0].shape == (2, 2, 7, 8) and seen["probability"][0].shape == (2, 2, 7, 7)
    assert torch.allclose(seen["probability"][0].sum(-1), torch.ones(2, 2, 7))


def test_products_are_calibrated_trained_and_come_back_from_the_file(pipeline, samples, tmp_path):
    settings = {**QUICK, "attention_bits": 4}
    start, end = (make_student(pipeline, LSQ(**{**settings, "max_steps": n}), samples=samples) for n in (0, 3))
    assert find_attentions(end) and product_bits(end) == 4 and product_bits(pipeline.unet) is None
    for name, attention in find_attentions(end).items():
        grid, start_grid = (a.processor.probability.input_quantizer for a in (attention, find_attentions(start)[name]))
        assert isinstance(grid, LearnedStep) and start_grid.offset == 0  # probabilities: unsigned
        assert 0 < start_grid.scale * 15 <= 1 and not torch.equal(grid.scale, start_grid.scale)
    quantized = quantize(pipeline, "lsq", samples=samples, **settings)
    dmquant.save(quantized, tmp_path / "out")
    loaded = dmquant.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(samples.call(loaded.unet), samples.call(quantized.unet))
    assert product_bits(loaded.unet) == measure_cost(loaded.unet).attention_bits == 4
    assert not any(isinstance(attention.processor, QuantAttention) for attention in find_attentions(pipeline.unet).values())


def test_a_loaded_model_dequantizes_to_the_attention_of_diffusers(pipeline, samples, tmp_path):
    dmquant.save(quantize(pipeline, "lsq", samples=samples, attention_bits=8, **QUICK), tmp_path / "out")
    unet = dmquant.load(tmp_path / "out").unet
    unet.dequantize()
    assert product_bits(unet) is None and set(unet.state_dict()) == set(pipeline.unet.state_dict())


def test_a_model_without_attention_is_refused():
    unet = UNet2DModel(8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), add_attention=False)  # fmt: skip
    with pytest.raises(InputError, match="attention_bits: UNet2DModel has no attention products"):
        LSQ(attention_bits=8).prepare(unet, Clock(torch.tensor([0.0])))


def test_text_conditional_networks_have_their_cross_attention_quantized_too():
    with torch.device("meta"):
        unet = UNet2DConditionModel(8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
                                    attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
    student = copy.deepcopy(unet)
    LSQ(attention_bits=8).prepare(student, Clock(torch.tensor([0.0])))
    names = [name for name, attention in find_attentions(student).items() if isinstance(attention.processor, QuantAttention)]
    assert len(names) == len(find_attentions(unet)) and sum(name.endswith("attn2") for name in names) == len(names) / 2
