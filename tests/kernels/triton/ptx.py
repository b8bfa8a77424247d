"""Compiles the kernels for GPUs, which needs none, and prints what tests ask of the assembly.

A program of its own: functions that were defined for the interpreter cannot be compiled any more.
"""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dmquant.kernels.triton import conv, quantize

TENSORS = {
    "codes": "*i8", "weight": "*u8", "weight_sums": "*i32",
    **dict.fromkeys(("scale", "zero", "act_scale", "act_zero", "gain", "offset", "factor"), "*fp32"),
    **dict.fromkeys(("x", "bias", "residual", "out"), "*bf16"),
}  # fmt: skip
TILE = {"ROWS": 64, "COLUMNS": 64, "BLOCK": 64, "ACT_BITS": 4, "HALF_SCALE": True, "PER_IMAGE": True}
PRODUCTS = {
    "mma": (80, {"BITS": 3, "PLANES": 1}),
    "wgmma": (90, {"BITS": 1, "PLANES": 2, "zero": None}),
}  # fmt: skip


def main() -> None:
    made = {name: assemble(conv.conv_tile, *case) for name, case in PRODUCTS.items()}
    found = {name: sorted(set(re.findall(r"(w?g?mma)\S*\.sync\S*\.(s8\.s8)", text))) for name, text in made.items()}
    tile = {"BITS": 4, "ACTIVATE": True, "PIXELS": quantize.PIXELS, "CHANNELS": quantize.CHANNELS}
    made = assemble(quantize.write_codes, 80, tile)
    found["floats"] = [name for name in ("div.rn.f32", "div.full", "ex2.approx", "fma.rn.f32") if name in made]
    print(json.dumps(found))


def assemble(kernel: triton.JITFunction, capability: int, constants: dict[str, object]) -> str:
    """PTX of a kernel at a compute capability, where constants are what its launch knows."""
    names = kernel.arg_names
    constants = {name: value for name, value in {**TILE, **constants}.items() if name in names}
    types = {name: "constexpr" if name in constants else TENSORS.get(name, "i32") for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    even = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if types[name].startswith("*")}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(ASTSource(kernel, types, fixed, even), target=target).asm["ptx"]


if __name__ == "__main__":
    main()
