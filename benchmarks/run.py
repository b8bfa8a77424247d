"""Runs a list of experiments under one protocol: quantize, save, evaluate; then writes their table.

    python benchmarks/run.py benchmarks/experiments/lsq.json -o runs/lsq

Each experiment is a folder with its packed pipeline and report.json. One that is there is not run again, so an interrupted
list continues where it stopped. The table and the reports' JSON go to benchmarks/results/<name>.{md,json}.
"""

import argparse
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import dmquant
from dmquant import checkpoint, methods
from dmquant.console import Tracker, say
from dmquant.denoiser import open_pipeline
from dmquant.report import Report
from dmquant.samples import Samples, record

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for pipelines and reports")
    parser.add_argument("--model", help="float pipeline; default: the embedded one")
    args = parser.parse_args()
    plan = json.loads(args.experiments.read_text())
    reports = [evaluate_float(args.model, args.output / "float", plan["protocol"])]
    reports += [run(args.model, experiment, args.output, plan["protocol"]) for experiment in plan["runs"]]
    write(args.experiments.stem, reports)


def evaluate_float(model: str | None, folder: Path, protocol: dict[str, Any]) -> Report:
    if not (folder / "report.json").exists():
        dmquant.evaluate(open_pipeline(model), metrics=("fid",), track=Tracker(), **protocol).save(folder)
    return Report.load(folder)


def run(model: str | None, experiment: dict[str, Any], output: Path, protocol: dict[str, Any]) -> Report:
    settings = dict(experiment)
    folder, seed = output / settings.pop("name"), settings.pop("seed", 0)
    if not (folder / "MANIFEST.json").exists():
        method = methods.get(settings.pop("method")).parse(settings)
        samples = share_recording(model, method.trajectories, method.sampling_steps, seed)
        started = time.monotonic()
        quantized = dmquant.quantize(open_pipeline(model), method, seed=seed, samples=samples, track=Tracker())
        dmquant.save(quantized, folder)
        say(f"{folder.name}: quantized in {time.monotonic() - started:.0f} s")
    if not (folder / "report.json").exists():
        report = dmquant.evaluate(checkpoint.load(folder), metrics=("fid", "psnr"), track=Tracker(), **protocol)
        report.save(folder)
        say(f"{folder.name}: {report.metrics}")
    return Report.load(folder)


@cache
def share_recording(model: str | None, trajectories: int, steps: int, seed: int) -> Samples:
    """The teacher's calls that all experiments of one seed learn from, recorded once."""
    return record(open_pipeline(model), trajectories, steps=steps, seed=seed, track=Tracker())


def write(name: str, reports: list[Report]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(dmquant.compare(reports).to_markdown(), encoding="utf-8")
    documents = [json.loads(report.to_json()) for report in reports]
    (RESULTS / f"{name}.json").write_text(json.dumps(documents, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
