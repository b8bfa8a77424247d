"""Measures the time and memory that each method needs to reach a given quality.

    python benchmarks/finetune_cost.py --run lsq:4/4 --run efficientdm:4/4 --run dilatequant:4/4 -o runs/finetune-cost

A point is one run of `dmquant quantize` in its own process, whose peak memory is measured, followed by `dmquant eval`. Learning
rates decay over the length of a run. Therefore a point with a quarter of the steps is a run with a quarter of max_steps, and
not the state of a longer run. The goal is the distance of the first method after all its steps. The time to reach it is
interpolated between the first two neighbouring points that enclose it. Times are sums over all stages, both wall-clock and
processor time; on a busy machine use the latter. With several seeds a point is their mean.

The same command continues after an interrupt: it keeps complete points, and runs an interrupted one again from the beginning.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import mean

import torch

from dmquant.cli.console import print_message, print_table
from dmquant.evaluation.reports import report
from dmquant.evaluation.sweep_plan import Experiment, parse_run
from dmquant.training import run_cost

RESULT = Path(__file__).parent / "results" / "finetune_cost.json"
STAGES = ("recording", "calibration", "fine-tuning", "clipping")
HEADINGS = (
    "run", "steps", "trained, M", "share", "record, s", "calibrate, s", "fine-tune, s", "clip, s", "CPU, s", "peak, MB",
    "training adds, MB", "distance",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A run of one length: its cost and its distances."""

    steps: int
    seconds: dict[str, float]  # by stage
    cpu_seconds: dict[str, float]
    peak_bytes: dict[str, int | None]  # by stage, beyond what the process held with the float pipeline loaded
    added_bytes: dict[str, int | None]  # by stage, beyond what it held as the stage began
    trained_params: int
    trained_share: float
    distances: list[float]  # by seed of training

    @property
    def distance(self) -> float:
        """Mean distance over the seeds."""
        return mean(self.distances)

    def total(self, clock: str) -> float:
        """Returns the seconds of all stages: wall-clock ("seconds") or processor time ("cpu_seconds")."""
        return sum(getattr(self, clock).values())

    @property
    def peak(self) -> int | None:
        """Largest peak of a stage in bytes; None if it is not known."""
        return max((peak for peak in self.peak_bytes.values() if peak is not None), default=None)


