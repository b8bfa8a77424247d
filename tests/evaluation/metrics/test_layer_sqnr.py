"""Layer profiles equal known errors, and errors computed from recorded inputs and outputs."""

import copy
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmquant.checkpoint import serialization
from dmquant.diffusion.layer_roles import named_layers
from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.evaluation.metrics import layer_sqnr
from dmquant.evaluation.metrics.layer_sqnr import measure_layers, merge, range_of, to_db
from dmquant.methods import get
from dmquant.quantization import quantize

HOW = SamplingPlan(steps=2, batch=2)
SMALL = {"max_steps": 0, "trajectories": 1, "sampling_steps": 2, "calibration_samples": 3, "batch": 2}
CHANGED = "mid_block.resnets.0.conv2"
# Matrix products may sum in another order when weights lie at another alignment, as those read from a file and their copies
# do. Such errors are above 130 dB in this model; the changes that the tests make are below 60 dB.
ROUNDING_DB = 120


@pytest.fixture
def pipeline(tiny_folder):
    return open_pipeline(tiny_folder)


@pytest.fixture(scope="module")
def packed(tiny_folder, tmp_path_factory):
    """The folder of a quantized pipeline; its first layer has a grid per timestep."""
    method = get("lsq").parse({"weight_bits": 4, "act_bits": 4, **SMALL})
    return serialization.save(quantize(open_pipeline(tiny_folder), method), tmp_path_factory.mktemp("packed") / "out")


def measure(other, base, seeds=range(3)):
    return {layer.name: layer for layer in measure_layers(find_target(other), find_target(base), seeds, HOW)}


def is_rounding(error_db):
    """Returns whether an error is zero, or at the level of float32 rounding."""
    return error_db is None or error_db > ROUNDING_DB


def record(pipeline, seeds, batch):
    """Returns inputs and outputs of every layer in float64: name -> [(x, y)] in the order of calls."""
    seen = defaultdict(list)
    hooks = [
        layer.register_forward_hook(lambda _, args, y, name=name: seen[name].append((args[0].double(), y.double().clone())))
        for name, layer in named_layers(pipeline.unet).items()
    ]
    list(generate(pipeline, seeds, replace(HOW, batch=batch)))
    for hook in hooks:
        hook.remove()
    return seen


def test_a_scaled_layer_has_the_error_of_the_factor_and_only_later_layers_have_an_error_too(pipeline):
    other = copy.deepcopy(pipeline)
    with torch.no_grad():
        for parameter in other.unet.get_submodule(CHANGED).parameters():
            parameter.mul_(1.125)
    found = measure(other, pipeline)
    assert found[CHANGED].local_db == found[CHANGED].total_db == pytest.approx(20 * math.log10(8), abs=0.01)
    place = list(found).index(CHANGED)
    assert all(is_rounding(layer.local_db) for name, layer in found.items() if name != CHANGED)
    assert all(is_rounding(layer.total_db) for layer in list(found.values())[:place])
    after = list(found.values())[place + 1 :]
    assert all(is_rounding(layer.total_db) == (layer.role == "time_projection") for layer in after)


def test_errors_and_ranges_equal_those_of_a_recording(pipeline):
    other = copy.deepcopy(pipeline)
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    found, recorded = measure(other, pipeline, range(2)), record(pipeline, range(2), 2)
    assert set(found) == set(recorded)
    for name, layer in found.items():
        twin = copy.deepcopy(other.unet.get_submodule(name)).double()
        signal, noise = (sum(parts) for parts in zip(*(
            (y.square().sum().item(), (twin(x) - y).square().sum().item()) for x, y in recorded[name]
        )))  # fmt: skip
        assert layer.local_db == pytest.approx(10 * math.log10(signal / noise), abs=0.02), name
        for (x, _), found_range in zip(recorded[name], layer.ranges.values(), strict=True):
            low, high = np.quantile(x.numpy(), [0.001, 0.999])
            assert found_range == pytest.approx((x.min().item(), low, high, x.max().item()), rel=1e-3, abs=1e-6)


