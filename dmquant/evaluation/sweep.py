"""Lists of experiments under one protocol: what is missing is quantized and evaluated, the cheapest first.

An experiment is a folder with its packed pipeline and report.json; what is complete is left alone, so a list that was killed
goes on where it stopped. The float model comes first, its trajectories are recorded once for all methods, and one experiment
that fails does not stop the others.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from dmquant import methods
from dmquant.checkpoint import atomic_folder, serialization
from dmquant.diffusion.conditioning import Conditioning, complete
from dmquant.diffusion.pipeline import find_target, is_quantized
from dmquant.diffusion.prompts import read_prompts
from dmquant.diffusion.trajectories import Samples, record
from dmquant.errors import DmquantError, InputError, Interrupted
from dmquant.evaluation.evaluator import add_layers, evaluate
from dmquant.evaluation.metrics.layer_sqnr import NAME as LAYERS
from dmquant.evaluation.metrics.registry import Choice, choose_metrics
from dmquant.evaluation.reports.columns import split_name
from dmquant.evaluation.reports.report import FILE_NAME, Report
from dmquant.methods.base import Method
from dmquant.progress import Track, plain
from dmquant.quantization import quantize
from dmquant.training.resume import Run

FLOAT = "float"  # the folder of the float model's report
DEFAULT_METRICS = ("fid", "psnr")
PROTOCOL = {"num_images": 1000, "seed": 0, "steps": 20, "batch": 50}  # where a plan says nothing
PROTOCOL_NAMES = (*PROTOCOL, "sampler", "reference", "extractor")
CONDITIONS = ("prompts", "class_labels", "guidance_scale")  # of a protocol in a file
CALLS_PER_SAMPLE = 4  # of the denoiser in a training step: forward, backward, and the quantizers' third of both
CLIP_DRAWS = 6  # of the images that set the sampler's clip range: the float model's, and about as many ranges as are tried
RUN = re.compile(r"(?P<method>[\w.-]+):(?P<weights>\d+)/(?P<acts>\d+)(?:,(?P<settings>.+))?")


@dataclass(frozen=True)
class Experiment:
    """One way to quantize; `name` is its folder."""

    name: str
    method: Method
    seed: int = 0

    @property
    def cost(self) -> int:
        """Denoiser calls of quantizing, on one sample each."""
        return self.method.trajectories * self.method.sampling_steps + self.cost_when_recorded

    @property
    def cost_when_recorded(self) -> int:
        """Those of training and of fitting the clip range."""
        method = self.method
        training = CALLS_PER_SAMPLE * method.max_steps * method.batch
        return training + CLIP_DRAWS * method.clip_images * method.sampling_steps


@dataclass(frozen=True)
class Plan:
    """Experiments, how they are evaluated, and by what."""

    experiments: tuple[Experiment, ...]
    given: dict[str, Any] = field(default_factory=dict)  # of the protocol, as keyword arguments of evaluate
    metrics: tuple[str, ...] = DEFAULT_METRICS
    conditioning: Conditioning = Conditioning()  # of what is recorded, and of what is measured

    def __post_init__(self) -> None:
        names = [experiment.name for experiment in self.experiments]
        twice = sorted({name for name in (FLOAT, *names) if (FLOAT, *names).count(name) > 1})
        if twice:
            raise InputError(f"{twice[0]!r} names two experiments; give each a name of its own")
        unknown = sorted(self.given.keys() - set(PROTOCOL_NAMES))
        if unknown:
            raise InputError(f"the protocol has no {unknown[0]!r}; it has {', '.join((*PROTOCOL_NAMES, *CONDITIONS))}")
        choose_metrics(self.metrics, self.protocol["num_images"])

    @property
    def protocol(self) -> dict[str, Any]:
        return {**PROTOCOL, **self.given}

    def with_layers(self) -> "Plan":
        """The same, with a look at the layers of every quantized model."""
        return replace(self, metrics=tuple(dict.fromkeys((*self.metrics, LAYERS))))

    @property
    def float_metrics(self) -> tuple[str, ...]:
        """Those that say something of a float model; where all compare with it, it is compared with itself."""
        return tuple(name for name in self.metrics if not Choice((name,)).needs_float_model) or self.metrics


@dataclass(frozen=True)
class Results:
    """What a list came to."""

    reports: dict[str, Report]  # by name, the float model first, then in the order of the list
    failures: dict[str, str]


@dataclass(frozen=True)
class Bench:
    """What all experiments of a list share."""

    model: str | None
    output: Path
    plan: Plan
    device: str | None
    cache: Path | None
    begin: Callable[[Path], AbstractContextManager[Run]]
    track: Track
    recall: Callable[[int, int, float, int], Samples]

    def open(self) -> DiffusionPipeline:
        return serialization.open_any(self.model, device=self.device)


def read_plan(file: Path) -> Plan:
    """The plan in a JSON file: {"protocol": {...}, "metrics": [...], "seeds": [...], "runs": [{"name", "method", settings}]}."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        runs, seeds = document["runs"], document.get("seeds")
        named = [(run, seed, "" if seeds is None else f"-seed{seed}") for seed in seeds or [None] for run in runs]
        experiments = [_read_run(dict(run), seed, suffix) for run, seed, suffix in named]
        metrics = tuple(document.get("metrics", DEFAULT_METRICS))
        protocol = dict(document.get("protocol", {}))
        asked = _read_conditioning({name: protocol.pop(name) for name in CONDITIONS if name in protocol})
        return Plan(tuple(experiments), protocol, metrics, asked)
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist; give a JSON list of experiments") from error
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no list of experiments: {type(error).__name__}: {error}") from error


