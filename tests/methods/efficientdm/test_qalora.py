"""QALoRA starts as calibrated, is merged before rounding, and leaves the base weight untrained."""

import weakref

import pytest
import torch
from torch import nn

from dmquant.methods.efficientdm.qalora import QALoRA, adapted_layers, half_precision_layers, stored_in_half
from dmquant.nn.convert import pack_layer
from dmquant.nn.fake_quant_layers import quantized, swap
from dmquant.nn.packed_weight import Bases
from dmquant.quantizers.base import BasisCodes
from dmquant.quantizers.binary import Binary
from dmquant.quantizers.uniform import LearnedStep

LAYERS = {
    "linear": (lambda: nn.Linear(10, 6), (2, 5, 10)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def adapted(layer, bits=4, rank=3, moved=True):
    shape = dict(num_channels=6, ndim=layer.weight.ndim)
    inner = Binary(**shape) if bits == 1 else LearnedStep(bits, **shape)
    adapter = QALoRA(inner, layer.weight.shape, rank)
    adapter.observe(layer.weight)
    adapter.initialize(torch.Generator().manual_seed(0))
    if moved:
        nn.init.normal_(adapter.up, std=0.1)
    return adapter


@every_layer
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_decoded_codes_equal_the_output_and_the_adapter_starts_as_its_inner_quantizer(name, bits):
    torch.manual_seed(0)
    weight = LAYERS[name][0]().weight
    start, later = adapted(LAYERS[name][0](), bits, moved=False), adapted(LAYERS[name][0](), bits)
    assert torch.equal(start(weight), start.inner(weight)) and not torch.equal(later(weight), later.inner(weight))
    for adapter in (start, later):
        assert torch.equal(adapter(weight), adapter.encode(weight).decode()) and adapter.bits == bits


@every_layer
def test_a_merged_update_equals_the_sum_with_two_low_rank_layers(name):
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    adapter = adapted(layer).double()
    change = adapter.merge(layer.weight) - layer.weight
    if name == "linear":
        expected = x @ adapter.down.T @ adapter.up.T
    elif name == "grouped":
        expected = layer._conv_forward(x, torch.einsum("or,rikl->oikl", adapter.up, adapter.down), None)
    else:
        pointwise = adapter.up.view(*adapter.up.shape, *(1,) * (layer.weight.ndim - 2))
        convolve = nn.functional.conv1d if name == "conv1d" else nn.functional.conv2d
        expected = convolve(convolve(x, adapter.down, padding=layer.padding), pointwise)
    plain = layer(x)
    layer.weight.data += change
    assert torch.allclose(layer(x) - plain, expected, atol=1e-12)


def test_the_rank_is_limited_to_that_of_the_weight():
    assert QALoRA(LearnedStep(4, num_channels=6), torch.Size((6, 4, 3, 3)), 32).down.shape == (6, 4, 3, 3)
    assert QALoRA(LearnedStep(4, num_channels=6), torch.Size((64, 2, 1, 1)), 32).up.shape == (64, 2)


def test_a_packed_layer_contains_no_adapter():
    layer = nn.Conv2d(4, 6, 3)
    layer = quantized(layer, adapted(layer), nn.Identity())
    packed, x = pack_layer(layer), torch.randn(2, 4, 5, 5)
    assert sorted(packed.state_dict()) == ["bias", "weight.codes", "weight.scale", "weight.zero"]
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))


class BinaryBases(Binary):
    traits = (Bases(),)

    def encode(self, x):
        return BasisCodes(torch.zeros_like(x, dtype=torch.uint8), self.scale.unsqueeze(0))


def test_an_adapter_has_the_stored_format_of_its_inner_quantizer():
    layer = nn.Conv2d(4, 6, 3)
    adapter = QALoRA(BinaryBases(num_channels=6), layer.weight.shape, 2)
    assert adapter.traits == (Bases(),) and isinstance(adapter.encode(layer.weight), BasisCodes)
    assert adapted(layer).traits == ()


def test_gradients_reach_the_adapter_and_the_step_through_rounding():
    torch.manual_seed(2)
    layer, x = nn.Linear(10, 6).requires_grad_(False), torch.randn(8, 10)
    adapter = adapted(layer)
    nn.functional.linear(x, adapter(layer.weight)).square().mean().backward()
    by_name = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert set(by_name) == {"down", "up", "inner.scale"} and all(grad.abs().sum() > 0 for grad in by_name.values())
    assert layer.weight.grad is None


@every_layer
@pytest.mark.parametrize("bits", [1, 4])
def test_the_merged_weight_is_not_stored_for_the_backward_pass_and_gradients_are_exact(name, bits, monkeypatch):
    torch.manual_seed(3)
    layer, sums = LAYERS[name][0]().requires_grad_(False), []
    one, other = adapted(layer, bits), adapted(layer, bits)
    other.load_state_dict(one.state_dict())
    merge = QALoRA.merge

    def noted(self, weight):
        merged = merge(self, weight)
        sums.append(weakref.ref(merged))
        return merged

    monkeypatch.setattr(QALoRA, "merge", noted)
    weight = one(layer.weight)
    assert [found() for found in sums] == [None], "no reference to the merged weight is left"
    weight.mul(weight.detach()).sum().backward()
    assert len(sums) == 2
    kept = other.inner(merge(other, layer.weight))
    kept.mul(kept.detach()).sum().backward()
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_initialization_depends_on_its_generator_alone_and_has_the_bounds_of_a_torch_layer():
    torch.manual_seed(5)
    one = adapted(nn.Conv2d(40, 6, 3), rank=6, moved=False)
    torch.manual_seed(6)
    two = adapted(nn.Conv2d(40, 6, 3), rank=6, moved=False)
    assert torch.equal(one.down, two.down) and not one.up.any()
    bound = 360**-0.5
    assert 0.95 * bound < one.down.abs().max() <= bound and one.down.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_frozen_weights_are_stored_in_half_precision_and_restored_exactly():
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 6))
    swap(model, lambda name, layer: (adapted(layer), nn.Identity()))
    model.requires_grad_(False)
    for layer in half_precision_layers(model):
        layer.weight.copy_(layer.weight.half())
    before, x = model(torch.ones(1, 10)), torch.ones(1, 10)
    assert half_precision_layers(model) == adapted_layers(model)[1:], "diffusers reads a model's dtype from its first parameter"
    with stored_in_half(half_precision_layers(model)):
        assert [layer.weight.dtype for layer in model] == [torch.float32, torch.float16]
        assert torch.equal(model(x), before)
    assert model[1].weight.dtype == torch.float32 and torch.equal(model(x), before)


def test_the_merge_is_in_float32_under_mixed_precision():
    layer = nn.Linear(10, 6)
    adapter = adapted(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter(layer.weight), adapter.encode(layer.weight).decode())
    assert torch.equal(adapter(layer.weight), adapter.encode(layer.weight).decode())
