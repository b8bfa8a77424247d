"""Block by block: what a link sees, what it follows, what is trained and what an interruption costs."""

import copy

import pytest
import torch

from dmquant.diffusion.pipeline import find_target
from dmquant.errors import Interrupted
from dmquant.methods.dilatequant.activation_cache import Shelf
from dmquant.methods.dilatequant.block_reconstruction import Memory
from dmquant.methods.dilatequant.block_runner import Link, find_links, trace
from dmquant.methods.dilatequant.method import DilateQuant
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.quantization import make_student
from dmquant.training.resume import SavedRun

QUICK = dict(trajectories=4, sampling_steps=3, calibration_samples=12, max_steps=3, batch=4)


@pytest.fixture(scope="module")
def student(pipeline, samples):
    return make_student(pipeline, DilateQuant(**{**QUICK, "max_steps": 0}), samples=samples)


def remember(student, pipeline, samples, folder, index, cache_bytes=1 << 30):
    teacher, block = find_target(pipeline).denoiser, find_links(student, samples)[index]
    link = Link(student, block, samples)
    memory = Memory(
        student, teacher, block, link, samples, torch.arange(len(samples)).float(), shelf=Shelf(folder, 0),
        cache_bytes=cache_bytes, batch=4,
    )  # fmt: skip
    return teacher, block, link, memory


def content(stacks):
    """All rows of each."""
    return [stack[torch.arange(len(stack))] for stack in stacks]


def test_inputs_are_those_behind_the_students_prefix_and_answers_the_teachers_behind_its_own(
    student, pipeline, samples, tmp_path
):
    teacher, block, link, memory = remember(student, pipeline, samples, tmp_path, 5)
    memory.enter(0)
    ours, theirs = trace(student, block, samples), trace(teacher, block, samples)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(content(memory.rows), link.rows_of(ours), strict=True))
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(content(memory.answers), link.answers_of(theirs), strict=True))
    assert not torch.allclose(content(memory.rows)[0], link.rows_of(theirs)[0], atol=1e-3)


def test_samples_beyond_the_budget_come_in_rounds_and_each_comes_once(student, pipeline, samples, tmp_path):
    _, _, _, memory = remember(student, pipeline, samples, tmp_path, 5, cache_bytes=0)
    assert memory.num_rounds == 3
    seen = []
    for number in range(3):
        memory.enter(number)
        assert len(memory.rows[0]) == len(memory.timestep) == 4
        seen += memory.weight.tolist()
    assert sorted(seen) == list(range(12))


def test_every_block_is_trained_and_follows_its_teacher_better(pipeline, samples, student):
    trained = make_student(pipeline, DilateQuant(**{**QUICK, "max_steps": 32, "learning_rate": 1e-3}), samples=samples)
    before = dict(quantized_layers(student))
    for name, layer in quantized_layers(trained).items():
        assert not torch.equal(layer.weight, before[name].weight), name
    assert torch.equal(trained.conv_norm_out.weight, student.conv_norm_out.weight), "no block has it"
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


def test_finished_blocks_do_not_run_again_in_a_continued_run_and_nothing_stays_of_what_they_answered(
    pipeline, samples, tmp_path, monkeypatch
):
    method, asked, ran = DilateQuant(**{**QUICK, "max_steps": 2}), iter(range(1 << 20)), []
    with pytest.raises(Interrupted):
        make_student(pipeline, method, samples=samples, run=SavedRun(tmp_path / "run", should_stop=lambda: next(asked) >= 9))
    kept = {file.stem for file in (tmp_path / "run" / "store" / "0").glob("*.json")}
    assert "down_blocks.0.resnets.0" in kept
    monkeypatch.setattr(Memory, "put_away", lambda memory: ran.append(memory._block.name))
    make_student(pipeline, method, samples=samples, run=SavedRun(tmp_path / "run"))
    assert ran and not kept & set(ran)
    assert not (tmp_path / "run" / "store").exists()


def test_a_student_is_the_same_whichever_samples_share_a_pass(pipeline, samples, student, tmp_path):
    contents = []
    for cache_bytes, number in ((1 << 30, 0), (0, 1)):
        memory = remember(copy.deepcopy(student), pipeline, samples, tmp_path, 3, cache_bytes=cache_bytes)[3]
        with memory:
            memory.enter(number)
            contents.append(content(memory.rows)[0])
    assert torch.allclose(contents[0][1::3], contents[1], atol=1e-5)
