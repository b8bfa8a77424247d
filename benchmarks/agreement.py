"""Measures the relative difference between the outputs of a packed denoiser with kernels and without, for equal inputs.

    python benchmarks/agreement.py runs/all/*-w?a? -o benchmarks/results/agreement.json

Differences are L2 norms, relative to the output, at each timestep of a sampler with noise as input. With integer sums in torch
(DMQUANT_KERNELS=exact) the outputs should be equal. With float sums torch rounds, and some values near the middle of two codes
get the other code; from there on outputs differ by steps of a grid. The same happens between two memory layouts in torch, which
adds the products in another order for channels last: that difference is measured too.
"""

import argparse
import copy
import json
import os
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from dmquant import load
from dmquant.diffusion.pipeline import find_target
from dmquant.nn.fused import unet

IMAGES = 2
BOUND = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="folders of quantized pipelines")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    found = {folder.name: measure(folder, args.steps) for folder in args.models}
    print(table(found))
    if args.output:
        args.output.write_text(json.dumps({"torch": torch.__version__, "models": found}, indent=2) + "\n")


@torch.no_grad()
def measure(folder: Path, steps: int) -> dict[str, dict[str, float]]:
    """Returns for each pair of variants the median and the largest difference, and the number of steps within BOUND."""
    pipe, generator = load(str(folder)), torch.Generator().manual_seed(0)
    plain = find_target(pipe).denoiser
    unet.unfuse(plain)
    models = {(kernels, is_fused): copy.deepcopy(plain) for kernels in ("c", "exact") for is_fused in (False, True)}
    for (_, is_fused), model in models.items():
        if is_fused:
            unet.fuse(model)
    shape = (IMAGES, plain.config.in_channels, *[plain.config.sample_size] * 2)
    apart: dict[str, list[float]] = {}
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps:
        x = torch.randn(shape, generator=generator)
        y = {key: call_denoiser(model, x, timestep, key[0]) for key, model in models.items()}
        in_floats = call_denoiser(plain, x, timestep, "torch")
        last = call_denoiser(plain, x.contiguous(memory_format=torch.channels_last), timestep, "torch")
        pairs = {
            "whole sums": (y["c", False], y["exact", False]), "whole sums, fused": (y["c", True], y["exact", True]),
            "float sums, fused": (y["c", True], in_floats), "float sums, torch in another layout": (last, in_floats),
        }  # fmt: skip
        for name, (found, wanted) in pairs.items():
            apart.setdefault(name, []).append(float((found - wanted).norm() / wanted.norm()))
    return {name: summary(values) for name, values in apart.items()}


def call_denoiser(model: nn.Module, x: Tensor, timestep: Tensor, kernels: str) -> Tensor:
    os.environ["DMQUANT_KERNELS"] = kernels  # a layer reads it at its first call, when it chooses a kernel
    return model(x, timestep).sample


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values), "largest": max(values), "within_bound": sum(value <= BOUND for value in values),
        "steps": len(values),
    }  # fmt: skip


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    names = list(next(iter(found.values())))
    lines = ["| model | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for model, row in found.items():
        parts = ((part["median"], part["largest"], part["within_bound"]) for part in map(row.get, names))
        cells = (f"{median:.1e} to {most:.1e} ({count})" if most else f"0 ({count})" for median, most, count in parts)
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
