"""Tests of lists of experiments: each is done once, the cheapest first; it continues after an interrupt or a failure."""

import shutil
from dataclasses import replace

import pytest

from dmquant.checkpoint import serialization
from dmquant.errors import Interrupted
from dmquant.evaluation import sweep
from dmquant.evaluation.reports.report import Report
from dmquant.evaluation.sweep import estimate_minutes, run_plan
from dmquant.evaluation.sweep_plan import FLOAT, Experiment, Plan
from dmquant.methods import get

SMALL = {"trajectories": 1, "sampling_steps": 2, "calibration_samples": 2, "batch": 2, "init": "minmax"}
PROTOCOL = {"num_images": 4, "steps": 2, "batch": 2}


def make(name: str, **settings) -> Experiment:
    return Experiment(name, get("lsq").parse({**SMALL, "max_steps": 1, **settings}))


PLAN = Plan((make("long", max_steps=3), make("short", weight_bits=2)), PROTOCOL, ("psnr",))


@pytest.fixture
def lines():
    return []


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """Returns the folder and the results of the plan. Copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("plan")
    return folder, run(PLAN, folder, tiny_folder)


@pytest.fixture
def done(whole, tmp_path):
    """Returns a copy of the plan's folder, and the results."""
    return shutil.copytree(whole[0], tmp_path / "done"), whole[1]


def run(plan, folder, model, lines=None, **how):
    return run_plan(plan, folder, model=str(model), device="cpu", tell=(lines if lines is not None else []).append, **how)


def count(monkeypatch, name: str) -> list:
    """Returns a list that receives the first argument of each call of a function of the module."""
    calls, real = [], getattr(sweep, name)
    monkeypatch.setattr(sweep, name, lambda first, *a, **how: calls.append(first) or real(first, *a, **how))
    return calls


def test_the_cheapest_comes_first_and_reports_keep_the_order_of_the_list(tiny_folder, tmp_path, lines, monkeypatch):
    recordings = count(monkeypatch, "record")
    results = run(PLAN, tmp_path, tiny_folder, lines)
    assert list(results.reports) == [FLOAT, "long", "short"] and results.failures == {}
    assert lines[0].startswith("2 of 2 experiments to do, about ")
    assert [line.split(":")[0] for line in lines[1:]] == ["short", "long"]
    assert len(recordings) == 1  # shared
    for name in ("long", "short"):
        assert serialization.verify(tmp_path / name) and Report.load(tmp_path / name) == results.reports[name]
        assert {"psnr"} == set(results.reports[name].metrics)
    assert results.reports[FLOAT].is_float


def test_recordings_of_another_eta_are_not_shared(tiny_folder, tmp_path, monkeypatch):
    recordings = count(monkeypatch, "record")
    plan = replace(PLAN, experiments=(make("still"), make("noisy", eta=1.0), make("still-too", weight_bits=2)))
    results = run(plan, tmp_path, tiny_folder)
    assert not results.failures and len(recordings) == 2
    assert serialization.read_record(tmp_path / "noisy")["settings"]["eta"] == 1.0


def test_complete_experiments_are_not_done_again(tiny_folder, done, lines, monkeypatch):
    folder, first = done
    quantized, evaluated = count(monkeypatch, "quantize_measured"), count(monkeypatch, "evaluate")
    assert run(PLAN, folder, tiny_folder, lines) == first and quantized == evaluated == [] and lines == []
    (folder / "long" / "report.json").unlink()
    assert run(PLAN, folder, tiny_folder).reports["long"].metrics == first.reports["long"].metrics
    assert quantized == [] and len(evaluated) == 1


def test_another_protocol_or_metric_measures_again_without_quantizing(tiny_folder, done, monkeypatch):
    quantized, evaluated = count(monkeypatch, "quantize_measured"), count(monkeypatch, "evaluate")
    more = replace(PLAN, given={**PROTOCOL, "num_images": 6})
    assert {report.protocol.num_images for report in run(more, done[0], tiny_folder).reports.values()} == {6}
    other = replace(more, metrics=("psnr", "cosine"), experiments=PLAN.experiments[:1])
    assert set(run(other, done[0], tiny_folder).reports["long"].metrics) == {"psnr", "cosine"}
    assert quantized == [] and len(evaluated) == 5


def test_layers_are_added_to_existing_reports(tiny_folder, done, monkeypatch):
    folder, first = done
    quantized, evaluated, added = (count(monkeypatch, name) for name in ("quantize_measured", "evaluate", "add_layers"))
    reports = run(PLAN.with_layers(), folder, tiny_folder).reports
    assert quantized == evaluated == [] and added == [first.reports["short"], first.reports["long"]]
    assert all(replace(reports[name], layers=()) == first.reports[name] for name in first.reports)
    assert reports["long"].layers and Report.load(folder / "long") == reports["long"] and not reports[FLOAT].layers
    assert run(PLAN.with_layers(), folder, tiny_folder).reports == reports and len(added) == 2
    (folder / "long" / "report.json").unlink()
    assert run(PLAN.with_layers(), folder, tiny_folder).reports["long"].layers == reports["long"].layers and len(added) == 2


def test_a_failure_does_not_stop_the_others(tiny_folder, done, lines, monkeypatch):
    folder, real = done[0], sweep.quantize_measured
    for name in ("long", "short"):
        shutil.rmtree(folder / name)

    def fail(pipeline, method, **how):
        if method.weight_bits == 2:
            raise ZeroDivisionError("no good")
        return real(pipeline, method, **how)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "quantize_measured", fail)
        results = run(PLAN, folder, tiny_folder, lines)
    assert list(results.reports) == [FLOAT, "long"] and results.failures == {"short": "ZeroDivisionError: no good"}
    assert "short failed: ZeroDivisionError: no good" in lines
    assert run(PLAN, folder, tiny_folder).failures == {}


def test_an_interrupted_list_continues_to_the_same_results(tiny_folder, tmp_path, whole, monkeypatch):
    expected, real = whole[1], sweep.quantize_measured

    def stop(pipeline, method, **how):
        if method.max_steps == 3:
            raise Interrupted("stopped")
        return real(pipeline, method, **how)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(sweep, "quantize_measured", stop)
        run(PLAN, tmp_path / "parts", tiny_folder)
    results = run(PLAN, tmp_path / "parts", tiny_folder)
    assert {n: r.metrics for n, r in results.reports.items()} == {n: r.metrics for n, r in expected.reports.items()}


def test_a_folder_of_another_experiment_is_refused(tiny_folder, done):
    other = replace(PLAN, experiments=(make("long", max_steps=2),))
    assert "max_steps was 3, now 2" in run(other, done[0], tiny_folder).failures["long"]


def test_the_estimate_counts_each_recording_once_and_grows_with_the_work(whole):
    report = whole[1].reports[FLOAT]
    one, two = (estimate_minutes([make(f"{n}", max_steps=100) for n in range(count)], report) for count in (1, 2))
    longer = estimate_minutes([make("0", max_steps=200)], report)
    assert 0 < one < two < 2 * one < 2 * longer
