"""Tensors that are stored in a file and read row by row, for more samples than memory holds."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmquant.errors import DamagedFile


class DiskTensor:
    """A tensor (N, ...) in a file, written and read by rows.

    Reads and writes go through the page cache of the operating system, which frees its memory when other programs need it.
    """

    def __init__(self, file: Path, shape: Sequence[int], dtype: torch.dtype):
        """Opens the file of a tensor of this shape, and creates it if it does not exist."""
        self.shape, self.dtype, self.path = tuple(shape), dtype, file
        self._row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        self._file = file.open("r+b" if file.exists() else "w+b")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return len(self) * self._row_bytes

    def write(self, start: int, rows: Tensor) -> None:
        """Writes rows (K, ...) from row `start` on. Raises OSError if the disk is full."""
        self._file.seek(start * self._row_bytes)
        self._file.write(_bytes_of(rows.detach().to("cpu", self.dtype).contiguous()))

    def __getitem__(self, index: Tensor) -> Tensor:
        """Returns copies (K, ...) of the rows of an index (K,). Raises DamagedFile if the file is too short."""
        rows = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        for row, number in zip(rows, index.tolist()):
            self._file.seek(number * self._row_bytes)
            if self._file.readinto(_bytes_of(row)) != self._row_bytes:
                raise DamagedFile(f"{self.path} has lost rows; this run cannot be continued: start over with --force")
        return rows

    def sync(self) -> None:
        """Returns when the rows are on the disk, so that they survive a power failure."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Closes and deletes the file."""
        self._file.close()
        self.path.unlink()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write_index(file: Path, groups: dict[str, Sequence[DiskTensor]]) -> None:
    """Writes a JSON file that lists complete tensors by group. The file is replaced atomically."""
    for tensor in (tensor for group in groups.values() for tensor in group):
        tensor.sync()
    content = {
        name: [[tensor.path.name, tensor.shape, str(tensor.dtype).removeprefix("torch.")] for tensor in group]
        for name, group in groups.items()
    }
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(file)


def read_index(file: Path) -> dict[str, list[DiskTensor]]:
    """Opens the tensors that an index lists, by group. They are stored in the index's folder."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: [DiskTensor(file.with_name(path), shape, getattr(torch, dtype)) for path, shape, dtype in group]
        for name, group in content.items()
    }
