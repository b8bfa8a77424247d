"""Images are drawn once: what a pipeline drew from some seeds is kept on disk and found again.

One folder for all that decides what is drawn (weights, configs, prompts or classes, sampler, steps, kind of device, versions),
and in it one file per batch of seeds with the images, the seconds that drawing took and a hash. So an interrupted evaluation
goes on where it stopped, and one more metric costs no sampling. A file serves only the very seeds that were drawn together: in
another batch an image may differ by a rounding, and a resumed evaluation shall be equal to one that never stopped.
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
# the packages whose code lies between a seed and its image: in a checkout it changes while the version stays
SOURCES = (diffusion, kernels, nn, quantizers)
PRIVATE = "_"  # what diffusers adds to configs: paths, versions, marks
IMAGES = "images"


class Drawn(NamedTuple):
    """One batch of images, and what drawing it took."""

    images: Tensor  # uint8 (B, 3, H, W), on the CPU
    seconds: float
    peak_bytes: int  # of the accelerator's memory; 0 on a CPU


class Gallery:
    """Draws by seed, or finds what was drawn. Without a folder nothing is kept."""

    def __init__(
        self, pipeline: DiffusionPipeline, *, steps: int, conditioning: Conditioning = Conditioning(), folder: Path | None = None
    ):
        self._target, self._steps, self._conditioning = find_target(pipeline), steps, complete(pipeline, conditioning)
        self._folder = folder and folder / name_folder(self._target, steps, self._conditioning)

    def draw(self, seeds: Sequence[int]) -> Drawn:
        """The images of seeds that follow each other, as one batch."""
        file = self._name(seeds)
        drawn = read(file, len(seeds)) if file and file.is_file() else None
        if drawn is None:
            drawn = draw(self._target, seeds, self._steps, self._conditioning)
            if file:
                self._keep(drawn, file)
        return drawn

    def holds(self, seeds: Sequence[int]) -> bool:
        """Whether these seeds were drawn together before."""
        file = self._name(seeds)
        return file is not None and file.is_file()

    def _name(self, seeds: Sequence[int]) -> Path | None:
        return self._folder and self._folder / f"{seeds[0]}-{seeds[-1]}.safetensors"

    def _keep(self, drawn: Drawn, file: Path) -> None:
        try:
            write(drawn, file)
        except OSError as error:  # a full disk shall not end an evaluation
            warnings.warn(f"images are not kept from here on: {error}", stacklevel=2)
            self._folder = None


def default_folder() -> Path:
    """$DMQUANT_CACHE, or our place in the cache of huggingface_hub, where the Inception weights are too."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(constants.HF_ASSETS_CACHE).expanduser() / "dmquant" / "default" / IMAGES


def draw(target: Target, seeds: Sequence[int], steps: int, conditioning: Conditioning) -> Drawn:
    device = target.denoiser.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    images = torch.cat(list(generate(target.pipeline, seeds, SamplingPlan(steps, len(seeds), conditioning))))
    seconds = time.perf_counter() - started
    return Drawn(images, seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


def name_folder(target: Target, steps: int, conditioning: Conditioning = Conditioning()) -> str:
    """A hash of everything that decides which image a seed becomes."""
    pipeline, denoiser = target.pipeline, target.denoiser
    asked = {"kind": conditioning.kind, "entries": conditioning.sha256, "guidance": conditioning.guidance}
    facts = {
        "pipeline": hash_pipeline(pipeline), "steps": steps, "device": denoiser.device.type, "dtype": str(denoiser.dtype),
        "versions": [__version__, *(version(package) for package in list_packages(pipeline))], "sources": hash_sources(),
        "kernels": choice(), "asked": asked,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def list_packages(pipeline: DiffusionPipeline) -> list[str]:
    """Those whose code decides what is drawn."""
    homes = {type(part).__module__.partition(".")[0] for part in pipeline.components.values()}
    return sorted({*PACKAGES, *(homes & {TEXT_PACKAGE})})


@cache
def hash_sources() -> str:
    """SHA-256 over the Python and C sources of the packages that decide what is drawn."""
    digest = hashlib.sha256()
    for folder in (Path(package.__path__[0]) for package in SOURCES):
        for file in sorted(file for suffix in ("py", "c", "h") for file in folder.rglob(f"*.{suffix}")):
            digest.update(f"{folder.name}/{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def hash_pipeline(pipeline: DiffusionPipeline) -> str:
    """SHA-256 over the components of a pipeline: classes, configs, layers and weights. Its path does not count."""
    digest = hashlib.sha256(type(pipeline).__name__.encode())
    for name, part in sorted(pipeline.components.items()):
        facts = [name, type(part).__name__, _public(getattr(part, "config", {}))]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        if isinstance(part, Module):
            _hash_module(part, digest)
        if hasattr(part, "get_vocab"):  # a tokenizer: which words are one token lies in no config
            digest.update(json.dumps(part.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()


def _hash_module(module: Module, digest: "hashlib._Hash") -> None:
    digest.update(repr(module).encode())  # the classes of its layers: packed and fake-quantized ones round differently
    tensors = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in stored_tensors(tensor):
            digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _public(config: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(config).items() if not key.startswith(PRIVATE)} if hasattr(config, "items") else {}


def write(drawn: Drawn, file: Path) -> None:
    """All or nothing."""
    facts = {"seconds": repr(drawn.seconds), "peak_bytes": str(drawn.peak_bytes), "sha256": _hash(drawn.images)}
    content = safetensors.torch.save({IMAGES: drawn.images.contiguous()}, facts)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read(file: Path, count: int) -> Drawn | None:
    """What was written; None, with a warning, where that is not what the file holds."""
    try:
        with safe_open(file, "pt") as content:
            facts, images = content.metadata(), content.get_tensor(IMAGES)
        if len(images) == count and images.dtype == torch.uint8 and facts["sha256"] == _hash(images):
            return Drawn(images, float(facts["seconds"]), int(facts["peak_bytes"]))
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        pass  # the same as a hash that does not fit
    warnings.warn(f"{file} is damaged; its images are drawn again", stacklevel=2)
    return None


def _hash(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()
