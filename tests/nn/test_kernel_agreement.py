"""What a packed denoiser answers is what the quantized one answered, for every method, at every step that was calibrated.

Bit for bit, where nobody rounds the sums of the quantized one. In floats it adds the same numbers in some order or other. Where
that puts a value on the other side of the middle between two codes, the two part by a step of its grid, as two layouts of the
quantized model itself do. Until then they agree to rounding.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dmquant import methods
from dmquant.diffusion.trajectories import Samples
from dmquant.kernels.reference import fma
from dmquant.nn.convert import layer_scheme, pack_model, packed_layers
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.nn.fused import unet
from dmquant.quantization import make_student
from dmquant.quantizers.base import BasisCodes
from dmquant.quantizers.per_part import PerPart
from tests.kernels.test_ops import error

SETTINGS = {"max_steps": 0, "clip_images": 0}
ROUNDING = 1e-5  # of the largest value


@pytest.fixture(params=[(name, bits) for bits in (4, 8) for name in methods.names()], scope="module", ids=str)
def student(request, pipeline, samples):
    name, act_bits = request.param
    method = methods.get(name).parse({**SETTINGS, "act_bits": act_bits, "calibration_samples": len(samples)})
    return make_student(pipeline, method, samples=samples).requires_grad_(False)


@pytest.fixture
def packed(student, by_kernels):
    return pack_model(student)


def call(model: nn.Module, sample: Samples) -> tuple[Tensor, dict[str, Tensor]]:
    """The answer and what each quantized or packed layer read, in the order of its calls."""
    read: dict[str, Tensor] = {}
    layers = quantized_layers(model) or packed_layers(model)
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: read.update({name: inputs[0].clone()}))
        for name, layer in layers.items()
    ]  # fmt: skip
    answer = sample.call(model)
    for hook in hooks:
        hook.remove()
    return answer, read


def exact_output(layer: nn.Module, x: Tensor) -> Tensor:
    """The output of a quantized layer by its own quantizers: float64 adds integers, part by part and plane by plane."""
    read, weight = layer.input_quantizer.encode(x), layer.weight_quantizer.encode(layer.weight)
    parts = [trait.first_channels for trait in layer_scheme(layer).traits if isinstance(trait, PerPart)]
    place, column = next(iter(parts), None), (-1, *(1,) * (layer.weight.dim() - 2))
    a, parts = read.codes.double() - read.zero, [slice(None)] if place is None else [slice(place), slice(place, None)]
    planes = [(weight.codes - weight.zero, weight.scale)]
    if isinstance(weight, BasisCodes):
        planes = [((weight.codes >> bit & 1) * 2.0 - 1, scale) for bit, scale in enumerate(weight.scale)]
    total = torch.zeros(())
    for number, part in enumerate(parts):
        scale = read.scale if place is None else read.scale[:, part][:, :1]
        out = torch.zeros(()) if number or layer.bias is None else layer.bias.view(column)
        for level, own in planes:
            factors = a[:, part], level[:, part].double()
            sums = nn.functional.linear(*factors) if isinstance(layer, nn.Linear) else layer._conv_forward(*factors, None)
            out = fma(sums.float(), own.view(column) * scale, out)
        total = total + out
    return total.contiguous(memory_format=torch.channels_last) if total.dim() == 4 else total


@pytest.mark.needs_compiler
def test_a_call_is_the_quantized_one_bit_for_bit_where_nobody_rounds_its_sums(student, packed, samples, monkeypatch):
    for layer in quantized_layers(student).values():
        monkeypatch.setattr(layer, "forward", partial(exact_output, layer))
    for sample in samples.split(1):
        assert torch.equal(sample.call(packed), sample.call(student))
    assert any(layer.weight.blocked for layer in packed_layers(packed).values())


@pytest.mark.needs_compiler
def test_fused_blocks_answer_bit_for_bit_what_they_answer_where_torch_multiplies(student, packed, samples, monkeypatch):
    by_torch = pack_model(student)
    for kernels, model in (("c", packed), ("exact", by_torch)):
        monkeypatch.setenv("DMQUANT_KERNELS", kernels)
        model(samples.x[:1], samples.timestep[:1])  # chooses kernels
        unet.fuse(model)
    for sample in samples.split(1):
        assert torch.equal(sample.call(packed), sample.call(by_torch))
    assert {layer.weight.blocked.kernel for layer in packed_layers(by_torch).values() if layer.weight.blocked} == {"exact"}


def test_each_layer_gives_what_the_quantized_one_gives_for_what_that_one_read(student, packed, samples, has_compiler):
    layers = packed_layers(packed)
    with packed.clock.at(samples.timestep, len(samples)), student.clock.at(samples.timestep, len(samples)):
        for name, x in call(student, samples)[1].items():
            assert error(layers[name](x), student.get_submodule(name)(x)) < ROUNDING, name
    assert any(layer.weight.blocked for layer in layers.values()) == has_compiler


def test_a_call_is_the_quantized_one_until_a_code_falls_to_the_other_side(student, packed, samples):
    layers, whole = packed_layers(packed), 0
    for sample in samples.split(1):
        (wanted, theirs), (found, ours) = call(student, sample), call(packed, sample)
        with packed.clock.at(sample.timestep, 1):
            for name, x in ours.items():
                assert error(x, theirs[name]) < ROUNDING, name
                other, codes = (layers[name].input(layers[name].divide(part)) for part in (theirs[name], x))
                if not torch.equal(codes, other):
                    break
            else:
                assert error(found, wanted) < ROUNDING
                whole += 1
    assert whole >= len(samples) / 2


def test_most_calls_of_fused_blocks_are_the_quantized_ones(student, packed, samples):
    packed(samples.x[:1], samples.timestep[:1])  # chooses kernels
    unet.fuse(packed)
    distances = [error(sample.call(packed), sample.call(student)) for sample in samples.split(1)]
    assert sum(distance < 1e-4 for distance in distances) >= len(samples) / 2
