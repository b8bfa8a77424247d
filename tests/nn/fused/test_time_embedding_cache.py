"""What a time adds to a block is computed once for each timestep, and anew whenever it would come out otherwise."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from dmquant.nn.fused import time_embedding_cache, unet
from dmquant.quantizers.per_timestep import TemporalGrid
from dmquant.quantizers.timestep_clock import Clock
from tests.kernels.test_ops import make_layer
from tests.nn.fused.test_unet import resnet

pytestmark = [pytest.mark.needs_compiler, pytest.mark.usefixtures("by_kernels")]

KINDS = {"added": {}, "scaled": {"time_embedding_norm": "scale_shift"}, "activated": {"skip_time_act": True}}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def block(request) -> nn.Module:
    return fused(request.param)


def fused(options: dict) -> nn.Module:
    block = resnet(**options)
    block(*inputs(1.0))
    unet.fuse(block)
    return block


def inputs(time: float | list[float]) -> tuple[Tensor, Tensor]:
    """An image, and for each sample the embedding of a time."""
    generator = torch.Generator().manual_seed(0)
    x, embedding = (torch.randn(shape, generator=generator) for shape in ((3, 12, 5, 4), (1, 16)))
    return x, embedding * torch.tensor(time).view(-1, 1).expand(3, 1)


def anew(block: nn.Module, *arguments: Tensor) -> Tensor:
    """What a copy answers that has seen nothing yet."""
    other = copy.deepcopy(block)
    unet.unfuse(other)
    other(*inputs(1.0))
    unet.fuse(other)
    return other(*arguments)


@pytest.fixture
def count(monkeypatch) -> list[nn.Module]:
    """The blocks that computed what a time adds, in turn."""
    seen, embed = [], unet.FusedResnetBlock2D._embed
    monkeypatch.setattr(unet.FusedResnetBlock2D, "_embed", lambda block, temb: (seen.append(block), embed(block, temb))[1])
    return seen


def test_each_timestep_is_computed_once_and_answers_stay_bit_for_bit(block, count):
    wanted = {time: anew(block, *inputs(time)) for time in (1.0, 0.3)}
    count.clear()
    for time in (1.0, 0.3, 1.0, 0.3, 0.3):
        assert torch.equal(block(*inputs(time)), wanted[time])
    assert len(count) == 2


def test_samples_of_several_timesteps_have_what_is_their_own(block, count):
    x, embedding = inputs([1.0, 0.3, 0.7])
    alone = [anew(block, x[i : i + 1], embedding[i : i + 1]) for i in range(3)]
    for _ in range(2):
        assert torch.equal(block(x, embedding.clone()), torch.cat(alone))
    assert count.count(block) == 2


CHANGES = {
    "a bias that is written to": lambda block: block.time_emb_proj.bias.normal_(),
    "the convolution's bias": lambda block: block.conv1.bias.mul_(2),
    "another bias": lambda block: setattr(block.conv1, "bias", nn.Parameter(torch.randn(20), requires_grad=False)),
    "a bias no more": lambda block: setattr(block.conv1, "bias", None),
    "scales of weights": lambda block: block.time_emb_proj.weight.scale.mul_(2),
    "a grid": lambda block: block.time_emb_proj.input.scale.mul_(2),
    "another layer": lambda block: setattr(block, "time_emb_proj", make_layer((20, 16), 2, 4)),
    "another convolution": lambda block: setattr(block, "conv1", make_layer((20, 12, 3, 3), 2, 4, padding=1)),
    "weights that are loaded": lambda block: block.load_state_dict(other_weights(block)),
}


def other_weights(block: nn.Module) -> dict[str, Tensor]:
    name = "time_emb_proj.weight.codes"
    return {key: ~value if key == name else value for key, value in block.state_dict().items()}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_changes_is_noticed(change):
    block = fused({})
    block.time_emb_proj.bias = nn.Parameter(torch.zeros(20), requires_grad=False)
    before = block(*inputs(0.3))
    change(block)
    block(*inputs(1.0)), block(*inputs(1.0))  # chooses kernels again
    found = block(*inputs(0.3))
    assert torch.equal(found, anew(block, *inputs(0.3))) and not torch.equal(found, before)


def test_an_embedding_that_is_written_to_is_another():
    block, (x, embedding) = fused({}), inputs(0.3)
    block(x, embedding)
    embedding.mul_(2)
    assert torch.equal(block(x, embedding), anew(block, x, embedding.clone()))


def test_grids_of_a_timestep_are_part_of_what_was_kept(count):
    block, clock = fused({}), Clock(torch.tensor([900.0, 0.0]))
    grid = block.time_emb_proj.input = TemporalGrid(4, clock)
    grid.scale.copy_(torch.tensor([0.3, 0.9])), grid.zero.fill_(8)
    answers = []
    for timestep in (900, 0, 900, [0, 900, 900]):
        with clock.at(torch.tensor(timestep), 3):
            answers.append(block(*inputs(0.3)))
    assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])
    assert torch.equal(answers[3], torch.cat([answers[1][:1], answers[0][1:]]))


def test_who_watches_a_layer_sees_each_of_its_calls(block):
    seen = []
    block(*inputs(0.3))
    hook = block.time_emb_proj.register_forward_hook(lambda *_: seen.append(1))
    block(*inputs(0.3)), block(*inputs(0.3))
    assert len(seen) == 2
    hook.remove()


def test_no_more_than_so_many_timesteps_are_kept(count, monkeypatch):
    monkeypatch.setattr(time_embedding_cache, "MOST", 2)
    block = fused({})
    for _ in range(2):
        for time in (0.1, 0.2, 0.3):
            block(*inputs(time))
    assert len(count) == 4 and len(time_embedding_cache.KEPT[block]) == 2
    seen = weakref.ref(block)
    del block, count[:]
    gc.collect()
    assert seen() is None, "what is kept holds no block"
