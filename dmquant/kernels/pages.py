"""Memory of large outputs, handed out again when they go.

An allocator returns large blocks to the system and gets them back page by page, each filled with zeros at its first touch: of a
call of Stable Diffusion 1.5 that was 7 % of the time. What is kept here is bounded, and nothing is kept of small tensors.
"""

import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

STEP = 1 << 20  # bytes: sizes are rounded up to it, and what is smaller comes from the allocator
LIMIT = 256 << 20  # bytes kept for later at most
LOCK = threading.RLock()  # a tensor may go, and give back its memory, in the middle of anything
spare: list[mmap.mmap] = []  # the oldest first


def empty(shape: Sequence[int]) -> Tensor:
    """An uninitialized float32 tensor on the CPU. Its memory comes back when nobody holds it, nor a view of it."""
    count = math.prod(shape)
    if 4 * count < STEP or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(tuple(shape))
    memory = take(-(-4 * count // STEP) * STEP)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)  # the tensor holds it
    weakref.finalize(view, give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=torch.float32, count=count).view(tuple(shape))


def take(size: int) -> mmap.mmap:
    """Memory of so many bytes: what was given back last, or new."""
    with LOCK:
        for place in reversed(range(len(spare))):
            if len(spare[place]) == size:
                return spare.pop(place)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def give_back(memory: mmap.mmap) -> None:
    """Keeps memory for the next tensor of its size. Where it is too much the oldest goes."""
    with LOCK:
        spare.append(memory)
        while sum(map(len, spare)) > LIMIT:
            spare.pop(0)
