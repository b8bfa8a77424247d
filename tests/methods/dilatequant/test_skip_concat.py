"""The skip offset of a layer is the number of channels that the network concatenates before the skip connection."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from dmquant.diffusion.example_inputs import example_inputs
from dmquant.methods.dilatequant.skip_concat import find_skip_offsets
from tests.diffusion.test_pipeline import TINY, every_denoiser, on_meta

WIDER = dict(
    block_out_channels=(8, 16, 32), layers_per_block=2, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=8, sample_size=16,
)  # fmt: skip


def concatenated_channels(unet, monkeypatch):
    """Returns (channels of the first tensor, channels of all) of each concatenation along channels in a call."""
    seen, cat = [], torch.cat

    def note(tensors, dim=0):
        if dim == 1 and tensors[0].ndim == 4:
            seen.append((tensors[0].shape[1], sum(tensor.shape[1] for tensor in tensors)))
        return cat(tensors, dim=dim)

    monkeypatch.setattr(torch, "cat", note)
    unet(**example_inputs(unet))
    return seen


@pytest.mark.parametrize(
    "kind, config", [(UNet2DModel, TINY[UNet2DModel]), (UNet2DModel, WIDER), (UNet2DConditionModel, TINY[UNet2DConditionModel])]
)
def test_skip_offsets_equal_those_of_the_concatenations_in_a_call(kind, config, monkeypatch):
    unet = on_meta(kind, **config)
    offsets = find_skip_offsets(unet, which="all")
    found = [(offset, unet.get_submodule(name).in_channels) for name, offset in offsets.items() if name.endswith("conv1")]
    assert len(found) > 2 and found == concatenated_channels(unet, monkeypatch)
    shortcuts = find_skip_offsets(unet, which="skip")
    assert shortcuts == {name: offset for name, offset in offsets.items() if name.endswith("conv_shortcut")}
    assert shortcuts and find_skip_offsets(unet, which="none") == {}


@every_denoiser
def test_only_unets_have_skip_offsets(kind):
    offsets = find_skip_offsets(on_meta(kind, **TINY[kind]), which="all")
    assert bool(offsets) == (kind in (UNet2DModel, UNet2DConditionModel))
