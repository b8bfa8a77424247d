"""CLIP score: cosine between the CLIP embeddings of images and of their prompts. Hessel et al., 2021.

Defined as in torchmetrics: 100 times the cosine, mean over the images, at least 0. Hessel et al. clamp the cosine of each image
and multiply by 2.5. Prompts longer than the context are truncated, but keep the end token; torchmetrics drops it. The network
is read from a folder or from the cache of the hub, and downloaded by `fetch_clip` only.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from dmquant.diffusion.quiet_loading import loading_quietly
from dmquant.errors import DamagedFile, InputError, MissingResource
from dmquant.evaluation.metrics.base import Batch, Metric, require
from dmquant.evaluation.metrics.inception_weights import hash_file

NAME = "clip_score"
DEFAULT = "openai/clip-vit-large-patch14"  # the default of torchmetrics
FILES = ["*.json", "*.txt", "*.safetensors"]  # pickles are never read
WEIGHTS = "model*.safetensors"


class ClipScore(Metric):
    """Mean over images of 100 times the cosine with their prompts, at least 0."""

    needs_prompts = True

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def update(self, batch: Batch) -> None:
        match = require(batch.match)
        self._sum += match.sum().item()
        self._count += len(match)

    def compute(self) -> dict[str, float]:
        return {NAME: max(self._sum / self._count, 0.0)}


class Clip(NamedTuple):
    """A CLIP network with its tokenizer and image processor, its requested name, and the SHA-256 of its weights."""

    network: Any  # CLIPModel of transformers, which is imported only when a CLIP is loaded
    processor: Any
    name: str
    sha256: str

    def to(self, device: torch.device) -> "Clip":
        return self._replace(network=self.network.to(device))

    @torch.no_grad()
    def match(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns 100 times the cosine between each uint8 image (B, 3, H, W) and its prompt, float64 (B,) on the CPU."""
        pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in images]
        longest = self.network.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(prompts), images=pictures, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.network.device)
        with torch.autocast(self.network.device.type, enabled=False):
            outputs = self.network(**inputs)
        image, text = (part.cpu().double() for part in (outputs.image_embeds, outputs.text_embeds))
        return 100 * nn.functional.cosine_similarity(image, text, dim=1)


def load_clip(model: str | Path | None = None) -> Clip:
    """Returns the CLIP from a folder, or from the hub's cache by its id, on the CPU in float32. None is the default."""
    name = str(model or DEFAULT)
    try:
        with loading_quietly():
            from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise MissingResource("clip_score needs transformers; get it with: pip install 'dmquant[text]'") from error
    folder = find_clip(name)
    weights = sorted(folder.glob(WEIGHTS))
    _check_folder(folder, weights)
    try:
        with loading_quietly():
            network, found = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError) as error:
        raise DamagedFile(f"{folder} cannot be loaded as CLIP: {str(error).strip().splitlines()[0]}") from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers initializes missing tensors at random
        raise DamagedFile(f"{folder}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
    label = folder.resolve().name if Path(name).expanduser().is_dir() else name
    return Clip(network.eval().requires_grad_(False), processor, label, _hash(weights))


def find_clip(name: str) -> Path:
    """Returns the folder itself, or the cached snapshot of a hub id. Raises MissingResource if there is neither."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    command = "dmquant fetch clip" if name == DEFAULT else f"hf download {name}"
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise MissingResource(f"CLIP {name!r} is no folder here and not in the hub's cache; get it with: {command}") from error


def fetch_clip(name: str = DEFAULT) -> Path:
    """Downloads a CLIP into the hub's cache and returns its folder. The default has 1.7 GB."""
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=["*flax*", "*tf_*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingResource(f"CLIP {name!r} cannot be fetched: {reason}; or give its folder by --clip") from error


def _check_folder(folder: Path, weights: Sequence[Path]) -> None:
    """Raises an error for a folder without a CLIP, or without safetensors."""
    config = folder / "config.json"
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no CLIP: it has no config.json") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{config} is no JSON object: {error}") from error
    if kind != "clip":
        raise InputError(f"{folder} holds a model of type {kind!r}, not clip; give another with --clip")
    if not weights:
        raise MissingResource(f"{folder} has no {WEIGHTS}; pickled weights are not read: give a CLIP that has them, with --clip")


def _hash(weights: Sequence[Path]) -> str:
    """Returns the SHA-256 of the file; for several shards, that of their concatenated hashes."""
    hashes = [hash_file(file) for file in weights]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
