"""The kernels: instruction sets that each needs, bits and geometries that it supports. C kernels are listed best first.

All C kernels give the same bits (csrc/conv/params.h explains why), so the choice between them affects speed only.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor

from dmquant.errors import InputError
from dmquant.kernels import build, layouts, triton_support
from dmquant.kernels.build import CannotCompile
from dmquant.kernels.conv_shape import ConvGeometry

AVX2, AVX512, VNNI, VBMI, AMX, AVX_VNNI = (1 << bit for bit in range(6))  # as in csrc/simd/isa.c
NAMES = {AVX2: "AVX2", AVX512: "AVX-512", VNNI: "AVX-512 VNNI", VBMI: "AVX-512 VBMI", AMX: "AMX", AVX_VNNI: "AVX-VNNI"}
FLAGS_256 = ("-mavx2", "-mfma")
FLAGS_512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512")
FLAGS_AVX_VNNI = (*FLAGS_256, "-mavxvnni")
FLAGS_AMX, FLAGS_VNNI = (*FLAGS_512, "-mamx-tile", "-mamx-int8"), (*FLAGS_512, "-mavx512vnni")
CHOICES = ("auto", "c", "onednn", "torch", triton_support.NAME, "exact")


@dataclass(frozen=True)
class Kernel:
    """A C kernel of csrc/, Triton's, or the reference."""

    name: str
    needs: int = 0  # instruction sets, as bits
    flags: tuple[str, ...] = ()
    max_weight_bits: int = 8
    max_act_bits: int = 8
    blocks: tuple[int, ...] = (64, 32)  # supported block sizes of C
    layout: str = "planes"  # key of LAYOUTS
    geometries: tuple[ConvGeometry, ...] = ()  # kernel sizes and strides that it supports, with any padding; empty: all
    supersedes: tuple[str, ...] = ()  # kernels that are never faster where this one runs
    needs_permission: bool = False  # of the operating system, to use AMX
    is_portable: bool = False
    source: str = ""  # file in csrc/ without ".c"; empty: conv/ and the kernel's name

    def __hash__(self) -> int:
        return hash(self.name)  # the default hashes all fields, at each call of a layer

    @property
    def is_wide(self) -> bool:
        """Returns whether it uses 512-bit registers. No other implementation was measured much faster than such a kernel."""
        return bool(self.needs & AVX512)

    def fits(self, weight_bits: int, act_bits: int, geometry: ConvGeometry) -> bool:
        """Returns whether it supports these bits (of a plane of weights, of activations) and this geometry."""
        return weight_bits <= self.max_weight_bits and act_bits <= self.max_act_bits and self.supports(geometry)

    def supports(self, geometry: ConvGeometry) -> bool:
        """Returns whether it supports this kernel size and stride."""
        sizes = [(known.kernel_size, known.stride) for known in self.geometries]
        return not sizes or (geometry.kernel_size, geometry.stride) in sizes

    @cache  # noqa: B019  kernels are few and live as long as the process
    def block_for(self, channels: int) -> int:
        """Returns the block size that needs the fewest filled-up channels, the larger of equals."""
        return min(self.blocks, key=lambda block: (layouts.fill_up(channels, block), -block))

    def to_blocked(self, codes: Tensor, bits: int) -> Tensor:
        """Returns the bytes of the codes (O, C, K) in this kernel's layout."""
        return LAYOUTS[self.layout][0](codes, bits, self.block_for(codes.shape[1]))

    def from_blocked(self, blocked: Tensor, shape: tuple[int, int, int], bits: int) -> Tensor:
        """Returns the codes (O, C, K) of a plane in this kernel's layout."""
        return LAYOUTS[self.layout][1](blocked, shape, bits, self.block_for(shape[1]))


LAYOUTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {  # codes -> blocked bytes, and back
    "planes": (layouts.to_planes, layouts.from_planes),
    "nibbles": (layouts.to_nibbles, layouts.from_nibbles),
    "nibbles by group": (partial(layouts.to_nibbles, by_group=True), partial(layouts.from_nibbles, by_group=True)),
    "steps": (layouts.to_steps, layouts.from_steps),
}
LUT: dict[str, Any] = {"max_weight_bits": 2, "max_act_bits": 6}
WINOGRAD: dict[str, Any] = {"max_weight_bits": 4, "max_act_bits": 5, "geometries": (ConvGeometry((3, 3)),), "blocks": (64,)}
OF_256 = ("winograd2", "avxvnni", "avx2")
KERNELS = (
    Kernel(
        "amx", AVX512 | AMX, FLAGS_AMX, blocks=(64,), supersedes=("winograd", "lut2", *OF_256, "scalar"), needs_permission=True,
    ),
    Kernel(
        "lut", AVX512 | VNNI | VBMI, (*FLAGS_VNNI, "-mavx512vbmi"), **LUT, layout="nibbles",
        supersedes=("lut2", *OF_256, "scalar"), source="conv/lut_avx512",
    ),
    Kernel("winograd", AVX512 | VNNI, FLAGS_VNNI, **WINOGRAD, supersedes=("winograd2",)),
    Kernel("vnni", AVX512 | VNNI, FLAGS_VNNI, supersedes=(*OF_256, "scalar"), source="conv/avx512vnni"),
    Kernel("lut2", AVX2, FLAGS_256, **LUT, layout="nibbles by group", supersedes=("scalar",), source="conv/lut_avx2"),
    Kernel("winograd2", AVX2 | AVX_VNNI, FLAGS_AVX_VNNI, **WINOGRAD, source="conv/winograd"),
    Kernel("avxvnni", AVX2 | AVX_VNNI, FLAGS_AVX_VNNI, supersedes=("avx2", "scalar"), source="conv/avx2"),
    Kernel("avx2", AVX2, FLAGS_256, supersedes=("scalar",)),
    Kernel("scalar", is_portable=True),
)  # fmt: skip
TRITON = Kernel(triton_support.NAME, blocks=(128, 64, 32), layout="steps")
EXACT = Kernel("exact")  # reference.py
BY_NAME = {kernel.name: kernel for kernel in (*KERNELS, TRITON, EXACT)}


def choice() -> str:
    """Returns the value of DMQUANT_KERNELS, one of CHOICES; "auto" if it is not set. Raises InputError for other values."""
    value = os.environ.get("DMQUANT_KERNELS") or "auto"
    if value not in CHOICES:
        raise InputError(f"DMQUANT_KERNELS must be one of {', '.join(CHOICES)}, got {value!r}")
    return value


@cache
def find_missing(kernel: Kernel) -> str:
    """Returns "" if the kernel runs on this machine, otherwise what is missing."""
    try:
        missing = kernel.needs & ~instruction_sets()
        if missing:
            return f"this processor has no {' and no '.join(name for bit, name in NAMES.items() if bit & missing)}"
        library(kernel)
    except CannotCompile as error:
        return str(error)
    return ""


@cache
def library(kernel: Kernel) -> ctypes.CDLL:
    """Returns the compiled library of a kernel. Raises CannotCompile if it cannot be compiled or is not allowed to run."""
    loaded = build.load(kernel.source or f"conv/{kernel.name}", kernel.flags)
    if kernel.needs_permission and loaded.dmquant_request_amx() != 0:
        raise CannotCompile("the operating system does not allow AMX")
    loaded.dmquant_run.argtypes, loaded.dmquant_run.restype = [ctypes.c_void_p], ctypes.c_int
    return loaded


def instruction_sets() -> int:
    """Returns the instruction sets of this processor as bits. Raises CannotCompile without a compiler."""
    return build.load("simd/isa").dmquant_instruction_sets()
