"""Measures the latency of one call of whole denoisers, packed and float, all variants in one process in turns.

    python benchmarks/denoiser_latency.py --models embedded cifar ldm4 -o benchmarks/results/denoiser_latency.json

Latency depends on shapes, not on values: configurations are real, weights and grids random (W1: signs, other bits: uniform
codes). The first and the last layer and the time embedding have 8 bits, the methods' default. Packed variants have fused blocks
as in a loaded pipeline, with float factors of attention products, and with 8 bits ("A8 attention"); "unfused" variants have the
blocks of diffusers and float products. Options add bfloat16 eager, float by torch.compile with frozen weights, and W8A8 by
oneDNN. Compare ratios, because all variants are slower on a busy machine. There, OMP_NUM_THREADS=1 and --processor-time exclude
the time of other processes.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from dmquant import methods
from dmquant.diffusion.pipeline import ASSETS
from dmquant.kernels import status
from dmquant.nn.attention import quantize_products
from dmquant.nn.convert import empty_layer, layers_of, packed_layers
from dmquant.nn.fused import unet as fusion
from dmquant.nn.scheme import LayerScheme
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
FLOAT_PRODUCTS, INTEGER_PRODUCTS, UNFUSED = "", " A8 attention", " unfused"  # suffixes of the names of packed variants
LAST = torch.channels_last


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    result = {"conditions": conditions(), "models": {name: measure(name, args) for name in args.models}}
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=["embedded", "cifar"])
    parser.add_argument("--batch", type=int, help="images per call; default: depends on the model")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bits", nargs="+", type=format_of, default=BITS, help="weights/activations; default: 1/4 4/4 8/8")
    parser.add_argument("--fused-only", action="store_true", help="leave out the unfused variants")
    parser.add_argument("--bf16", action="store_true", help="also: bfloat16 eager")
    parser.add_argument("--compile", action="store_true", help="also: float by torch.compile, weights frozen; takes minutes")
    parser.add_argument("--onednn", action="store_true", help="also: W8A8 by oneDNN, unfused")
    parser.add_argument("--threads", type=int, help="number of threads; default: torch's")
    parser.add_argument("--processor-time", action="store_true", help="measure processor time; needs one thread")
    parser.add_argument("--profile", action="store_true", help="also: time by operator of W1A4 and of float")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.processor_time and (args.threads or torch.get_num_threads()) > 1:
        parser.error("--processor-time is that of one thread: --threads 1")
    return args


def format_of(text: str) -> tuple[int, int]:
    weight, act = map(int, text.split("/"))
    return weight, act


def conditions() -> dict[str, object]:
    return {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg(),
        "kernels": status.kernel_status(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


@torch.no_grad()
def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Returns the milliseconds of each variant, and the speed of the packed ones relative to the others."""
    torch.manual_seed(0)
    denoiser, inputs = make_denoiser(name, args.batch or BATCHES[name])
    packed = make_packed(denoiser, args)
    calls = float_calls(denoiser, inputs, args) | {variant: partial(model, **inputs) for variant, model in packed.items()}
    if args.onednn:
        calls["W8A8 oneDNN"] = under_onednn(partial(pack_randomly(denoiser, 8, 8), **inputs))
    seconds = time_in_turns(calls, args.repeats, time.thread_time if args.processor_time else time.perf_counter)
    rows = {
        variant: {"median_ms": round(statistics.median(taken) * 1e3, 2), "min_ms": round(min(taken) * 1e3, 2)}
        for variant, taken in seconds.items()
    }
    for variant, model in packed.items():
        others = [other for other in rows if other not in packed or other == variant.split()[0] + UNFUSED != variant]
        rows[variant] |= {
            "times_faster_than": {other: round(rows[other]["median_ms"] / rows[variant]["median_ms"], 2) for other in others},
            "times_by_minimum": round(rows["fp32 channels_last"]["min_ms"] / rows[variant]["min_ms"], 2),
            "kernels": count_kernels(model),
        }
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    result = {"parameters": parameters, "batch": args.batch or BATCHES[name], "variants": rows}
    if args.profile:
        result["profile"] = {variant: profile(calls[variant]) for variant in ("fp32 channels_last", "W1A4") if variant in calls}
    return result


