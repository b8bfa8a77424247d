"""Tests of lists of experiments from a JSON file and from the command line."""

import json
from pathlib import Path

import pytest

from dmquant.errors import InputError
from dmquant.evaluation.sweep_plan import parse_run, read_plan

PROTOCOL = {"num_images": 4, "steps": 2, "batch": 2}


def test_a_run_is_named_by_method_and_bits():
    plain, tuned = parse_run("lsq:4/8"), parse_run("lsq:2/32,max_steps=5,keep=first")
    assert (plain.name, plain.method.weight_bits, plain.method.act_bits) == ("lsq-w4a8", 4, 8)
    assert tuned.name == "lsq-w2a32-max_steps-5-keep-first" and tuned.method.max_steps == 5
    assert plain.cost > parse_run("lsq:4/8,max_steps=0").cost and plain.cost > parse_run("lsq:4/8,clip_images=0").cost


@pytest.mark.parametrize("text", ["lsq", "lsq:4", "lsq:4/x", ":4/4", "lsq:4/4,", "lqs:4/4", "lsq:9/4", "lsq:4/4,nonsense=1"])
def test_text_that_is_no_run_is_refused(text):
    with pytest.raises(InputError):
        parse_run(text)


def test_a_file_holds_protocol_seeds_and_runs(tmp_path):
    file = tmp_path / "list.json"
    runs = [{"name": "a", "method": "lsq", "weight_bits": 4}, {"name": "b", "method": "lsq", "seed": 5}]
    file.write_text(json.dumps({"protocol": PROTOCOL, "runs": runs}))
    plan = read_plan(file)
    assert [(e.name, e.seed) for e in plan.experiments] == [("a", 0), ("b", 5)] and plan.given == PROTOCOL
    assert plan.metrics == ("fid", "psnr") and plan.float_metrics == ("fid",)
    file.write_text(json.dumps({"seeds": [0, 1], "runs": runs, "metrics": ["psnr"]}))
    again = read_plan(file)
    assert [(e.name, e.seed) for e in again.experiments] == [("a-seed0", 0), ("b-seed0", 0), ("a-seed1", 1), ("b-seed1", 1)]
    assert again.metrics == ("psnr",) and again.float_metrics == ("psnr",)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not a valid list of experiments"),
        ("[]", "is not a valid list of experiments"),
        ('{"runs": [{"method": "lsq"}]}', "KeyError: 'name'"),
        ('{"runs": [{"name": "a", "method": "lqs"}]}', "did you mean 'lsq'"),
        ('{"runs": [{"name": "../a", "method": "lsq"}]}', "cannot be the name of a folder"),
        ('{"runs": [{"name": "a", "method": "lsq"}, {"name": "a", "method": "lsq"}]}', "'a' names two experiments"),
        ('{"runs": [{"name": "float", "method": "lsq"}]}', "'float' names two"),
        ('{"runs": [], "protocol": {"images": 3}}', "the protocol has no 'images'"),
        ('{"runs": [], "metrics": ["fdi"]}', "did you mean 'fid'"),
    ],
)
def test_an_invalid_file_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "list.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_plan(file)
    with pytest.raises(InputError, match="does not exist"):
        read_plan(tmp_path / "nowhere.json")


def test_the_lists_of_the_benchmarks_are_plans():
    for file in (Path(__file__).parents[2] / "benchmarks" / "experiments").glob("*.json"):
        assert read_plan(file).experiments