def parse_run(text: str) -> Experiment:
    """The experiment that METHOD:WEIGHT_BITS/ACT_BITS[,KEY=VALUE...] names."""
    found = RUN.fullmatch(text)
    if not found:
        raise InputError(f"a run is METHOD:W/A, such as lsq:4/8 or lsq:4/4,max_steps=100; got {text!r}")
    pairs = [pair.partition("=") for pair in (found["settings"] or "").split(",") if pair]
    settings = {key: value for key, _, value in pairs}
    bits = {"weight_bits": found["weights"], "act_bits": found["acts"]}
    changes = "".join(f"-{key}-{value}" for key, value in settings.items())
    name = f"{found['method']}-w{found['weights']}a{found['acts']}{changes}"
    return Experiment(re.sub(r"[^\w.-]", "_", name), methods.get(found["method"]).parse({**bits, **settings}))


def run_plan(
    plan: Plan, output: Path, *, model: str | None = None, device: str | None = None, cache: Path | None = None,
    begin: Callable[[Path], AbstractContextManager[Run]] = lambda folder: nullcontext(Run()),
    tell: Callable[[str], None] = lambda text: None, track: Track = plain,
) -> Results:
    """Does what is missing of the plan in the folder `output`. `begin` gives the saved run of an experiment's folder."""
    plan = replace(plan, conditioning=complete(serialization.open_any(model, device=device), plan.conditioning))
    recall = share_recording(model, device, plan.conditioning, track)
    bench = Bench(model, output, plan, device, cache, begin, track, recall)
    reports = {FLOAT: measure_float(bench)}
    missing = [experiment for experiment in plan.experiments if not is_done(experiment, bench)]
    if missing:
        minutes = max(1, round(estimate_minutes(missing, reports[FLOAT])))
        tell(f"{len(missing)} of {len(plan.experiments)} experiments to do, about {minutes} min")
    failures = {}
    for experiment in sorted(plan.experiments, key=lambda experiment: experiment.cost):
        started = time.monotonic()
        try:
            reports[experiment.name] = run_experiment(experiment, bench)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001  whatever it was, the other experiments are not to blame
            failures[experiment.name] = str(error) if isinstance(error, DmquantError) else f"{type(error).__name__}: {error}"
            tell(f"{experiment.name} failed: {failures[experiment.name]}")
            continue
        if experiment in missing:
            tell(f"{experiment.name}: done in {(time.monotonic() - started) / 60:.1f} min")
    order = [FLOAT, *(experiment.name for experiment in plan.experiments if experiment.name in reports)]
    return Results({name: reports[name] for name in order}, failures)


def estimate_minutes(experiments: Sequence[Experiment], float_report: Report) -> float:
    """Time to quantize and evaluate, by how fast the float model was; each recording counts once."""
    protocol = float_report.protocol
    call_s = float_report.seconds_per_image / protocol.steps
    recordings = {(e.method.trajectories, e.method.sampling_steps, e.method.eta, e.seed) for e in experiments}
    calls = sum(trajectories * steps for trajectories, steps, *_ in recordings) + sum(e.cost_when_recorded for e in experiments)
    evaluation = len(experiments) * protocol.num_images * float_report.seconds_per_image
    return (call_s * calls + evaluation) / 60


def measure_float(bench: Bench) -> Report:
    folder = bench.output / FLOAT
    report = _find_report(folder, bench.plan, bench.plan.float_metrics)
    if report is None:
        report = _evaluate(bench.open(), bench, bench.plan.float_metrics)
        report.save(folder)
    return report


def is_done(experiment: Experiment, bench: Bench) -> bool:
    folder = bench.output / experiment.name
    return is_quantized(folder) and _find_report(folder, bench.plan, bench.plan.metrics) is not None