def main() -> None:
    args = parse_arguments()
    experiments = [parse_run(text) for text in args.run or ("lsq:4/4", "efficientdm:4/4")]
    curves = {}
    for experiment in experiments:
        lengths = sorted({round(share * experiment.method.max_steps) for share in args.shares})
        curves[experiment.name] = [measure(experiment, steps, args) for steps in lengths]
    print_table(HEADINGS, list_rows(curves), align="l" + "r" * (len(HEADINGS) - 1), notes=["", *list_notes(curves)])
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(summarize(curves, experiments, args), indent=2) + "\n", encoding="utf-8")
    print_message(f"wrote {args.result}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="append", help="METHOD:W/A[,KEY=VALUE...]; may be repeated; the first one sets the goal")
    parser.add_argument("--model", default="embedded", help="float pipeline; default: the embedded one")
    parser.add_argument("--shares", type=parse_shares, default="0,1/8,1/4,1/2,1", help="lengths as shares of max_steps")
    parser.add_argument("-n", "--num-images", type=int, default=2000, help="images per distance")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps per image")
    parser.add_argument("--seeds", type=parse_seeds, default="0", help="seeds of training, as in 0,1,2")
    parser.add_argument("--device")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the points")
    parser.add_argument("--result", type=Path, default=RESULT, help="file to write")
    return parser.parse_args()


def parse_seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_shares(text: str) -> list[Fraction]:
    shares = [Fraction(part) for part in text.split(",")]
    if not all(0 <= share <= 1 for share in shares) or 1 not in shares:
        raise argparse.ArgumentTypeError(f"shares must be from 0 to 1 and include 1, got {text}")
    return shares


def measure(experiment: Experiment, steps: int, args: argparse.Namespace) -> Point:
    """Returns the point of runs of this length; runs those that do not exist yet."""
    return average([measure_once(experiment, steps, seed, args) for seed in args.seeds])


def measure_once(experiment: Experiment, steps: int, seed: int, args: argparse.Namespace) -> Point:
    folder = args.output / f"{experiment.name}-{steps}-seed{seed}"
    where = ["--device", args.device] if args.device else []
    if not (folder / run_cost.FILE_NAME).is_file():
        method = experiment.method
        chosen = {**method.settings(), "max_steps": steps}
        settings = [part for key, value in chosen.items() for part in ("--set", f"{key}={write(value)}")]
        goes_to = ["--seed", str(seed), "--force", "-o", str(folder)]
        run_command(["quantize", args.model, "--method", method.name, *settings, *goes_to, *where])
    protocol = ["--num-images", str(args.num_images), "--steps", str(args.steps)]
    file = args.output / f"{folder.name}-n{args.num_images}-{args.steps}steps.json"
    if not file.is_file():
        run_command(["eval", str(folder), "--fid", *protocol, "-o", str(file), *where])
    return read_point(steps, folder, file)


def write(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def run_command(line: list[str]) -> None:
    """Runs `dmquant` in a new process with its output on stderr; raises SystemExit with its exit code if it fails."""
    code = subprocess.run([sys.executable, "-m", "dmquant", *line], stdout=sys.stderr).returncode
    if code:
        raise SystemExit(code)


def read_point(steps: int, folder: Path, file: Path) -> Point:
    taken = run_cost.Effort.load(folder)
    keys = ("seconds", "cpu_seconds", "peak_bytes", "added_bytes")
    measured = ({name: getattr(stage, key) for name, stage in taken.stages.items()} for key in keys)
    distance = next(iter(report.Report.load(file).metrics.values()))
    return Point(steps, *measured, taken.trained_params, taken.trained_share, [distance])


def average(points: Sequence[Point]) -> Point:
    """Returns the mean of runs with different seeds."""

    def by_stage(key: str) -> dict[str, float | None]:
        stages = [getattr(point, key) for point in points]
        return {name: None if None in (values := [stage[name] for stage in stages]) else mean(values) for name in stages[0]}

    measured = {key: by_stage(key) for key in ("seconds", "cpu_seconds", "peak_bytes", "added_bytes")}
    return replace(points[0], **measured, distances=[distance for point in points for distance in point.distances])


def find_time(points: Sequence[Point], goal: float, clock: Callable[[Point], float]) -> float | None:
    """Returns the time at which the curve first reaches the distance `goal`, interpolated between points; None: never.

    It is the time of the first point if that one is below the goal already.
    """
    for number, point in enumerate(points):
        if point.distance > goal:
            continue
        if number == 0:
            return clock(point)
        before = points[number - 1]
        share = (before.distance - goal) / (before.distance - point.distance)
        return clock(before) + share * (clock(point) - clock(before))
    return None


def compare(points: Sequence[Point], goal: Point) -> dict[str, float | None]:
    """Returns time and memory of the run that set the goal divided by those of this method; larger is better."""
    found: dict[str, float | None] = {}
    for clock in ("seconds", "cpu_seconds"):
        whole = find_time(points, goal.distance, lambda point: point.total(clock))
        training = find_time(points, goal.distance, lambda point: getattr(point, clock)["fine-tuning"])
        found[f"{clock}_to_goal"] = whole
        found[f"{clock}_ratio"] = goal.total(clock) / whole if whole else None
        found[f"fine_tuning_{clock}_ratio"] = getattr(goal, clock)["fine-tuning"] / training if training else None
    own, other = points[-1].added_bytes["fine-tuning"], goal.added_bytes["fine-tuning"]
    return found | {
        "memory_ratio": goal.peak / points[-1].peak if points[-1].peak else None,
        "fine_tuning_memory_ratio": other / own if own and other else None,
    }


def list_rows(curves: dict[str, list[Point]]) -> list[list[str]]:
    return [
        [
            name, str(point.steps), f"{point.trained_params / 1e6:.2f}", f"{point.trained_share:.1%}",
            *(f"{point.seconds.get(stage, 0):.1f}" for stage in STAGES),
            f"{point.total('cpu_seconds'):.1f}", write_megabytes(point.peak),
            write_megabytes(point.added_bytes.get("fine-tuning")), f"{point.distance:.4f}",
        ]
        for name, points in curves.items() for point in points
    ]  # fmt: skip


def write_megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def list_notes(curves: dict[str, list[Point]]) -> list[str]:
    (first, points), *others = curves.items()
    goal = points[-1]
    notes = [f"goal: {goal.distance:.4f}, of {first} after {goal.steps} steps and {goal.total('seconds'):.0f} s"]
    for name, curve in others:
        found = compare(curve, goal)
        if found["seconds_to_goal"] is None:
            notes.append(f"{name}: does not reach the goal; its best is {min(point.distance for point in curve):.4f}")
        else:
            times = f"{found['seconds_ratio']:.2f} x as fast ({found['cpu_seconds_ratio']:.2f} x by processor time)"
            notes.append(f"{name}: at the goal in {found['seconds_to_goal']:.0f} s, {times}")
        if found["memory_ratio"]:
            added = f"; training adds 1/{found['fine_tuning_memory_ratio']:.2f}" if found["fine_tuning_memory_ratio"] else ""
            notes.append(f"{name}: peak memory 1/{found['memory_ratio']:.2f} of the first run's{added}")
    return notes


def summarize(curves: dict[str, list[Point]], experiments: Sequence[Experiment], args: argparse.Namespace) -> dict:
    goal = curves[experiments[0].name][-1]
    return {
        "protocol": {"model": args.model, "num_images": args.num_images, "steps": args.steps, "seeds": args.seeds},
        "conditions": {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": args.device or "default"},
        "goal": {"run": experiments[0].name, "distance": goal.distance, "seconds": goal.total("seconds")},
        "runs": [
            {
                "name": experiment.name, "method": experiment.method.name, "settings": experiment.method.settings(),
                "points": [asdict(point) | {"distance": point.distance} for point in curves[experiment.name]],
                **compare(curves[experiment.name], goal),
            }
            for experiment in experiments
        ],
    }  # fmt: skip


if __name__ == "__main__":
    main()
