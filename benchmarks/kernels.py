"""Measures the latency of packed layers and of torch per shape: float NCHW, float channels_last, oneDNN W8A8, every kernel.

    python benchmarks/kernels.py -o benchmarks/results/kernels.json

All variants run in one process, in turns of shuffled order. An untimed call precedes each timed one, so that no variant depends
on the caches and the clock frequency that another left. With one thread, processor time is measured; with more, wall-clock time.
On a busy machine long calls are interrupted more often than short ones, which biases the ratios of medians: the table has the
ratios of the least times. Inputs and outputs are float, so that packed times include quantizing the input. Float weights are not
prepacked, as in torch's eager convolution. On processors for which MKL is slow, float linear layers are slow too, and the ratios
of all others are larger.

`--isa` measures as on another processor: kernels that need more instructions are left out, and oneDNN, which also computes the
float products, is limited in the same way. avx512 has AVX-512 VNNI and no AMX, avx2vnni AVX-VNNI and no AVX-512 (also set
ATEN_CPU_CAPABILITY=avx2 for torch's other operators), avx2 neither. It needs a new process, because oneDNN reads the limit once.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmquant.kernels import registry, status
from dmquant.kernels.conv_shape import ConvGeometry
from dmquant.nn import dispatch
from dmquant.nn.convert import empty_layer
from dmquant.nn.packed_layers import PackedConv2d
from dmquant.nn.scheme import LayerScheme

ISAS = {  # name -> oneDNN's name, and instruction sets that are missing
    "avx512": ("AVX512_CORE_VNNI", registry.AMX), "avx2vnni": ("AVX2_VNNI", registry.AVX512),
    "avx2": ("AVX2", registry.AVX512 | registry.AVX_VNNI),
}  # fmt: skip
BITS = ((1, 4), (1, 5), (1, 6), (2, 4), (4, 4), (8, 8))


class Shape(NamedTuple):
    """A convolution of square images with padding of half its kernel."""

    images: int
    channels: int
    outputs: int
    side: int
    kernel: int
    stride: int = 1

    @property
    def geometry(self) -> ConvGeometry:
        half = self.kernel // 2
        return ConvGeometry((self.kernel, self.kernel), (self.stride, self.stride), (half, half, half, half))

    @property
    def products(self) -> int:
        return self.images * (self.side // self.stride) ** 2 * self.channels * self.outputs * self.kernel**2


SHAPES = (
    Shape(1, 256, 256, 32, 3), Shape(4, 256, 256, 16, 3), Shape(4, 512, 512, 8, 3), Shape(1, 128, 128, 64, 3),
    Shape(1, 1280, 1280, 16, 3), Shape(4, 256, 256, 32, 3, 2), Shape(4, 256, 256, 32, 1), Shape(1, 1024, 1024, 32, 1),
    Shape(50, 48, 48, 32, 3), Shape(50, 96, 96, 16, 3),
)  # fmt: skip


def main() -> None:
    args = parse_arguments()
    name, without = ISAS.get(args.isa, ("", 0))
    if name:
        os.environ["ONEDNN_MAX_CPU_ISA"] = name  # read when oneDNN is first used
    rows = [measure(shape, args.seconds, without=without) for shape in SHAPES]
    conditions = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg(),
        "kernels": status.kernel_status(),
        "isa": args.isa,
    }  # fmt: skip
    print(table(rows))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per shape")
    parser.add_argument("--isa", choices=ISAS, help="measure as on such a processor; default: all instruction sets of this one")
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


@torch.no_grad()
def measure(shape: Shape, seconds: float, *, without: int = 0) -> dict[str, object]:
    """Returns the measurements of every variant on one shape; kernels that need an instruction set of `without` are left out."""
    torch.manual_seed(0)
    layer = nn.Conv2d(shape.channels, shape.outputs, shape.kernel, shape.stride, shape.kernel // 2)
    x = torch.randn(shape.images, shape.channels, shape.side, shape.side)
    last = x.contiguous(memory_format=torch.channels_last)
    weight_last = layer.weight.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Tensor]] = {
        "fp32 NCHW": lambda: layer(x), "fp32 channels_last": lambda: layer._conv_forward(last, weight_last, layer.bias),
    }  # fmt: skip
    for weight_bits, act_bits in BITS:
        for kernel in fitting(weight_bits, act_bits, shape.geometry, without):
            packed = make_packed(layer, weight_bits, act_bits, kernel)
            calls[f"W{weight_bits}A{act_bits} {kernel}"] = partial(dispatch.launch, packed, packed.weight.blocked, last)
    calls["oneDNN W8A8"] = make_onednn(layer, last)
    return {"shape": shape._asdict(), "variants": compare(calls, shape.products, seconds)}


def fitting(weight_bits: int, act_bits: int, geometry: ConvGeometry, without: int) -> list[str]:
    fitting = [kernel for kernel in registry.KERNELS if kernel.fits(weight_bits, act_bits, geometry)]
    wanted = [kernel for kernel in fitting if not kernel.is_portable and not kernel.needs & without]
    return [kernel.name for kernel in wanted if not registry.find_missing(kernel)]


def make_packed(layer: nn.Conv2d, weight_bits: int, act_bits: int, kernel: str) -> PackedConv2d:
    """Returns a packed layer of random codes: times depend on shapes only."""
    packed = empty_layer(layer, LayerScheme(weight_bits, act_bits), dtype=torch.float32, device="cpu")
    packed.weight.codes.random_(0, 256)
    packed.weight.zero.fill_(0.5 if weight_bits == 1 else 1 << (weight_bits - 1))
    packed.input.scale.fill_(6.0 / (1 << act_bits))
    packed.input.zero.fill_(1 << (act_bits - 1))
    packed.bias = layer.bias
    packed.weight.block(kernel)
    return packed


def make_onednn(layer: nn.Conv2d, x: Tensor) -> Callable[[], Tensor]:
    """Returns a call of oneDNN's W8A8 convolution as torch has it: prepacked weights, and an input quantizer in one pass."""
    scale, zero, place = 0.04, 128, (list(layer.stride), list(layer.padding), [1, 1], 1)
    weight_scale = layer.weight.abs().amax((1, 2, 3)) / 127
    levels = (layer.weight / weight_scale.view(-1, 1, 1, 1)).round().to(torch.int8)
    packed = torch.ops.onednn.qconv_prepack(levels, weight_scale, scale, zero, *place, list(x.shape))
    no_zeros = torch.zeros(len(weight_scale), dtype=torch.int32)

    def run() -> Tensor:
        codes = torch.quantize_per_tensor(x, scale, zero, torch.quint8).int_repr()
        return torch.ops.onednn.qconv_pointwise(
            codes, scale, zero, packed, weight_scale, no_zeros, layer.bias, *place, 1.0, 0, torch.float32, "none", [], ""
        )  # fmt: skip

    return run


