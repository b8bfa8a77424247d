"""Stores generated images on disk, so that equal pipelines, options and seeds are sampled once.

The name of a folder is a hash of everything that determines an image: weights, configs, prompts or classes, sampler, steps,
kind of device, versions. It has one file per batch of seeds with the images, the seconds of sampling and a hash. An interrupted
evaluation continues where it stopped, and one more metric needs no sampling. A file is used only for the same batch of seeds:
in another batch an image may be rounded differently, and a continued evaluation must equal an uninterrupted one.
"""

import hashlib
import json
import os
import secrets
import time
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Module

from dmquant import __version__, diffusion, kernels, nn, quantizers
from dmquant.diffusion.conditioning import Conditioning, complete
from dmquant.diffusion.other_tools import stored_tensors
from dmquant.diffusion.pipeline import Target, find_target
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.kernels.registry import choice

VARIABLE = "DMQUANT_CACHE"
PACKAGES, TEXT_PACKAGE = ("torch", "diffusers"), "transformers"
# packages whose code determines the images; in a checkout their code changes while the version does not
SOURCES = (diffusion, kernels, nn, quantizers)
PRIVATE = "_"  # prefix of keys that diffusers adds to configs: paths, versions
IMAGES = "images"


class ImageBatch(NamedTuple):
    """One batch of images, with the time and memory of sampling it."""

    images: Tensor  # uint8 (B, 3, H, W), on the CPU
    seconds: float
    peak_bytes: int  # of the accelerator's memory; 0 on a CPU


class ImageCache:
    """Loads or generates images by seed. Without a folder nothing is stored."""

    def __init__(
        self, pipeline: DiffusionPipeline, *, steps: int, conditioning: Conditioning = Conditioning(), folder: Path | None = None
    ):
        self._target, self._steps, self._conditioning = find_target(pipeline), steps, complete(pipeline, conditioning)
        self._folder = folder and folder / name_folder(self._target, steps, self._conditioning)

    def load_or_generate(self, seeds: Sequence[int]) -> ImageBatch:
        """Returns the images of consecutive seeds as one batch, from the folder if it has them."""
        file = self._name(seeds)
        batch = read_file(file, len(seeds)) if file and file.is_file() else None
        if batch is None:
            batch = generate_batch(self._target, seeds, self._steps, self._conditioning)
            if file:
                self._store(batch, file)
        return batch

    def contains(self, seeds: Sequence[int]) -> bool:
        """Returns whether the images of these seeds were stored as one batch."""
        file = self._name(seeds)
        return file is not None and file.is_file()

    def _name(self, seeds: Sequence[int]) -> Path | None:
        return self._folder and self._folder / f"{seeds[0]}-{seeds[-1]}.safetensors"

    def _store(self, batch: ImageBatch, file: Path) -> None:
        try:
            write_file(batch, file)
        except OSError as error:  # an evaluation continues with a full disk
            warnings.warn(f"images are not stored from here on: {error}; set {VARIABLE} to another folder", stacklevel=2)
            self._folder = None


def default_folder() -> Path:
    """Returns $DMQUANT_CACHE if it is set, else dmquant's folder in the assets cache of huggingface_hub."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(constants.HF_ASSETS_CACHE).expanduser() / "dmquant" / "default" / IMAGES


def generate_batch(target: Target, seeds: Sequence[int], steps: int, conditioning: Conditioning) -> ImageBatch:
    """Generates the images of the seeds as one batch and measures time and memory."""
    device = target.denoiser.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    images = torch.cat(list(generate(target.pipeline, seeds, SamplingPlan(steps, len(seeds), conditioning))))
    seconds = time.perf_counter() - started
    return ImageBatch(images, seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


def name_folder(target: Target, steps: int, conditioning: Conditioning = Conditioning()) -> str:
    """Returns a hash of everything that determines the image of a seed."""
    pipeline, denoiser = target.pipeline, target.denoiser
    asked = {"kind": conditioning.kind, "entries": conditioning.sha256, "guidance": conditioning.guidance}
    facts = {
        "pipeline": hash_pipeline(pipeline),
        "steps": steps,
        "device": denoiser.device.type,
        "dtype": str(denoiser.dtype),
        "versions": [__version__, *(version(package) for package in list_packages(pipeline))],
        "sources": hash_sources(),
        "kernels": choice(),
        "asked": asked,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def list_packages(pipeline: DiffusionPipeline) -> list[str]:
    """Returns the names of the packages whose code determines the images."""
    homes = {type(part).__module__.partition(".")[0] for part in pipeline.components.values()}
    return sorted({*PACKAGES, *(homes & {TEXT_PACKAGE})})


@cache
def hash_sources() -> str:
    """Returns the SHA-256 of the Python and C sources of the packages SOURCES."""
    digest = hashlib.sha256()
    for folder in (Path(package.__path__[0]) for package in SOURCES):
        for file in sorted(file for suffix in ("py", "c", "h") for file in folder.rglob(f"*.{suffix}")):
            digest.update(f"{folder.name}/{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def hash_pipeline(pipeline: DiffusionPipeline) -> str:
    """Returns the SHA-256 of a pipeline's components (classes, configs, layers, weights); its path does not enter."""
    digest = hashlib.sha256(type(pipeline).__name__.encode())
    for name, part in sorted(pipeline.components.items()):
        facts = [name, type(part).__name__, _public(getattr(part, "config", {}))]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        if isinstance(part, Module):
            _hash_module(part, digest)
        if hasattr(part, "get_vocab"):  # a tokenizer, whose vocabulary is not in its config
            digest.update(json.dumps(part.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()


def _hash_module(module: Module, digest: "hashlib._Hash") -> None:
    digest.update(repr(module).encode())  # the classes of its layers: packed and fake-quantized layers round differently
    tensors = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in stored_tensors(tensor):
            digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _public(config: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(config).items() if not key.startswith(PRIVATE)} if hasattr(config, "items") else {}


def write_file(batch: ImageBatch, file: Path) -> None:
    """Writes a batch atomically."""
    facts = {"seconds": repr(batch.seconds), "peak_bytes": str(batch.peak_bytes), "sha256": _hash(batch.images)}
    content = safetensors.torch.save({IMAGES: batch.images.contiguous()}, facts)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read_file(file: Path, count: int) -> ImageBatch | None:
    """Returns the batch in a file; warns and returns None if the file is damaged."""
    try:
        with safe_open(file, "pt") as content:
            facts, images = content.metadata(), content.get_tensor(IMAGES)
        if len(images) == count and images.dtype == torch.uint8 and facts["sha256"] == _hash(images):
            return ImageBatch(images, float(facts["seconds"]), int(facts["peak_bytes"]))
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        pass  # damaged, as if the hash were wrong
    warnings.warn(f"{file} is damaged; its images are generated again", stacklevel=2)
    return None


def _hash(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()
