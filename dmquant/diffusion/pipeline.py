"""Opens diffusers pipelines from folders, the hub or the embedded assets, and finds the denoiser in them."""

import copy
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from dmquant.assets import ASSETS
from dmquant.diffusion.folder_checks import find_quantizer, list_components, refuse_foreign_code, refuse_pickles
from dmquant.diffusion.layer_roles import named_layers
from dmquant.diffusion.quiet_loading import loading_quietly
from dmquant.errors import DamagedFile, DmquantError, InputError, MissingResource
from dmquant.kernels import registry

EMBEDDED = "embedded"
DENOISERS = ("unet", "transformer", "prior", "decoder")  # component names, in the order they are looked for
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
HUB_TIMEOUT_S = 4.0


def open_pipeline(
    model: str | Path | None = None, *, device: str | None = None, dtype: torch.dtype | None = None, any_tool: bool = False
) -> DiffusionPipeline:
    """Opens a float pipeline.

    Args:
        model: a local folder, a hub id "org/name", or None for the embedded pipeline.
        dtype: of the components; float32 by default.
        any_tool: also open pipelines that another tool quantized; their weights are not checked.

    Raises:
        InputError: the pipeline is quantized, or the device cannot be used.
        MissingResource: nothing was found under this name, or a library is not installed.
        DamagedFile: a config cannot be read, or weights are missing or not finite.
    """
    folder = locate(model)
    tool = find_quantizer(folder, DENOISERS)
    if tool == "dmquant" or (tool is not None and not any_tool):
        way_out = "open it with dmquant.load" if tool == "dmquant" else "give the float pipeline that it was made from"
        raise InputError(f"{folder}: this is a {tool} checkpoint; {way_out}")
    pipeline = load_folder(folder, dtype=dtype)
    pipeline.register_to_config(_name_or_path=EMBEDDED if model is None else str(model))  # not the cache folder behind it
    target = find_target(pipeline)
    _check_size(folder / target.name, target.denoiser)
    if tool is None:
        _check_weights(folder / target.name, target.denoiser)
    return place(pipeline, device)


def locate(model: str | Path | None) -> Path:
    """Returns the local folder of a model: assets (None or "embedded"), the path itself, or the hub snapshot of "org/name"."""
    if model is None or model == EMBEDDED:
        return _check_folder(ASSETS / "pipeline")
    path = Path(model).expanduser()
    if path.exists():
        return _check_folder(path)
    if isinstance(model, Path) or not HUB_ID.fullmatch(model):
        raise MissingResource(f"{str(model)!r} was tried as a local path and does not exist; a hub id has the form org/name")
    return _check_folder(_download(model))


