"""Low-bit arithmetic on NVIDIA GPUs by Triton: whether its kernels can be used on this machine.

There are two kernels. triton/quantize.py applies the prologue to an image and writes its codes as bytes, padding included.
triton/conv.py is an implicit GEMM over those bytes: weights stay at their bits in memory, are unpacked to bytes in registers and
are multiplied by the int8 tensor cores, with integer sums. The float operations and their order are those of the C kernels.
Hopper has no 4-bit and no useful 1-bit tensor cores, so all bits run at the rate of bytes; fewer bits save memory only. int8 is
used instead of fp8 because its sums are exact.

The tests run the kernels by Triton's interpreter and compile them for compute capabilities 8.0 and 9.0 (tests/kernels/triton).
They have not been run on a GPU; sizes of tiles are not measured. On a GPU each kernel is compared with the reference before it is
used. Not supported: split-K (few pixels of many channels leave most of a GPU idle), autotuning, attention products, other GPUs.
"""

import subprocess
from functools import cache
from importlib.util import find_spec

import torch

NAME = "triton"
NEEDS = (8, 0)  # compute capability; Turing (7.5) has int8 tensor cores, but Triton compiles for Ampere and later


@cache
def find_missing(device: torch.device | None = None) -> str:
    """Returns "" if the kernels can be used on this CUDA device (None: the current one), otherwise the reason why not."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'dmquant[gpu]'"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.cuda is None:
        return "the kernels support NVIDIA GPUs only"
    found = torch.cuda.get_device_capability(device)
    if found < NEEDS:
        return f"compute capability {found[0]}.{found[1]}: Triton needs {NEEDS[0]}.{NEEDS[1]}"
    return ""


def failures() -> tuple[type[Exception], ...]:
    """Returns the exceptions that Triton, its C compiler or the driver raise for a kernel that cannot be compiled or run."""
    from triton.errors import TritonError

    return TritonError, RuntimeError, OSError, subprocess.CalledProcessError
