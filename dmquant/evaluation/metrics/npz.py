"""Arrays of an npz that somebody else wrote: checked by their headers before anything is decompressed, never unpickled."""

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

IMAGES_AT_ONCE = 50
MOST_PIXELS = 2**22  # of one image


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The npz, read with every fault of the file told as one."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (DmquantError, torch.OutOfMemoryError):  # the second from work done on what is read
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise DamagedFile(f"{path} cannot be read: {error}") from error


def read_array(path: Path, archive: zipfile.ZipFile, key: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """One array of the archive, after its header promised the shape and a number type."""
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
    # later format versions allow a header of 4 GiB, which no array of numbers needs
    if np.lib.format.read_magic(member) != (1, 0):
        raise ValueError("unusual npy version")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if is_fortran and len(shape) > 2:  # of a matrix numpy knows what to do; images are streamed
        raise ValueError("an array in Fortran order")
    return shape, dtype


def stream_images(path: Path, archive: zipfile.ZipFile, key: str, *, most: int) -> Iterator[Tensor]:
    """Images of an array (N, H, W, 3) of bytes, uint8 (B, 3, H, W), without holding them all."""
    with archive.open(f"{key}.npy") as member:
        shape, dtype = read_header(member)
        is_image = dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and shape[1] * shape[2] <= MOST_PIXELS
        if not is_image or not 2 <= shape[0] <= most:
            raise InputError(f"{path}: {key} is {dtype} {shape}, not images; expected uint8 (2 to {most}, height, width, 3)")
        for start in range(0, shape[0], IMAGES_AT_ONCE):
            batch = (min(IMAGES_AT_ONCE, shape[0] - start), *shape[1:])
            data = bytearray(member.read(int(np.prod(batch))))
            if len(data) != np.prod(batch):
                raise EOFError(f"{key} ends early")
            yield torch.frombuffer(data, dtype=torch.uint8).view(batch).permute(0, 3, 1, 2).contiguous()
