import copy

import pytest
import torch
from torch import nn

from dmquant.nn.fake_quant_layers import QuantConv1d, QuantConv2d, QuantLinear, bypassed, find_layers, quantized_layers, swap
from dmquant.quantizers.uniform import LearnedStep


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect", bias=False)
        self.line = nn.Conv1d(4, 4, 1)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.head(self.line(self.conv(x).flatten(2)).mean(2))


def choose(name, layer):
    weight = LearnedStep(4, num_channels=len(layer.weight), ndim=layer.weight.ndim)
    return weight, LearnedStep(8, symmetric=False)


def test_swap_replaces_every_layer_and_shares_its_parameters():
    model = Net()
    weight = model.conv.weight
    swap(model, choose)
    assert [type(layer) for layer in quantized_layers(model).values()] == [QuantConv2d, QuantConv1d, QuantLinear]
    assert model.conv.weight is weight and model.conv.bias is None and model.conv.padding_mode == "reflect"
    assert not find_layers(model)


def test_float_keys_stay_a_subset_of_the_quantized_keys():
    teacher, student = Net(), Net()
    swap(student, choose)
    assert set(teacher.state_dict()) < set(student.state_dict())


def test_layers_not_chosen_stay_as_they_are():
    model = Net()
    swap(model, lambda name, layer: None if name == "conv" else (nn.Identity(), nn.Identity()))
    assert type(model.conv) is nn.Conv2d and type(model.line) is QuantConv1d


def test_identity_quantizers_change_nothing():
    model, x = Net(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    swap(model, lambda name, layer: (nn.Identity(), nn.Identity()))
    assert torch.equal(model(x), expected)


def test_bypassed_is_float_inside_and_quantized_again_after_even_when_interrupted():
    model, x = Net(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    swap(model, choose)
    quantized = model(x)
    with pytest.raises(KeyboardInterrupt), bypassed(model):
        assert torch.equal(model(x), expected)
        raise KeyboardInterrupt
    assert torch.equal(model(x), quantized)


def test_a_swapped_model_survives_deepcopy_and_meta_construction():
    model = Net()
    swap(model, choose)
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    assert torch.equal(twin(x), model(x))
    with torch.device("meta"):
        empty = Net()
        swap(empty, choose)
    assert set(empty.state_dict()) == set(model.state_dict())
