"""Reads images from folders and zip archives as uint8 RGB tensors."""

import hashlib
import io
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dmquant.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
MAX_DAMAGED = 0.01  # share of unreadable files above which a set is refused
MAX_MEMBER_BYTES = 2**28  # a larger member of an archive is refused as a decompression bomb
UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,  # zipfile: encrypted members
)


@dataclass(frozen=True)
class ImageFile:
    """An image file: its name in the set, and the path or archive member that holds its bytes."""

    name: str
    path: Path
    member: str | None  # the name inside a zip; None for a plain file

    @property
    def label(self) -> str:
        """Name of the folder that holds the image: its class in a set with a folder per class."""
        return PurePosixPath(self.name).parent.name


def list_images(*paths: str | Path) -> list[ImageFile]:
    """Returns the image files of folders and zips, sorted by name. Raises InputError if there are none."""
    if "" in paths:
        raise InputError("an empty text names no images; give a folder or a zip")
    files = [file for path in paths for file in _list_one(Path(path))]
    if not files:
        raise InputError(f"no images in {', '.join(map(str, paths))}; give a folder or a zip of png, jpg, webp ... files")
    return sorted(files, key=lambda file: file.name)


def read_images(files: Sequence[ImageFile], *, size: int | None = None) -> Iterator[tuple[ImageFile, Tensor]]:
    """Yields each file with its pixels, uint8 (3, H, W). `size` resizes the short side (bicubic) and crops the centre.

    Unreadable files are skipped with a warning. Raises InputError if they are more than 1 %.
    """
    damaged = []
    with _Archives() as archives:
        for file in files:
            try:
                pixels = _decode(archives.read(file), size)
            except UNREADABLE as error:
                damaged.append(file.name)
                if len(damaged) > MAX_DAMAGED * len(files):
                    count = f"{len(damaged)} of {len(files)} images cannot be read"
                    raise InputError(f"{count}, first {damaged[0]!r}: {error}") from error
                continue
            yield file, pixels
    if damaged:
        warnings.warn(f"skipped {len(damaged)} of {len(files)} images that cannot be read, first {damaged[0]!r}", stacklevel=2)


def load_images(files: Sequence[ImageFile], *, size: int | None = None) -> tuple[Tensor, list[ImageFile]]:
    """Returns all pixels, uint8 (N, 3, H, W), and their files. Raises InputError if sizes differ and no `size` is given."""
    pairs = list(read_images(files, size=size))
    shapes = {tuple(pixels.shape) for _, pixels in pairs}
    if len(shapes) != 1:
        raise InputError(f"images have {len(shapes)} different sizes; give the size to bring them to")
    return torch.stack([pixels for _, pixels in pairs]), [file for file, _ in pairs]


def hash_images(pixels: Tensor) -> str:
    """Returns the SHA-256 of uint8 pixels (N, 3, H, W), which does not depend on files or archives."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def _list_one(path: Path) -> list[ImageFile]:
    if path.is_dir():
        found = (p for p in sorted(path.rglob("*")) if _is_picture(p.name) and p.is_file())
        return [ImageFile(p.relative_to(path).as_posix(), p, None) for p in found]
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a folder or a zip of images")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is neither a folder nor a zip of images")
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.namelist() if _is_picture(PurePosixPath(m).name)]
    return [ImageFile(m, path, m) for m in members]


def _is_picture(name: str) -> bool:
    # macOS writes "._name.png" beside an image: attributes, not an image
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not name.startswith("._")


def _decode(data: bytes, size: int | None) -> Tensor:
    with Image.open(io.BytesIO(data)) as file:
        if file.mode == "F":
            raise ValueError("floating-point pixels have no known range; save them as 8 or 16 bits")
        # 16-bit greys are clipped by convert("RGB"): bring them to 8 bits first
        grey_or_colour = file.point(lambda value: value / 256).convert("L") if file.mode.startswith("I") else file
        image = grey_or_colour.convert("RGB")
    if size is not None:
        image = _fit(image, size)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def _fit(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class _Archives:
    """Keeps zip archives open while a set is read, since opening one reads its directory."""

    def __enter__(self) -> "_Archives":
        self._open: dict[Path, zipfile.ZipFile] = {}
        return self

    def __exit__(self, *exception: object) -> None:
        for archive in self._open.values():
            archive.close()

    def read(self, file: ImageFile) -> bytes:
        if file.member is None:
            return file.path.read_bytes()
        if file.path not in self._open:
            self._open[file.path] = zipfile.ZipFile(file.path)
        archive = self._open[file.path]
        size_bytes = archive.getinfo(file.member).file_size
        if size_bytes > MAX_MEMBER_BYTES:
            raise ValueError(f"{size_bytes} bytes unpacked")
        return archive.read(file.member)
