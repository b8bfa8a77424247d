"""A fused transformer block is diffusers' own, but for a few values that lie between two codes."""

import copy

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from dmquant.kernels.registry import BY_NAME
from dmquant.nn import dispatch
from dmquant.nn.attention import quantize_products
from dmquant.nn.fused import transformer, unet
from dmquant.quantizers.dilated import Divide
from tests.kernels.test_attention import fixed
from tests.kernels.test_norm import normed
from tests.kernels.test_ops import USABLE, error, make_layer
from tests.nn.fused.test_unet import pack_layers

KINDS = {
    "to a text": dict(cross_attention_dim=12, activation_fn="geglu"),
    "to itself": dict(activation_fn="gelu", attention_bias=True),
    "to itself twice": dict(double_self_attention=True),
    "modulated": dict(
        norm_type="ada_norm_zero", num_embeds_ada_norm=10, activation_fn="gelu-approximate", norm_elementwise_affine=False
    ),
    "modulated and weighted": dict(norm_type="ada_norm_zero", num_embeds_ada_norm=10, activation_fn="gelu"),
}


pytestmark = pytest.mark.usefixtures("by_kernels")


def make(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    block, inputs = BasicTransformerBlock(24, 2, 12, **KINDS[kind]), {"hidden_states": torch.randn(2, 15, 24)}
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    if kind == "to a text":
        inputs["encoder_hidden_states"] = torch.randn(2, 7, 12)
    if kind.startswith("modulated"):
        inputs |= {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 4])}
    return pack_layers(block, 4, 8), inputs


@pytest.mark.parametrize("is_quantized", [False, True], ids=["float products", "quantized products"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_block_gives_what_diffusers_own_gives(kind, is_quantized, has_compiler):
    block, inputs = make(kind)
    if is_quantized:
        quantize_products(block, lambda heads: fixed(8, 0.02, 100))
    plain = copy.deepcopy(block)
    plain(**inputs)
    wanted = plain(**inputs)
    unet.fuse(block)
    first = block(**inputs)
    assert block.can_fuse(**inputs) == has_compiler and torch.equal(block(**inputs), first)
    assert (first - wanted).abs().median() < 1e-5 and error(first, wanted) < 0.02
    unet.unfuse(block)
    assert torch.equal(block(**inputs), wanted)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_block_answers_bit_for_bit_what_it_answers_where_torch_multiplies(kind, monkeypatch):
    block, inputs = make(kind)
    quantize_products(block, lambda heads: fixed(8, 0.02, 100))
    by_torch = copy.deepcopy(block)
    for kernels, model in (("c", block), ("exact", by_torch)):
        monkeypatch.setenv("DMQUANT_KERNELS", kernels)
        model(**inputs)  # chooses kernels
        unet.fuse(model)
    assert by_torch.can_fuse(**inputs) and torch.equal(block(**inputs), by_torch(**inputs))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("kind", ["to a text", "to itself", "modulated"])
def test_what_layers_divide_is_divided_after_the_activation(kind):
    block, inputs = make(kind)
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith("norm1"):
            layer.divide = Divide(layer.in_features, 0)
            layer.divide.reciprocal.uniform_(0.3, 3)
    block(**inputs)
    wanted = block(**inputs)
    unet.fuse(block)
    found = block(**inputs)
    assert block.can_fuse(**inputs)
    assert (found - wanted).abs().median() < 1e-5 and error(found, wanted) < 0.02


@pytest.mark.parametrize("is_linear", [False, True], ids=["convolutions", "linear layers"])
def test_an_image_of_tokens_is_normed_projected_and_added_to_as_diffusers_does(is_linear, has_compiler):
    model = Transformer2DModel(2, 12, 24, norm_num_groups=4, cross_attention_dim=12, use_linear_projection=is_linear)
    model, x, text = pack_layers(model, 4, 8), torch.randn(2, 24, 5, 3), torch.randn(2, 7, 12)
    model(x, text)
    wanted = model(x, text).sample
    unet.fuse(model)
    found = model(x, text).sample
    assert torch.equal(model(x, text, return_dict=False)[0], found)
    assert (found - wanted).abs().median() < 1e-5 and error(found, wanted) < 0.02
    assert found.is_contiguous(memory_format=torch.channels_last) == has_compiler
    hook = model.norm.register_forward_hook(lambda *_: None)
    assert error(model(x, text).sample, wanted) < 0.02
    hook.remove()


@pytest.mark.needs_compiler
@pytest.mark.parametrize("name", [name for name in USABLE if not BY_NAME[name].geometries])
@pytest.mark.parametrize("channels", [31, 64, 130])
def test_every_kernel_norms_tokens_to_the_same_bits(name, channels):
    layer, x, norm = make_layer((37, channels), 1, 4), 3 * torch.randn(2, 45, channels) + 7, nn.LayerNorm(channels)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    layer.divide = Divide(channels, 2)
    layer.divide.reciprocal.uniform_(0.5, 2)
    layer.weight.block(name)
    wanted = dispatch.launch(layer, layer.weight.blocked, normed(x, norm) * layer.divide.reciprocal)
    assert torch.equal(dispatch.run_fused(layer, x, transformer.norm_of(norm)), wanted)


@pytest.mark.parametrize("kind", ["modulated", "to a text"])
def test_many_tokens_are_fed_forward_some_at_a_time(kind, monkeypatch):
    block, inputs = make(kind)
    unet.fuse(block)
    block(**inputs)
    wanted = block(**inputs)
    monkeypatch.setattr(transformer, "ROW", 2)
    monkeypatch.setattr(transformer, "HIDDEN_BYTES", 4 * 2 * 96 * 4)  # four tokens of two images, or four in all of wider ones
    assert torch.equal(block(**inputs), wanted)


@pytest.mark.needs_compiler
def test_masks_gradients_and_hooks_leave_a_block_as_it_was():
    block, inputs = make("to a text")
    unet.fuse(block)
    block(**inputs)
    assert block.can_fuse(**inputs)
    assert not block.can_fuse(**inputs, attention_mask=torch.zeros(2, 1, 15))
    assert not block.can_fuse(**inputs, cross_attention_kwargs={"scale": 1.0})
    with torch.enable_grad():
        assert not block.can_fuse(**inputs)
    for name in ("norm1", "norm2", "norm3", "attn1", "attn2.to_k", "ff", "ff.net.0", "ff.net.2"):
        hook = block.get_submodule(name).register_forward_hook(lambda *_: None)
        assert not block.can_fuse(**inputs), name
        hook.remove()
    block.ff.net[1].p = 0.5
    assert block.can_fuse(**inputs) and not block.train().can_fuse(**inputs)


def test_a_fused_block_compiles_to_one_graph():
    block, inputs = make("to a text")
    block(**inputs)
    unet.fuse(block)
    wanted = block(**inputs)
    assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(**inputs), wanted)
