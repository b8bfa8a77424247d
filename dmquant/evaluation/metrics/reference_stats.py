"""Reference statistics: features of an image set that generated images are compared with.

FID uses mean and covariance of the features, sFID those of spatial features, and KID, precision and recall the features
themselves, of which 10,000 are kept, spaced evenly over the set. A reference is a built-in set, an npz (ours, pytorch-fid,
clean-fid, EDM, ADM), or computed from an image folder or zip. Headers of files are checked before data are decompressed.
"""

import hashlib
import io
import json
import os
import secrets
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmquant.assets import ASSETS
from dmquant.diffusion.image_files import ImageFile, list_images, read_images
from dmquant.errors import DamagedFile, InputError
from dmquant.evaluation.metrics.feature_extractor import Extractor
from dmquant.evaluation.metrics.inception_weights import hash_file
from dmquant.evaluation.metrics.npz import open_archive, read_array, read_header, stream_images
from dmquant.evaluation.metrics.running_moments import Moments, RunningMoments
from dmquant.progress import Track, plain

FOLDER = ASSETS / "reference"
MORE = "more"  # subfolder with the spatial statistics and features of the built-in references
DEFAULT = "cifar10-train"
MAX_META_BYTES = 2**16
MAX_ASYMMETRY = 1e-5  # relative to the largest entry: float32 rounding
NUM_KEPT = 10_000  # number of stored features, as many as images in ADM's reference files
MAX_KEPT = 200_000
PARTS = {"spatial": "spatial statistics (mu_s, sigma_s)", "features": "features"}


@dataclass(frozen=True)
class Reference:
    """Statistics of one image set under one extractor."""

    name: str
    mu: Tensor  # float64 (D,)
    sigma: Tensor  # float64 (D, D), divisor n - 1
    num_images: int | None  # None: not stored in the file
    sha256: str  # of the file, or of the pixels if the statistics were computed here
    spatial: Moments | None = None  # of spatial features; None if the extractor or the file has none
    features: Tensor | None = None  # float16 (K, D), of at most NUM_KEPT images spaced evenly; None if the file has none

    def require(self, part: str) -> None:
        """Raises InputError if the part ("mu", "spatial", "features") is missing."""
        if getattr(self, part) is None:
            hint = "make one that has: dmquant reference IMAGES -o stats.npz"
            raise InputError(f"reference {self.name} has no {PARTS[part]}; {hint}")


def open_reference(
    source: str | Path | None, extractor: Extractor, *, size: int | None = None, parts: Sequence[str] = (), track: Track = plain
) -> Reference:
    """Returns the reference `source`: a built-in name, an npz, or images; None is the built-in default.

    Args:
        size: Side in pixels to which images are resized.
        parts: Parts that the reference must have: "mu", "spatial", "features".

    Raises:
        InputError: There is no such reference, or it lacks one of the parts.
    """
    found = _find_reference(source, extractor, size, track)
    if "features" in parts and found.features is None and source is not None and Path(source).suffix == ".npz":
        found = replace(found, features=_read_image_features(Path(source), extractor, track))
    for part in parts:
        found.require(part)
    return found


def _find_reference(source: str | Path | None, extractor: Extractor, size: int | None, track: Track) -> Reference:
    if source == "":
        raise InputError(f"an empty text names no reference; {_known(extractor)}, or give an npz or images")
    source = DEFAULT if source is None else source
    built_in = FOLDER / f"{source}.{extractor.name}.npz"
    if str(source) in built_in_names() and built_in.is_file():
        reference = read_reference(built_in, extractor, name=str(source))
        return _add_optional_parts(reference, FOLDER / MORE / built_in.name, extractor)
    path = Path(source)
    if not path.exists():
        raise InputError(f"no reference {str(source)!r} for {extractor.name}; {_known(extractor)}, or give an npz or images")
    if path.suffix in (".pkl", ".pt", ".pth"):
        raise InputError(f"{path} is a pickle, which can run code; convert it: numpy.savez('stats.npz', mu=..., sigma=...)")
    if path.suffix == ".npz":
        return read_reference(path, extractor)
    return compute_reference(list_images(path), extractor, name=path.name, size=size, track=track)


