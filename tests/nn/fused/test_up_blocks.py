"""What comes over a skip is read where it lies: bit for bit as if it had been concatenated first."""

import copy

import pytest
import torch
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, nn

from dmquant.kernels import norm
from dmquant.nn import dispatch
from dmquant.nn.dispatch import Around
from dmquant.nn.fused import unet, up_blocks
from dmquant.quantizers.dilated import Divide
from dmquant.quantizers.per_part import SplitGrid
from tests.kernels.test_ops import USABLE, fitting, make_layer
from tests.nn.fused.test_unet import pack_layers

pytestmark = pytest.mark.usefixtures("by_kernels")

SIZES = {
    "in_channels": 8, "prev_output_channel": 24, "out_channels": 16, "temb_channels": 20, "resnet_groups": 4, "num_layers": 2,
}  # fmt: skip
BLOCKS = {
    "alone": lambda: UpBlock2D(**SIZES, add_upsample=True),
    "attention": lambda: AttnUpBlock2D(**SIZES, attention_head_dim=4, upsample_type="conv"),
    "resnet upsampler": lambda: AttnUpBlock2D(**SIZES, attention_head_dim=4, upsample_type="resnet"),
    "context": lambda: CrossAttnUpBlock2D(**SIZES, num_attention_heads=2, cross_attention_dim=12, add_upsample=False),
}


def inputs(kind: str = "alone") -> dict[str, object]:
    """From below and over two skips."""
    given = {"hidden_states": torch.randn(2, 24, 4, 6), "temb": torch.randn(2, 20)}
    given["res_hidden_states_tuple"] = (torch.randn(2, 8, 4, 6), torch.randn(2, 16, 4, 6))
    return given | ({"encoder_hidden_states": torch.randn(2, 5, 12)} if kind == "context" else {})


def concatenating(block: nn.Module) -> nn.Module:
    """The same block, fused but for the skips."""
    other = copy.deepcopy(block)
    other.__class__ = unet.PLAIN[type(other)]
    return other


@pytest.mark.needs_compiler
@pytest.mark.parametrize("split", [64, 37, 1, 128])
@pytest.mark.parametrize("kernel", USABLE)
def test_every_kernel_reads_two_images_as_one(kernel, split):
    for size, weight_bits, act_bits in ((3, 1, 4), (1, 2, 6), (1, 8, 8)):
        layer = make_layer((37, 131, size, size), weight_bits, act_bits, padding=size // 2, symmetric=size == 3)
        if kernel not in fitting(layer):
            continue
        layer.weight.block(kernel)
        x = torch.randn(2, 131, 5, 9).contiguous(memory_format=torch.channels_last)
        gain, offset = norm.moments(x.permute(0, 2, 3, 1), None, None, 1, 1e-5)
        for around in (Around(), Around(gain, offset, norm.SILU, torch.rand(131)), Around(zoom=2)):
            wanted = dispatch.apply(layer, layer.weight.blocked, x, around)
            beside = around._replace(beside=x[:, split:])
            assert torch.equal(dispatch.apply(layer, layer.weight.blocked, x[:, :split], beside), wanted)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("sizes", [(64, 64), (24, 120), (90, 6), (130, 62)], ids=str)
def test_moments_of_two_images_are_those_of_one(sizes):
    x, beside = (torch.randn(3, 9, 15, size) * 2 + 5 for size in sizes)  # more pixels than a run
    weight, bias = torch.randn(2, sum(sizes)).unbind()
    found = norm.moments(x, weight, bias, 4, 1e-5, beside)
    wanted = norm.moments(torch.cat([x, beside], -1), weight, bias, 4, 1e-5)
    assert all(torch.equal(*pair) for pair in zip(found, wanted))


@pytest.mark.needs_compiler
def test_the_number_of_threads_changes_no_bit_of_the_moments():
    x, beside, threads = torch.randn(2, 9, 15, 200), torch.randn(2, 9, 15, 72), torch.get_num_threads()
    wanted = norm.moments(x, None, None, 8, 1e-5, beside)
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(*pair) for pair in zip(norm.moments(x, None, None, 8, 1e-5, beside), wanted))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("kind", BLOCKS)
def test_an_up_block_gives_what_it_gives_of_concatenations(kind, monkeypatch):
    block, given = pack_layers(BLOCKS[kind]()), inputs(kind)
    plain = block(**given)
    unet.fuse(block)
    first, wanted = block(**given), concatenating(block)(**given)
    monkeypatch.setattr(up_blocks.torch, "cat", None)  # nobody concatenates any more
    assert torch.equal(block(**given), wanted) and torch.equal(first, wanted)
    assert (wanted - plain).abs().median() < 1e-5


