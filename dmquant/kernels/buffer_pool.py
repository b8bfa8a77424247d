"""Memory of large outputs, handed out again when they go.

An allocator returns large blocks to the system and gets them back page by page, each filled with zeros at its first touch: of a
call of Stable Diffusion 1.5 that was 7 % of the time. What is kept here is bounded, and nothing is kept of small tensors.

The system is asked for huge pages, where it has them: one look-up of an address then does for 2 MiB instead of 4 KiB, and
kernels that read many rows at once take 5 to 10 % less time.
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

STEP = 1 << 21  # bytes of a huge page: sizes are rounded up to it
SMALLEST = 1 << 20  # bytes: what is smaller comes from the allocator
LIMIT = 256 << 20  # bytes kept for later at most
LOCK = threading.RLock()  # a tensor may go, and give back its memory, in the middle of anything
free: list[mmap.mmap] = []  # the oldest first


def empty(shape: Sequence[int], order: torch.memory_format = torch.contiguous_format) -> Tensor:
    """An uninitialized float32 tensor on the CPU, an image perhaps channels last. Its memory comes back when nobody holds it,
    nor a view of it."""
    count = math.prod(shape)
    if 4 * count < SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, memory_format=order)
    memory = acquire(-(-4 * count // STEP) * STEP)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)  # the tensor holds it
    weakref.finalize(view, release, memory).atexit = False
    flat = torch.frombuffer(view, dtype=torch.float32, count=count)
    if order is torch.contiguous_format:
        return flat.view(shape)
    _, channels, height, width = shape
    return flat.as_strided(shape, (channels * height * width, 1, channels * width, channels))


def acquire(size: int) -> mmap.mmap:
    """Memory of so many bytes: what was given back last, or new."""
    with LOCK:
        for index in reversed(range(len(free))):
            if len(free[index]) == size:
                return free.pop(index)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def release(memory: mmap.mmap) -> None:
    """Keeps memory for the next tensor of its size. Where it is too much the oldest goes."""
    with LOCK:
        free.append(memory)
        while sum(map(len, free)) > LIMIT:
            free.pop(0)
