import pytest
import torch

from dmquant.checkpoint import serialization
from dmquant.diffusion.layer_roles import find_roles
from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.errors import InputError
from dmquant.methods.lsq.method import LSQ
from dmquant.nn.convert import packed_layers
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.quantization import describe_run, make_student, plan, quantize

QUICK = dict(trajectories=2, sampling_steps=2, calibration_samples=4, max_steps=2, batch=2, init="minmax")


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    return open_pipeline(tiny_folder)


@pytest.fixture(scope="module")
def student(pipeline):
    """Before it is packed. Read it; do not change it."""
    return make_student(pipeline, LSQ(**QUICK), seed=7)


@pytest.fixture(scope="module")
def quantized(pipeline):
    """After it is packed. Read it; do not change it."""
    return quantize(pipeline, "lsq", weight_bits=4, act_bits=8, seed=7, **QUICK)


def test_a_quantized_pipeline_draws_and_shares_all_but_the_denoiser(pipeline, quantized):
    assert quantized.unet is not pipeline.unet and type(quantized) is type(pipeline)
    ranges = {key: value for key, value in quantized.scheduler.config.items() if value != pipeline.scheduler.config[key]}
    assert not ranges.keys() - {"clip_sample_range"}
    images = torch.cat(list(generate(quantized, range(3), SamplingPlan(2))))
    assert images.shape == (3, 3, 8, 8)


def test_high_bits_hardly_change_an_image_and_low_bits_do(pipeline):
    def answer(pipeline):
        torch.manual_seed(0)
        with torch.no_grad():
            return find_target(pipeline).denoiser(torch.randn(4, 3, 8, 8), 500).sample

    calibrated, exact = {**QUICK, "max_steps": 0, "trajectories": 8, "init": "mse"}, answer(pipeline)
    students = [quantize(pipeline, "lsq", weight_bits=bits, act_bits=bits, **calibrated) for bits in (8, 4, 2)]
    error = [(answer(student) - exact).square().mean() for student in students]
    assert error[0] < 0.01 * exact.square().mean() and error[0] < error[1] < error[2]


def test_what_comes_back_draws_what_is_loaded_after_saving(quantized, tmp_path):
    assert packed_layers(quantized.unet) and not quantized_layers(quantized.unet)
    serialization.save(quantized, tmp_path / "saved")
    quantized.save_pretrained(tmp_path / "by diffusers")
    for folder in ("saved", "by diffusers"):
        loaded = serialization.load(tmp_path / folder)
        assert torch.equal(*(torch.cat(list(generate(p, [0, 1], SamplingPlan(2)))) for p in (quantized, loaded)))


def test_a_student_has_the_values_that_are_packed(student, quantized):
    layers, packed = quantized_layers(student), packed_layers(quantized.unet)
    assert list(layers) == list(packed)
    for name, layer in layers.items():
        assert torch.equal(layer.weight_quantizer(layer.weight), packed[name].weight.dequantize())


def test_the_record_says_how_it_was_made(quantized):
    record = find_target(quantized).denoiser.dmquant_record
    assert (record["method"], record["seed"], record["weight_bits"], record["act_bits"]) == ("lsq", 7, 4, 8)
    assert LSQ.parse(record["settings"]).max_steps == 2


def test_the_record_says_how_much_was_trained(pipeline, student, quantized):
    total = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    whole = quantized.unet.dmquant_record
    assert whole["trained_params"] == sum(parameter.numel() for parameter in student.parameters()) > total
    assert whole["trained_share"] == pytest.approx(whole["trained_params"] / total, abs=1e-4)
    calibrated = quantize(pipeline, "lsq", **{**QUICK, "max_steps": 0}).unet.dmquant_record
    assert calibrated["trained_params"] == calibrated["trained_share"] == 0


def test_a_base_model_is_recorded_by_its_absolute_path(pipeline, tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    for name, expected in ((tiny_folder.name, str(tiny_folder.resolve())), ("embedded", "embedded"), ("org/x", "org/x")):
        named = find_target(pipeline).with_denoiser(pipeline.unet).pipeline
        named.register_to_config(_name_or_path=name)
        assert describe_run(named, LSQ(), 0)["base_model"] == expected


def test_images_can_be_trained_on(pipeline, student, tmp_path):
    from PIL import Image

    for index in range(3):
        Image.new("RGB", (8, 8), (80 * index, 10, 10)).save(tmp_path / f"{index}.png")
    other = make_student(pipeline, LSQ(**QUICK), seed=7, data=tmp_path)
    assert not torch.equal(other.conv_in.weight, student.conv_in.weight)


def test_a_plan_names_the_bits_of_every_layer(pipeline):
    bits = plan(pipeline, "lsq", weight_bits=4, act_bits=4)
    assert set(bits) == set(find_roles(find_target(pipeline).denoiser))
    assert bits["conv_in"] == (8, 8) and bits["mid_block.resnets.0.conv1"] == (4, 4)


def test_quantizing_twice_is_refused(quantized):
    for again in (quantize, plan):
        with pytest.raises(InputError, match="quantized already"):
            again(quantized, "lsq")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"weight_bits": 32, "act_bits": 32}, "every layer in float"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"method": None}, "method must be a name"),
        ({"weight_bits": True}, "valid integer"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_any_work(pipeline, changes, message):
    def track(work, label):
        raise AssertionError("work was begun")

    with pytest.raises(InputError, match=message):
        quantize(pipeline, **{**QUICK, **changes}, track=track)


def test_half_precision_and_things_that_are_no_pipeline_are_refused(tiny_folder):
    with pytest.raises(InputError, match="float32"):
        quantize(open_pipeline(tiny_folder).to(torch.float16), **QUICK)
    with pytest.raises(InputError, match="not UNet2DModel"):
        quantize(open_pipeline(tiny_folder).unet, **QUICK)


def test_settings_beside_a_method_object_are_refused(pipeline):
    with pytest.raises(InputError, match="not both: act_bits"):
        quantize(pipeline, LSQ(), act_bits=4)
