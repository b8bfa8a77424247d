"""DilateQuant: the grid of each input, saving and loading, and settings."""

import copy

import pytest
import torch
from PIL import Image

import dmquant
from dmquant.checkpoint import serialization
from dmquant.cli import app
from dmquant.diffusion.layer_roles import Role, find_roles
from dmquant.diffusion.pipeline import find_target
from dmquant.errors import DamagedFile, InputError
from dmquant.methods.dilatequant.method import DilateQuant
from dmquant.methods.dilatequant.weight_dilation import dilation_factors
from dmquant.nn.attention import QuantInput
from dmquant.nn.convert import packed_layers, read_scheme
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.quantization import make_student, quantize
from dmquant.quantizers.dilated import Dilated, DilatedInput, Divide
from dmquant.quantizers.per_part import Heads, PerHead, Split, SplitGrid
from dmquant.quantizers.per_timestep import PerTimestep, TemporalGrid, TemporalStep
from dmquant.quantizers.timestep_clock import Clock

QUICK = dict(trajectories=4, sampling_steps=3, calibration_samples=12, max_steps=2, batch=4)


def prepared(pipeline, **settings):
    student = copy.deepcopy(find_target(pipeline).denoiser)
    DilateQuant(**{**QUICK, **settings}).prepare(student, Clock(torch.tensor([666.0, 333.0, 0.0])))
    return student


def test_all_inputs_but_the_time_embeddings_have_a_grid_per_timestep_and_all_are_divided(pipeline):
    student = prepared(pipeline, attention_bits=8)
    roles = find_roles(student)
    for name, layer in quantized_layers(student).items():
        assert isinstance(layer.input_quantizer, DilatedInput)
        for leaf, _ in layer.input_quantizer.leaves(torch.empty(1, layer.weight.shape[1], 1, 1)):
            assert isinstance(leaf, TemporalStep) == (roles[name] != Role.TIME_EMBEDDING)
    factors = [module.input_quantizer for module in student.modules() if isinstance(module, QuantInput)]
    assert len(factors) > 4 and all(isinstance(factor, TemporalStep) and factor.bits == 8 for factor in factors)
    assert all(quantizer.clock is student.clock for quantizer in factors)


def test_dilation_and_temporal_grids_can_be_switched_off(pipeline):
    assert not any(isinstance(module, DilatedInput) for module in prepared(pipeline, dilation="none").modules())
    static = prepared(pipeline, temporal=False, attention_bits=8)
    temporal = [name for name, module in static.named_modules() if isinstance(module, TemporalStep)]
    assert all(name.startswith("conv_in.") for name in temporal)
    assert not any(isinstance(module, DilatedInput) for module in prepared(pipeline, weight_bits=32).modules())


@pytest.mark.parametrize("dilation", ["weights", "smooth"])
def test_factors_follow_from_the_weights_of_the_teacher(pipeline, samples, dilation):
    student = make_student(pipeline, DilateQuant(**{**QUICK, "max_steps": 0}, dilation=dilation, fold=False), samples=samples)
    teacher, dilated = find_target(pipeline).denoiser, 0
    for name, layer in quantized_layers(student).items():
        factor, limit = layer.weight_quantizer.factor, dilation_factors(teacher.get_submodule(name).weight)
        assert (factor >= 1).all() and (factor <= limit).all()
        assert dilation == "smooth" or torch.equal(factor, limit)
        assert torch.equal(layer.input_quantizer.divide.reciprocal, factor.reciprocal())
        dilated += int((factor != 1).sum())
    assert dilated > 10


def test_a_plan_says_how_many_channels_of_each_layer_are_dilated(pipeline, samples):
    method = DilateQuant(**{**QUICK, "max_steps": 0}, keep=(Role.ATTENTION,), fold=False)
    student, teacher = make_student(pipeline, method, samples=samples), find_target(pipeline).denoiser
    notes = DilateQuant(keep=(Role.ATTENTION,)).notes(teacher)
    assert notes.keys() == quantized_layers(student).keys()
    for name, layer in quantized_layers(student).items():
        factor = layer.weight_quantizer.factor
        assert notes[name] == f"{(factor != 1).sum()} of {len(factor)} channels dilated"
    assert DilateQuant(dilation="none").notes(teacher) == {}
    folded = DilateQuant(dilation="smooth").notes(teacher)["mid_block.attentions.0.to_q"]
    assert folded.startswith("at most ") and folded.endswith("of 8 channels dilated, folded")


