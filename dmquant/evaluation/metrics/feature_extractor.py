"""Feature extractors: networks that map uint8 images to the features that metrics compare.

The embedded one was trained by `benchmarks/train_extractor.py` on 32x32 images. Frechet distances in its features are
named `fd-<name>`, never FID.
"""

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmquant.assets import ASSETS
from dmquant.errors import InputError
from dmquant.evaluation.metrics.inception_weights import hash_file, load_inception
from dmquant.evaluation.metrics.resnet import ResNetExtractor

EMBEDDED = "resnet-cifar10"
INCEPTION = "inception"
NAMES = (EMBEDDED, INCEPTION)
EMBEDDED_FOLDER = ASSETS / "extractor"


class Features(NamedTuple):
    """Features of a batch of images; None for those that a network does not have."""

    features: Tensor  # (B, D), pooled over all positions
    spatial: Tensor | None = None  # (B, S), a few channels of a middle layer at all positions
    logits: Tensor | None = None  # (B, K), of its classifier


class Extractor(NamedTuple):
    """A network that maps uint8 images (B, 3, H, W) to features (B, D), its name, and the SHA-256 of its weights."""

    network: Any  # a module with num_features, perhaps num_spatial, image_size and read
    name: str
    sha256: str

    def to(self, device: torch.device) -> "Extractor":
        return self._replace(network=self.network.to(device))

    def features(self, images: Tensor) -> Tensor:
        """Returns the pooled features (B, D) of uint8 images (B, 3, H, W), float64 on the CPU."""
        return self.read(images).features

    @torch.no_grad()
    def read(self, images: Tensor) -> Features:
        """Returns all features of uint8 images (B, 3, H, W), computed in float32 without autocast, as float64 on the CPU."""
        device = next(self.network.parameters()).device
        if images.dtype != torch.uint8:
            raise InputError(f"{self.name} takes uint8 images, got {images.dtype}")
        self.check_size(*images.shape[-2:])
        with torch.autocast(device.type, enabled=False):
            found = compute_features(self.network, images.to(device))
        spatial, logits = (None if part is None else part.cpu().double() for part in (found.spatial, found.logits))
        return Features(found.features.cpu().double(), spatial, logits)  # on the CPU: some devices have no float64

    def check_size(self, height: int, width: int) -> None:
        """Raises InputError if the network needs images of another size in pixels."""
        expected = getattr(self.network, "image_size", None)
        if expected and (height, width) != (expected, expected):
            raise InputError(f"{self.name} takes {expected}x{expected} images, got {width}x{height}; try extractor inception")


def compute_features(network: Any, images: Tensor) -> Features:
    """Returns the features of a network; one without the method `read` has pooled features only."""
    return Features(*network.read(images)) if hasattr(network, "read") else Features(network(images))


def load_extractor(name: str, inception_weights: str | Path | None = None) -> Extractor:
    """Returns the extractor with this name, on the CPU, in eval mode. `inception_weights` is for "inception" only."""
    if name == INCEPTION:
        network, sha256 = load_inception(inception_weights)
        return Extractor(network, name, sha256)
    if name != EMBEDDED:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise InputError(f"no extractor {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMES)}"))
    if inception_weights is not None:
        raise InputError(f"inception weights are for the extractor 'inception', not {name!r}; leave them out")
    return load_embedded(EMBEDDED_FOLDER)


def load_embedded(folder: Path) -> Extractor:
    """Returns the ResNet from a folder written by `benchmarks/train_extractor.py`."""
    record = json.loads((folder / "record.json").read_text())
    file = folder / "model.safetensors"
    network = ResNetExtractor(len(record["classes"]))
    network.load_state_dict(load_file(file))
    return Extractor(network.eval().requires_grad_(False), record["name"], hash_file(file))
