"""Tests of the time to a quality: points are kept, times are interpolated, and `quantize` accepts every command line."""

import json
from argparse import Namespace

import pytest

from benchmarks import finetune_cost
from benchmarks.finetune_cost import Point, average, compare, find_time, measure, parse_shares
from dmquant.evaluation.sweep_plan import parse_run
from dmquant.methods import get
from dmquant.training.run_cost import Effort, Stage
from tests.evaluation.reports.test_report import document


def point(steps, distance, seconds=None, peak=1000, added=600):
    stages = {"recording": 10.0, "calibration": 5.0, "fine-tuning": float(steps if seconds is None else seconds)}
    half = {name: value / 2 for name, value in stages.items()}
    return Point(steps, stages, half, dict.fromkeys(stages, peak), dict.fromkeys(stages, added), 100, 0.5, [distance])


def clock(point):
    return point.total("seconds")


def test_a_time_lies_between_the_points_that_enclose_the_goal_in_the_share_of_the_distance():
    points = [point(0, 10.0), point(100, 6.0), point(200, 2.0)]
    assert find_time(points, 6.0, clock) == clock(points[1]) and find_time(points, 2.0, clock) == clock(points[2])
    assert find_time(points, 5.0, clock) == pytest.approx(15 + 125)
    assert find_time(points, 10.5, clock) == 15, "the shortest run has it already"
    assert find_time(points, 1.9, clock) is None


def test_the_first_crossing_of_the_goal_counts():
    assert find_time([point(0, 10.0), point(100, 4.0), point(200, 8.0), point(300, 1.0)], 7.0, clock) == pytest.approx(15 + 50)


def test_a_run_compared_with_itself_is_as_fast_and_as_large():
    points = [point(0, 10.0), point(100, 4.0)]
    found = compare(points, points[-1])
    assert {value for name, value in found.items() if name.endswith("ratio")} == {1.0} and found["seconds_to_goal"] == 115


def test_half_the_steps_and_memory_give_ratios_of_two():
    goal = point(300, 4.0, peak=3000, added=1800)
    found = compare([point(0, 10.0), point(100, 4.0, peak=1500, added=600)], goal)
    assert found["seconds_ratio"] == pytest.approx(315 / 115) and found["fine_tuning_seconds_ratio"] == 3
    assert (found["memory_ratio"], found["fine_tuning_memory_ratio"]) == (2, 3)
    assert compare([point(0, 10.0), point(100, 4.1)], goal)["seconds_ratio"] is None


@pytest.fixture
def commands(monkeypatch):
    """Returns the command lines that were run; each writes the files that dmquant would write."""
    lines = []

    def run(line):
        lines.append(line)
        target = finetune_cost.Path(line[line.index("-o") + 1])
        if line[0] == "eval":
            target.write_text(document())
            return
        target.mkdir(parents=True)
        Effort({"fine-tuning": Stage(2.0, 3.0, 500, 200)}, 0, "cpu", 7, 0.1, True).save(target)

    monkeypatch.setattr(finetune_cost, "run_command", run)
    return lines


def test_a_point_is_a_run_of_its_own_length_that_is_made_once(commands, tmp_path):
    args = Namespace(output=tmp_path, seeds=[3], device=None, num_images=50, steps=20, model="embedded")
    experiment = parse_run("efficientdm:4/4,keep=skip,max_steps=80")
    first = measure(experiment, 20, args)
    assert measure(experiment, 20, args) == first and [line[0] for line in commands] == ["quantize", "eval"]
    given = dict(text.split("=", 1) for flag, text in zip(commands[0], commands[0][1:]) if flag == "--set")
    method = get("efficientdm").parse(given)
    assert method.max_steps == 20 and method.settings() == {**experiment.method.settings(), "max_steps": 20}
    expected = next(iter(json.loads(document())["metrics"].values()))
    assert (first.distance, first.peak, first.total("cpu_seconds")) == (expected, 500, 3.0)
    args.num_images = 60
    measure(experiment, 20, args)
    assert [line[0] for line in commands] == ["quantize", "eval", "eval"], "more images need no other run"


def test_the_whole_command_ends_with_a_row_per_point_and_a_result(commands, tmp_path, monkeypatch, capsys):
    runs = ["--run", "lsq:4/4,max_steps=8", "--run", "efficientdm:4/4,max_steps=4", "--shares", "1/2,1"]
    result = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["finetune_cost.py", *runs, "-o", str(tmp_path / "points"), "--result", str(result)])
    finetune_cost.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("lsq", "efficientdm-w4a4-max_steps-4 "))]
    assert len(rows) == 4
    assert [[point["steps"] for point in run["points"]] for run in json.loads(result.read_text())["runs"]] == [[4, 8], [2, 4]]


def test_a_point_of_several_seeds_is_the_mean_of_a_run_with_each(commands, tmp_path):
    args = Namespace(output=tmp_path, seeds=[0, 1], device=None, num_images=50, steps=20, model="embedded")
    found = measure(parse_run("lsq:4/4"), 8, args)
    assert [line[line.index("--seed") + 1] for line in commands if line[0] == "quantize"] == ["0", "1"]
    assert len(found.distances) == 2 and found.distance == pytest.approx(sum(found.distances) / 2)
    both = average([point(8, 2.0, seconds=10, peak=100), point(8, 4.0, seconds=30, peak=300)])
    assert (both.distance, both.distances, both.seconds["fine-tuning"], both.peak) == (3.0, [2.0, 4.0], 20, 200)
    assert average([point(8, 2.0), point(8, 2.0, peak=None)]).peak is None


def test_shares_are_fractions_and_include_one():
    assert [float(share) for share in parse_shares("0,1/8,1")] == [0, 0.125, 1]
    for text in ("0,1/2", "1,2"):
        with pytest.raises(finetune_cost.argparse.ArgumentTypeError, match="include 1"):
            parse_shares(text)
