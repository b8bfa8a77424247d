"""What every method owes, run over the table of names: a new method is tested by being listed."""

import copy

import pytest
import torch

from dmquant import methods
from dmquant.checkpoint import serialization
from dmquant.diffusion.pipeline import find_target
from dmquant.errors import InputError
from dmquant.evaluation.cost import measure_cost
from dmquant.methods.base import Method
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.progress import plain
from dmquant.quantization import lay_out, make_student, quantize
from dmquant.quantizers.base import Quantizer
from dmquant.quantizers.timestep_clock import Clock

QUICK = dict(trajectories=4, sampling_steps=3, calibration_samples=8, max_steps=4, batch=4)


@pytest.fixture(params=methods.names(), scope="module")
def cls(request):
    return methods.get(request.param)


@pytest.fixture(scope="module")
def student(cls, pipeline, samples):
    """What a run on the shared recording ends with. Read it; do not change it."""
    return make_student(pipeline, cls.parse(QUICK), samples=samples)


def test_a_method_is_a_frozen_dataclass_with_a_name_help_and_a_card(cls):
    assert issubclass(cls, Method) and methods.get(cls.name) is cls
    assert all(setting.help for setting in cls.describe())
    assert len(methods.summary(cls.name)) > 10
    with pytest.raises(AttributeError):
        cls().weight_bits = 3


def test_settings_survive_being_written_and_read(cls):
    method = cls.parse({"max_steps": "7", "keep": "skip,attention", "learning_rate": "1e-3"})
    assert (method.max_steps, method.learning_rate, len(method.keep)) == (7, 1e-3, 2)
    assert cls.parse(method.settings()) == method


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"act_bit": 4}, "did you mean 'act_bits'"),
        ({"weight_bits": 9}, "weight_bits must be 1 to 8"),
        ({"act_bits": 1}, "act_bits must be 2 to 8"),
        ({"max_steps": "many"}, "max_steps"),
        ({"keep": "roof"}, "keep"),
        ({"learning_rate": -1}, "learning_rate must be 0 or more"),
        ({"eta": 1.5}, "eta must be in"),
        ({"quantizer_rate": "nan"}, "quantizer_rate must be 0 or more"),
        ({"clip_norm": "inf"}, "clip_norm must be above 0"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_bad_settings_are_refused_by_name(cls, settings, message):
    with pytest.raises(InputError, match=message):
        cls.parse(settings)


def test_preparing_looks_at_shapes_only_and_so_runs_on_meta(cls, pipeline, samples):
    denoiser = find_target(pipeline).denoiser
    empty, real = copy.deepcopy(denoiser).to("meta"), copy.deepcopy(denoiser)
    for student in (empty, real):
        cls().prepare(student, Clock(samples.timestep.unique()))
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert set(denoiser.state_dict()) <= set(real.state_dict())


@pytest.mark.parametrize("attention_bits", [32, 8])
def test_what_a_plan_counts_is_what_is_written_to_the_byte(cls, pipeline, samples, attention_bits, tmp_path):
    method = cls.parse({**QUICK, "act_bits": 4, "attention_bits": attention_bits})
    planned = measure_cost(find_target(pipeline).denoiser, layout=lay_out(pipeline, method))
    folder = serialization.save(quantize(pipeline, method, samples=samples), tmp_path / "out")
    assert planned.size_bytes == (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert planned == measure_cost(find_target(serialization.load(folder)).denoiser)


def test_the_law_holds_for_every_quantizer_of_a_finished_run(student):
    for layer in quantized_layers(student).values():
        if isinstance(layer.weight_quantizer, Quantizer):
            assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight_quantizer.encode(layer.weight).decode())


def test_a_run_tracks_each_stage_leaves_the_teacher_alone_and_repeats_itself_with_a_recording_of_its_own(cls, pipeline, student):
    teacher, labels = find_target(pipeline).denoiser, []
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    def note(work, label):
        labels.append(label)
        return plain(work, label)

    again = make_student(pipeline, cls.parse(QUICK), track=note)
    assert labels == ["sampling", "calibrate", "correct biases", "fine-tune", "correct answers"]
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())


def test_fine_tuning_brings_the_student_nearer_to_the_teacher(cls, pipeline, samples):
    method = cls.parse({**QUICK, "act_bits": 4, "learning_rate": 1e-3, "quantizer_rate": 1e-2, "batch": 8})
    distance = []
    for max_steps in (0, 20):
        trained = make_student(pipeline, cls.parse({**method.settings(), "max_steps": max_steps}), samples=samples)
        with torch.no_grad():
            distance.append((samples.call(trained) - samples.target).square().mean())
    assert distance[1] < distance[0]


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean 'lsq'"):
        methods.get("lsqq")