def run_experiment(experiment: Experiment, bench: Bench) -> Report:
    """The report of an experiment, quantized and evaluated where that was not done before."""
    folder = bench.output / experiment.name
    if (folder / atomic_folder.MANIFEST).is_file():
        refuse_other(experiment, folder, bench.plan.conditioning)
    else:
        pipeline, method, asked = bench.open(), experiment.method, bench.plan.conditioning
        with bench.begin(folder) as run:
            samples = bench.recall(method.trajectories, method.sampling_steps, method.eta, experiment.seed)
            how = {"seed": experiment.seed, "conditioning": asked, "samples": samples, "run": run, "track": bench.track}
            quantized = quantize(pipeline, method, **how)
            serialization.save(quantized, folder)
            find_target(quantized).denoiser.dmquant_effort.save(folder)
    report = _find_report(folder, bench.plan, bench.plan.metrics)
    if report is not None and (report.layers or LAYERS not in bench.plan.metrics):
        return report
    pipeline = serialization.load(folder, device=bench.device)
    if report is None:
        report = _evaluate(pipeline, bench, bench.plan.metrics)
    else:  # all but the layers was measured before
        report = add_layers(report, pipeline, bench.open(), conditioning=bench.plan.conditioning, track=bench.track)
    report.save(folder)
    return report


def refuse_other(experiment: Experiment, folder: Path, asked: Conditioning) -> None:
    """Raises InputError where the folder holds a pipeline that was made otherwise."""
    record = serialization.read_record(folder)
    here = {"method": experiment.method.name, "seed": experiment.seed, **experiment.method.settings(), **asked.describe()}
    there = {**record, **record.get("settings", {})}
    differing = [f"{key} was {there[key]}, now {value}" for key, value in here.items() if key in there and there[key] != value]
    if differing:
        raise InputError(f"{folder} holds another experiment: {'; '.join(differing)}. Give it another name, or remove the folder")


def share_recording(
    model: str | None, device: str | None, asked: Conditioning, track: Track
) -> Callable[[int, int, float, int], Samples]:
    """Records the float model's trajectories (their number, steps, eta, seed) when first asked, and once."""
    @cache
    def recall(trajectories: int, steps: int, eta: float, seed: int) -> Samples:
        pipeline = serialization.open_any(model, device=device)
        return record(pipeline, trajectories, steps=steps, eta=eta, seed=seed, conditioning=asked, track=track)

    return recall


def _evaluate(pipeline: DiffusionPipeline, bench: Bench, metrics: Sequence[str]) -> Report:
    base = bench.open() if Choice(tuple(metrics)).needs_float_model else None
    return evaluate(
        pipeline, metrics=metrics, conditioning=bench.plan.conditioning, float_pipeline=base, cache=bench.cache,
        track=bench.track, **bench.plan.protocol,
    )


def _find_report(folder: Path, plan: Plan, metrics: Sequence[str]) -> Report | None:
    """The report in a folder, where it was taken by the protocol of the plan and has its metrics; layers may be added later."""
    if not (folder / FILE_NAME).is_file():
        return None
    report = Report.load(folder)
    taken, measured = asdict(report.protocol), {split_name(name)[0] for name in report.metrics}
    # a reference is asked for by its place and recorded by its name
    wanted = {**plan.protocol, **plan.conditioning.describe()}
    differs = any(taken[name] != value for name, value in wanted.items() if name != "reference")
    asked = {"recall" if name == "prdc" else name for name in metrics if name != LAYERS}
    return report if not differs and asked <= measured else None


def _read_conditioning(given: dict[str, Any]) -> Conditioning:
    """What a file asks of a conditional pipeline: the name of a file of prompts, a list of class labels, a guidance scale."""
    prompts, labels, guidance = given.get("prompts"), given.get("class_labels", []), given.get("guidance_scale")
    if type(labels) is not list or any(type(label) is not int for label in labels):
        raise InputError(f"class_labels should be a list of whole numbers, not {labels!r}")
    if guidance is not None and type(guidance) not in (int, float):
        raise InputError(f"guidance_scale should be a number, not {guidance!r}")
    return Conditioning(() if prompts is None else read_prompts(Path(prompts)), tuple(labels), guidance)


def _read_run(run: dict[str, Any], seed: int | None, suffix: str) -> Experiment:
    """An experiment of a file. A file with seeds has them for all."""
    own = run.pop("seed", 0)
    name = f"{run.pop('name')}{suffix}"
    if not name or Path(name).name != name or name.startswith("."):
        raise InputError(f"{name!r} cannot be the name of a folder")
    return Experiment(name, methods.get(run.pop("method")).parse(run), own if seed is None else seed)
