"""References: what is known of the images that generated ones are compared with, as an extractor sees them.

Mean and covariance of the features serve FID, those of spatial features sFID, and the features themselves KID, precision and
recall; of a large set some thousand features are kept, evenly over its files. References come by the name of a built-in set,
from an npz (ours, pytorch-fid, clean-fid, EDM, ADM), or are computed from an image folder or zip. Foreign files are checked by
their headers before anything is decompressed.
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
from dmquant.evaluation.metrics.running_moments import Moments, Sums
from dmquant.progress import Track, plain

FOLDER = ASSETS / "reference"
MORE = "more"  # a folder in FOLDER with what the built-in statistics have beyond mean and covariance
DEFAULT = "cifar10-train"
MAX_META_BYTES = 2**16
ASYMMETRY = 1e-5  # relative to the largest entry: what float32 leaves
KEPT = 10_000  # features of a set, as many images as ADM's reference files hold
MAX_KEPT = 200_000
PARTS = {"spatial": "spatial statistics (mu_s, sigma_s)", "features": "features"}


@dataclass(frozen=True)
class Reference:
    """Statistics of one image set under one extractor."""

    name: str
    mu: Tensor  # float64 (D,)
    sigma: Tensor  # float64 (D, D), divisor n - 1
    num_images: int | None  # None: the file does not say
    sha256: str  # of the file, or of the pixels where the statistics were computed here
    spatial: Moments | None = None  # of the extractor's spatial features; None where it has none or the file lacks them
    features: Tensor | None = None  # float16 (K, D), of at most KEPT images evenly over the set; None: the file has none

    def require(self, part: str) -> None:
        """Raises InputError where the part ("mu", "spatial", "features") is not there."""
        if getattr(self, part) is None:
            way_out = "make one that has: dmquant reference IMAGES -o stats.npz"
            raise InputError(f"reference {self.name} has no {PARTS[part]}; {way_out}")


def open_reference(
    source: str | Path | None, extractor: Extractor, *, size: int | None = None, parts: Sequence[str] = (), track: Track = plain
) -> Reference:
    """The reference that `source` names; None is the built-in default. `size` is the side to bring images to.

    Raises InputError where it lacks one of the `parts` ("mu", "spatial", "features").
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
        return _add_more(read_reference(built_in, extractor, name=str(source)), FOLDER / MORE / built_in.name, extractor)
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
    kept: int = KEPT, track: Track = plain,
) -> Reference:
    """Statistics of image files, streamed; `size` brings every image to size x size first."""
    digest, pooled, spatial, features = hashlib.sha256(), Sums(), Sums(), list[Tensor]()
    chosen = set(spread(len(files), kept))
    pixels = (image for _, image in track(read_images(files, size=size), f"reference {name}"))
    for images in _stack(pixels, batch, digest):
        seen = extractor.read(images)
        rows = [row for row in range(len(images)) if pooled.count + row in chosen]
        features.append(seen.features[rows].half())
        pooled.add(seen.features)
        if seen.spatial is not None:
            spatial.add(seen.spatial)
    mu, sigma = pooled.moments()
    in_space = spatial.moments() if spatial.count else None
    return Reference(name, mu, sigma, pooled.count, digest.hexdigest(), in_space, torch.cat(features))


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, evenly."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def _stack(pixels: Iterator[Tensor], batch: int, digest: "hashlib._Hash") -> Iterator[Tensor]:
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
    """Writes mu, sigma, what else there is, n and a JSON meta string; tools that read mu and sigma can use the file."""
    meta = {
        "extractor": extractor.name, "extractor_sha256": extractor.sha256, "source": reference.name,
        "source_sha256": reference.sha256, "resize": f"bicubic to {size}, centre crop" if size else "none",
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
    _write_whole(path, content.getvalue())


def _write_whole(path: Path, content: bytes) -> None:
    """All or nothing."""
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
    """The statistics of an npz with `mu` and `sigma`; checked for the extractor's width, symmetry and finiteness."""
    with open_archive(path) as archive:
        _check_meta(path, archive, extractor)
        moments = _read_moments(path, archive, ("mu", "sigma"), extractor.network.num_features)
        count = int(read_array(path, archive, "n", (), "i")) if "n.npy" in archive.namelist() else None
        spatial, features = _read_spatial(path, archive, extractor), _read_features(path, archive, extractor)
    if count is not None and count < 2:
        raise DamagedFile(f"{path} says that it was made from {count} images")
    return Reference(name or path.name, *moments, count, hash_file(path), spatial, features)


def _add_more(reference: Reference, path: Path, extractor: Extractor) -> Reference:
    """A built-in reference with what the file beside it holds."""
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
    """sFID's statistics under ADM's names, where the file has them and the extractor such features."""
    width = getattr(extractor.network, "num_spatial", None)
    is_there = {"mu_s.npy", "sigma_s.npy"} <= set(archive.namelist())
    return _read_moments(path, archive, ("mu_s", "sigma_s"), width) if width and is_there else None


def _read_features(path: Path, archive: zipfile.ZipFile, extractor: Extractor) -> Tensor | None:
    """Features (K, D) under our name or clean-fid's."""
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
    """Features of the images that ADM's files hold in `arr_0`; of some of them where they are many."""
    with open_archive(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            return None
        batches = track(stream_images(path, archive, "arr_0", most=MAX_KEPT), f"features of {path.name}")
        features = torch.cat([extractor.features(images) for images in batches])
    return features[spread(len(features), KEPT)].half()


def _check_meta(path: Path, archive: zipfile.ZipFile, extractor: Extractor) -> None:
    """Refuses our own statistics when they were made by another extractor; other tools' files have no meta."""
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
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * np.abs(sigma).max() or (sigma.diagonal() < 0).any():
        raise DamagedFile(f"{path}: {key} is not symmetric with a positive diagonal: not a covariance")
