"""Measures the time of a quantized training step relative to the same step in float, both in one process in turns.

    python benchmarks/finetune_throughput.py -o benchmarks/results/finetune_throughput.json

A step is forward, backward, clipping and update of the embedded denoiser on recorded samples with stored teacher outputs.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dmquant import methods
from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.diffusion.trajectories import record
from dmquant.quantizers.timestep_clock import Clock
from dmquant.training.calibration import observe_inputs, observe_weights
from dmquant.training.objectives import Distillation
from dmquant.training.trainer import Training, parameter_groups, start_optimizer, step_generator


def main() -> None:
    args = parse_arguments()
    pipeline = open_pipeline(args.model)
    samples = record(pipeline, 8, steps=8, seed=0)
    teacher = find_target(pipeline).denoiser.eval()
    method = methods.get("lsq")(weight_bits=args.wbits, act_bits=args.abits, batch=args.batch)
    student = copy.deepcopy(teacher)
    method.prepare(student, Clock(samples.timestep.unique()))
    observe_weights(student)
    observe_inputs(student, samples, batch=args.batch)
    objective, training = Distillation(samples, torch.ones(len(samples))), method.training()
    models = {"float": copy.deepcopy(teacher), "quantized": student}
    steps = {name: make_step(model, objective, training) for name, model in models.items()}
    seconds = time_in_turns(steps, args.repeats)
    result = summarize(seconds, args)
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="float pipeline; default: the embedded one")
    parser.add_argument("--wbits", type=int, default=4)
    parser.add_argument("--abits", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def make_step(model: nn.Module, objective: Distillation, training: Training) -> Callable[[int], None]:
    """Returns a function that does one training step of the model as `dmquant.training.trainer.fit` does."""
    _, optimizer = start_optimizer(parameter_groups(model, training))

    def step(number: int) -> None:
        generator = step_generator(0, number, 0)
        loss = objective.loss(model, training.batch, step=number, generator=generator, device=torch.device("cpu"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_in_turns(steps: dict[str, Callable[[int], None]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step(number)
            seconds[name].append(time.perf_counter() - started)
    return {name: values[2:] for name, values in seconds.items()}  # the first two warm up


def summarize(seconds: dict[str, list[float]], args: argparse.Namespace) -> dict:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    least = {name: min(values) for name, values in seconds.items()}
    return {
        "bits": f"W{args.wbits}A{args.abits}",
        "batch": args.batch,
        "repeats": args.repeats,
        "median_seconds": {name: round(value, 4) for name, value in median.items()},
        "minimum_seconds": {name: round(value, 4) for name, value in least.items()},
        "ratio_of_medians": round(median["quantized"] / median["float"], 3),
        "ratio_of_minima": round(least["quantized"] / least["float"], 3),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
