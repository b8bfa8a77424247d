"""Finds, checks and downloads the weights of the FID Inception network.

They are downloaded by `fetch_inception` only.
"""

import hashlib
import os
import pickle
from pathlib import Path
from urllib.error import URLError

import torch
from huggingface_hub import cached_assets_path, constants
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmquant.errors import DamagedFile, MissingResource
from dmquant.evaluation.metrics.inception_v3 import InceptionV3

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
OTHER_NAME = "weights-inception-2015-12-05-6726825d.pth"  # name of the same file in torch-fidelity
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
SHA256_PREFIX = "6726825d"
VARIABLE = "DMQUANT_INCEPTION_WEIGHTS"


def load_inception(path: str | Path | None = None, *, sha256_prefix: str = SHA256_PREFIX) -> tuple[InceptionV3, str]:
    """Returns the network in eval mode, and the SHA-256 of its file.

    A `.pth` must have the published hash. A `.safetensors` conversion is accepted if its names and shapes are right.
    """
    file = find_inception(path)
    sha256 = hash_file(file)
    if file.suffix != ".safetensors" and not sha256.startswith(sha256_prefix):
        raise DamagedFile(f"{file} has SHA-256 {sha256[:8]}..., expected {sha256_prefix}...; fetch it again from {URL}")
    with torch.device("meta"):
        network = InceptionV3()
    try:
        network.load_state_dict(_read(file), assign=True)
    except RuntimeError as error:
        raise DamagedFile(f"{file} does not hold the FID Inception network: {error}") from error
    return network.eval().requires_grad_(False), sha256


def find_inception(path: str | Path | None = None) -> Path:
    """Returns the weights file: the given path, $DMQUANT_INCEPTION_WEIGHTS, or the first one in the caches."""
    named = path or os.environ.get(VARIABLE)
    if named and not Path(named).is_file():
        raise MissingResource(f"{named} does not exist; {_advice()}")
    found = [file for file in ([Path(named)] if named else cache_paths()) if file.is_file()]
    if not found:
        raise MissingResource(f"the Inception weights are not on this machine; {_advice()}")
    return found[0]


def cache_paths() -> list[Path]:
    """Returns the paths of cached files in order of priority: the cache of torch.hub, then ours."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    # the folder that cached_assets_path names; the function itself would create it
    own = Path(constants.HF_ASSETS_CACHE).expanduser() / "dmquant" / "default" / "inception"
    return [hub / FILE_NAME, hub / OTHER_NAME, own / FILE_NAME]


def fetch_inception(*, url: str = URL, sha256_prefix: str = SHA256_PREFIX) -> Path:
    """Downloads the weights (91 MiB) into our cache, checks their hash, and returns the file."""
    target = cached_assets_path("dmquant", subfolder="inception") / FILE_NAME
    try:
        torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256_prefix, progress=False)
    except URLError as error:
        raise MissingResource(f"{url} cannot be reached: {error.reason}; {_advice()}") from error
    except RuntimeError as error:
        raise DamagedFile(f"{url} is not the expected file: {error}") from error
    return target


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, SafetensorError) as error:
        raise DamagedFile(f"{file} cannot be read as weights: {error}") from error


def _advice() -> str:
    return (
        f"download {URL} (file {FILE_NAME}, SHA-256 {SHA256_PREFIX}...) to {cache_paths()[0].parent}, "
        f"or run 'dmquant fetch inception', or name the file by --inception-weights or ${VARIABLE}"
    )
