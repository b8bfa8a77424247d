"""Block by unit: what a runner sees, what it follows, what is trained and what an interruption costs."""

import copy

import pytest
import torch

from dmquant.diffusion.pipeline import find_target
from dmquant.errors import Interrupted
from dmquant.methods.dilatequant.activation_cache import ActivationCache
from dmquant.methods.dilatequant.block_reconstruction import UnitData
from dmquant.methods.dilatequant.block_runner import BlockRunner, find_units, trace_unit
from dmquant.methods.dilatequant.method import DilateQuant
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.quantization import make_student
from dmquant.training.resume import SavedRun

QUICK = dict(trajectories=4, sampling_steps=3, calibration_samples=12, max_steps=3, batch=4)


@pytest.fixture(scope="module")
def student(pipeline, samples):
    return make_student(pipeline, DilateQuant(**{**QUICK, "max_steps": 0}), samples=samples)


def make_data(student, pipeline, samples, folder, index, max_bytes=1 << 30):
    teacher, unit = find_target(pipeline).denoiser, find_units(student, samples)[index]
    runner = BlockRunner(student, unit, samples)
    data = UnitData(
        student, teacher, unit, runner, samples, torch.arange(len(samples)).float(), cache=ActivationCache(folder, 0),
        max_bytes=max_bytes, batch=4,
    )  # fmt: skip
    return teacher, unit, runner, data


def content(tensors):
    """Returns all rows of each tensor."""
    return [tensor[torch.arange(len(tensor))] for tensor in tensors]


def test_inputs_are_taken_behind_the_quantized_student_and_targets_behind_the_teacher(student, pipeline, samples, tmp_path):
    teacher, unit, runner, data = make_data(student, pipeline, samples, tmp_path, 5)
    data.load_round(0)
    ours, theirs = trace_unit(student, unit, samples), trace_unit(teacher, unit, samples)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(content(data.inputs), runner.inputs_from(ours), strict=True))
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(content(data.targets), runner.outputs_from(theirs), strict=True))
    assert not torch.allclose(content(data.inputs)[0], runner.inputs_from(theirs)[0], atol=1e-3)


def test_samples_beyond_the_size_limit_are_split_into_rounds_with_each_sample_once(student, pipeline, samples, tmp_path):
    _, _, _, data = make_data(student, pipeline, samples, tmp_path, 5, max_bytes=0)
    assert data.num_rounds == 3
    seen = []
    for number in range(3):
        data.load_round(number)
        assert len(data.inputs[0]) == len(data.timestep) == 4
        seen += data.weight.tolist()
    assert sorted(seen) == list(range(12))


def test_every_unit_is_trained_and_the_distance_to_the_teacher_falls(pipeline, samples, student):
    trained = make_student(pipeline, DilateQuant(**{**QUICK, "max_steps": 32, "learning_rate": 1e-3}), samples=samples)
    before = dict(quantized_layers(student))
    for name, layer in quantized_layers(trained).items():
        assert not torch.equal(layer.weight, before[name].weight), name
    assert torch.equal(trained.conv_norm_out.weight, student.conv_norm_out.weight), "it belongs to no unit"
    frozen = {name for name, parameter in trained.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv_norm_out.weight", "conv_norm_out.bias"}
    with torch.no_grad():
        distance = [(samples.call(network) - samples.target).square().mean() for network in (student, trained)]
    assert distance[1] < 0.8 * distance[0]


@pytest.mark.parametrize(
    "stops, settings", [((3, 5), {}), ((0, 7), {"ema_decay": 0.5, "cache_gib": 1e-9})], ids=["plain", "averaged, in rounds"]
)
def test_an_interrupted_run_continues_bit_for_bit_in_the_middle_of_a_block_and_between_two(
    stops, settings, pipeline, samples, tmp_path
):
    method = DilateQuant(**{**QUICK, **settings, "max_steps": 2, "dilation": "smooth"})
    whole = make_student(pipeline, method, samples=samples).state_dict()
    for count in stops:
        asked = iter(range(1 << 20))
        run = SavedRun(tmp_path / "run", should_stop=lambda: next(asked) >= count)
        with pytest.raises(Interrupted):
            make_student(pipeline, method, samples=samples, run=run)
    torch.manual_seed(7)
    resumed = make_student(pipeline, method, samples=samples, run=SavedRun(tmp_path / "run")).state_dict()
    assert resumed.keys() == whole.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []


def test_finished_blocks_do_not_run_again_in_a_resumed_run_and_their_cached_outputs_are_deleted_at_its_end(
    pipeline, samples, tmp_path, monkeypatch
):
    method, asked, ran = DilateQuant(**{**QUICK, "max_steps": 2}), iter(range(1 << 20)), []
    with pytest.raises(Interrupted):
        make_student(pipeline, method, samples=samples, run=SavedRun(tmp_path / "run", should_stop=lambda: next(asked) >= 9))
    kept = {file.stem for file in (tmp_path / "run" / "store" / "0").glob("*.json")}
    assert "down_blocks.0.resnets.0" in kept
    monkeypatch.setattr(UnitData, "cache_outputs", lambda data: ran.append(data._unit.name))
    make_student(pipeline, method, samples=samples, run=SavedRun(tmp_path / "run"))
    assert ran and not kept & set(ran)
    assert not (tmp_path / "run" / "store").exists()


def test_inputs_do_not_depend_on_which_samples_share_a_forward_pass(pipeline, samples, student, tmp_path):
    contents = []
    for max_bytes, number in ((1 << 30, 0), (0, 1)):
        data = make_data(copy.deepcopy(student), pipeline, samples, tmp_path, 3, max_bytes=max_bytes)[3]
        with data:
            data.load_round(number)
            contents.append(content(data.inputs)[0])
    assert torch.allclose(contents[0][1::3], contents[1], atol=1e-5)
