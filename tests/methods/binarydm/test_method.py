import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

import dmquant
from dmquant.checkpoint import serialization
from dmquant.diffusion.blocks import find_ends
from dmquant.diffusion.layer_roles import find_roles
from dmquant.diffusion.pipeline import open_pipeline
from dmquant.diffusion.trajectories import record
from dmquant.errors import InputError, Interrupted
from dmquant.evaluation.cost import measure_cost
from dmquant.methods.binarydm.basis_schedule import set_num_bases
from dmquant.methods.binarydm.evolvable_basis import EvolvableBasis
from dmquant.methods.binarydm.method import BinaryDM
from dmquant.nn.convert import packed_layers
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.nn.packed_weight import PackedBases
from dmquant.quantization import make_student, plan, quantize
from dmquant.quantizers.binary import Binary
from dmquant.quantizers.timestep_clock import Clock
from dmquant.training.calibration import observe_weights
from dmquant.training.resume import SavedRun
from tests.evaluation.test_cost import DDPM_CIFAR, LDM4_BEDS, on_meta

QUICK = dict(trajectories=4, sampling_steps=3, calibration_samples=8, max_steps=6, batch=4)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A pipeline with four resolutions, so that some blocks are not among the first and last ones."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("deep") / "pipeline"
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return open_pipeline(folder)


@pytest.fixture(scope="module")
def samples(deep):
    return record(deep, 4, steps=3, seed=0)


def weights(student):
    return {name: layer.weight_quantizer for name, layer in quantized_layers(student).items()}


def test_only_binary_layers_in_the_first_and_last_blocks_have_two_bases(deep):
    student = copy.deepcopy(deep.unet)
    BinaryDM().prepare(student, Clock(torch.tensor([0.0])))
    ends = tuple(f"{module}." for block in find_ends(student) for module in block.modules)
    for name, quantizer in weights(student).items():
        is_binary = find_roles(student)[name] not in BinaryDM().eight_bit
        assert isinstance(quantizer, Binary) == is_binary
        assert isinstance(quantizer, EvolvableBasis) == (is_binary and f"{name}.".startswith(ends))
    kinds = {type(quantizer) for quantizer in weights(student).values() if isinstance(quantizer, Binary)}
    assert kinds == {Binary, EvolvableBasis}


def test_multi_basis_ldm4_has_1_15_bits_per_binary_weight():
    beds = on_meta(UNet2DModel, **LDM4_BEDS)
    planned = BinaryDM(basis="multi").plan(beds)
    sizes = {name: beds.get_submodule(name).weight.numel() for name, bits in planned.items() if bits[0] < 8}
    assert round(sum(planned[name][0] * size for name, size in sizes.items()) / sum(sizes.values()), 2) == 1.15


def test_with_basis_single_no_layer_has_two_bases(deep):
    student = copy.deepcopy(deep.unet)
    BinaryDM(basis="single").prepare(student, Clock(torch.tensor([0.0])))
    assert not any(isinstance(quantizer, EvolvableBasis) for quantizer in weights(student).values())


@pytest.mark.parametrize("max_steps, switch", [(0, 0.5), (1, 0), (1, 0.5), (1, 1), (3, 0), (3, 0.5), (3, 1)])
def test_evolvable_bases_end_with_one_bit_per_weight_for_any_run_length(deep, samples, switch, max_steps, tmp_path):
    settings = {**QUICK, "max_steps": max_steps, "switch": switch, "act_bits": 32}
    quantized = quantize(deep, "binarydm", samples=samples, **settings)
    planned = plan(deep, "binarydm", act_bits=32)
    found = {name: layer.weight.bits for name, layer in packed_layers(quantized.unet).items()}
    assert found == {name: weight_bits for name, (weight_bits, _) in planned.items()}
    assert {planned[name][0] for name in BinaryDM().two_basis_layers(deep.unet)} == {1}
    dmquant.save(quantized, tmp_path / "out")
    loaded = dmquant.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(samples.call(loaded.unet), samples.call(quantized.unet))


def test_with_basis_multi_the_file_has_two_bases(deep, samples, tmp_path):
    quantized = quantize(deep, "binarydm", samples=samples, basis="multi", **QUICK)
    dmquant.save(quantized, tmp_path / "out")
    loaded = dmquant.load(tmp_path / "out")
    planned = plan(deep, "binarydm", basis="multi")
    two_based = BinaryDM().two_basis_layers(deep.unet)
    for name, layer in packed_layers(loaded.unet).items():
        assert isinstance(layer.weight, PackedBases) == (name in two_based)
        assert (layer.weight.bits, layer.input.bits) == planned[name]
    with torch.no_grad():
        assert torch.equal(samples.call(loaded.unet), samples.call(quantized.unet))


def test_an_interrupted_run_continues_bit_for_bit_across_the_switch(deep, samples, tmp_path):
    calls = []

    def stop_once():
        calls.append(None)
        return len(calls) == 3

    whole = quantize(deep, "binarydm", samples=samples, **QUICK)
    with pytest.raises(Interrupted):
        quantize(deep, "binarydm", samples=samples, run=SavedRun(tmp_path / "run", should_stop=stop_once), **QUICK)
    resumed = quantize(deep, "binarydm", samples=samples, run=SavedRun(tmp_path / "run"), **QUICK)
    assert all(torch.equal(value, resumed.unet.state_dict()[name]) for name, value in whole.unet.state_dict().items())


def test_warm_up_with_training_on_images_runs(deep, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (8, 8), (index * 40, 0, 0)).save(folder / f"{index}.png")
    student = make_student(deep, BinaryDM(warmup=1, **QUICK), data=folder)
    assert torch.isfinite(student.conv_in.weight).all()


def test_the_file_of_the_cifar_ddpm_is_less_than_a_24th_and_its_size_is_the_one_reported(tmp_path):
    unet = UNet2DModel(**DDPM_CIFAR)  # random weights
    method = BinaryDM(act_bits=4)
    cost = measure_cost(unet, bits=method.plan(unet))
    method.prepare(unet, Clock(torch.tensor([0.0])))
    observe_weights(unet)
    set_num_bases([q for q in unet.modules() if isinstance(q, EvolvableBasis)], 1)
    serialization.save(DDIMPipeline(unet, DDIMScheduler()), tmp_path / "out")
    size_bytes = (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert 24 * size_bytes <= 4 * cost.num_params
    assert cost.size_bytes == pytest.approx(size_bytes, rel=0.01)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"weight_bits": 4}, "weight_bits must be 1 for binarydm"),
        ({"switch": 2}, "switch must be 0 to 1"),
        ({"basis": "third"}, "basis"),
        ({"mimic_weight": -1}, "mimic_weight must be 0 or more"),
        ({"basis_penalty": "nan"}, "basis_penalty must be 0 or more"),
        ({"mimic_compression": 0}, "mimic_compression must be at least 1"),
        ({"warmup": -1}, "warmup must be 0 or more"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        BinaryDM.parse(settings)
