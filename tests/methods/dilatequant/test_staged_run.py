"""A staged run numbers its steps consecutively, is displayed as one, and is resumed in the stage where it stopped."""

import torch
from torch import nn

from dmquant.methods.dilatequant.staged_run import Stage, StagedRun
from dmquant.progress import plain
from dmquant.training.resume import Run
from dmquant.training.trainer import Step


class RecordedRun(Run):
    """Resumes at a given step, and records the parts that would be saved."""

    def __init__(self, begin=0):
        self.begin, self.restored, self.numbers, self.parts = begin, [], [], []

    def restore(self, parts, device):
        self.restored.append(sorted(parts))
        return self.begin

    def keep(self, steps, parts):
        for step in steps:
            self.numbers.append(step.number)
            self.parts.append(dict(parts))
            yield step


def run_stages(recorded, track=plain, *, count=3, length=4):
    """Runs all stages, and returns the step numbers that the training loop of each one gets."""
    student = nn.Linear(2, 2)
    staged_run, given = StagedRun(recorded, student, count=count, length=length, track=track), {}
    for index in range(staged_run.first, count):
        stage, parts = Stage(staged_run, index), {"student": nn.Linear(1, 1), "optimizer": index}
        given[index] = []
        for step in stage.keep([Step(number) for number in range(stage.restore(parts, torch.device("cpu")), length)], parts):
            step.loss = 10 * index + step.number
            given[index].append(step.number)
    staged_run.finish()
    assert all(parts["student"] is student for parts in recorded.parts)
    return given


def test_steps_are_numbered_consecutively_and_each_stage_saves_its_own_parts_with_the_whole_student():
    recorded = RecordedRun()
    assert run_stages(recorded) == {index: [0, 1, 2, 3] for index in range(3)}
    assert recorded.numbers == list(range(12)) and [parts["optimizer"] for parts in recorded.parts] == [0] * 4 + [1] * 4 + [2] * 4


def test_a_run_is_resumed_in_the_stage_where_it_stopped():
    for begin, expected in ((6, {1: [2, 3], 2: [0, 1, 2, 3]}), (8, {2: [0, 1, 2, 3]}), (11, {2: [3]})):
        recorded = RecordedRun(begin)
        assert run_stages(recorded) == expected and recorded.numbers == list(range(begin, 12))
        assert recorded.restored == [["student"], ["optimizer", "student"]]


def test_the_progress_display_sees_one_sequence_of_steps_with_their_losses():
    shown = []

    def track(steps, label):
        assert label == "fine-tune"
        for step in steps:
            yield step
            shown.append(step.loss)

    run_stages(RecordedRun(), track, count=2, length=2)
    assert shown == [0, 1, 10, 11]