def compare(calls: dict[str, Callable[[], Tensor]], products: int, seconds: float) -> dict[str, dict[str, float]]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # thread_time excludes other programs
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(taken["fp32 NCHW"]) < 6:
        for name in order.sample(list(calls), len(calls)):
            calls[name]()
            before = clock()
            calls[name]()
            taken[name].append(clock() - before)
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    return {
        name: {
            "median_ms": round(median * 1e3, 3), "min_ms": round(min(taken[name][1:]) * 1e3, 3),
            "gmac_per_s": round(products / median * 1e-9, 1),
            "times_channels_last": round(medians["fp32 channels_last"] / median, 2),
            "times_by_minimum": round(min(taken["fp32 channels_last"][1:]) / min(taken[name][1:]), 2),
        }
        for name, median in medians.items()
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Returns a Markdown table: how many times faster than fp32 channels_last each variant is, by the least times."""
    names = list(dict.fromkeys(name for row in rows for name in row["variants"]))
    lines = ["| shape | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for row in rows:
        shape = Shape(**row["shape"])
        label = f"{shape.images}x{shape.channels}x{shape.side}x{shape.side} -> {shape.outputs}, {shape.kernel}x{shape.kernel}"
        label += f" / {shape.stride}" if shape.stride > 1 else ""
        cells = [str(row["variants"].get(name, {}).get("times_by_minimum", "")) for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
