"""Reference statistics: mean and covariance of the features of the images that generated ones are compared with.

They come by the name of a built-in set, from an npz (ours, pytorch-fid, clean-fid, EDM, ADM), or are computed from
an image folder or zip. Foreign files are checked by their headers before anything is decompressed.
"""

import hashlib
import io
import json
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dmquant.errors import DamagedFile, InputError
from dmquant.images import ImageFile, list_images, read_images
from dmquant.metrics.extractor import Extractor
from dmquant.metrics.weights import hash_file
from dmquant.progress import Track, plain

FOLDER = Path(__file__).parents[1] / "assets" / "reference"
DEFAULT = "cifar10-train"
MAX_META_BYTES = 2**16
ASYMMETRY = 1e-5  # relative to the largest entry: what float32 leaves


@dataclass(frozen=True)
class Reference:
    """Statistics of one image set under one extractor."""

    name: str
    mu: Tensor  # float64 (D,)
    sigma: Tensor  # float64 (D, D), divisor n - 1
    num_images: int | None  # None: the file does not say
    sha256: str  # of the file, or of the pixels where the statistics were computed here


def open_reference(
    source: str | Path | None, extractor: Extractor, *, size: int | None = None, track: Track = plain
) -> Reference:
    """The reference that `source` names; None is the built-in default. `size` is the side to bring images to."""
    if source == "":
        raise InputError(f"an empty text names no reference; {_known(extractor)}, or give an npz or images")
    source = DEFAULT if source is None else source
    built_in = FOLDER / f"{source}.{extractor.name}.npz"
    if str(source) in built_in_names() and built_in.is_file():
        return read_reference(built_in, extractor, name=str(source))
    path = Path(source)
    if not path.exists():
        raise InputError(f"no reference {str(source)!r} for {extractor.name}; {_known(extractor)}, or give an npz or images")
    if path.suffix in (".pkl", ".pt", ".pth"):
        raise InputError(f"{path} is a pickle, which can run code; convert it: numpy.savez('stats.npz', mu=..., sigma=...)")
    if path.suffix == ".npz":
        return read_reference(path, extractor)
    return compute_reference(list_images(path), extractor, name=path.name, size=size, track=track)


def built_in_names() -> set[str]:
    return {file.name.split(".")[0] for file in FOLDER.glob("*.npz")}


def _known(extractor: Extractor) -> str:
    known = sorted(file.name.split(".")[0] for file in FOLDER.glob(f"*.{extractor.name}.npz"))
    return f"built in: {', '.join(known) or 'none'}"


@torch.no_grad()
def compute_reference(
    files: Sequence[ImageFile], extractor: Extractor, *, name: str, size: int | None = None, batch: int = 100,
    track: Track = plain,
) -> Reference:
    """Statistics of image files, streamed; `size` brings every image to size x size first."""
    digest = hashlib.sha256()
    pixels = (image for _, image in track(read_images(files, size=size), f"reference {name}"))
    features = (extractor.features(images) for images in _stack(pixels, batch, digest))
    mu, sigma, count = measure_moments(features)
    return Reference(name, mu, sigma, count, digest.hexdigest())


