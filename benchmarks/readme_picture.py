"""Draws the picture of the README: one row for the embedded float pipeline and each quantized one, with equal seeds.

The folders are those of pipelines that were quantized with default settings:

    dmquant quantize --method lsq --wbits 4 --abits 4 -o runs/readme/w4a4
    dmquant quantize --method binarydm --wbits 1 --abits 4 -o runs/readme/w1a4
    python benchmarks/readme_picture.py runs/readme/w4a4 runs/readme/w1a4 -o docs/images/samples.png
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import dmquant
from dmquant.diffusion.pipeline import find_target
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.evaluation.cost import measure_cost
from dmquant.evaluation.image_grid import stack_rows

STEPS = 20  # as in the evaluations of benchmarks/results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quantized", nargs="+", type=Path, help="folders of quantized pipelines")
    parser.add_argument("-n", "--num-images", type=int, default=8, help="seeds 0 to n - 1")
    parser.add_argument("--side", type=int, default=96, help="pixels of a tile")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    pipelines = [dmquant.load(), *(dmquant.load(folder) for folder in args.quantized)]
    rows = {describe(pipeline): draw(pipeline, args.num_images, args.side) for pipeline in pipelines}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    stack_rows(rows).save(args.output, optimize=True)


def describe(pipeline: DiffusionPipeline) -> str:
    """Returns the caption of a row: bits, method and size of the denoiser."""
    denoiser = find_target(pipeline).denoiser
    cost, record = measure_cost(denoiser), getattr(denoiser, "dmquant_record", None)
    if record is None:
        return f"float: {cost.float_size_bytes / 1e6:.2f} MB"
    return f"W{record['weight_bits']}A{record['act_bits']}, {record['method']}: {cost.size_bytes / 1e6:.2f} MB"


def draw(pipeline: DiffusionPipeline, count: int, side: int) -> Tensor:
    """Returns images of seeds 0 to count - 1, uint8 (N, 3, H, W), enlarged without smoothing to `side` pixels or more."""
    images = torch.cat(list(generate(pipeline, range(count), SamplingPlan(STEPS, count))))
    zoom = -(-side // images.shape[-1])
    return images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)


if __name__ == "__main__":
    main()