def built_in_names() -> set[str]:
    """Returns the names of the built-in references."""
    return {file.name.split(".")[0] for file in FOLDER.glob("*.npz")}


def _known(extractor: Extractor) -> str:
    known = sorted(file.name.split(".")[0] for file in FOLDER.glob(f"*.{extractor.name}.npz"))
    return f"built in: {', '.join(known) or 'none'}"


@torch.no_grad()
def compute_reference(
    files: Sequence[ImageFile],
    extractor: Extractor,
    *,
    name: str,
    size: int | None = None,
    batch: int = 100,
    kept: int = NUM_KEPT,
    track: Track = plain,
) -> Reference:
    """Computes the statistics of image files, read in batches. With `size`, images are resized to size x size first."""
    digest, pooled, spatial, features = hashlib.sha256(), RunningMoments(), RunningMoments(), list[Tensor]()
    chosen = set(spaced_indices(len(files), kept))
    pixels = (image for _, image in track(read_images(files, size=size), f"reference {name}"))
    for images in _stack(pixels, batch, digest):
        found = extractor.read(images)
        rows = [row for row in range(len(images)) if pooled.count + row in chosen]
        features.append(found.features[rows].half())
        pooled.add(found.features)
        if found.spatial is not None:
            spatial.add(found.spatial)
    mu, sigma = pooled.moments()
    spatial_moments = spatial.moments() if spatial.count else None
    return Reference(name, mu, sigma, pooled.count, digest.hexdigest(), spatial_moments, torch.cat(features))


def spaced_indices(count: int, most: int) -> list[int]:
    """Returns at most `most` evenly spaced indices below `count`."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def _stack(pixels: Iterator[Tensor], batch: int, digest: "hashlib._Hash") -> Iterator[Tensor]:
    """Yields batches of images, and adds their pixels to the digest. Raises InputError if sizes differ."""
    while images := list(islice(pixels, batch)):
        sizes = {tuple(image.shape[-2:]) for image in images}
        if len(sizes) > 1:
            raise InputError(f"the reference images have different sizes, such as {sorted(sizes)[:2]}; give one size")
        stacked = torch.stack(images)
        digest.update(stacked.numpy().tobytes())
        yield stacked


def save_reference(
    reference: Reference, extractor: Extractor, path: Path, *, size: int | None = None, parts: Sequence[str] = ("mu", *PARTS)
) -> None:
    """Writes the given parts, n and a JSON meta string to an npz. Other tools can read its `mu` and `sigma`."""
    meta = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "source": reference.name,
        "source_sha256": reference.sha256,
        "resize": f"bicubic to {size}, centre crop" if size else "none",
    }
    arrays = {"mu": reference.mu, "sigma": reference.sigma} if "mu" in parts else {}
    if "spatial" in parts and reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mu, "sigma_s": reference.spatial.sigma}
    if "features" in parts and reference.features is not None:
        arrays["features"] = reference.features
    content = io.BytesIO()
    values: dict[str, Any] = {key: value.numpy() for key, value in arrays.items()}
    if reference.num_images is not None:
        values["n"] = np.int64(reference.num_images)
    np.savez(content, **values, meta=np.array(json.dumps(meta, sort_keys=True)))
    _write_atomically(path, content.getvalue())


def _write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_reference(path: Path, extractor: Extractor, *, name: str | None = None) -> Reference:
    """Returns the statistics of an npz with `mu` and `sigma`.

    Raises InputError or DamagedFile if shapes do not fit the extractor, or values are not finite or symmetric.
    """
    with open_archive(path) as archive:
        _check_meta(path, archive, extractor)
        moments = _read_moments(path, archive, ("mu", "sigma"), extractor.network.num_features)
        count = int(read_array(path, archive, "n", (), "i")) if "n.npy" in archive.namelist() else None
        spatial, features = _read_spatial(path, archive, extractor), _read_features(path, archive, extractor)
    if count is not None and count < 2:
        raise DamagedFile(f"{path} says that it was made from {count} images")
    return Reference(name or path.name, *moments, count, hash_file(path), spatial, features)


def _add_optional_parts(reference: Reference, path: Path, extractor: Extractor) -> Reference:
    """Returns a built-in reference with the spatial statistics and features of a second file, if it exists."""
    if not path.is_file():
        return reference
    with open_archive(path) as archive:
        _check_meta(path, archive, extractor)
        spatial, features = _read_spatial(path, archive, extractor), _read_features(path, archive, extractor)
    return replace(reference, spatial=spatial, features=features)


def _read_moments(path: Path, archive: zipfile.ZipFile, keys: tuple[str, str], width: int) -> Moments:
    mu = read_array(path, archive, keys[0], (width,), "f")
    sigma = read_array(path, archive, keys[1], (width, width), "f")
    _check_moments(path, mu, sigma, keys[1])
    return Moments(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double())


def _read_spatial(path: Path, archive: zipfile.ZipFile, extractor: Extractor) -> Moments | None:
    """Returns the spatial statistics, under ADM's names; None if the file or the extractor has none."""
    width = getattr(extractor.network, "num_spatial", None)
    is_there = {"mu_s.npy", "sigma_s.npy"} <= set(archive.namelist())
    return _read_moments(path, archive, ("mu_s", "sigma_s"), width) if width and is_there else None


