"""Calibration: grids from what layers read, biases from what rounding takes."""

import copy

import pytest
import torch
from torch import nn

from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.diffusion.trajectories import record
from dmquant.methods.lsq.method import LSQ
from dmquant.nn.fake_quant_layers import bypassed, quantized_layers
from dmquant.quantizers.timestep_clock import Clock
from dmquant.training.calibration import correct_answers, correct_biases, observe_inputs, observe_weights, run_float


@pytest.fixture(scope="module")
def samples(tiny_folder):
    return record(open_pipeline(tiny_folder), 4, steps=3, seed=0)


@pytest.fixture
def student(tiny_folder, samples):
    student = copy.deepcopy(find_target(open_pipeline(tiny_folder)).denoiser)
    LSQ(weight_bits=2, act_bits=4, first_grid="static").prepare(student, Clock(torch.tensor([0.0])))
    observe_weights(student)
    observe_inputs(student, samples, batch=5)
    return student


def mean_errors(student, float_student, samples):
    """Per layer the mean error of each output channel on the inputs that it has in the float model, in float64."""
    inputs = {name: [] for name in quantized_layers(float_student)}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: inputs[name].append(args[0]))
        for name, layer in quantized_layers(float_student).items()
    ]
    run_float(float_student, samples.split(5))
    for hook in hooks:
        hook.remove()
    return {name: mean_error(layer, quantized_layers(float_student)[name], inputs[name])
            for name, layer in quantized_layers(student).items()}  # fmt: skip


@torch.no_grad()
def mean_error(layer, float_layer, inputs):
    with bypassed(float_layer):
        error = torch.cat([layer(x).double() - float_layer(x).double() for x in inputs])
    return (error if isinstance(layer, nn.Linear) else error.movedim(1, -1)).flatten(0, -2).mean(0)


def test_corrected_biases_leave_no_mean_error_in_any_channel_of_any_layer(student, samples):
    float_student = copy.deepcopy(student)
    before = mean_errors(student, float_student, samples)
    correct_biases(student, samples, batch=5)
    after = mean_errors(student, float_student, samples)
    assert all(error.abs().max() > 1e-4 for error in before.values())
    assert all(error.abs().max() < 1e-6 for error in after.values())


def test_a_correction_leaves_weights_quantizers_and_hooks_as_they_were(student, samples):
    kept = {name: value.clone() for name, value in student.state_dict().items() if not name.endswith(".bias")}
    quantizers = {name: layer.input_quantizer for name, layer in quantized_layers(student).items()}
    correct_biases(student, samples, batch=5)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in kept.items())
    assert all(layer.input_quantizer is quantizers[name] for name, layer in quantized_layers(student).items())
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in student.modules())


def test_a_layer_that_never_runs_keeps_its_bias(student, samples):
    student.spare = quantized_layers(student)["conv_out"].__class__(3, 3, 1)
    student.spare.weight_quantizer = student.spare.input_quantizer = nn.Identity()
    before = student.spare.bias.clone()
    correct_biases(student, samples, batch=5)
    assert torch.equal(student.spare.bias, before)


def last_answers(network, samples):
    return torch.cat([part.call(network) for part in samples.split(5)]).double().mean((2, 3))


def test_corrected_answers_have_the_teachers_weighted_mean_in_every_channel(pipeline, student, samples):
    weight = torch.rand(len(samples), generator=torch.Generator().manual_seed(0))
    share = (weight / weight.sum()).double().unsqueeze(1)
    with torch.no_grad():
        off = (share * (last_answers(student, samples) - last_answers(pipeline.unet, samples))).sum(0)
        correct_answers(student, pipeline.unet, samples, weight, batch=5)
        left = (share * (last_answers(student, samples) - last_answers(pipeline.unet, samples))).sum(0)
    assert off.abs().max() > 1e-4 and left.abs().max() < 1e-6


def test_a_correction_of_answers_touches_the_last_bias_alone_and_leaves_no_hooks(pipeline, student, samples):
    kept = {name: value.clone() for name, value in student.state_dict().items() if name != "conv_out.bias"}
    correct_answers(student, pipeline.unet, samples, torch.ones(len(samples)), batch=5)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in kept.items())
    hooks = [layer._forward_hooks for network in (student, pipeline.unet) for layer in network.modules()]
    assert not any(hooks)
