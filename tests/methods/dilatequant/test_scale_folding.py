"""Folding factors leaves the output of the float network unchanged, and no division remains."""

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel

from dmquant.diffusion.example_inputs import example_inputs
from dmquant.diffusion.pipeline import find_target
from dmquant.methods.dilatequant.method import DilateQuant
from dmquant.methods.dilatequant.scale_folding import apply_fold, find_folds, share_factors
from dmquant.methods.dilatequant.weight_dilation import dilation_factors
from dmquant.nn.convert import layer_scheme, pack_layer
from dmquant.nn.fake_quant_layers import bypassed, find_layers, quantized_layers
from dmquant.quantization import make_student
from dmquant.quantizers.dilated import Dilated
from tests.diffusion.test_pipeline import TINY, every_denoiser
from tests.methods.dilatequant.test_block_runner import randomized
from tests.methods.dilatequant.test_weight_dilation import ranges

QUICK = dict(trajectories=4, sampling_steps=3, calibration_samples=12, max_steps=0, batch=4)
PROJECTIONS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
# a block's prefix, and the groups of its layers whose input can be folded
EXPECTED = {
    UNet2DModel: ("mid_block.attentions.0.", {("to_q", "to_k", "to_v"), ("to_out.0",)}),
    UNet2DConditionModel: ("mid_block.attentions.0.transformer_blocks.0.", {
        PROJECTIONS, ("attn1.to_out.0",), ("attn2.to_q",), ("attn2.to_out.0",), ("ff.net.0.proj",), ("ff.net.2",),
    }),
    DiTTransformer2DModel: ("transformer_blocks.1.", {PROJECTIONS, ("attn1.to_out.0",), ("ff.net.0.proj",)}),
    PixArtTransformer2DModel: ("transformer_blocks.1.", {("attn1.to_out.0",), ("attn2.to_out.0",)}),
}  # fmt: skip


def network_of(kind):
    """Returns a float64 network with perturbed parameters, and inputs."""
    torch.manual_seed(0)
    network = kind(**TINY[kind]).eval().double()
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network, randomized(example_inputs(network, batch=2, device="cpu"))


@every_denoiser
@torch.no_grad()
def test_folding_leaves_the_output_of_a_float64_network_unchanged(kind):
    network, inputs = network_of(kind)
    folds = find_folds(network, find_layers(network))
    prefix, expected = EXPECTED.get(kind, ("", set()))
    found = (fold.readers for fold in folds if fold.readers[0].startswith(prefix))
    assert {tuple(reader.removeprefix(prefix) for reader in readers) for readers in found} == expected
    before = network(**inputs, return_dict=False)[0]
    for fold in folds:
        apply_fold(network, fold, 1 + 3 * torch.rand(network.get_submodule(fold.readers[0]).weight.shape[1]).double())
    after = network(**inputs, return_dict=False)[0]
    assert torch.allclose(after, before, rtol=1e-9, atol=1e-11 * before.abs().max().item())


@every_denoiser
@torch.no_grad()
def test_producers_have_one_row_per_input_channel_of_the_readers(kind):
    network, _ = network_of(kind)
    for fold in find_folds(network, find_layers(network)):
        channels = {network.get_submodule(reader).weight.shape[1] for reader in fold.readers}
        assert channels == {rows.count for rows in fold.producers}, fold


@torch.no_grad()
def test_layers_that_read_one_tensor_share_a_factor_that_keeps_all_their_ranges():
    network, _ = network_of(UNet2DConditionModel)
    folds = find_folds(network, find_layers(network))
    readers = {reader: network.get_submodule(reader).weight for fold in folds for reader in fold.readers}
    shared = share_factors({name: dilation_factors(weight) for name, weight in readers.items()}, folds)
    for fold in folds:
        together = dilation_factors(torch.cat([readers[reader] for reader in fold.readers]))
        for reader in fold.readers:
            assert torch.equal(shared[reader], together) and (together >= 1).all()
    before = {name: ranges(weight.clone()) for name, weight in readers.items()}
    for fold in folds:
        # whole rows of a producer shrink, and their grids too: readers are checked before they become producers of later folds
        assert all(torch.equal(*pair) for name in fold.readers for pair in zip(before[name], ranges(readers[name])))
        apply_fold(network, fold, shared[fold.readers[0]])
        assert all(torch.equal(*pair) for name in fold.readers for pair in zip(before[name], ranges(readers[name])))


def test_a_tensor_is_not_folded_if_a_layer_outside_the_selection_reads_it_too():
    network, _ = network_of(UNet2DModel)
    names = set(find_layers(network)) - {"mid_block.attentions.0.to_k"}
    readers = {reader for fold in find_folds(network, names) for reader in fold.readers}
    assert "mid_block.attentions.0.to_q" not in readers and "mid_block.attentions.0.to_out.0" in readers


def test_a_folded_layer_stores_no_reciprocal_and_the_float_student_equals_the_teacher(pipeline, samples):
    teacher = find_target(pipeline).denoiser
    student = make_student(pipeline, DilateQuant(**QUICK, bias_correction=False), samples=samples)
    readers = {reader for fold in find_folds(teacher, find_layers(teacher)) for reader in fold.readers}
    kept = 0
    for name, layer in quantized_layers(student).items():
        is_divided = Dilated() in layer_scheme(layer).traits
        assert is_divided == any(key.startswith("divide.") for key in pack_layer(layer).state_dict())
        kept += is_divided
        assert not (is_divided and name in readers), name
    outputs = [name for name in readers if name.endswith("to_out.0")]
    grown = torch.stack([student.get_submodule(name).weight / teacher.get_submodule(name).weight for name in outputs])
    assert kept > 5 and (grown > 1.001).any() and (grown > 1 - 1e-6).all()
    with torch.no_grad(), bypassed(student):
        assert torch.allclose(samples.call(student), samples.target, atol=1e-5)
