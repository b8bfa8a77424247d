"""CLIP score: how well images show their prompts, by the cosine of CLIP's embeddings of both. Hessel et al., 2021.

Defined as in torchmetrics: 100 times the cosine, mean over the images, at least 0. Hessel et al. clamp each image's cosine and
multiply by 2.5. Prompts longer than the network's context are cut before its end token, which stays; torchmetrics drops it.
The network is an optional one, read from a folder or from the hub's cache and never fetched unless `fetch_clip` is called.
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
from dmquant.evaluation.metrics.base import Batch, Metric, given
from dmquant.evaluation.metrics.inception_weights import hash_file

NAME = "clip_score"
DEFAULT = "openai/clip-vit-large-patch14"  # torchmetrics' own
FILES = ["*.json", "*.txt", "*.safetensors"]  # pickles are not read, so not fetched
WEIGHTS = "model*.safetensors"


class ClipScore(Metric):
    """100 times the cosine of images and prompts, mean over the images, at least 0."""

    needs_prompts = True

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def update(self, batch: Batch) -> None:
        match = given(batch.match)
        self._sum += match.sum().item()
        self._count += len(match)

    def compute(self) -> dict[str, float]:
        return {NAME: max(self._sum / self._count, 0.0)}


class Clip(NamedTuple):
    """A CLIP network with its tokenizer and image processor, the name it was asked for by, and the SHA-256 of its weights."""

    network: Any  # transformers' CLIPModel, which is imported when a CLIP is loaded
    processor: Any
    name: str
    sha256: str

    def to(self, device: torch.device) -> "Clip":
        return self._replace(network=self.network.to(device))

    @torch.no_grad()
    def match(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 times the cosine of each uint8 image (B, 3, H, W) and its prompt, float64 (B,) on the CPU."""
        pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in images]
        longest = self.network.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(prompts), images=pictures, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.network.device)
        with torch.autocast(self.network.device.type, enabled=False):
            seen = self.network(**inputs)
        ours, theirs = (part.cpu().double() for part in (seen.image_embeds, seen.text_embeds))
        return 100 * nn.functional.cosine_similarity(ours, theirs, dim=1)


def load_clip(model: str | Path | None = None) -> Clip:
    """The CLIP in a folder or, by its hub id, in the hub's cache; on the CPU, in eval mode and float32. None is the default."""
    name = str(model or DEFAULT)
    try:
        with loading_quietly():
            from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise MissingResource("clip_score needs transformers; get it with: pip install 'dmquant[text]'") from error
    folder = find_clip(name)
    weights = sorted(folder.glob(WEIGHTS))
    _refuse_others(folder, weights)
    try:
        with loading_quietly():
            network, found = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError) as error:
        raise DamagedFile(f"{folder} cannot be loaded as CLIP: {str(error).strip().splitlines()[0]}") from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers makes up what a file lacks
        raise DamagedFile(f"{folder}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
    label = folder.resolve().name if Path(name).expanduser().is_dir() else name
    return Clip(network.eval().requires_grad_(False), processor, label, _hash(weights))


def find_clip(name: str) -> Path:
    """The folder itself, or the snapshot of a hub id in the cache."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    way = "dmquant fetch clip" if name == DEFAULT else f"hf download {name}"
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise MissingResource(f"CLIP {name!r} is no folder here and not in the hub's cache; get it with: {way}") from error


def fetch_clip(name: str = DEFAULT) -> Path:
    """Downloads a CLIP into the hub's cache, which checks it, and returns its folder; 1.7 GB the default."""
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=["*flax*", "*tf_*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingResource(f"CLIP {name!r} cannot be fetched: {reason}; or give its folder by --clip") from error


def _refuse_others(folder: Path, weights: Sequence[Path]) -> None:
    """Raises for a folder that holds no CLIP, or one without safetensors."""
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
    """SHA-256 of the file; of several shards, that of their hashes one after the other."""
    hashes = [hash_file(file) for file in weights]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
