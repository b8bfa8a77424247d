import copy

import pytest
import torch
from torch import nn

from dmquant.diffusion.layer_roles import Role, find_roles
from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.methods.lsq.method import LSQ
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.quantizers.binary import Binary
from dmquant.quantizers.per_timestep import TemporalStep
from dmquant.quantizers.timestep_clock import Clock
from dmquant.quantizers.uniform import LearnedStep


@pytest.fixture
def denoiser(tiny_folder):
    return find_target(open_pipeline(tiny_folder)).denoiser


def prepared(denoiser, **settings):
    student = copy.deepcopy(denoiser)
    LSQ(**{"first_grid": "static", **settings}).prepare(student, Clock(torch.tensor([0.0])))
    return quantized_layers(student)


def bits(layer):
    return tuple(getattr(q, "bits", 32) for q in (layer.weight_quantizer, layer.input_quantizer))


def test_first_last_and_time_embedding_layers_have_eight_bits_and_all_others_the_set_bits(denoiser):
    roles, layers = find_roles(denoiser), prepared(denoiser, weight_bits=3, act_bits=5)
    assert set(layers) == set(roles)
    for name, layer in layers.items():
        assert bits(layer) == ((8, 8) if roles[name] in (Role.FIRST, Role.LAST, Role.TIME_EMBEDDING) else (3, 5))


def test_kept_roles_stay_float_layers(denoiser):
    roles, layers = find_roles(denoiser), prepared(denoiser, keep=(Role.SKIP,), eight_bit=())
    assert {roles[name] for name in roles if name not in layers} == {Role.SKIP}
    assert all(bits(layer) == (4, 8) for layer in layers.values())


def test_thirty_two_bits_keep_weights_or_activations_in_float(denoiser):
    for layer in prepared(denoiser, act_bits=32).values():
        assert isinstance(layer.input_quantizer, nn.Identity) and isinstance(layer.weight_quantizer, LearnedStep)
    for layer in prepared(denoiser, weight_bits=32).values():
        assert isinstance(layer.weight_quantizer, nn.Identity) and isinstance(layer.input_quantizer, LearnedStep)
    assert not prepared(denoiser, weight_bits=32, act_bits=32)


def test_one_bit_weights_have_a_sign_and_a_trained_scale(denoiser):
    roles = find_roles(denoiser)
    for name, layer in prepared(denoiser, weight_bits=1).items():
        assert isinstance(layer.weight_quantizer, Binary) == (roles[name] not in LSQ().eight_bit)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_every_width_runs_with_a_step_per_channel_or_per_layer(denoiser, bits, per_channel):
    for layer in prepared(denoiser, weight_bits=bits, per_channel=per_channel, eight_bit=()).values():
        quantizer = layer.weight_quantizer
        quantizer.observe(layer.weight)
        assert torch.equal(quantizer(layer.weight), quantizer.encode(layer.weight).decode())
        assert quantizer.scale.numel() == (len(layer.weight) if per_channel else 1)


def test_settings_choose_steps_per_layer_and_signed_activations(denoiser):
    for layer in prepared(denoiser, per_channel=False, act_offset=False).values():
        assert layer.weight_quantizer.scale.numel() == 1 and layer.input_quantizer.symmetric


def test_the_first_layer_has_a_grid_per_timestep_where_its_input_is_quantized(denoiser):
    for settings, is_temporal in (({}, True), ({"act_bits": 32}, False), ({"first_grid": "static"}, False)):
        layers = prepared(denoiser, **{"first_grid": "temporal", **settings})
        kinds = {name for name, layer in layers.items() if isinstance(layer.input_quantizer, TemporalStep)}
        assert kinds == ({"conv_in"} if is_temporal else set())
        assert all(bits(layer)[1] in (8, 32) for layer in layers.values())
