"""Low-bit arithmetic on NVIDIA GPUs by Triton: two kernels, the codes of an image and their product with a packed weight.

What is read is normalized, activated and quantized once, into bytes with their padding around them (codes.py). The product is
an implicit GEMM over those bytes: weights stay at their bits in memory, are made bytes in registers, and are multiplied by the
tensor cores for int8; sums are whole (products.py). The float operations are those of the C kernels, in their order. Hopper has
no 4-bit and no useful 1-bit tensor cores, so all bits run at the rate of bytes; what few bits save is memory. int8 and not fp8:
it is exact at any width and length.

Never run on a GPU: there was none. The kernels were run by Triton's interpreter, and compiled for compute capabilities 8.0 and
9.0 (tests/kernels/triton); sizes of tiles are reasoned, not measured, and nothing is claimed of speed. On a GPU each kernel is
compared with the reference before it is used. Not done: splitting long sums over several programs (few pixels of many channels
leave most of a GPU idle), autotuning, attention products, GPUs of other makers.
"""

import subprocess
from functools import cache
from importlib.util import find_spec

import torch

NAME = "triton"
NEEDS = (8, 0)  # Turing (7.5) multiplies bytes too, but Triton compiles for Ampere and later


@cache
def find_missing(device: torch.device | None = None) -> str:
    """Empty if the kernels can be tried on this CUDA device, or on the current one; otherwise why not."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'dmquant[gpu]'"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.cuda is None:
        return "written for NVIDIA's GPUs only"
    found = torch.cuda.get_device_capability(device)
    if found < NEEDS:
        return f"compute capability {found[0]}.{found[1]}: Triton needs {NEEDS[0]}.{NEEDS[1]}"
    return ""


def failures() -> tuple[type[Exception], ...]:
    """What is raised where Triton, or the C compiler or driver that it needs, gives up on a kernel."""
    from triton.errors import TritonError

    return TritonError, RuntimeError, OSError, subprocess.CalledProcessError