def _read_features(path: Path, archive: zipfile.ZipFile, extractor: Extractor) -> Tensor | None:
    """Returns features (K, D), under our name or clean-fid's; None if there are none."""
    key = next((key for key in ("features", "feats") if f"{key}.npy" in archive.namelist()), None)
    if key is None:
        return None
    with archive.open(f"{key}.npy") as member:
        shape, _ = read_header(member)
    width = extractor.network.num_features
    if len(shape) != 2 or not 2 <= shape[0] <= MAX_KEPT:
        raise InputError(f"{path}: {key} has shape {shape}; expected (2 to {MAX_KEPT}, {width})")
    features = read_array(path, archive, key, (shape[0], width), "f")
    if not np.isfinite(features).all():
        raise DamagedFile(f"{path}: {key} holds values that are not finite")
    return torch.from_numpy(features)


def _read_image_features(path: Path, extractor: Extractor, track: Track) -> Tensor | None:
    """Returns features of at most NUM_KEPT of the images that ADM's files store in `arr_0`; None if there are none."""
    with open_archive(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            return None
        batches = track(stream_images(path, archive, "arr_0", most=MAX_KEPT), f"features of {path.name}")
        features = torch.cat([extractor.features(images) for images in batches])
    return features[spaced_indices(len(features), NUM_KEPT)].half()


def _check_meta(path: Path, archive: zipfile.ZipFile, extractor: Extractor) -> None:
    """Raises InputError if our own file was made with another extractor. Files of other tools have no meta string."""
    if "meta.npy" not in archive.namelist():
        return
    with archive.open("meta.npy") as member:
        shape, dtype = read_header(member)
    if shape != () or dtype.kind != "U" or dtype.itemsize > MAX_META_BYTES:
        raise ValueError("meta is not a short string")
    with archive.open("meta.npy") as member:
        meta = json.loads(str(np.lib.format.read_array(member, allow_pickle=False)))
    if not isinstance(meta, dict) or not {"extractor", "extractor_sha256"} <= meta.keys():
        raise ValueError("meta does not name the extractor")
    if meta["extractor_sha256"] != extractor.sha256:
        raise InputError(f"{path} was made with other weights of {meta['extractor']!r} than {extractor.name!r} has here")


def _check_moments(path: Path, mu: np.ndarray, sigma: np.ndarray, key: str) -> None:
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DamagedFile(f"{path} holds values that are not finite")
    if np.abs(sigma - sigma.T).max() > MAX_ASYMMETRY * np.abs(sigma).max() or (sigma.diagonal() < 0).any():
        raise DamagedFile(f"{path}: {key} is not symmetric with a positive diagonal: not a covariance")
