"""What a packed denoiser answers is what the quantized one answered, for every method, at every step that was calibrated.

Both add the same numbers in another order. Where that puts a value on the other side of the middle between two codes, the two
part by a step of its grid, as two layouts of the quantized model itself do. Until then they agree to rounding, and mostly that
is until the end.
"""

import pytest
import torch
from torch import Tensor, nn

from dmquant import methods
from dmquant.kernels import fusion
from dmquant.layers import quantized_layers
from dmquant.packed import pack_model, packed_layers
from dmquant.quantization import make_student
from dmquant.samples import Samples
from tests.kernels.test_ops import error

SETTINGS = {"act_bits": 4, "max_steps": 0, "clip_images": 0}
ROUNDING = 1e-5  # of the largest value


@pytest.fixture(params=methods.names(), scope="module")
def student(request, pipeline, samples):
    method = methods.get(request.param).parse({**SETTINGS, "calibration_samples": len(samples)})
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
    fusion.fuse(packed)
    distances = [error(sample.call(packed), sample.call(student)) for sample in samples.split(1)]
    assert sum(distance < 1e-4 for distance in distances) >= len(samples) / 2
