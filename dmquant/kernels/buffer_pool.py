"""A pool for the memory of large outputs of kernels: float32 tensors on the CPU of at least SMALLEST bytes.

glibc gives the end of its heap back to the system when a tensor is freed, and gets it back page by page, each filled with zeros.
Whether that happens depends on what else is in the heap, so it differs between processes. Without the pool a packed DDPM of
CIFAR-10 (W1A4, batch 4, one thread) had 0 to 3,200 page faults per call of the denoiser in three processes that drew images, and
took 1 to 12 % more processor time than with it; at batch 16 it took 4 to 6 % more. The embedded pipeline took 0 to 5 % more,
and LDM-4 0.2 %.

Nothing simpler does the same: torch has no pool for CPU memory, and glibc's own limits (MALLOC_TRIM_THRESHOLD_,
MALLOC_MMAP_THRESHOLD_) hold for every library of the process, so they are for the user to set. The pool asks for huge pages,
which saved a further 1.8 % (LDM-4) to 3.8 % (CIFAR-10) of a call. It keeps up to LIMIT bytes that no tensor uses.
`buffer_pool.LIMIT = 0` switches it off: every tensor then comes from torch.empty.
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
    if 4 * count < SMALLEST or LIMIT == 0 or not hasattr(mmap, "MAP_PRIVATE"):
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
