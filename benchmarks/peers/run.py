"""Quantizes a pipeline by other tools at the same bits and evaluates it by our protocol; `dmquant compare` shows both.

    python benchmarks/peers/run.py quanto:8/32 quanto:8/8 quanto:4/32 quanto:2/32 torchao:8/32 -o runs/peers -n 200
    dmquant compare runs/peers runs/ours

Each tool runs with its own defaults on everything that it can quantize: a user gets that for one call. Activations of quanto
are calibrated along the pipeline's own trajectories, as we record them.
"""

import argparse
import copy
import re
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dmquant.diffusion.layer_roles import named_layers
from dmquant.diffusion.other_tools import layer_bits
from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.diffusion.trajectories import record
from dmquant.errors import InputError
from dmquant.evaluation.evaluator import evaluate
from dmquant.evaluation.image_cache import default_folder

FLOAT_BITS = 32
NAME = re.compile(r"(\w+):(\d+)/(\d+)")
TRAJECTORIES, STEPS, BATCH = 8, 20, 32  # of the calibration of activations


def main() -> None:
    given = read_arguments()
    torch.set_num_threads(given.threads)
    base = open_pipeline(given.model)
    for name in given.peers:
        tool, weight_bits, act_bits = read_name(name)
        folder = given.output / f"{tool}-w{weight_bits}a{act_bits}"
        peer = make_peer(base, tool, weight_bits, act_bits)
        how = {"num_images": given.num_images, "steps": given.steps, "batch": given.batch, "cache": default_folder()}
        report = evaluate(peer, metrics=("fid", "psnr"), float_pipeline=base, **how)
        settings = {"layers": count_layers(find_target(peer).denoiser)}
        replace(report, model=str(folder), settings=settings, base_model=report.model).save(folder)
        print(f"wrote {folder}: {settings['layers']}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="+", help="TOOL:W/A, such as quanto:4/32; 32 = float")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--model", help="float pipeline; default: the embedded one")
    parser.add_argument("-n", "--num-images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def read_name(name: str) -> tuple[str, int, int]:
    found = NAME.fullmatch(name)
    if not found or found[1] not in PEERS:
        raise InputError(f"a peer is TOOL:W/A with one of {', '.join(PEERS)}, such as quanto:4/32; got {name!r}")
    return found[1], int(found[2]), int(found[3])


@torch.no_grad()
def make_peer(base: DiffusionPipeline, tool: str, weight_bits: int, act_bits: int) -> DiffusionPipeline:
    """The pipeline with its denoiser quantized by the tool; the one given stays as it is."""
    target = find_target(base)
    student = copy.deepcopy(target.denoiser)
    PEERS[tool](student, weight_bits, act_bits, base)
    return target.with_denoiser(student).pipeline


def quantize_by_quanto(denoiser: nn.Module, weight_bits: int, act_bits: int, base: DiffusionPipeline) -> None:
    """Linear layers, convolutions and, with activations, norms: everything quanto knows. Weights per channel."""
    from optimum import quanto

    if weight_bits not in (2, 4, 8) or act_bits not in (8, FLOAT_BITS):
        raise InputError(f"quanto has weights of 2, 4 and 8 bits and activations of 8 or 32, not {weight_bits}/{act_bits}")
    activations = quanto.qint8 if act_bits < FLOAT_BITS else None
    quanto.quantize(denoiser, weights=getattr(quanto, f"qint{weight_bits}"), activations=activations)
    if act_bits < FLOAT_BITS:
        with quanto.Calibration():
            for part in record(base, TRAJECTORIES, steps=STEPS, seed=0).split(BATCH):
                part.call(denoiser)
    quanto.freeze(denoiser)


def quantize_by_torchao(denoiser: nn.Module, weight_bits: int, act_bits: int, base: DiffusionPipeline) -> None:
    """Linear layers only: convolutions stay in float."""
    from torchao import quantization

    configs = {
        (8, FLOAT_BITS): lambda: quantization.Int8WeightOnlyConfig(),
        (8, 8): lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        **{(bits, FLOAT_BITS): lambda bits=bits: intx_config(bits) for bits in range(1, 8)},
    }
    if (weight_bits, act_bits) not in configs:
        raise InputError(f"torchao has weights of 1 to 8 bits at 32 for activations, and 8/8, not {weight_bits}/{act_bits}")
    quantization.quantize_(denoiser, configs[weight_bits, act_bits]())


def intx_config(bits: int) -> object:
    """Weights of so many bits, one scale per output channel, held in int8 tensors: torchao packs them for phones only."""
    from torchao import quantization
    from torchao.quantization.granularity import PerAxis

    return quantization.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0))


def count_layers(denoiser: nn.Module) -> str:
    """How many of the layers the tool has quantized, and what it left."""
    layers = named_layers(denoiser).values()
    left = [layer for layer in layers if layer_bits(layer) is None]
    kinds = sorted({type(layer).__name__ for layer in left})
    rest = f"; left in float: {', '.join(kinds)}" if left else ""
    return f"{len(layers) - len(left)} of {len(layers)} layers quantized{rest}"


PEERS = {"quanto": quantize_by_quanto, "torchao": quantize_by_torchao}


if __name__ == "__main__":
    main()
