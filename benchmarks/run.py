"""Runs a list of experiments under one protocol: quantize, save, evaluate; then writes their table.

    python benchmarks/run.py benchmarks/experiments/lsq.json -o runs/lsq

Each experiment is a folder with its packed pipeline and report.json. One that is there is not run again, so an interrupted
list continues where it stopped, and `--share 1/3` takes every third one: several processes, one folder. A list with
"seeds" runs each experiment once for each training seed. The last process writes the table and the reports to
benchmarks/results/<name>.{md,json}.
"""

import argparse
import json
import time
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import dmquant
from dmquant import checkpoint, methods
from dmquant.console import Tracker, say
from dmquant.denoiser import open_pipeline
from dmquant.report import Report
from dmquant.samples import Samples, record

RESULTS = Path(__file__).parent / "results"
FLOAT = "float"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for pipelines and reports")
    parser.add_argument("--model", help="float pipeline; default: the embedded one")
    parser.add_argument("--share", default="1/1", help="which part of the list this process runs, as 1/3")
    args = parser.parse_args()
    plan = json.loads(args.experiments.read_text())
    jobs = [{"name": FLOAT}, *expand(plan)]
    number, count = map(int, args.share.split("/"))
    for job in jobs[number - 1::count]:
        run(args.model, job, args.output / job["name"], plan["protocol"])
    if all((args.output / job["name"] / "report.json").exists() for job in jobs):
        write(args.experiments.stem, {job["name"]: Report.load(args.output / job["name"]) for job in jobs})


def expand(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """One job for each experiment and training seed; all experiments with the first seed come first."""
    if "seeds" not in plan:
        return plan["runs"]
    return [{**job, "name": f"{job['name']}-seed{seed}", "seed": seed} for seed in plan["seeds"] for job in plan["runs"]]


def run(model: str | None, job: dict[str, Any], folder: Path, protocol: dict[str, Any]) -> None:
    """Quantizes and evaluates one experiment, as far as that is not done."""
    if (folder / "report.json").exists():
        return
    if job["name"] == FLOAT:
        dmquant.evaluate(open_pipeline(model), metrics=("fid",), track=Tracker(), **protocol).save(folder)
        return
    if not (folder / "MANIFEST.json").exists():
        quantize(model, job, folder)
    report = dmquant.evaluate(checkpoint.load(folder), metrics=("fid", "psnr"), track=Tracker(), **protocol)
    report.save(folder)
    say(f"{folder.name}: {report.metrics}")


def quantize(model: str | None, job: dict[str, Any], folder: Path) -> None:
    settings = {key: value for key, value in job.items() if key not in ("name", "seed", "method")}
    method, seed = methods.get(job["method"]).parse(settings), job.get("seed", 0)
    samples = share_recording(model, method.trajectories, method.sampling_steps, seed)
    started = time.monotonic()
    quantized = dmquant.quantize(open_pipeline(model), method, seed=seed, samples=samples, track=Tracker())
    dmquant.save(quantized, folder)
    say(f"{folder.name}: quantized in {time.monotonic() - started:.0f} s")


@cache
def share_recording(model: str | None, trajectories: int, steps: int, seed: int) -> Samples:
    """The teacher's calls that all experiments of one seed learn from, recorded once."""
    return record(open_pipeline(model), trajectories, steps=steps, seed=seed, track=Tracker())


def write(name: str, reports: dict[str, Report]) -> None:
    """The table of all reports, that of the means over training seeds, and the reports."""
    RESULTS.mkdir(exist_ok=True)
    table = dmquant.compare(list(reports.values())).to_markdown()
    (RESULTS / f"{name}.md").write_text(f"{summarize(reports)}\n{table}", encoding="utf-8")
    documents = [json.loads(report.to_json()) for report in reports.values()]
    (RESULTS / f"{name}.json").write_text(json.dumps(documents, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def summarize(reports: dict[str, Report]) -> str:
    """One row per experiment: each metric's mean over training seeds, and its least and largest value."""
    groups: dict[str, list[Report]] = {}
    for job, report in reports.items():
        groups.setdefault(job.partition("-seed")[0], []).append(report)
    metrics = sorted({metric for report in reports.values() for metric in report.metrics})
    lines = [f"| experiment | seeds | {' | '.join(metrics)} |", f"|---|--:|{'--:|' * len(metrics)}"]
    for experiment, members in groups.items():
        cells = [describe([report.metrics[metric] for report in members if metric in report.metrics]) for metric in metrics]
        lines.append(f"| {experiment} | {len(members)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
