"""Blocks hold every inner layer once, in the order in which they run."""

from contextlib import ExitStack

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

from dmquant.diffusion.blocks import find_blocks, find_ends
from dmquant.diffusion.example_inputs import example_inputs
from dmquant.diffusion.layer_roles import Role, find_roles, named_layers
from dmquant.testing import TINY_UNET
from tests.diffusion.test_pipeline import TINY, every_denoiser, on_meta


def test_ldm4_has_twelve_blocks_down_one_in_the_middle_and_twelve_up():
    names = [block.name for block in find_blocks(on_meta(UNet2DModel, sample_size=64))]
    assert len(names) == 25 and names[0] == "conv_in" and names[12] == "mid_block"


@every_denoiser
def test_blocks_hold_every_inner_layer_once(kind):
    network = on_meta(kind, **TINY[kind])
    inside = [f"{module}.{name}".removesuffix(".") for block in find_blocks(network) for module in block.modules
              for name in named_layers(network.get_submodule(module))]  # fmt: skip
    assert len(inside) == len(set(inside))
    outside = {name: role for name, role in find_roles(network).items() if name not in inside}
    assert set(outside.values()) <= {Role.FIRST, Role.LAST, Role.TIME_EMBEDDING}


@every_denoiser
def test_blocks_come_in_the_order_of_execution(kind):
    network, seen = on_meta(kind, **TINY[kind]), []
    names = {network.get_submodule(name): name for block in find_blocks(network) for name in block.modules}
    with ExitStack() as hooks, torch.no_grad():
        for module in names:
            hooks.callback(module.register_forward_pre_hook(lambda module, _: seen.append(names[module])).remove)
        network(**example_inputs(network))
    assert seen == list(names.values())


@every_denoiser
def test_a_stride_is_what_the_feature_maps_say(kind):
    network, sizes = on_meta(kind, **TINY[kind]), {}

    def note(module, args, output):
        maps = [value for value in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(value)]
        sizes[names[module]] = maps[-1].shape

    blocks = find_blocks(network)
    names = {network.get_submodule(block.modules[0]): block for block in blocks}
    with ExitStack() as hooks, torch.no_grad():
        for module in names:
            hooks.callback(module.register_forward_hook(note).remove)
        network(**example_inputs(network))
    side = max(shape[-1] for shape in sizes.values() if len(shape) == 4) if any(len(s) == 4 for s in sizes.values()) else 1
    assert all(block.stride == (side // shape[-1] if len(shape) == 4 else 1) for block, shape in sizes.items())


def test_the_ends_of_ldm4_are_its_first_and_last_six_blocks():
    network = on_meta(UNet2DModel, sample_size=64)
    blocks = find_blocks(network)
    assert find_ends(network) == blocks[:6] + blocks[-6:]


def test_the_ends_of_a_transformer_hold_at_most_15_percent_and_one_block_on_each_side_at_least():
    blocks = find_blocks(deep := on_meta(DiTTransformer2DModel, num_layers=28, num_attention_heads=2, attention_head_dim=8))
    ends = find_ends(deep)
    share = sum(p.numel() for block in ends for p in deep.get_submodule(block.name).parameters())
    assert ends == blocks[:2] + blocks[-2:] and share <= 0.15 * sum(p.numel() for p in deep.parameters())
    for num_layers in (1, 2, 3):
        shallow = on_meta(DiTTransformer2DModel, num_layers=num_layers, num_attention_heads=2, attention_head_dim=8)
        assert len(find_ends(shallow)) == min(2, num_layers)


def test_a_unet_of_two_levels_has_nothing_but_ends():
    network = on_meta(UNet2DModel, **TINY_UNET)
    assert find_ends(network) == find_blocks(network)
