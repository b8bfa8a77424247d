"""Fused blocks give what diffusers' own give, and step back wherever anything is out of the ordinary."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

import dmquant
from dmquant.kernels import norm
from dmquant.nn.attention import quantize_products
from dmquant.nn.convert import pack_model
from dmquant.nn.fused import unet
from dmquant.quantizers.dilated import Divide
from tests.kernels.test_attention import fixed
from tests.kernels.test_ops import error, make_layer
from tests.nn.test_convert import run, tiny_unet

pytestmark = pytest.mark.usefixtures("by_kernels")


class NormAndActivate(nn.GroupNorm):
    """The norm and the activation of a block by the C that kernels run: what is left to differ is the order of sums."""

    is_active = True

    def forward(self, x: Tensor) -> Tensor:
        last = (x.unsqueeze(2) if x.dim() == 3 else x).permute(0, 2, 3, 1)
        gain, offset = norm.moments_of(self, last.permute(0, 3, 1, 2))
        made = norm.normalize(last, gain, offset, activation=self.is_active).permute(0, 3, 1, 2)
        return made.squeeze(2) if x.dim() == 3 else made


class Alone(NormAndActivate):
    is_active = False


def pack_layers(block: nn.Module, weight_bits: int = 2, act_bits: int = 4) -> nn.Module:
    """Every layer of a block packed at random; norms with weights that are not one."""
    for name, layer in list(block.named_modules()):
        if isinstance(layer, nn.GroupNorm):
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
        if type(layer) in (nn.Conv2d, nn.Linear):
            options = {"stride": layer.stride, "padding": layer.padding} if isinstance(layer, nn.Conv2d) else {}
            packed = make_layer(layer.weight.shape, weight_bits, act_bits, **options)
            packed.weight.scale.mul_(layer.weight[0].numel() ** -0.5)
            packed.bias = layer.bias
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, packed)
    return block.eval()


def resnet(**options) -> nn.Module:
    options = {"in_channels": 12, "out_channels": 20, "temb_channels": 16, "groups": 4, **options}
    return pack_layers(ResnetBlock2D(**options))


def stepwise(block: nn.Module, kind: type, *inputs: Tensor) -> Tensor:
    """The block as diffusers wrote it, on the norms of the kernels."""
    other = copy.deepcopy(block)
    unet.unfuse(other)
    for module in other.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = kind
    if kind is NormAndActivate:
        time = other.nonlinearity  # of the time alone; of images it is done
        other.nonlinearity = nn.Identity()
        if inputs[1] is not None and not other.skip_time_act:
            inputs = (inputs[0], time(inputs[1]))
    other(*inputs)
    return other(*inputs)


BLOCKS = [
    {}, {"temb_channels": None}, {"out_channels": 12, "output_scale_factor": 2.0}, {"skip_time_act": True},
    {"in_channels": 70, "out_channels": 36, "groups": 2},
]  # fmt: skip


@pytest.mark.needs_compiler
@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_a_fused_block_is_its_steps(options):
    block, x = resnet(**options), torch.randn(3, options.get("in_channels", 12), 6, 5)
    time = None if options.get("temb_channels", 16) is None else torch.randn(3, 16)
    plain = block(x, time)
    unet.fuse(block)
    assert block.can_fuse(x)
    found, wanted = block(x, time), stepwise(block, NormAndActivate, x, time)
    # a value that lies between two codes may fall to either side where a bias is added first: few do, and by one step
    assert (found - wanted).abs().median() < 1e-6 and error(found, wanted) < 0.1
    assert (found - plain).abs().median() < 1e-5 and error(found, plain) < 0.1
    if time is None:
        assert torch.equal(found, wanted)


def test_scales_and_shifts_by_the_time_are_fused():
    block, x, time = resnet(time_embedding_norm="scale_shift"), torch.randn(3, 12, 6, 5), torch.randn(3, 16)
    plain = block(x, time)
    unet.fuse(block)
    assert (block(x, time) - plain).abs().median() < 1e-5 and error(block(x, time), plain) < 0.1


def test_the_first_call_which_chooses_the_kernels_gives_what_later_calls_give(has_compiler):
    block, x, time = resnet(), torch.randn(3, 12, 6, 5), torch.randn(3, 16)
    unet.fuse(block)
    assert not block.can_fuse(x)
    assert torch.equal(block(x, time), block(temb=time, input_tensor=x)) and block.can_fuse(x) == has_compiler


@pytest.mark.needs_compiler
def test_attention_reads_normalized_tokens_and_adds_its_residual():
    block = pack_layers(Attention(24, heads=2, dim_head=12, norm_num_groups=4, residual_connection=True, bias=True))
    x = torch.randn(2, 24, 5, 3)
    plain = block(x)
    unet.fuse(block)
    assert block.can_fuse(x) and torch.allclose(block(x), stepwise(block, Alone, x), atol=1e-5)
    assert (block(x) - plain).abs().median() < 1e-5
    context = torch.randn(2, 4, 24)
    assert torch.equal(block(x.flatten(2).transpose(1, 2), context), stepwise(block, nn.GroupNorm, x.flatten(2).mT, context))


@pytest.mark.parametrize("image", [True, False], ids=["an image", "tokens"])
def test_an_attention_on_codes_gives_what_torch_gives_fused_and_unfused(image, monkeypatch, has_compiler):
    block = Attention(24, heads=2, dim_head=12, norm_num_groups=4 if image else None, residual_connection=image, bias=True)
    block, x = pack_layers(block, 4, 8), torch.randn(2, 24, 5, 3) if image else torch.randn(2, 15, 24)
    quantize_products(block, lambda heads: fixed(8, 0.02, 100))
    monkeypatch.setenv("DMQUANT_KERNELS", "torch")
    wanted = copy.deepcopy(block)(x)
    monkeypatch.setenv("DMQUANT_KERNELS", "c")
    assert error(block(x), wanted) < 1e-4
    unet.fuse(block)
    assert error(block(x), wanted) < 1e-4 and block.can_fuse(x) == (image and has_compiler)


def test_attention_on_codes_compiles_to_one_graph():
    block, x = pack_layers(Attention(24, heads=2, dim_head=12), 4, 8), torch.randn(2, 15, 24)
    quantize_products(block, lambda heads: fixed(8, 0.02, 100))
    wanted = block(x)
    assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x), wanted)


@pytest.mark.parametrize(
    "make, size",
    [
        (lambda: Upsample2D(12, use_conv=True, out_channels=20), (3, 5)),
        (lambda: Downsample2D(12, use_conv=True, padding=0, name="op"), (6, 9)),
    ],
    ids=["upsampling", "downsampling"],
)
@pytest.mark.parametrize("bits", [(1, 4), (1, 6), (4, 8)])
def test_images_are_enlarged_and_padded_bit_for_bit(make, size, bits, has_compiler):
    block, x = pack_layers(make(), *bits), torch.randn(2, 12, *size)
    plain = block(x)
    unet.fuse(block)
    assert block.can_fuse(x) == has_compiler and torch.equal(block(x), plain)
    assert torch.equal(block(x.contiguous(memory_format=torch.channels_last)), plain)


@pytest.mark.needs_compiler
def test_channels_that_are_divided_are_divided_after_the_norm():
    block, x, time = resnet(temb_channels=None), torch.randn(3, 12, 6, 5), None
    for layer in (block.conv1, block.conv2):
        layer.divide = Divide(layer.in_channels, 2)
        layer.divide.reciprocal.uniform_(0.5, 2)
    block(x, time)
    unet.fuse(block)
    assert torch.equal(block(x, time), stepwise(block, NormAndActivate, x, time))


def test_a_block_whose_layers_are_watched_or_trained_runs_as_it_was(has_compiler):
    block, x, time = resnet(), torch.randn(1, 12, 4, 4), torch.randn(1, 16)
    plain, seen = block(x, time), []
    unet.fuse(block)
    hook = block.norm2.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(block(x, time), plain) and seen
    hook.remove()
    with torch.enable_grad():
        assert not block.can_fuse(x)
    assert not block.can_fuse(x.double()) and block.can_fuse(x) == has_compiler


def test_a_quantized_pipeline_gives_what_its_folder_gives(tiny_folder, tmp_path):
    quantized = dmquant.quantize(dmquant.load(tiny_folder), "lsq", max_steps=0, trajectories=1, sampling_steps=2)
    dmquant.save(quantized, tmp_path / "out")
    ours, theirs = (run(pipeline.unet) for pipeline in (quantized, dmquant.load(tmp_path / "out")))
    assert torch.equal(ours, theirs) and any(type(module) in unet.PLAIN for module in quantized.unet.modules())


def test_fusing_changes_classes_only_and_back():
    packed = pack_model(tiny_unet())
    names, kinds = list(packed.state_dict()), [type(module) for module in packed.modules()]
    unet.fuse(packed)
    assert list(packed.state_dict()) == names and any(type(module) in unet.PLAIN for module in packed.modules())
    run(packed)
    assert torch.isfinite(run(copy.deepcopy(packed))).all()
    unet.unfuse(packed)
    assert [type(module) for module in packed.modules()] == kinds


def test_without_kernels_a_fused_model_is_the_reference_bit_for_bit(monkeypatch):
    monkeypatch.setenv("DMQUANT_KERNELS", "torch")
    packed = pack_model(tiny_unet())
    wanted = run(packed)
    unet.fuse(packed)
    assert torch.equal(run(packed), wanted)


def test_a_fused_block_compiles_to_one_graph():
    block, x, time = resnet(), torch.randn(2, 12, 4, 4), torch.randn(2, 16)
    block(x, time)
    unet.fuse(block)
    wanted = block(x, time)
    assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x, time), wanted)