def float_calls(denoiser: nn.Module, inputs: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Returns calls of the float denoiser: NCHW, channels last, and those that options add."""
    last_inputs = {name: x.contiguous(memory_format=LAST) if x.dim() == 4 else x for name, x in inputs.items()}
    last = copy.deepcopy(denoiser).to(memory_format=LAST)
    calls = {"fp32 NCHW": partial(denoiser, **inputs), "fp32 channels_last": partial(last, **last_inputs)}
    if args.bf16:
        halved = {name: x.bfloat16() if x.is_floating_point() else x for name, x in last_inputs.items()}
        calls["bf16 channels_last"] = partial(copy.deepcopy(last).bfloat16(), **halved)
    if args.compile:
        import torch._inductor.config  # slow to import

        torch._inductor.config.freezing = True
        calls["fp32 compiled"] = partial(torch.compile(last), **last_inputs)
    return calls


def make_packed(denoiser: nn.Module, args: argparse.Namespace) -> dict[str, nn.Module]:
    """Returns variant -> packed denoiser."""
    models = {}
    for weight, act in args.bits:
        plain = pack_randomly(denoiser, weight, act)
        for suffix, attention_bits in ((FLOAT_PRODUCTS, None), (INTEGER_PRODUCTS, 8)):
            fused = models[f"W{weight}A{act}{suffix}"] = copy.deepcopy(plain)
            if attention_bits:
                quantize_products(fused, lambda heads: middle_grid(attention_bits))
            fusion.fuse(fused)
        if not args.fused_only:
            models[f"W{weight}A{act}{UNFUSED}"] = plain
    return models


def under_onednn(run: Callable[[], object]) -> Callable[[], object]:
    """Returns a function that calls `run` with DMQUANT_KERNELS=onednn."""

    def run_with_onednn() -> object:
        before = os.environ.get("DMQUANT_KERNELS", "auto")
        os.environ["DMQUANT_KERNELS"] = "onednn"
        try:
            return run()
        finally:
            os.environ["DMQUANT_KERNELS"] = before

    return run_with_onednn


def make_denoiser(name: str, batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns a denoiser with random weights and the arguments of one call."""
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
    """Returns a copy with packed layers of random codes."""
    bits = methods.get("lsq")(weight_bits=weight_bits, act_bits=act_bits).plan(denoiser)
    memo = {id(layer): make_layer(layer, LayerScheme(*bits[name])) for name, layer in layers_of(denoiser).items()}
    return copy.deepcopy(denoiser, memo).eval()


def make_layer(layer: nn.Module, format: LayerScheme) -> nn.Module:
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
    """Returns a grid from -3 to 3."""
    grid = FixedGrid(bits)
    grid.scale.fill_(6.0 / (1 << bits))
    grid.zero.fill_(1 << (bits - 1))
    return grid


def time_in_turns(calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Returns the seconds of each call. The first turn is not measured: it warms up, compiles and chooses kernels."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, run in calls.items():
            started = clock()
            run()
            if turn:
                seconds[name].append(clock() - started)
    return seconds


def count_kernels(model: nn.Module) -> dict[str, int]:
    """Returns kernel -> number of layers that use it."""
    names = [layer.weight.blocked.kernel if layer.weight.blocked else "reference" for layer in packed_layers(model).values()]
    return {name: names.count(name) for name in sorted(set(names))}


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Returns the milliseconds of one call by operator, without the operators that it calls: the 14 largest."""
    activities, whole = [torch.profiler.ProfilerActivity.CPU], torch.profiler.record_function("python and kernels")
    with torch.profiler.profile(activities=activities) as record, whole:
        run()
    events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)[:14]
    return {event.key: round(event.self_cpu_time_total / 1e3, 2) for event in events}


if __name__ == "__main__":
    main()
