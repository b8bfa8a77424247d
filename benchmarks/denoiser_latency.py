"""One call of whole denoisers, packed against float: real configurations, random weights, all variants in one process, in turns.

    python benchmarks/denoiser_latency.py --models embedded cifar ldm4 -o benchmarks/results/denoiser_latency.json

Times depend on shapes, not on values, so the weights are drawn and the grids are made up: W1 signs, other bits uniform codes.
Ends and time embedding are at 8 bits, as every method has them by default. Packed variants are fused as a loaded pipeline is, with
the factors of attention products in float, and at 8 bits ("A8 attention"); each is also run as diffusers wrote it ("unfused",
products in float). Read the ratios: rates fall when the machine is busy. On a machine that is busy with other things,
OMP_NUM_THREADS=1 and --processor-time leave out the time in which others ran.
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
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from dmquant import kernels, methods
from dmquant.attention import quantize_products
from dmquant.denoiser import ASSETS
from dmquant.kernels import fusion
from dmquant.packed import Format, empty_layer, layers_of, packed_layers
from dmquant.quantizers.base import FixedGrid

UNETS = {
    "embedded": json.loads((ASSETS / "pipeline" / "unet" / "config.json").read_text(encoding="utf-8")),
    "cifar": dict(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, norm_eps=1e-6, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
    "ldm4": dict(
        sample_size=64, block_out_channels=(224, 448, 672, 896), layers_per_block=2, attention_head_dim=32,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3), up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    ),
}  # fmt: skip
BATCHES = {"embedded": 50, "cifar": 4, "ldm4": 1, "sd15": 2, "dit": 2}
BITS = ((1, 4), (4, 4), (8, 8))
FLOAT_PRODUCTS, INTEGER_PRODUCTS = "", " A8 attention"  # behind the name of a fused variant


def main() -> None:
    args = parse_arguments()
    result = {"conditions": conditions(), "models": {name: measure(name, args) for name in args.models}}
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=["embedded", "cifar"])
    parser.add_argument("--batch", type=int, help="images; default: one that suits the model")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true", help="of the one thread that runs, instead of passing time")
    parser.add_argument("--profile", action="store_true", help="also: where the time of W1A4 and of float goes")
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def conditions() -> dict[str, object]:
    return {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg(), "kernels": kernels.survey(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


@torch.no_grad()
def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Milliseconds of each variant, and how many times faster the packed ones are."""
    torch.manual_seed(0)
    denoiser, inputs = make_denoiser(name, args.batch or BATCHES[name])
    variants = {"fp32 NCHW": denoiser, "fp32 channels_last": copy.deepcopy(denoiser).to(memory_format=torch.channels_last)}
    for weight, act in BITS:
        plain = variants[f"W{weight}A{act} unfused"] = pack_randomly(denoiser, weight, act)
        for suffix, attention_bits in ((FLOAT_PRODUCTS, None), (INTEGER_PRODUCTS, 8)):
            fused = variants[f"W{weight}A{act}{suffix}"] = copy.deepcopy(plain)
            if attention_bits:
                quantize_products(fused, lambda heads: middle_grid(attention_bits))
            fusion.fuse(fused)
    calls = {variant: call(model, inputs, "channels_last" in variant) for variant, model in variants.items()}
    seconds = time_in_turns(calls, args.repeats, time.thread_time if args.processor_time else time.perf_counter)
    rows = {
        variant: {"median_ms": round(statistics.median(taken) * 1e3, 2), "min_ms": round(min(taken) * 1e3, 2)}
        for variant, taken in seconds.items()
    }
    for weight, act in BITS:
        others = ("fp32 NCHW", "fp32 channels_last", f"W{weight}A{act} unfused")
        for suffix in (FLOAT_PRODUCTS, INTEGER_PRODUCTS):
            row = rows[f"W{weight}A{act}{suffix}"]
            row["times_faster_than"] = {other: round(rows[other]["median_ms"] / row["median_ms"], 2) for other in others}
            row["times_by_minimum"] = round(rows["fp32 channels_last"]["min_ms"] / row["min_ms"], 2)
            row["kernels"] = count_kernels(variants[f"W{weight}A{act}{suffix}"])
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    result = {"parameters": parameters, "batch": args.batch or BATCHES[name], "variants": rows}
    if args.profile:
        result["profile"] = {variant: profile(calls[variant]) for variant in ("fp32 channels_last", "W1A4")}
    return result


def make_denoiser(name: str, batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A denoiser of random weights and what one call of it takes."""
    timestep = torch.full((batch,), 500)
    if name in UNETS:
        unet = UNet2DModel(**{key: value for key, value in UNETS[name].items() if not key.startswith("_")}).eval()
        size = unet.config.sample_size
        return unet, {"sample": torch.randn(batch, unet.config.in_channels, size, size), "timestep": timestep}
    if name == "sd15":
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
        text = torch.randn(batch, 77, 768)
        return unet, {"sample": torch.randn(batch, 4, 64, 64), "timestep": timestep, "encoder_hidden_states": text}
    dit = DiTTransformer2DModel(in_channels=4, out_channels=8, sample_size=32).eval()
    labels = torch.arange(batch)
    return dit, {"hidden_states": torch.randn(batch, 4, 32, 32), "timestep": timestep, "class_labels": labels}


def pack_randomly(denoiser: nn.Module, weight_bits: int, act_bits: int) -> nn.Module:
    """A copy with packed layers of made-up codes."""
    bits = methods.get("lsq")(weight_bits=weight_bits, act_bits=act_bits).plan(denoiser)
    memo = {id(layer): make_layer(layer, Format(*bits[name])) for name, layer in layers_of(denoiser).items()}
    return copy.deepcopy(denoiser, memo).eval()


def make_layer(layer: nn.Module, format: Format) -> nn.Module:
    packed = empty_layer(layer, format, dtype=torch.float32, device="cpu")
    weight, middle = packed.weight, 1 << (format.weight_bits - 1)
    weight.codes.random_(0, 256)
    weight.scale.fill_(1.0 / middle / layer.weight[0].numel() ** 0.5)
    weight.zero.fill_(0.5 if format.weight_bits == 1 else middle)
    packed.input = middle_grid(format.act_bits)
    if layer.bias is not None:
        packed.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return packed


def middle_grid(bits: int) -> FixedGrid:
    """From -3 to 3."""
    grid = FixedGrid(bits)
    grid.scale.fill_(6.0 / (1 << bits))
    grid.zero.fill_(1 << (bits - 1))
    return grid


def call(model: nn.Module, inputs: dict[str, Tensor], channels_last: bool) -> Callable[[], object]:
    if channels_last:
        inputs = {
            name: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
            for name, tensor in inputs.items()
        }
    return lambda: model(**inputs)


def time_in_turns(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each call. The first turn warms up and, for the packed variants, chooses kernels."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, run in calls.items():
            started = clock()
            run()
            if turn:
                seconds[name].append(clock() - started)
    return seconds


def count_kernels(model: nn.Module) -> dict[str, int]:
    """How many layers run by which kernel."""
    names = [layer.weight.blocked.kernel if layer.weight.blocked else "reference" for layer in packed_layers(model).values()]
    return {name: names.count(name) for name in sorted(set(names))}


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one call by operator, without what an operator calls in turn; packed layers show by their own time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        with torch.profiler.record_function("python and kernels"):
            run()
    events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)[:14]
    return {event.key: round(event.self_cpu_time_total / 1e3, 2) for event in events}


if __name__ == "__main__":
    main()
