"""Each unit computes alone what it computes in the network, for every architecture."""

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
from dmquant.methods.dilatequant.block_runner import Block, BlockRunner, find_units, trace_unit
from dmquant.methods.dilatequant.method import DilateQuant
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.progress import plain
from dmquant.quantizers.timestep_clock import Clock
from tests.diffusion.test_pipeline import TINY, every_denoiser

MAX_TOKENS = 32  # the full number of tokens would take minutes and test nothing more


@torch.no_grad()
def calls_of(network, count=5):
    """Records calls of a denoiser on few random tokens at random timesteps."""
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
    few = value[tuple(slice(MAX_TOKENS) for _ in value.shape)]
    return torch.rand_like(few) if few.is_floating_point() else few


def student_of(kind):
    """Returns a copy of the calibrated student, and recorded calls of it."""
    student, samples = _calibrate(kind)
    return copy.deepcopy(student), samples


@cache
def runners_of(kind):
    """Returns a shared student, which tests must not change, recorded calls of it, and its runners by unit."""
    student, samples = student_of(kind)
    return student, samples, {block: BlockRunner(student, block, samples) for block in find_units(student, samples)}


@cache
def _calibrate(kind):
    torch.manual_seed(1)
    # the recorder takes time_ids for positions, which are the same for all samples_factors
    options = {name: value for name, value in TINY[kind].items() if "addition" not in name and "projection_class" not in name}
    student = kind(**options).eval()
    samples, method = calls_of(student), DilateQuant(attention_bits=8 if kind is UNet2DModel else 32, calibration_samples=5)
    method.prepare(student, Clock(samples.timestep.unique()))
    method.calibrate(student, samples, track=plain)
    return student, samples


@every_denoiser
@torch.no_grad()
def test_every_unit_has_the_same_outputs_alone_as_in_the_network(kind):
    student, samples, runners = runners_of(kind)
    part = samples[torch.tensor([3, 0, 4, 1])]
    for block, runner in runners.items():
        calls = trace_unit(student, block, part)
        with student.clock.at(part.timestep, 4):
            outputs = runner(*runner.inputs_from(calls))
            halted = runner.inputs_from(trace_unit(student, block, part, with_outputs=False))
        assert outputs and all(torch.equal(*pair) for pair in zip(outputs, runner.outputs_from(calls), strict=True)), block.name
        assert all(torch.equal(*pair) for pair in zip(halted, runner.inputs_from(calls), strict=True)), block.name


@every_denoiser
def test_units_contain_every_quantized_layer_that_runs_exactly_once(kind):
    student, _, runners = runners_of(kind)
    modules = [student.get_submodule(name) for unit in runners for name in unit.modules]
    inside = [layer for module in modules for layer in quantized_layers(module).values()]
    assert len(inside) == len(set(inside)) and set(inside) == set(quantized_layers(student).values())
    names = [unit.name for unit in runners]
    blocks = [block.name for block in find_blocks(student)]
    assert [name for name in names if name in blocks] == blocks


def test_units_of_a_unet_begin_with_the_time_embedding_and_end_with_the_last_layer():
    names = [unit.name for unit in runners_of(UNet2DModel)[2]]
    assert names[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"] and names[-1] == "conv_out"


def test_modules_after_the_unit_do_not_run_and_without_outputs_its_last_module_does_not_run():
    student, samples = student_of(UNet2DModel)
    (first, *_, last), ran, end = find_units(student, samples), [], student.conv_out
    hook = end.register_forward_hook(lambda *call: ran.append(call))
    trace_unit(student, first, samples)
    trace_unit(student, last, samples, with_outputs=False)
    hook.remove()
    assert not ran and not end._forward_pre_hooks and not any(module._forward_hooks for module in student.modules())


def test_parts_that_do_not_follow_each_other_are_refused():
    student, samples = student_of(UNet2DModel)
    with pytest.raises(DmquantError, match="conv_in do not follow each other"):
        BlockRunner(student, Block("conv_in", ("conv_in", "mid_block")), samples)


class Folded(nn.Module):
    """Passes all samples to its layer as one tensor without a batch dimension."""

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
        BlockRunner(network, Block("inner", ("inner",)), recorder.take())
