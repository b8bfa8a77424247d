"""Lists of experiments and their protocol, from a JSON file or from the command line."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dmquant import methods
from dmquant.diffusion.conditioning import Conditioning
from dmquant.diffusion.prompts import read_prompts
from dmquant.errors import InputError
from dmquant.evaluation.metrics.layer_sqnr import NAME as LAYERS
from dmquant.evaluation.metrics.registry import MetricSelection, select_metrics
from dmquant.methods.base import Method

FLOAT = "float"  # name of the folder of the float model's report
DEFAULT_METRICS = ("fid", "psnr")
PROTOCOL = {"num_images": 1000, "seed": 0, "steps": 20, "batch": 50}  # defaults of a plan
PROTOCOL_NAMES = (*PROTOCOL, "sampler", "reference", "extractor")
CONDITIONS = ("prompts", "class_labels", "guidance_scale")  # keys of a protocol in a file
CALLS_PER_SAMPLE = 4  # denoiser calls per training step: forward (1), backward (2), a third more for the quantizers
CLIP_DRAWS = 6  # passes over the images that set the clip range: one of the float model, about five for the ranges tried
RUN = re.compile(r"(?P<method>[\w.-]+):(?P<weights>\d+)/(?P<acts>\d+)(?:,(?P<settings>.+))?")


@dataclass(frozen=True)
class Experiment:
    """A method with its settings and seed; `name` is the name of its folder."""

    name: str
    method: Method
    seed: int = 0

    @property
    def cost(self) -> int:
        """Cost of quantizing in denoiser calls on one sample, with the recording of the trajectories."""
        return self.method.trajectories * self.method.sampling_steps + self.cost_when_recorded

    @property
    def cost_when_recorded(self) -> int:
        """Cost of training and of fitting the clip range, in denoiser calls on one sample."""
        method = self.method
        training = CALLS_PER_SAMPLE * method.max_steps * method.batch
        return training + CLIP_DRAWS * method.clip_images * method.sampling_steps


@dataclass(frozen=True)
class Plan:
    """Experiments, the protocol of their evaluation, and the metrics."""

    experiments: tuple[Experiment, ...]
    given: dict[str, Any] = field(default_factory=dict)  # fields of the protocol: keyword arguments of evaluate
    metrics: tuple[str, ...] = DEFAULT_METRICS
    conditioning: Conditioning = Conditioning()  # of recording, training and evaluation

    def __post_init__(self) -> None:
        names = [experiment.name for experiment in self.experiments]
        twice = sorted({name for name in (FLOAT, *names) if (FLOAT, *names).count(name) > 1})
        if twice:
            raise InputError(f"{twice[0]!r} names two experiments; give each a name of its own")
        unknown = sorted(self.given.keys() - set(PROTOCOL_NAMES))
        if unknown:
            raise InputError(f"the protocol has no {unknown[0]!r}; it has {', '.join((*PROTOCOL_NAMES, *CONDITIONS))}")
        select_metrics(self.metrics, self.protocol["num_images"])

    @property
    def protocol(self) -> dict[str, Any]:
        return {**PROTOCOL, **self.given}

    def with_layers(self) -> "Plan":
        """Returns the plan with the metric "layers" added."""
        return replace(self, metrics=tuple(dict.fromkeys((*self.metrics, LAYERS))))

    @property
    def float_metrics(self) -> tuple[str, ...]:
        """The metrics that need no float model to compare with; if there are none, all: it is compared with itself."""
        return tuple(name for name in self.metrics if not MetricSelection((name,)).needs_float_model) or self.metrics


def read_plan(file: Path) -> Plan:
    """Returns the plan that a JSON file holds.

    Its form is {"protocol": {...}, "metrics": [...], "seeds": [...], "runs": [{"name", "method", settings}]}. With "seeds",
    every run is done with each of them.

    Raises:
        InputError: the file does not exist or is not valid.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        runs, seeds = document["runs"], document.get("seeds")
        named = [(run, seed, "" if seeds is None else f"-seed{seed}") for seed in seeds or [None] for run in runs]
        experiments = [_read_run(dict(run), seed, suffix) for run, seed, suffix in named]
        metrics = tuple(document.get("metrics", DEFAULT_METRICS))
        protocol = dict(document.get("protocol", {}))
        conditioning = _read_conditioning({name: protocol.pop(name) for name in CONDITIONS if name in protocol})
        return Plan(tuple(experiments), protocol, metrics, conditioning)
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist; give a JSON list of experiments") from error
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a valid list of experiments: {type(error).__name__}: {error}") from error


def parse_run(text: str) -> Experiment:
    """Returns the experiment of METHOD:WEIGHT_BITS/ACT_BITS[,KEY=VALUE...]; raises InputError for other text."""
    found = RUN.fullmatch(text)
    if not found:
        raise InputError(f"a run is METHOD:W/A, such as lsq:4/8 or lsq:4/4,max_steps=100; got {text!r}")
    pairs = [pair.partition("=") for pair in (found["settings"] or "").split(",") if pair]
    settings = {key: value for key, _, value in pairs}
    bits = {"weight_bits": found["weights"], "act_bits": found["acts"]}
    changes = "".join(f"-{key}-{value}" for key, value in settings.items())
    name = f"{found['method']}-w{found['weights']}a{found['acts']}{changes}"
    return Experiment(re.sub(r"[^\w.-]", "_", name), methods.get(found["method"]).parse({**bits, **settings}))


def _read_conditioning(given: dict[str, Any]) -> Conditioning:
    """Returns the conditioning of a plan in a file: path of a file of prompts, list of class labels, guidance scale."""
    prompts, labels, guidance = given.get("prompts"), given.get("class_labels", []), given.get("guidance_scale")
    if type(labels) is not list or any(type(label) is not int for label in labels):
        raise InputError(f"class_labels should be a list of whole numbers, not {labels!r}")
    if guidance is not None and type(guidance) not in (int, float):
        raise InputError(f"guidance_scale should be a number, not {guidance!r}")
    return Conditioning(() if prompts is None else read_prompts(Path(prompts)), tuple(labels), guidance)


def _read_run(run: dict[str, Any], seed: int | None, suffix: str) -> Experiment:
    """Returns an experiment of a file; `seed` (None: the run's own, default 0) and `suffix` come from the file's seeds."""
    own = run.pop("seed", 0)
    name = f"{run.pop('name')}{suffix}"
    if not name or Path(name).name != name or name.startswith("."):
        raise InputError(f"{name!r} cannot be the name of a folder; use letters, digits, - and _")
    return Experiment(name, methods.get(run.pop("method")).parse(run), own if seed is None else seed)
