"""Memory of large output tensors, kept for reuse after the tensors are freed.

An allocator returns large blocks to the system, which then maps them page by page and zeroes each page at its first access. That
was 7 % of a call of Stable Diffusion 1.5. Blocks here are mapped with huge pages of 2 MiB where the system has them; kernels
that read many rows at once then take 5 to 10 % less time. torch has no setting for either on the CPU.

State: the module-level list `free`, guarded by LOCK. It holds at most LIMIT bytes, in blocks of at least SMALLEST bytes. Setting
`buffer_pool.LIMIT = 0` keeps nothing.
"""

import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

STEP = 1 << 21  # bytes of a huge page; sizes are rounded up to a multiple
SMALLEST = 1 << 20  # bytes; smaller tensors come from torch's allocator
LIMIT = 256 << 20  # bytes kept at most
# reentrant: the garbage collector may free a tensor, and so call `release`, while this thread holds the lock
LOCK = threading.RLock()
free: list[mmap.mmap] = []  # oldest first


def empty(shape: Sequence[int], order: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Returns an uninitialized float32 tensor on the CPU, contiguous or channels last.

    Its memory is kept for reuse when the tensor and all views of it are freed.
    """
    count = math.prod(shape)
    if 4 * count < SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, memory_format=order)
    memory = acquire(-(-4 * count // STEP) * STEP)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)  # kept alive by the tensor
    weakref.finalize(view, release, memory).atexit = False
    flat = torch.frombuffer(view, dtype=torch.float32, count=count)
    if order is torch.contiguous_format:
        return flat.view(shape)
    _, channels, height, width = shape
    return flat.as_strided(shape, (channels * height * width, 1, channels * width, channels))


def acquire(size: int) -> mmap.mmap:
    """Returns a block of `size` bytes: the one of this size that was released last, or a new one."""
    with LOCK:
        for index in reversed(range(len(free))):
            if len(free[index]) == size:
                return free.pop(index)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # no huge pages on this system
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def release(memory: mmap.mmap) -> None:
    """Keeps a block for reuse, and frees the oldest blocks above LIMIT."""
    with LOCK:
        free.append(memory)
        while sum(map(len, free)) > LIMIT:
            free.pop(0)