def load_folder(folder: Path, *, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Loads the pipeline in a local folder, in float32 by default. Accepts only safetensors and classes of diffusers."""
    registry.choice()  # refuses an unknown DMQUANT_KERNELS before any work is done
    files = list_components(folder)
    refuse_foreign_code(folder, files)
    refuse_pickles(files)
    try:
        with loading_quietly():
            return DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=dtype)
    except DmquantError:
        raise
    except ImportError as error:  # raised by diffusers' placeholder classes for missing libraries
        raise MissingResource(f"{folder} needs a library that is not installed: {str(error).strip()}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedFile(f"{folder} cannot be loaded: {str(error).strip()}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # diffusers raises these for wrong config values
        configs = ["model_index.json", *(file.as_posix() for file in files if file.name.endswith("config.json"))]
        reason = f"{type(error).__name__}: {error}"
        raise DamagedFile(f"{folder} cannot be loaded; a value in one of {', '.join(configs)} is wrong ({reason})") from error


def choose_device() -> str:
    """Returns the CUDA device of this process (LOCAL_RANK), or "cpu" without CUDA."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def place(pipeline: DiffusionPipeline, device: str | None) -> DiffusionPipeline:
    """Moves the pipeline to the device; None leaves it where it is. Raises InputError if the device cannot be used."""
    return pipeline if device is None else pipeline.to(_check_device(device))


def is_quantized(folder: str | Path) -> bool:
    """Returns whether a local pipeline folder holds a denoiser packed by dmquant. Reads JSON only."""
    return (Path(folder) / "model_index.json").is_file() and find_quantizer(Path(folder), DENOISERS) == "dmquant"


@dataclass(frozen=True)
class Target:
    """A pipeline and the network in it that the sampler calls."""

    pipeline: DiffusionPipeline
    name: str  # of the network among the pipeline's components
    denoiser: ModelMixin

    def with_denoiser(self, denoiser: nn.Module) -> Self:
        """Returns a pipeline with another network; the two pipelines share every other component."""
        twin = copy.copy(self.pipeline)
        twin._internal_dict = copy.copy(self.pipeline._internal_dict)
        twin.register_modules(**{self.name: denoiser})
        return replace(self, pipeline=twin, denoiser=denoiser)


def find_target(pipeline: DiffusionPipeline) -> Target:
    """Finds the network that the sampler calls.

    Public functions call this once; functions inside the package take the Target or its denoiser.

    Raises:
        DmquantError: no component has Conv1d, Conv2d or Linear layers.
    """
    for name in DENOISERS:
        module = pipeline.components.get(name)
        if isinstance(module, nn.Module) and named_layers(module):
            return Target(pipeline, name, module)
    found = ", ".join(f"{name} ({type(part).__name__})" for name, part in pipeline.components.items() if part is not None)
    raise DmquantError(
        f"{type(pipeline).__name__} has no denoiser with Conv1d, Conv2d or Linear layers: "
        f"looked for {', '.join(DENOISERS)}; found {found or 'nothing'}"
    )


@contextmanager
def evaluating(denoiser: nn.Module) -> Iterator[None]:
    """Keeps the denoiser in evaluation mode inside the context; with dropout, a teacher's outputs would differ per call."""
    was_training = denoiser.training
    denoiser.eval()
    try:
        yield
    finally:
        denoiser.train(was_training)


def _check_device(name: str) -> torch.device:
    """Returns the device of that name. Raises InputError if it cannot hold a tensor here."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device {name!r} is not available here; torch {torch.__version__} sees no CUDA device")
        torch.empty(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ImportError) as error:  # the last two come from backends that this torch lacks
        reason = re.split(r"\n|\. ", str(error))[0]
        raise InputError(f"device {name!r} cannot be used: {reason}; try cpu, cuda or cuda:1") from error
    if device.type == "meta" or (device.type == "cpu" and device.index):
        raise InputError(f"device {name!r} cannot be used; try cpu, cuda or cuda:1")
    return device


def _check_folder(folder: Path) -> Path:
    """Returns the folder. Raises MissingResource or InputError if it holds no pipeline."""
    if not folder.exists():
        raise MissingResource(f"{folder} is missing; give a diffusers pipeline folder")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give a diffusers pipeline folder")
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} has no model_index.json; give the folder of a whole diffusers pipeline, not of one component")
    return folder


def _download(model: str) -> Path:
    """Returns the snapshot folder of a hub pipeline, from the cache if the hub is offline or does not answer."""
    files = None if constants.HF_HUB_OFFLINE else _ask_hub(model)
    if files is not None:
        refuse_pickles(files)
    try:
        return Path(DiffusionPipeline.download(model, use_safetensors=True, local_files_only=files is None))
    except (OSError, HTTPError) as error:
        unanswered = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        why = f"not in the cache, and {unanswered}" if files is None else str(error)
        raise MissingResource(f"{model!r} is no local folder and was then tried as a hub id: {why}") from error


def _ask_hub(model: str) -> list[PurePath] | None:
    """Returns the file names of a hub repository, or None if the hub does not answer in time."""
    try:
        files = HfApi().model_info(model, timeout=HUB_TIMEOUT_S).siblings
        return [PurePath(file.rfilename) for file in files or ()]
    except GatedRepoError as error:
        raise MissingResource(f"{model!r} is gated on the hub; accept its terms there and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise MissingResource(f"{model!r} is neither a local folder nor a model on the hub (or it is private)") from error
    except (HTTPError, OSError):
        return None


def _check_size(folder: Path, denoiser: ModelMixin) -> None:
    """Raises DamagedFile if the config has a sample_size that is not a positive whole number or a pair of them."""
    size = denoiser.config.get("sample_size", 1)
    sides = size if isinstance(size, list | tuple) else [size]
    if not all(type(side) is int and side > 0 for side in sides):
        raise DamagedFile(f"{folder}/config.json: sample_size cannot be {json.dumps(size)}; give a positive whole number")


def _check_weights(folder: Path, denoiser: ModelMixin) -> None:
    """Raises DamagedFile for missing, unexpected or non-finite tensors.

    diffusers only warns about missing tensors (they stay on meta) and unexpected ones, and does not look for NaN.
    """
    damaged = [key for key, value in denoiser.state_dict().items() if value.is_meta or not value.isfinite().all()]
    if damaged:
        raise DamagedFile(f"{folder}: {len(damaged)} tensors are missing or not finite: {', '.join(damaged[:5])}")
    extra = _find_extra(folder, denoiser)
    if extra:
        is_student = any("_quantizer." in key for key in extra)
        reason = "; it was saved with save_pretrained before dmquant.save" if is_student else ""
        raise DamagedFile(f"{folder}: {len(extra)} tensors have no place in the model: {', '.join(extra[:5])}{reason}")


def _find_extra(folder: Path, denoiser: ModelMixin) -> list[str]:
    """Returns the sorted names of stored tensors that the model does not have."""
    stored: dict[str, None] = {}
    for pattern in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors"):
        for path in folder.glob(pattern):
            with safe_open(path, "pt") as file:
                stored |= dict.fromkeys(file.keys())
    denoiser._fix_state_dict_keys_on_load(stored)  # names written by early versions of diffusers
    ignored = denoiser._keys_to_ignore_on_load_unexpected or ()
    extra = stored.keys() - denoiser.state_dict().keys()
    return sorted(key for key in extra if not any(re.search(pattern, key) for pattern in ignored))