def test_divided_channels_are_divided_on_both_sides(has_compiler):
    block, given = pack_layers(BLOCKS["alone"]()), inputs()
    for resnet in block.resnets:
        for layer in (resnet.conv1, resnet.conv_shortcut):
            layer.divide = Divide(layer.in_channels, 2)
            layer.divide.reciprocal.uniform_(0.5, 2)
    unet.fuse(block)
    assert torch.equal(block(**given), concatenating(block)(**given)) and joins(block, given) == has_compiler


def joins(block: nn.Module, given: dict[str, object]) -> bool:
    return block.resnets[0].can_join(given["hidden_states"], given["res_hidden_states_tuple"][-1])


def split_shortcut(block: nn.Module, sizes: tuple[int, int] = (20, 20)) -> None:
    layer = block.resnets[0].conv_shortcut
    layer.input = SplitGrid([layer.input, copy.deepcopy(layer.input)], sizes)
    layer.input.parts[1].scale.mul_(2)


def watch(block: nn.Module) -> None:
    block.resnets[0].register_forward_hook(lambda *_: None)


def watch_layer(block: nn.Module) -> None:
    block.resnets[0].conv_shortcut.register_forward_hook(lambda *_: None)


def test_a_shortcut_of_two_grids_gets_its_two_parts(has_compiler, monkeypatch):
    block, given = pack_layers(BLOCKS["alone"]()), inputs()
    layer = block.resnets[0].conv_shortcut
    split_shortcut(block, (24, 16))
    layer.divide = Divide(40, 2)
    layer.divide.reciprocal.uniform_(0.5, 2)
    plain = block(**given)
    unet.fuse(block)
    block(**given)
    wanted = concatenating(block)(**given)
    assert (wanted - plain).abs().median() < 1e-5 and joins(block, given) == has_compiler
    if has_compiler:
        monkeypatch.setattr(up_blocks.torch, "cat", None)
    assert torch.equal(block(**given), wanted)


@pytest.mark.parametrize("change", [split_shortcut, watch, watch_layer])
def test_a_block_that_needs_the_concatenation_gets_it(change):
    block, given = pack_layers(BLOCKS["alone"]()), inputs()
    change(block)
    unet.fuse(block)
    block(**given)
    assert torch.equal(block(**given), concatenating(block)(**given)) and not joins(block, given)


def test_skips_that_are_changed_on_their_way_are_left_to_diffusers():
    block, given = pack_layers(BLOCKS["alone"]()), inputs()
    unet.fuse(block)
    block.resolution_idx, block.s1, block.s2, block.b1, block.b2 = 0, 0.9, 0.2, 1.2, 1.4
    assert not block.can_fuse(**given)
    # diffusers writes to what it was given
    assert torch.equal(block(**copy.deepcopy(given)), concatenating(block)(**copy.deepcopy(given)))


def test_skips_of_another_size_are_refused_as_before():
    block, given = pack_layers(BLOCKS["alone"]()), inputs()
    unet.fuse(block)
    block(**given)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        block(**given | {"res_hidden_states_tuple": (torch.randn(2, 8, 4, 6), torch.randn(2, 16, 5, 6))})


def test_an_up_block_compiles_to_one_graph():
    block, given = pack_layers(BLOCKS["alone"]()), inputs()
    unet.fuse(block)
    block(**given)
    found: Tensor = torch.compile(block, backend="eager", fullgraph=True)(**given)
    assert torch.equal(found, block(**given))