def measure_moments(features: Iterable[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Mean (D,), covariance (D, D) and count of float64 feature rows that come in batches (B, D)."""
    total, products, count = 0, 0, 0
    for rows in features:
        total, products, count = total + rows.sum(0), products + rows.T @ rows, count + len(rows)
    if count < 2:
        raise InputError(f"a reference needs at least 2 images, got {count}")
    mu = total / count
    return mu, (products - count * mu.outer(mu)) / (count - 1), count


def _stack(pixels: Iterator[Tensor], batch: int, digest: "hashlib._Hash") -> Iterator[Tensor]:
    while images := list(islice(pixels, batch)):
        sizes = {tuple(image.shape[-2:]) for image in images}
        if len(sizes) > 1:
            raise InputError(f"the reference images have different sizes, such as {sorted(sizes)[:2]}; give one size")
        stacked = torch.stack(images)
        digest.update(stacked.numpy().tobytes())
        yield stacked


def save_reference(reference: Reference, extractor: Extractor, path: Path, *, size: int | None = None) -> None:
    """Writes mu, sigma, n and a JSON meta string; tools that read mu and sigma can use the file. All or nothing."""
    meta = {
        "extractor": extractor.name, "extractor_sha256": extractor.sha256, "source": reference.name,
        "source_sha256": reference.sha256, "resize": f"bicubic to {size}, centre crop" if size else "none",
    }
    content = io.BytesIO()
    np.savez(
        content, mu=reference.mu.numpy(), sigma=reference.sigma.numpy(), n=np.int64(reference.num_images),
        meta=np.array(json.dumps(meta, sort_keys=True)),
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_reference(path: Path, extractor: Extractor, *, name: str | None = None) -> Reference:
    """The statistics of an npz with `mu` and `sigma`; checked for the extractor's width, symmetry and finiteness."""
    width = extractor.network.num_features
    try:
        with zipfile.ZipFile(path) as archive:
            _check_meta(path, archive, extractor)
            mu = _read_array(path, archive, "mu", (width,), "f")
            sigma = _read_array(path, archive, "sigma", (width, width), "f")
            count = int(_read_array(path, archive, "n", (), "i")) if "n.npy" in archive.namelist() else None
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise DamagedFile(f"{path} cannot be read: {error}") from error
    _check_moments(path, mu, sigma)
    if count is not None and count < 2:
        raise DamagedFile(f"{path} says that it was made from {count} images")
    return Reference(name or path.name, torch.from_numpy(mu).double(), torch.from_numpy(sigma).double(), count, hash_file(path))


def _read_array(path: Path, archive: zipfile.ZipFile, key: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """One array of the archive, after its header promised the shape and a number type."""
    if f"{key}.npy" not in archive.namelist():
        raise InputError(f"{path} has no {key!r}; reference statistics are an npz with 'mu' and 'sigma'")
    with archive.open(f"{key}.npy") as member:
        found, dtype = _read_header(member)
    if dtype.kind != kind:
        raise InputError(f"{path}: {key} is of type {dtype}, not numbers; give statistics as plain arrays")
    if found != shape:
        raise InputError(f"{path}: {key} has shape {found}, the extractor needs {shape}; was it made with other features?")
    with archive.open(f"{key}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_header(member: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    # later format versions allow a header of 4 GiB, which no array of numbers needs
    if np.lib.format.read_magic(member) != (1, 0):
        raise ValueError("unusual npy version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    return shape, dtype


def _check_meta(path: Path, archive: zipfile.ZipFile, extractor: Extractor) -> None:
    """Refuses our own statistics when they were made by another extractor; other tools' files have no meta."""
    if "meta.npy" not in archive.namelist():
        return
    with archive.open("meta.npy") as member:
        shape, dtype = _read_header(member)
    if shape != () or dtype.kind != "U" or dtype.itemsize > MAX_META_BYTES:
        raise ValueError("meta is not a short string")
    with archive.open("meta.npy") as member:
        meta = json.loads(str(np.lib.format.read_array(member, allow_pickle=False)))
    if not isinstance(meta, dict) or not {"extractor", "extractor_sha256"} <= meta.keys():
        raise ValueError("meta does not name the extractor")
    if meta["extractor_sha256"] != extractor.sha256:
        raise InputError(f"{path} was made with other weights of {meta['extractor']!r} than {extractor.name!r} has here")


def _check_moments(path: Path, mu: np.ndarray, sigma: np.ndarray) -> None:
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DamagedFile(f"{path} holds values that are not finite")
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * np.abs(sigma).max() or (sigma.diagonal() < 0).any():
        raise DamagedFile(f"{path}: sigma is not symmetric with a positive diagonal: not a covariance")
