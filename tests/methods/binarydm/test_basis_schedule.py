import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.methods.binarydm.basis_schedule import BasisSchedule, BinarizationWarmup, group_layers
from dmquant.methods.binarydm.evolvable_basis import EvolvableBasis
from dmquant.methods.binarydm.method import BinaryDM
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.quantizers.binary import Binary
from dmquant.quantizers.timestep_clock import Clock


class RecordingObjective:
    """An objective that records a property of the student at each step and returns a loss of zero."""

    def __init__(self, inspect):
        self.inspect, self.seen = inspect, []

    def loss(self, student, batch, *, step, generator, device):
        self.seen.append(self.inspect(student))
        return torch.zeros(())


def losses_of(objective, student, steps):
    how = {"generator": torch.Generator(), "device": torch.device("cpu")}
    return [objective.loss(student, 1, step=step, **how).item() for step in steps]


@pytest.fixture
def student(tiny_folder):
    student = copy.deepcopy(find_target(open_pipeline(tiny_folder)).denoiser)
    BinaryDM().prepare(student, Clock(torch.tensor([0.0])))
    return student


def test_the_number_of_bases_is_a_function_of_the_step(student):
    quantizers = [q for q in student.modules() if isinstance(q, EvolvableBasis)]
    recording = RecordingObjective(lambda _: {q.bits for q in quantizers})
    losses_of(BasisSchedule(recording, quantizers, 5, 0.09), student, [0, 4, 5, 9, 4, 5])
    assert recording.seen == [{2}, {2}, {1}, {1}, {2}, {1}]


def test_the_penalty_is_the_mean_magnitude_of_the_second_scales_and_ends_at_the_switch(student):
    quantizers = [q for q in student.modules() if isinstance(q, EvolvableBasis)]
    with torch.no_grad():
        for index, quantizer in enumerate(quantizers):
            quantizer.second_scale.fill_(-index)
    losses = losses_of(BasisSchedule(RecordingObjective(lambda _: None), quantizers, 5, 0.09), student, [4, 5])
    assert losses == [pytest.approx(0.09 * (len(quantizers) - 1) / 2), 0]


def test_warm_up_binarizes_the_middle_first_and_the_ends_last(student):
    groups = group_layers(student)
    binary = {name: layer for name, layer in quantized_layers(student).items() if isinstance(layer.weight_quantizer, Binary)}

    def binarized(_):
        return {name for name, layer in binary.items() if isinstance(layer.weight_quantizer, Binary)}

    recording = RecordingObjective(binarized)
    losses_of(BinarizationWarmup(recording, groups, 3), student, [0, 2, 3, 6, 50])
    first, same, second, all_of_them, later = recording.seen
    assert {name for name in binary if name.startswith("mid_block")} <= first == same < second < all_of_them == later
    assert not any(name.startswith(("down_blocks.0.resnets", "up_blocks.1")) for name in second)
    assert binarized(None) == set(binary)  # all quantizers are back after the step


def test_warm_up_of_a_transformer_goes_from_the_middle_block_outwards():
    with torch.device("meta"):
        network = DiTTransformer2DModel(num_layers=5, num_attention_heads=2, attention_head_dim=8)
    BinaryDM().prepare(network, Clock(torch.tensor([0.0], device="meta")))
    layers = quantized_layers(network)
    names = {layer: name for name, layer in layers.items()}
    indices = [sorted({int(names[layer].split(".")[1]) for layer in group}) for group in group_layers(network)]
    assert indices == [[2], [1, 3], [0, 4]]


def test_weight_quantizers_are_restored_when_the_loss_raises_an_error(student):
    class Failing:
        def loss(self, *args, **kwargs):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        losses_of(BinarizationWarmup(Failing(), group_layers(student), 3), student, [0])
    assert not any(isinstance(layer.weight_quantizer, nn.Identity) for layer in quantized_layers(student).values())
