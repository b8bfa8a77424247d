"""EfficientDM: quantized layers, trained parameters and their rates, saving and loading, and other samplers."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from PIL import Image
from torch import nn

import dmquant
from dmquant.checkpoint import serialization
from dmquant.cli import app
from dmquant.diffusion.conditioning import Conditioning
from dmquant.diffusion.layer_roles import Role, find_roles
from dmquant.diffusion.pipeline import find_target
from dmquant.diffusion.sampling import SamplingPlan, generate, set_sampler
from dmquant.diffusion.trajectories import Samples, record
from dmquant.errors import InputError, Interrupted
from dmquant.methods.efficientdm.method import EfficientDM
from dmquant.methods.efficientdm.qalora import QALoRA, adapted_layers
from dmquant.nn.convert import packed_layers
from dmquant.nn.fake_quant_layers import quantized_layers, swap
from dmquant.nn.scheme import FLOAT_BITS
from dmquant.progress import plain
from dmquant.quantization import make_student, quantize
from dmquant.quantizers.per_timestep import TemporalGrid, TemporalStep
from dmquant.quantizers.timestep_clock import Clock
from dmquant.quantizers.uniform import LearnedStep
from dmquant.training.objectives import Distillation
from dmquant.training.resume import SavedRun
from dmquant.training.trainer import fit
from tests.evaluation.test_cost import LDM4_BEDS, LDM4_IMAGENET, LDM8_CHURCH, on_meta
from tests.text import make_text_pipeline

QUICK = dict(act_bits=4, trajectories=4, sampling_steps=3, calibration_samples=12, max_steps=6, batch=4)
TIMESTEPS = torch.tensor([666.0, 333.0, 0.0])


def prepared(pipeline, **settings):
    student = copy.deepcopy(find_target(pipeline).denoiser)
    EfficientDM(**{**QUICK, **settings}).prepare(student, Clock(TIMESTEPS))
    return student


@pytest.fixture(scope="module")
def calibrated(pipeline, samples, coarse_search):
    """Returns a function from settings to a copy of the calibrated student; calibration is cached."""

    @cache
    def calibrate(**settings):
        student = prepared(pipeline, **settings)
        EfficientDM(**{**QUICK, **settings}).calibrate(student, samples, track=plain)
        return student

    return lambda **settings: copy.deepcopy(calibrate(**settings))


@pytest.fixture(scope="module")
def trained(pipeline, samples, coarse_search):
    return make_student(pipeline, EfficientDM(**QUICK), samples=samples)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "kind, config, count",
    [(UNet2DModel, LDM4_BEDS, 73), (UNet2DModel, LDM8_CHURCH, 109), (UNet2DConditionModel, LDM4_IMAGENET, 265)],
    ids=["LDM-4 beds", "LDM-8 church", "LDM-4 ImageNet"],
)
def test_policy_paper_quantizes_as_many_layers_as_the_public_code(kind, config, count):
    denoiser = on_meta(kind, **config)
    bits = EfficientDM(policy="paper", act_bits=4).plan(denoiser).values()
    assert sum(pair != (FLOAT_BITS, FLOAT_BITS) for pair in bits) == count and list(bits).count((8, 8)) == 4
    assert (FLOAT_BITS, FLOAT_BITS) not in EfficientDM().plan(denoiser).values()


def test_layers_below_8_bits_have_adapters_and_all_but_the_time_embedding_have_temporal_grids(pipeline):
    student = prepared(pipeline)
    roles = find_roles(student)
    for name, layer in quantized_layers(student).items():
        assert isinstance(layer.weight_quantizer, QALoRA) == (roles[name] not in EfficientDM().eight_bit)
        assert isinstance(layer.input_quantizer, TemporalStep) == (roles[name] != Role.TIME_EMBEDDING)
    assert student.clock.timesteps.tolist() == TIMESTEPS.tolist()


def test_with_policy_paper_layers_of_eight_bits_have_static_grids(pipeline):
    student = prepared(pipeline, policy="paper")
    roles, layers = find_roles(student), quantized_layers(student)
    assert {roles[name] for name in roles if name not in layers} == {Role.SKIP, Role.RESAMPLE, Role.ATTENTION}
    assert "up_blocks.0.upsamplers.0.conv" in layers and "down_blocks.0.downsamplers.0.conv" not in layers
    for name, layer in layers.items():
        assert isinstance(layer.input_quantizer, TemporalStep) == (roles[name] not in EfficientDM().eight_bit)


def test_adapters_and_temporal_grids_can_be_switched_off(pipeline):
    static = prepared(pipeline, temporal=False)
    assert not any(isinstance(layer.input_quantizer, TemporalStep) for layer in quantized_layers(static).values())
    assert not hasattr(static, "clock")
    assert not adapted_layers(prepared(pipeline, weight_bits=32))
    assert not hasattr(prepared(pipeline, act_bits=32), "clock")


@pytest.mark.parametrize("base", ["original", "rounded"])
@pytest.mark.parametrize("half_base", [True, False])
@torch.no_grad()
def test_adapters_leave_the_calibrated_student_unchanged_at_the_start(calibrated, samples, base, half_base):
    student = calibrated(base=base, half_base=half_base)
    for layer in adapted_layers(student):
        layer.weight_quantizer.initialize(torch.Generator().manual_seed(0))
    answer = samples.call(student)
    for layer in adapted_layers(student):
        layer.weight_quantizer = layer.weight_quantizer.inner
    assert torch.equal(samples.call(student), answer)


@torch.no_grad()
def test_a_rounded_base_has_the_codes_of_the_original_and_lies_on_their_grid(calibrated):
    original, rounded = (calibrated(base=base) for base in ("original", "rounded"))
    for one, other in zip(adapted_layers(original), adapted_layers(rounded)):
        codes = one.weight_quantizer.encode(one.weight)
        assert torch.equal(other.weight_quantizer.encode(other.weight).codes, codes.codes)
        assert torch.equal(other.weight, codes.decode()) and not torch.equal(one.weight, codes.decode())


@torch.no_grad()
def test_base_weights_are_representable_in_float16(calibrated):
    student = calibrated()
    assert all(torch.equal(layer.weight, layer.weight.half().float()) for layer in adapted_layers(student))


def test_only_adapters_and_grids_are_trained(calibrated, trained):
    start = calibrated().state_dict()
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, start[name])}
    changed.remove("conv_out.bias")  # corrected after training
    assert all("quantizer." in name for name in changed)
    assert {name.rpartition(".")[2] for name in changed} == {"down", "up", "scale", "offset", "log_scale", "zero"}
    assert all(value.dtype == torch.float32 for value in trained.state_dict().values())


def test_rates_follow_weight_steps_scale_sizes_and_the_run_length(calibrated):
    student = calibrated()
    layer = adapted_layers(student)[0]
    adapter, step = layer.weight_quantizer, layer.weight_quantizer.mean_step()
    assert step == pytest.approx(adapter.inner.scale.mean().item())

    def rates(**settings):
        groups = EfficientDM(**{**QUICK, **settings}).parameter_groups(student)
        return {parameter: group.rate for group in groups for parameter in group.parameters}

    for max_steps, factor in ((16000, 1), (32000, 1), (1600, 10), (100, 160), (6, 250)):
        assert rates(max_steps=max_steps)[adapter.up] == pytest.approx(factor * step / 2500)
    assert rates(max_steps=16000, adapter_divisor=10)[adapter.down] == pytest.approx(step / 10)
    assert rates(scale_aware=False, learning_rate=3e-4)[adapter.up] == 3e-4
    assert rates(weight_scale_rate=0.1)[adapter.inner.scale] == pytest.approx(0.1 * step)
    assert rates(quantizer_rate=0.1)[layer.input_quantizer.log_scale] == 0.1
    trained, quantizers = set(rates()), [part for name, part in student.named_modules() if "quantizer" in name]
    assert trained == {parameter for part in quantizers for parameter in part.parameters()}


def test_attention_products_are_trained_with_the_activations(calibrated):
    settings = {**QUICK, "attention_bits": 8}
    student = calibrated(attention_bits=8)
    groups = EfficientDM(**settings).parameter_groups(student)
    trained = {parameter for group in groups for parameter in group.parameters}
    factors = [parameter for name, parameter in student.named_parameters() if ".processor." in name]
    assert len(factors) > 8 and trained.issuperset(factors)


class TwoScales(nn.Module):
    """Two parallel layers whose weights differ by a factor of 100, with outputs of equal size."""

    def __init__(self):
        super().__init__()
        self.large, self.small = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.small.weight.copy_(self.large.weight / 100)
            self.small.bias.zero_()
            self.large.bias.zero_()

    def forward(self, sample, timestep, return_dict=True):
        return (torch.cat([self.large(sample), 100 * self.small(sample)], 1),)


def train_two(**settings):
    """Returns, for each layer, the mean update of its weight in steps, and the fraction of codes that change."""
    torch.manual_seed(0)
    student, x = TwoScales(), torch.randn(256, 16)
    wanted = (x @ torch.randn(16, 16) / 8).repeat(1, 2)  # the error of both layers is equal
    swap(student, lambda name, layer: (LearnedStep(4, num_channels=16, ndim=2), nn.Identity()))
    layers, before = quantized_layers(student), {}
    for name, layer in layers.items():
        layer.weight_quantizer.observe(layer.weight)
        layer.weight_quantizer = QALoRA(layer.weight_quantizer, layer.weight.shape, 8)
        layer.weight_quantizer.initialize(torch.Generator().manual_seed(1))
        before[name] = layer.weight_quantizer.encode(layer.weight).codes
    method = EfficientDM(act_bits=32, max_steps=20, batch=64, **settings)
    objective = Distillation(Samples(x, torch.zeros(256), wanted, {}, {}), torch.ones(256))
    fit(student, objective, method.training(), method.parameter_groups(student), seed=0)
    moved, crossed = {}, {}
    for name, layer in layers.items():
        adapter = layer.weight_quantizer
        moved[name] = ((adapter.merge(layer.weight) - layer.weight).abs().mean() / adapter.mean_step()).item()
        crossed[name] = (adapter.encode(layer.weight).codes != before[name]).float().mean().item()
    return moved, crossed


def test_scale_aware_rates_change_equal_fractions_of_codes_in_layers_of_different_scale():
    moved, crossed = train_two()
    assert moved["small"] / moved["large"] == pytest.approx(1, abs=0.2)
    assert crossed["small"] / crossed["large"] == pytest.approx(1, abs=0.3) and min(crossed.values()) > 0.1
    moved, crossed = train_two(scale_aware=False, learning_rate=1e-4)
    assert moved["small"] > 30 * moved["large"] and crossed["small"] > 0.1 > 10 * crossed["large"]


@pytest.mark.parametrize(
    "weight_bits, act_bits, policy", [(2, 8, "strict"), (3, 4, "strict"), (4, 4, "paper"), (8, 8, "paper"), (1, 4, "strict")]
)
def test_a_loaded_pipeline_has_the_output_of_the_saved_one(pipeline, samples, weight_bits, act_bits, policy, tmp_path):
    settings = {**QUICK, "weight_bits": weight_bits, "act_bits": act_bits, "policy": policy, "max_steps": 2}
    quantized = quantize(pipeline, "efficientdm", samples=samples, **settings)
    dmquant.save(quantized, tmp_path / "out")
    loaded = find_target(dmquant.load(tmp_path / "out")).denoiser
    with torch.no_grad():
        assert torch.equal(samples.call(loaded), samples.call(find_target(quantized).denoiser))
    grids = [layer.input for layer in packed_layers(loaded).values() if isinstance(layer.input, TemporalGrid)]
    assert grids and all(grid.scale.shape == (3,) and grid.clock is loaded.clock for grid in grids)
    assert not any("quantizer" in name for name in loaded.state_dict())


@pytest.mark.parametrize("lookup", ["nearest", "linear"])
@pytest.mark.filterwarnings("ignore")  # about uncalibrated timesteps, and from inside diffusers
def test_every_sampler_and_step_count_runs_with_grids_of_three_timesteps(pipeline, samples, lookup, tmp_path):
    dmquant.save(quantize(pipeline, "efficientdm", samples=samples, lookup=lookup, **{**QUICK, "max_steps": 0}), tmp_path / "out")
    loaded = dmquant.load(tmp_path / "out")
    assert find_target(loaded).denoiser.clock.lookup == lookup
    for sampler, steps in (("ddim", 3), ("ddim", 7), ("heun", 4), ("dpm++", 5), ("euler", 3)):
        set_sampler(loaded, sampler)
        assert next(iter(generate(loaded, [0, 1], SamplingPlan(steps)))).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("lookup", ["nearest", "linear"])
@pytest.mark.filterwarnings("ignore")  # about uncalibrated timesteps, which are tested here
def test_a_student_trained_with_many_steps_works_at_uncalibrated_timesteps(pipeline, samples, lookup):
    many = record(pipeline, 4, steps=10, seed=0)
    method = EfficientDM(**{**QUICK, "sampling_steps": 10, "calibration_samples": 40, "max_steps": 2}, lookup=lookup)
    student = make_student(pipeline, method, samples=many)
    with torch.no_grad():
        own, others = ((part.call(student) - part.target).square().mean() / part.target.var() for part in (many, samples))
    assert not set(samples.timestep.tolist()) & set(many.timestep.tolist()) - {0}
    assert others < 1.5 * own < 0.5


@torch.no_grad()
def test_a_batch_of_mixed_timesteps_gives_the_same_output_as_single_samples(calibrated, samples):
    student = calibrated().double()
    mixed = samples[torch.tensor([0, 11, 5, 7])]
    mixed = replace(mixed, x=mixed.x.double())
    alone = torch.cat([mixed[slice(row, row + 1)].call(student) for row in range(4)])
    assert torch.allclose(mixed.call(student), alone, rtol=0, atol=1e-12)


def test_under_guidance_both_halves_of_the_batch_use_the_grid_of_their_timestep(tmp_path):
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=4, patch_size=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2)
    guided = DiTPipeline(network, vae, DDIMScheduler(), id2label={0: "cat"})
    wanted = Conditioning(class_labels=(0, 5), guidance=4.0)
    quantized = quantize(guided, "efficientdm", conditioning=wanted, **QUICK)
    steps = []
    transformer = find_target(quantized).denoiser
    layer = next(layer for layer in packed_layers(transformer).values() if isinstance(layer.input, TemporalGrid))
    layer.register_forward_pre_hook(lambda layer, args: steps.append((len(args[0]), transformer.clock.step.tolist())))
    images = next(iter(generate(quantized, [0, 1], SamplingPlan(3, conditioning=wanted))))
    assert steps == [(4, [step] * 4) for step in range(3)] and images.shape[:2] == (2, 3)
    dmquant.save(quantized, tmp_path / "out")
    again = next(iter(generate(dmquant.load(tmp_path / "out"), [0, 1], SamplingPlan(3, conditioning=wanted))))
    assert torch.equal(again, images)


def test_a_text_pipeline_is_trained_at_the_guidance_scale_of_the_command_line(tmp_path):
    make_text_pipeline().save_pretrained(tmp_path / "text")
    (tmp_path / "prompts.txt").write_text("a cat\ndogs\n")
    asked = ["--prompts", str(tmp_path / "prompts.txt"), "--guidance-scale", "3", "-o", str(tmp_path / "out")]
    settings = [f"--set={name}={value}" for name, value in {**QUICK, "max_steps": 1}.items()]
    assert app.run_command(["quantize", str(tmp_path / "text"), "--method", "efficientdm", *settings, *asked]) == 0
    record = serialization.read_record(tmp_path / "out")
    assert (record["condition"], record["num_conditions"], record["guidance_scale"]) == ("prompts", 2, 3.0)


@pytest.mark.parametrize("settings", [{"trajectory": "sequential"}, {"precision": "bf16"}, {"ema_decay": 0.5}, {"rank": 1}])
def test_other_training_settings_run(pipeline, samples, settings):
    student = make_student(pipeline, EfficientDM(**{**QUICK, "max_steps": 2, **settings}), samples=samples)
    assert samples.call(student).isfinite().all()


def test_training_on_images_runs_with_cached_trajectories_only(pipeline, samples, tmp_path):
    for index in range(4):
        Image.new("RGB", (8, 8), (index * 40, 0, 0)).save(tmp_path / f"{index}.png")
    student = make_student(pipeline, EfficientDM(**{**QUICK, "max_steps": 2}), data=tmp_path, samples=samples)
    assert samples.call(student).isfinite().all()
    with pytest.raises(InputError, match="leave --data out"):
        make_student(pipeline, EfficientDM(**QUICK, trajectory="sequential"), data=tmp_path, samples=samples)


def test_an_interrupted_run_continues_bit_for_bit(trained, pipeline, samples, tmp_path):
    calls = []

    def stop_once():
        calls.append(None)
        return len(calls) == 4

    method = EfficientDM(**QUICK)
    with pytest.raises(Interrupted):
        make_student(pipeline, method, samples=samples, run=SavedRun(tmp_path / "run", should_stop=stop_once))
    resumed = make_student(pipeline, method, samples=samples, run=SavedRun(tmp_path / "run"))
    assert equal(trained.state_dict(), resumed.state_dict())


def test_different_seeds_draw_different_adapters(pipeline, samples):
    method = EfficientDM(**{**QUICK, "max_steps": 0})
    one, two = (make_student(pipeline, method, samples=samples, seed=seed) for seed in (0, 1))
    assert not torch.equal(adapted_layers(one)[0].weight_quantizer.down, adapted_layers(two)[0].weight_quantizer.down)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"policy": "loose"}, "policy"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"adapter_divisor": 0}, "adapter_divisor must be above 0"),
        ({"adapter_steps": 0}, "adapter_steps must be at least 1"),
        ({"weight_scale_rate": -1}, "weight_scale_rate must be 0 or more"),
        ({"trajectory": "random"}, "trajectory"),
        ({"lookup": "cubic"}, "lookup"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        EfficientDM.parse(settings)
