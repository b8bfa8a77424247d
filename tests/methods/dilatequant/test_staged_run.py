"""Many trainings as one run: numbered through, shown once, continued in the leg where it stopped."""

import torch
from torch import nn

from dmquant.methods.dilatequant.staged_run import Leg, Relay
from dmquant.progress import plain
from dmquant.training.resume import Run
from dmquant.training.trainer import Step


class Tape(Run):
    """Continues at a step, and notes what would be saved."""

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


def run_legs(tape, track=plain, *, count=3, length=4):
    """What a loop of each leg would be given: the numbers of its steps."""
    student = nn.Linear(2, 2)
    relay, given = Relay(tape, student, count=count, length=length, track=track), {}
    for index in range(relay.first, count):
        leg, parts = Leg(relay, index), {"student": nn.Linear(1, 1), "optimizer": index}
        given[index] = []
        for step in leg.keep([Step(number) for number in range(leg.restore(parts, torch.device("cpu")), length)], parts):
            step.loss = 10 * index + step.number
            given[index].append(step.number)
    relay.finish()
    assert all(parts["student"] is student for parts in tape.parts)
    return given


def test_legs_are_numbered_through_and_each_saves_its_own_parts_with_the_whole_student():
    tape = Tape()
    assert run_legs(tape) == {index: [0, 1, 2, 3] for index in range(3)}
    assert tape.numbers == list(range(12)) and [parts["optimizer"] for parts in tape.parts] == [0] * 4 + [1] * 4 + [2] * 4


def test_a_run_is_continued_in_the_leg_where_it_stopped():
    for begin, expected in ((6, {1: [2, 3], 2: [0, 1, 2, 3]}), (8, {2: [0, 1, 2, 3]}), (11, {2: [3]})):
        tape = Tape(begin)
        assert run_legs(tape) == expected and tape.numbers == list(range(begin, 12))
        assert tape.restored == [["student"], ["optimizer", "student"]]


def test_whoever_tracks_sees_one_row_of_steps_with_their_losses():
    shown = []

    def track(steps, label):
        assert label == "fine-tune"
        for step in steps:
            yield step
            shown.append(step.loss)

    run_legs(Tape(), track, count=2, length=2)
    assert shown == [0, 1, 10, 11]