def test_the_total_error_of_the_last_layer_is_that_of_the_model_outputs(pipeline):
    other, seen, asked = copy.deepcopy(pipeline), [], []
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(1.1)
    last = list(measure(other, pipeline).values())[-1]

    def note(denoiser, args, kwargs, output):
        asked.append((args, kwargs))
        seen.append(output.sample)

    hook = pipeline.unet.register_forward_hook(note, with_kwargs=True)
    list(generate(pipeline, range(3), HOW))
    hook.remove()
    with torch.no_grad():
        others = [other.unet(*args, **kwargs).sample for args, kwargs in asked]
    energies = [sum(t.double().square().sum().item() for t in ts) for ts in (seen, [a - b for a, b in zip(others, seen)])]
    assert last.name == "conv_out" and last.total_db == pytest.approx(10 * math.log10(energies[0] / energies[1]), abs=0.01)


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_packed_layers_are_measured_at_the_right_timestep(packed, pipeline, monkeypatch, choice):
    monkeypatch.setenv("DMQUANT_KERNELS", choice)
    other = serialization.load(packed)
    found = measure(other, pipeline)
    # the first layer reads the same in both models, and its grid is another one at every timestep
    first = found["conv_in"]
    assert first.local_db == first.total_db and first.local_db > 20 and (first.weight_bits, first.act_bits) == (8, 8)
    body = found["down_blocks.0.resnets.0.conv1"]
    assert (body.weight_bits, body.act_bits, body.role) == (4, 4, "body") and 0 < body.total_db < 40
    assert list(found).index("mid_block.resnets.0.conv1") < list(found).index("up_blocks.0.resnets.0.conv1")


def test_a_model_has_no_error_against_itself_and_no_hook_is_left(pipeline):
    assert all(layer.local_db is layer.total_db is None for layer in measure(pipeline, pipeline).values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.unet.modules())


def test_no_hook_is_left_after_an_exception(pipeline, monkeypatch):
    monkeypatch.setattr(layer_sqnr, "range_of", lambda x: 1 / 0)
    other = copy.deepcopy(pipeline)
    with pytest.raises(ZeroDivisionError):
        measure(other, pipeline)
    modules = [*pipeline.unet.modules(), *other.unet.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_a_layer_that_the_other_model_lacks_has_a_range_and_no_error(pipeline):
    other = copy.deepcopy(pipeline)
    del other.unet.mid_block.resnets[1]
    other.unet.mid_block.attentions = torch.nn.ModuleList([])
    found = measure(other, pipeline)["mid_block.resnets.1.conv1"]
    assert found.local_db is found.total_db is None and len(found.ranges) == 2


def test_profiles_do_not_depend_on_the_batch_size(pipeline):
    other = copy.deepcopy(pipeline)
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(1.1)
    one, many = (measure_layers(find_target(other), find_target(pipeline), range(3), SamplingPlan(2, batch)) for batch in (1, 50))
    for first, second in zip(one, many, strict=True):
        assert is_rounding(first.total_db) == is_rounding(second.total_db)
        if not is_rounding(first.total_db):
            assert first.total_db == pytest.approx(second.total_db, abs=0.02)
        assert [r[0] for r in first.ranges.values()] == pytest.approx([r[0] for r in second.ranges.values()], rel=1e-3)


def test_quantiles_of_many_values_are_those_of_their_distribution():
    x = torch.randn(4, 64, 40, 40, generator=torch.Generator().manual_seed(0))
    least, low, high, largest = range_of(x)
    assert (least, largest) == (x.min().item(), x.max().item())
    assert (low, high) == pytest.approx((-3.09, 3.09), abs=0.3)  # of the normal distribution


def test_merged_ranges_have_the_outer_bounds_and_mean_quantiles_with_four_digits():
    assert merge([(-1.23456, -1.0, 1.0, 2.0), (-1.0, -0.5, 0.5, 3.0)]) == (-1.235, -0.75, 0.75, 3.0)


def test_decibels_of_known_ratios_and_none_without_signal_or_noise():
    assert to_db([60.0, 40.0], [1.0]) == 20.0
    assert to_db([1.0], [0.0]) is to_db([0.0], [1.0]) is to_db([], []) is to_db([1.0], [math.nan]) is None
