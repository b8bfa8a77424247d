"""Links of a chain run alone as they do in the network, whatever the architecture."""

import copy
from functools import cache

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from dmquant.diffusion.blocks import find_blocks
from dmquant.diffusion.example_inputs import example_inputs
from dmquant.diffusion.trajectories import Recorder
from dmquant.errors import DmquantError
from dmquant.methods.dilatequant.block_runner import Block, Link, find_links, trace
from dmquant.methods.dilatequant.method import DilateQuant
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.progress import plain
from dmquant.quantizers.timestep_clock import Clock
from tests.diffusion.test_pipeline import TINY, every_denoiser

MOST = 32  # tokens: a denoiser's own number of them would cost minutes and show nothing more


@torch.no_grad()
def calls_of(network, count=5):
    """Calls of a denoiser on few random tokens at random timesteps, as a recording has them."""
    torch.manual_seed(0)
    arguments = randomized(example_inputs(network, batch=count, device="cpu"))
    recorder = Recorder()
    network.register_forward_hook(recorder.note, with_kwargs=True)
    network(**arguments)
    network._forward_hooks.clear()
    network._forward_hooks_with_kwargs.clear()
    return recorder.take()


def randomized(value):
    if isinstance(value, dict):
        return {name: randomized(inner) for name, inner in value.items()}
    if not torch.is_tensor(value):
        return value
    few = value[tuple(slice(MOST) for _ in value.shape)]
    return torch.rand_like(few) if few.is_floating_point() else few


def student_of(kind):
    """A calibrated student of one's own, and calls of it."""
    student, samples = _calibrate(kind)
    return copy.deepcopy(student), samples


@cache
def links_of(kind):
    """A student that nobody may change, calls of it, and its links."""
    student, samples = student_of(kind)
    return student, samples, {block: Link(student, block, samples) for block in find_links(student, samples)}


@cache
def _calibrate(kind):
    torch.manual_seed(1)
    # a recording takes time_ids for positions, which all samples share
    options = {name: value for name, value in TINY[kind].items() if "addition" not in name and "projection_class" not in name}
    student = kind(**options).eval()
    samples, method = calls_of(student), DilateQuant(attention_bits=8 if kind is UNet2DModel else 32, calibration_samples=5)
    method.prepare(student, Clock(samples.timestep.unique()))
    method.calibrate(student, samples, track=plain)
    return student, samples


@every_denoiser
@torch.no_grad()
def test_every_link_answers_alone_what_it_answers_in_the_network(kind):
    student, samples, links = links_of(kind)
    part = samples[torch.tensor([3, 0, 4, 1])]
    for block, link in links.items():
        calls = trace(student, block, part)
        with student.clock.at(part.timestep, 4):
            answers = link(*link.rows_of(calls))
            halted = link.rows_of(trace(student, block, part, with_answers=False))
        assert answers and all(torch.equal(*pair) for pair in zip(answers, link.answers_of(calls), strict=True)), block.name
        assert all(torch.equal(*pair) for pair in zip(halted, link.rows_of(calls), strict=True)), block.name


@every_denoiser
def test_links_hold_every_quantized_layer_that_runs_once(kind):
    student, _, links = links_of(kind)
    modules = [student.get_submodule(name) for link in links for name in link.modules]
    inside = [layer for module in modules for layer in quantized_layers(module).values()]
    assert len(inside) == len(set(inside)) and set(inside) == set(quantized_layers(student).values())
    names = [link.name for link in links]
    blocks = [block.name for block in find_blocks(student)]
    assert [name for name in names if name in blocks] == blocks


def test_links_of_a_unet_begin_with_the_time_embedding_and_end_with_the_last_layer():
    names = [link.name for link in links_of(UNet2DModel)[2]]
    assert names[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"] and names[-1] == "conv_out"


def test_what_follows_a_link_does_not_run_and_without_answers_neither_does_its_end():
    student, samples = student_of(UNet2DModel)
    (first, *_, last), ran, end = find_links(student, samples), [], student.conv_out
    hook = end.register_forward_hook(lambda *call: ran.append(call))
    trace(student, first, samples)
    trace(student, last, samples, with_answers=False)
    hook.remove()
    assert not ran and not end._forward_pre_hooks and not any(module._forward_hooks for module in student.modules())


def test_parts_that_do_not_follow_each_other_are_refused():
    student, samples = student_of(UNet2DModel)
    with pytest.raises(DmquantError, match="conv_in do not follow each other"):
        Link(student, Block("conv_in", ("conv_in", "mid_block")), samples)


class Folded(nn.Module):
    """Reads all samples as one row of another length."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 1)

    def forward(self, x, timestep, return_dict=True):
        return (self.inner(x.reshape(-1, 1)).view_as(x),)


def test_inputs_without_a_row_per_sample_are_refused():
    network = Folded()
    recorder = Recorder()
    x = torch.rand(4, 3)
    recorder.note(network, (x, torch.zeros(4)), {}, (x,))
    with pytest.raises(DmquantError, match="inner reads a tensor that has no row per sample"):
        Link(network, Block("inner", ("inner",)), recorder.take())