def test_a_dry_run_shows_the_dilated_channels(tiny_folder, capsys):
    assert app.run_command(["quantize", str(tiny_folder), "--method", "dilatequant", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("channels dilated") > 20 and "channels dilated, folded" in shown and "first: kept at 8/8; 0 of 3" in shown


@pytest.mark.parametrize("split, leaves", [("skip", {"conv_shortcut"}), ("all", {"conv1", "conv_shortcut"}), ("none", set())])
def test_split_selects_the_layers_whose_concatenated_inputs_have_two_grids(pipeline, split, leaves):
    student = prepared(pipeline, split=split)
    found = [name for name, module in student.named_modules() if isinstance(module, Split)]
    assert {name.split(".")[4] for name in found} == leaves and len(found) == 2 * len(leaves)
    assert all(name.startswith("up_blocks.0.resnets.") for name in found)
    assert all(part.clock is student.clock for name in found for part in student.get_submodule(name).parts)


def test_a_split_offset_beyond_the_input_channels_is_refused(pipeline, samples, tmp_path):
    quantized = quantize(pipeline, "dilatequant", samples=samples, **{**QUICK, "max_steps": 0})
    dmquant.save(quantized, tmp_path / "out")
    path = tmp_path / "out/unet/config.json"
    assert path.read_text().count('"split:8"') == 1  # both up blocks by one pattern
    path.write_text(path.read_text().replace('"split:8"', '"split:16"'))
    with pytest.raises(DamagedFile, match="does not fit UNet2DModel"):
        serialization.load(tmp_path / "out", verify=False)


@pytest.mark.parametrize("bits, split", [(4, "skip"), (6, "all"), (8, "none")])
def test_a_loaded_model_has_the_same_output_as_the_trained_student(pipeline, samples, bits, split, tmp_path):
    settings = dict(weight_bits=bits, act_bits=bits, attention_bits=8, split=split)
    student = make_student(pipeline, DilateQuant(**{**QUICK, **settings}), samples=samples)
    dmquant.save(find_target(pipeline).with_denoiser(student).pipeline, tmp_path / "out")
    again = find_target(dmquant.load(tmp_path / "out")).denoiser
    part = samples[torch.tensor([0, 5, 11, 7])]
    with torch.no_grad():
        assert torch.equal(part.call(again), part.call(student))
    scheme = read_scheme(again)
    assert scheme.attention_traits == (PerTimestep(),) and any(Dilated() in layer.traits for layer in scheme.overrides.values())
    assert any(isinstance(layer.divide, Divide) for layer in packed_layers(again).values())
    assert sum(isinstance(module, TemporalGrid) for module in again.modules()) > len(packed_layers(again)) / 2
    assert sum(isinstance(module, SplitGrid) for module in again.modules()) == {"skip": 2, "all": 4, "none": 0}[split]


def test_head_grids_gives_attention_products_a_grid_per_head(pipeline, samples, tmp_path):
    method = DilateQuant(**QUICK, attention_bits=6, head_grids=True)
    student = make_student(pipeline, method, samples=samples)
    heads = [module for module in student.modules() if isinstance(module, Heads)]
    assert len(heads) == 8 and all(len(module.parts) == 2 for module in heads)
    assert all(isinstance(part, TemporalStep) and part.clock is student.clock for module in heads for part in module.parts)
    assert all(not torch.equal(*(part.log_scale for part in module.parts)) for module in heads)
    dmquant.save(find_target(pipeline).with_denoiser(student).pipeline, tmp_path / "out")
    again = find_target(dmquant.load(tmp_path / "out")).denoiser
    assert read_scheme(again).attention_traits == (PerTimestep(), PerHead())
    with torch.no_grad():
        assert torch.equal(samples.call(again), samples.call(student))


def test_kernels_support_divided_and_split_inputs(pipeline, samples, monkeypatch):
    denoiser = find_target(quantize(pipeline, "dilatequant", samples=samples, **QUICK, split="all")).denoiser
    with torch.no_grad():
        expected = samples.call(denoiser)
        monkeypatch.setenv("DMQUANT_KERNELS", "c")
        assert torch.allclose(samples.call(copy.deepcopy(denoiser)), expected, atol=1e-4)


def test_a_factor_that_is_not_positive_is_refused(pipeline, samples, tmp_path):
    quantized = quantize(pipeline, "dilatequant", samples=samples, **{**QUICK, "max_steps": 0})
    layer = next(layer for layer in packed_layers(find_target(quantized).denoiser).values() if isinstance(layer.divide, Divide))
    layer.divide.reciprocal[0] = 0
    with pytest.raises(DamagedFile, match="reciprocal that is not positive"):
        dmquant.save(quantized, tmp_path / "out")


@pytest.mark.parametrize(
    "settings", [{"scope": "model"}, {"precision": "bf16"}, {"lookup": "linear"}, {"block_samples": 3}, {"temporal": False}]
)
def test_other_training_settings_run(pipeline, samples, settings):
    student = make_student(pipeline, DilateQuant(**{**QUICK, **settings}), samples=samples)
    assert samples.call(student).isfinite().all()


def test_training_on_images_needs_scope_model(pipeline, samples, tmp_path):
    for index in range(4):
        Image.new("RGB", (8, 8), (index * 40, 0, 0)).save(tmp_path / f"{index}.png")
    student = make_student(pipeline, DilateQuant(**QUICK, scope="model"), data=tmp_path, samples=samples)
    assert samples.call(student).isfinite().all()
    with pytest.raises(InputError, match="leave --data out"):
        make_student(pipeline, DilateQuant(**QUICK), data=tmp_path, samples=samples)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dilation": "wide"}, "dilation"),
        ({"scope": "layer"}, "scope"),
        ({"split": "half"}, "split"),
        ({"head_grids": "true"}, "head_grids needs quantized attention products"),
        ({"block_samples": 0}, "block_samples must be at least 1"),
        ({"cache_gib": 0}, "cache_gib must be above 0"),
        ({"cache_gib": "inf"}, "cache_gib must be above 0"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        DilateQuant.parse(settings)
