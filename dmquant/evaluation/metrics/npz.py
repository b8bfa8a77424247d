"""Reads arrays of untrusted npz files. Headers are checked before data are decompressed, and nothing is unpickled."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from dmquant.errors import DamagedFile, DmquantError, InputError

BATCH = 50
MAX_PIXELS = 2**22  # per image


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens an npz. All errors of a malformed file are raised as DamagedFile."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (DmquantError, torch.OutOfMemoryError):  # the second one is raised by computations on the data
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise DamagedFile(f"{path} cannot be read: {error}") from error


def read_array(path: Path, archive: zipfile.ZipFile, key: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Returns one array of the archive. Raises InputError if its header does not have this shape and kind of number."""
    if f"{key}.npy" not in archive.namelist():
        raise InputError(f"{path} has no {key!r}; reference statistics are an npz with 'mu' and 'sigma'")
    with archive.open(f"{key}.npy") as member:
        found, dtype = read_header(member)
    if dtype.kind != kind:
        raise InputError(f"{path}: {key} is of type {dtype}, not numbers; give statistics as plain arrays")
    if found != shape:
        raise InputError(f"{path}: {key} has shape {found}, the extractor needs {shape}; was it made with other features?")
    with archive.open(f"{key}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def read_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of an array. Raises ValueError for unusual headers."""
    # later format versions allow a header of 4 GiB, which no array of numbers needs
    if np.lib.format.read_magic(member) != (1, 0):
        raise ValueError("unusual npy version")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if is_fortran and len(shape) > 2:  # numpy reorders matrices, but images are streamed
        raise ValueError("an array in Fortran order")
    return shape, dtype


def stream_images(path: Path, archive: zipfile.ZipFile, key: str, *, most: int) -> Iterator[Tensor]:
    """Yields batches of images, uint8 (B, 3, H, W), from an array (N, H, W, 3) without loading all of it."""
    with archive.open(f"{key}.npy") as member:
        shape, dtype = read_header(member)
        is_image = dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and shape[1] * shape[2] <= MAX_PIXELS
        if not is_image or not 2 <= shape[0] <= most:
            raise InputError(f"{path}: {key} is {dtype} {shape}, not images; expected uint8 (2 to {most}, height, width, 3)")
        for start in range(0, shape[0], BATCH):
            batch = (min(BATCH, shape[0] - start), *shape[1:])
            data = bytearray(member.read(int(np.prod(batch))))
            if len(data) != np.prod(batch):
                raise EOFError(f"{key} ends early")
            yield torch.frombuffer(data, dtype=torch.uint8).view(batch).permute(0, 3, 1, 2).contiguous()
