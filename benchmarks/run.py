"""Runs a list of experiments under one protocol, then writes their tables.

    python benchmarks/run.py benchmarks/experiments/lsq.json -o runs/lsq

Each experiment is a folder with its packed pipeline and report.json. Complete ones are not run again, so an interrupted list
continues where it stopped. `--share 1/3` runs every third one: several processes can share a folder. The last process to end
writes the means over training seeds, the table and the reports to benchmarks/results/<name>.{md,json}.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import dmquant
from dmquant.cli.console import Tracker, print_message
from dmquant.evaluation.reports.report import Report
from dmquant.evaluation.sweep import run_plan
from dmquant.evaluation.sweep_plan import FLOAT, read_plan

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for pipelines and reports")
    parser.add_argument("--model", help="float pipeline; default: the embedded one")
    parser.add_argument("--share", default="1/1", help="part of the list to run: 2/3 is every third, from the second on")
    args = parser.parse_args()
    plan = read_plan(args.experiments)
    number, count = map(int, args.share.split("/"))
    share = replace(plan, experiments=plan.experiments[number - 1 :: count])
    failures = run_plan(share, args.output, model=args.model, tell=print_message, track=Tracker()).failures
    names = [FLOAT, *(experiment.name for experiment in plan.experiments)]
    if not failures and all((args.output / name / "report.json").exists() for name in names):
        write(args.experiments.stem, {name: Report.load(args.output / name) for name in names})


def write(name: str, reports: dict[str, Report]) -> None:
    """Writes the table of all reports, that of the means over training seeds, and the reports without their layers."""
    RESULTS.mkdir(exist_ok=True)
    table = dmquant.compare(list(reports.values())).to_markdown()
    (RESULTS / f"{name}.md").write_text(f"{summarize(reports)}\n{table}", encoding="utf-8")
    documents = [json.loads(replace(report, layers=()).to_json()) for report in reports.values()]
    (RESULTS / f"{name}.json").write_text(json.dumps(documents, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def summarize(reports: dict[str, Report]) -> str:
    """Returns a table with one row per experiment: mean, least and largest value of each metric over training seeds."""
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
