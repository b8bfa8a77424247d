"""Runs a list of experiments under one protocol: quantizes and evaluates those that are not done, the cheapest first.

An experiment is a folder with its packed pipeline and report.json. Complete folders are not changed, so an interrupted list
continues where it stopped. The float model is evaluated first, its trajectories are recorded once for all methods, and an
experiment that fails does not stop the others.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from diffusers import DiffusionPipeline

from dmquant.checkpoint import atomic_folder, serialization
from dmquant.diffusion.conditioning import Conditioning, complete
from dmquant.diffusion.pipeline import is_quantized
from dmquant.diffusion.trajectories import Samples, record
from dmquant.errors import DmquantError, InputError, Interrupted
from dmquant.evaluation.evaluator import add_layers, evaluate
from dmquant.evaluation.metrics.layer_sqnr import NAME as LAYERS
from dmquant.evaluation.metrics.registry import MetricSelection
from dmquant.evaluation.reports.columns import split_name
from dmquant.evaluation.reports.report import FILE_NAME, Report
from dmquant.evaluation.sweep_plan import FLOAT, Experiment, Plan
from dmquant.progress import Track, plain
from dmquant.quantization import quantize_measured
from dmquant.training.resume import Run


@dataclass(frozen=True)
class Results:
    """Reports and failures of a list of experiments."""

    reports: dict[str, Report]  # by name: the float model, then the order of the list
    failures: dict[str, str]  # name -> reason


@dataclass(frozen=True)
class SweepContext:
    """Everything that the experiments of a list share."""

    model: str | None
    output: Path
    plan: Plan
    device: str | None
    cache: Path | None
    begin: Callable[[Path], AbstractContextManager[Run]]
    track: Track
    get_samples: Callable[[int, int, float, int], Samples]

    def open(self) -> DiffusionPipeline:
        """Returns the float pipeline, loaded anew."""
        return serialization.open_any(self.model, device=self.device)


def run_plan(
    plan: Plan,
    output: Path,
    *,
    model: str | None = None,
    device: str | None = None,
    cache: Path | None = None,
    begin: Callable[[Path], AbstractContextManager[Run]] = lambda folder: nullcontext(Run()),
    tell: Callable[[str], None] = lambda text: None,
    track: Track = plain,
) -> Results:
    """Runs the experiments that are not done in the folder `output`, and returns the reports of all.

    Args:
        model: Float pipeline; default: the embedded one.
        cache: Folder in which images are stored and found again; default: none.
        begin: Takes an experiment's folder and returns a context with its saved run.
        tell: Takes a line of text on the progress.
    """
    plan = replace(plan, conditioning=complete(serialization.open_any(model, device=device), plan.conditioning))
    get_samples = share_recording(model, device, plan.conditioning, track)
    context = SweepContext(model, output, plan, device, cache, begin, track, get_samples)
    reports = {FLOAT: measure_float(context)}
    missing = [experiment for experiment in plan.experiments if not is_done(experiment, context)]
    if missing:
        minutes = max(1, round(estimate_minutes(missing, reports[FLOAT])))
        tell(f"{len(missing)} of {len(plan.experiments)} experiments to do, about {minutes} min")
    failures = {}
    for experiment in sorted(plan.experiments, key=lambda experiment: experiment.cost):
        started = time.monotonic()
        try:
            reports[experiment.name] = run_experiment(experiment, context)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001  no error of one experiment stops the others
            failures[experiment.name] = str(error) if isinstance(error, DmquantError) else f"{type(error).__name__}: {error}"
            tell(f"{experiment.name} failed: {failures[experiment.name]}")
            continue
        if experiment in missing:
            tell(f"{experiment.name}: done in {(time.monotonic() - started) / 60:.1f} min")
    order = [FLOAT, *(experiment.name for experiment in plan.experiments if experiment.name in reports)]
    return Results({name: reports[name] for name in order}, failures)


def estimate_minutes(experiments: Sequence[Experiment], float_report: Report) -> float:
    """Returns the time to quantize and evaluate, estimated from the float model's speed; a shared recording counts once."""
    protocol = float_report.protocol
    call_s = float_report.seconds_per_image / protocol.steps
    recordings = {(e.method.trajectories, e.method.sampling_steps, e.method.eta, e.seed) for e in experiments}
    calls = sum(trajectories * steps for trajectories, steps, *_ in recordings) + sum(e.cost_when_recorded for e in experiments)
    evaluation = len(experiments) * protocol.num_images * float_report.seconds_per_image
    return (call_s * calls + evaluation) / 60


