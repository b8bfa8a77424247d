"""Measures the latency of one denoiser call on a CUDA device: packed, and bfloat16 eager, compiled and as CUDA graphs.

    python -m benchmarks.gpu_latency -o benchmarks/results/gpu_latency.json

Configurations are real, weights and grids random (denoiser_latency.py); inputs and outputs are bfloat16 in channels last, blocks
fused as in a loaded pipeline. Times are between CUDA events, after warming up. Each row is written as soon as it is measured and
measured once: --seconds limits the time, and the same command continues with the rows that are left. This script has not been
run on a GPU yet.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise, product
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.denoiser_latency import BITS, count_kernels, make_denoiser, pack_randomly
from dmquant.kernels import status
from dmquant.nn import cuda_graph
from dmquant.nn.fused import unet

MODELS = ("cifar", "ldm4", "sd15")
BATCHES = (1, 8, 32)
PLAIN = ("bf16", "bf16 graph", "bf16 compiled", "bf16 compiled graph")  # the last one uses the CUDA graphs of torch.compile
PACKED = {f"W{weight}A{act}{graphed}": (weight, act) for weight, act in BITS for graphed in ("", " graph")}
BASELINES = ("bf16", "bf16 compiled graph")
WARM_UPS = 5
Row = tuple[str, str, int]  # model, variant, batch
Measured = dict[str, dict[str, object]]


def main() -> None:
    args = parse_arguments()
    end = time.perf_counter() + args.seconds
    if not torch.cuda.is_available():
        sys.exit(f"gpu_latency: there is no CUDA device (torch {torch.__version__}); nothing was measured")
    known = read(args.output)
    rows = list(product(args.models, args.variants, args.batches))
    for row, found in measure([row for row in rows if name_of(row) not in known], args.repeats, end):
        known[name_of(row)] = found
        write(args.output, known)
    left = sum(name_of(row) not in known for row in rows)
    print("\n".join(table(known, args)) + (f"\n\n{left} rows are left; the same command continues" if left else ""))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--variants", nargs="+", choices=(*PLAIN, *PACKED), default=(*PLAIN, *PACKED))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after this time")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


def name_of(row: Row) -> str:
    return ", ".join(map(str, row))


def read(file: Path) -> Measured:
    """Returns the rows in the file; exits if they were measured on another device."""
    if not file.exists():
        return {}
    document, here = json.loads(file.read_text(encoding="utf-8")), torch.cuda.get_device_name()
    there = document["conditions"]["device"]
    if there != here:
        sys.exit(f"gpu_latency: {file} was measured on {there}, this is {here}; give another file")
    return document["rows"]


def write(file: Path, rows: Measured) -> None:
    conditions = {
        "device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "triton": status.kernel_status()["triton"] or "in use",
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    draft.replace(file)


@torch.no_grad()
def measure(rows: list[Row], repeats: int, end: float) -> Iterator[tuple[Row, dict[str, object]]]:
    """Yields each row with its measurements until the time is up. A variant of a model is made once for all its batches."""
    for (model, variant), same in groupby(rows, key=lambda row: row[:2]):
        if time.perf_counter() > end:
            return
        torch.manual_seed(0)
        denoiser, single = make_denoiser(model, 1)
        denoiser = make_variant(denoiser, variant)
        for row in same:
            if time.perf_counter() > end:
                return
            inputs = {name: to_gpu(tensor.repeat_interleave(row[2], 0)) for name, tensor in single.items()}
            try:
                yield row, describe(time_calls(lambda: denoiser(**inputs), repeats), denoiser)
            except torch.OutOfMemoryError:
                yield row, {"failed": "out of memory"}


def make_variant(denoiser: nn.Module, variant: str) -> nn.Module:
    """Returns the variant of the denoiser on the GPU."""
    if variant in PACKED:
        denoiser = pack_randomly(denoiser, *PACKED[variant])
        unet.fuse(denoiser)
    denoiser = denoiser.eval().to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    if "compiled" in variant:
        return torch.compile(denoiser, mode="reduce-overhead" if "graph" in variant else None)
    if "graph" in variant:
        cuda_graph.capture(denoiser)
    return denoiser


def to_gpu(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.cuda()
    format = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.to("cuda", torch.bfloat16, memory_format=format)


def time_calls(run: Callable[[], object], repeats: int) -> list[float]:
    """Returns the milliseconds of each call; calls follow each other without synchronization."""
    for _ in range(WARM_UPS):
        run()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def describe(taken_ms: list[float], denoiser: nn.Module) -> dict[str, object]:
    """Returns median and least time, kernels, and peak memory of the allocator: weights, activations, pools of graphs."""
    return {
        "median_ms": round(statistics.median(taken_ms), 3), "min_ms": round(min(taken_ms), 3),
        "peak_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1), "kernels": count_kernels(denoiser),
    }  # fmt: skip


def table(known: Measured, args: argparse.Namespace) -> Iterator[str]:
    """Yields the lines of a Markdown table: milliseconds, and times faster than the baselines."""
    yield "| model, variant, batch | ms | " + " | ".join(f"times faster than {name}" for name in BASELINES) + " |"
    yield "|---|--:|" + "--:|" * len(BASELINES)
    for model, batch, variant in product(args.models, args.batches, args.variants):
        median = known.get(name_of((model, variant, batch)), {}).get("median_ms")
        others = (known.get(name_of((model, name, batch)), {}).get("median_ms") for name in BASELINES)
        ratios = (f"{other / median:.2f}" if median and other else "" for other in others)
        if median:
            yield f"| {name_of((model, variant, batch))} | {median} | " + " | ".join(ratios) + " |"


if __name__ == "__main__":
    main()
