"""Tensors on the disk, row by row: what blocks read and answer, for more samples than memory holds."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmquant.errors import DamagedFile


class Stack:
    """N rows of a tensor in a file. They pass through the system's cache of the disk: memory that it gives back when asked."""

    def __init__(self, file: Path, shape: Sequence[int], dtype: torch.dtype):
        """Rows of shape[1:]; those of a file that is there already are the ones that it holds."""
        self.shape, self.dtype, self.path = tuple(shape), dtype, file
        self._row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        self._file = file.open("r+b" if file.exists() else "w+b")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return len(self) * self._row_bytes

    def write(self, place: int, rows: Tensor) -> None:
        """Puts rows in from this place on. OSError where the disk is full."""
        self._file.seek(place * self._row_bytes)
        self._file.write(_bytes_of(rows.detach().to("cpu", self.dtype).contiguous()))

    def __getitem__(self, index: Tensor) -> Tensor:
        """Copies of the rows of an index (K,), in its order. DamagedFile where the file has lost them."""
        rows = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        for row, number in zip(rows, index.tolist()):
            self._file.seek(number * self._row_bytes)
            if self._file.readinto(_bytes_of(row)) != self._row_bytes:
                raise DamagedFile(f"{self.path} has lost rows; this run cannot be continued: start over with --force")
        return rows

    def settle(self) -> None:
        """Returns once the rows are on the disk, whatever happens to the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        self._file.close()
        self.path.unlink()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write_index(file: Path, stacks: dict[str, Sequence[Stack]]) -> None:
    """Says that these stacks are complete; the file is there whole or not at all."""
    for stack in (stack for group in stacks.values() for stack in group):
        stack.settle()
    content = {
        name: [[stack.path.name, stack.shape, str(stack.dtype).removeprefix("torch.")] for stack in group]
        for name, group in stacks.items()
    }
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(file)


def read_index(file: Path) -> dict[str, list[Stack]]:
    """The stacks that an index names, beside it."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: [Stack(file.with_name(path), shape, getattr(torch, dtype)) for path, shape, dtype in group]
        for name, group in content.items()
    }
