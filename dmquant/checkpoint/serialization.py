"""Writes and reads folders of quantized pipelines: diffusers pipelines whose denoiser is packed.

A folder is complete or absent (atomic_folder.py). The hooks in diffusers_quantizer.py read the denoiser, so `load` and diffusers'
from_pretrained are one loader; `load` checks the hashes of the manifest first. Saving a pipeline twice gives the same bytes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from torch import nn

from dmquant.checkpoint import atomic_folder, diffusers_quantizer
from dmquant.checkpoint.quantization_config import DmquantConfig
from dmquant.diffusion.pipeline import (
    DENOISERS,
    Target,
    find_target,
    is_quantized,
    load_folder,
    locate,
    open_pipeline,
    place,
)
from dmquant.errors import DamagedFile, DmquantError, InputError
from dmquant.nn import cuda_graph as graph
from dmquant.nn.convert import pack_model, packed_layers, prepare_packed


def save(pipeline: DiffusionPipeline, folder: str | Path, *, force: bool = False) -> Path:
    """Writes the pipeline with a packed denoiser and returns the folder. The pipeline given stays as it is."""
    destination = atomic_folder.check_target(folder, force=force)
    packed = pack(find_target(pipeline))
    _refuse_unreadable(packed.denoiser)
    atomic_folder.check_space(destination, _count_bytes(packed.pipeline))
    with atomic_folder.publish(destination, force=force) as temporary:
        try:
            packed.pipeline.save_pretrained(temporary, safe_serialization=True)
        except SafetensorError as error:
            raise DmquantError(f"{destination} was not written: {error}") from error
        _forget_paths(temporary)
    return destination


def load(
    folder: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None, verify: bool = True
) -> DiffusionPipeline:
    """Returns the quantized pipeline in a folder. Hashes are checked if the folder has a manifest. Scales stay float32."""
    folder = locate(_recover(Path(folder)))
    if verify and (folder / atomic_folder.MANIFEST).is_file():  # save_pretrained writes none
        atomic_folder.verify_manifest(folder)
    _read_config(folder)
    return place(load_folder(folder, dtype=dtype), device)


def open_any(
    model: str | Path | None = None, *, device: str | None = None, dtype: torch.dtype | None = None, any_tool: bool = False,
    cuda_graph: bool = False,
) -> DiffusionPipeline:  # fmt: skip
    """Returns a quantized or float pipeline: from a local folder, by hub id, or the embedded one (None).

    With `any_tool` also one that another tool quantized. With `cuda_graph`, on a CUDA device, the denoiser's calls are replays of
    CUDA graphs (nn/cuda_graph.py): faster where launches take longer than the work, at the price of more memory.
    """
    if cuda_graph and not (device or "").startswith("cuda"):
        raise InputError(f"cuda_graph needs a CUDA device, not {device or 'the CPU'}; give device='cuda'")
    folder = locate(model)
    if not is_quantized(folder):
        pipeline = open_pipeline(model, device=device, dtype=dtype, any_tool=any_tool)
    else:
        # the hub checks hashes by itself, and its snapshot lacks files that diffusers does not ask for
        pipeline = load(folder, device=device, dtype=dtype, verify=model is not None and Path(model).exists())
    if cuda_graph:
        graph.capture(find_target(pipeline).denoiser)
    return pipeline


def verify(folder: str | Path) -> list[str]:
    """Reads and checks all files of a folder and returns their names. Raises DamagedFile for the first fault."""
    folder = locate(_recover(Path(folder)))
    if not (folder / atomic_folder.MANIFEST).is_file():
        _read_config(folder)  # a float pipeline never has one
        way_out = "write the folder anew with dmquant.save(dmquant.load(folder), new_folder)"
        raise DamagedFile(f"{folder} has no {atomic_folder.MANIFEST} to compare its files with; {way_out}")
    names = atomic_folder.verify_manifest(folder)
    load(folder, verify=False)
    for name in names:
        if name.endswith(".safetensors"):
            _refuse_non_finite(folder / name)
    return names


def read_record(folder: str | Path) -> dict[str, Any]:
    """Returns how the pipeline in a folder was quantized: method, settings, bits, base model, seed. Reads JSON only."""
    return _read_config(Path(folder)).run


def pack(target: Target) -> Target:
    """Returns a pipeline with a packed denoiser, ready to run or to save. It shares all float tensors."""
    packed = pack_model(target.denoiser)
    if not packed_layers(packed):
        raise InputError("nothing in this pipeline is quantized; see dmquant.quantize")
    diffusers_quantizer.mark_as_quantized(packed)
    return target.with_denoiser(packed)


def _refuse_unreadable(denoiser: ModelMixin) -> None:
    """Raises an error unless the denoiser has exactly the tensors that its config describes, all of them valid."""
    with init_empty_weights():
        # through JSON: the config in memory also holds private entries of diffusers
        skeleton = type(denoiser).from_config(json.loads(denoiser.to_json_string()))
    prepare_packed(skeleton, denoiser.config.quantization_config.scheme, dtype=denoiser.dtype)
    expected, found = skeleton.state_dict(), denoiser.state_dict()
    odd = sorted(set(expected) ^ set(found))
    if odd:
        raise DmquantError(f"nothing was saved: {odd[0]} is {'unexpected' if odd[0] in found else 'missing'} in a packed model")
    for name, tensor in found.items():
        path, _, leaf = name.rpartition(".")
        diffusers_quantizer.check_tensor(skeleton.get_submodule(path), leaf, tensor, name=name)


def _count_bytes(pipeline: DiffusionPipeline) -> int:
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


def _forget_paths(folder: Path) -> None:
    """Removes the path from which a pipeline was loaded: it belongs to the machine, not to the model."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _recover(folder: Path) -> Path:
    """Restores a result whose writer was killed between its two renames."""
    if not folder.exists() and folder.parent.is_dir():
        with atomic_folder.lock(folder):
            atomic_folder.repair(folder)
    return folder


def _read_config(folder: Path) -> DmquantConfig:
    """Returns the quantization_config of the denoiser in a pipeline folder."""
    for name in DENOISERS:
        path = locate(folder) / name / "config.json"
        if path.is_file():
            return _parse_config(path)
    raise InputError(f"{folder} holds no denoiser: looked for {', '.join(DENOISERS)}")


def _parse_config(path: Path) -> DmquantConfig:
    try:
        config = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{path} is no JSON object: {error}") from error
    if config is None:
        raise InputError(f"{path.parent} is not quantized; open it with dmquant.diffusion.pipeline.open_pipeline")
    return DmquantConfig.from_dict(config)


def _refuse_non_finite(path: Path) -> None:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  a safetensors file cannot be iterated over
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise DamagedFile(f"{path}: {name} holds values that are not finite")