def measure_float(context: SweepContext) -> Report:
    """Returns the float model's report; evaluates it if the folder has none under the plan's protocol."""
    folder = context.output / FLOAT
    report = _find_report(folder, context.plan, context.plan.float_metrics)
    if report is None:
        report = _evaluate(context.open(), context, context.plan.float_metrics)
        report.save(folder)
    return report


def is_done(experiment: Experiment, context: SweepContext) -> bool:
    """Returns whether the experiment's folder has a pipeline and a report with all metrics."""
    folder = context.output / experiment.name
    return is_quantized(folder) and _find_report(folder, context.plan, context.plan.metrics) is not None


def run_experiment(experiment: Experiment, context: SweepContext) -> Report:
    """Returns the report of an experiment; quantizes and evaluates what its folder does not hold yet."""
    folder = context.output / experiment.name
    if (folder / atomic_folder.MANIFEST).is_file():
        refuse_other(experiment, folder, context.plan.conditioning)
    else:
        pipeline, method, conditioning = context.open(), experiment.method, context.plan.conditioning
        with context.begin(folder) as run:
            samples = context.get_samples(method.trajectories, method.sampling_steps, method.eta, experiment.seed)
            quantized = quantize_measured(
                pipeline, method, seed=experiment.seed, conditioning=conditioning, samples=samples, run=run, track=context.track
            )
            serialization.save(quantized.pipeline, folder)
            quantized.effort.save(folder)
    report = _find_report(folder, context.plan, context.plan.metrics)
    if report is not None and (report.layers or LAYERS not in context.plan.metrics):
        return report
    pipeline = serialization.load(folder, device=context.device)
    if report is None:
        report = _evaluate(pipeline, context, context.plan.metrics)
    else:  # only the layers are missing
        report = add_layers(report, pipeline, context.open(), conditioning=context.plan.conditioning, track=context.track)
    report.save(folder)
    return report


def refuse_other(experiment: Experiment, folder: Path, conditioning: Conditioning) -> None:
    """Raises InputError if the folder holds a pipeline with another method, seed, setting or conditioning."""
    record = serialization.read_record(folder)
    here = {"method": experiment.method.name, "seed": experiment.seed, **experiment.method.settings(), **conditioning.describe()}
    there = {**record, **record.get("settings", {})}
    differing = [f"{key} was {there[key]}, now {value}" for key, value in here.items() if key in there and there[key] != value]
    if differing:
        raise InputError(f"{folder} holds another experiment: {'; '.join(differing)}. Use another name, or remove the folder")


def share_recording(
    model: str | None, device: str | None, conditioning: Conditioning, track: Track
) -> Callable[[int, int, float, int], Samples]:
    """Returns a function of (trajectories, steps, eta, seed) that records the float model's trajectories once for each."""

    @cache
    def get_samples(trajectories: int, steps: int, eta: float, seed: int) -> Samples:
        pipeline = serialization.open_any(model, device=device)
        return record(pipeline, trajectories, steps=steps, eta=eta, seed=seed, conditioning=conditioning, track=track)

    return get_samples


def _evaluate(pipeline: DiffusionPipeline, context: SweepContext, metrics: Sequence[str]) -> Report:
    base = context.open() if MetricSelection(tuple(metrics)).needs_float_model else None
    return evaluate(
        pipeline,
        metrics=metrics,
        conditioning=context.plan.conditioning,
        float_pipeline=base,
        cache=context.cache,
        track=context.track,
        **context.plan.protocol,
    )


def _find_report(folder: Path, plan: Plan, metrics: Sequence[str]) -> Report | None:
    """Returns the report in a folder; None if its protocol is not the plan's or a metric is missing, except "layers"."""
    if not (folder / FILE_NAME).is_file():
        return None
    report = Report.load(folder)
    recorded, measured = asdict(report.protocol), {split_name(name)[0] for name in report.metrics}
    # the plan has the path of a reference, the report its name: they are not compared
    wanted = {**plan.protocol, **plan.conditioning.describe()}
    differs = any(recorded[name] != value for name, value in wanted.items() if name != "reference")
    needed = {"recall" if name == "prdc" else name for name in metrics if name != LAYERS}
    return report if not differs and needed <= measured else None
