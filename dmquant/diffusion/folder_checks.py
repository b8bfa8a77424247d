"""Checks of a pipeline folder before anything in it is loaded.

Weights are read from safetensors only, and no code of a folder is run: pickles and foreign code are refused by name.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils.import_utils import DummyObject

from dmquant.errors import DamagedFile, InputError


def find_quantizer(folder: Path, components: Iterable[str]) -> str | None:
    """Returns quant_method of the first component that has one, None for a float pipeline."""
    index = _read_json(folder / "model_index.json")
    configs = (folder / name / "config.json" for name in components if name in index)
    for path in filter(Path.is_file, configs):
        entry = _read_json(path).get("quantization_config")
        if entry is not None and not isinstance(entry, dict):
            raise DamagedFile(f"{path}: quantization_config should be a JSON object, not a {type(entry).__name__}")
        if entry is not None:
            return str(entry.get("quant_method", "unnamed"))
    return None


def list_components(folder: Path) -> list[PurePath]:
    """Returns the files of the components that model_index.json names, relative to the folder."""
    index = _read_json(folder / "model_index.json")
    public = {name: entry for name, entry in index.items() if not name.startswith("_")}
    names = [name for name, entry in public.items() if isinstance(entry, list) or (folder / name).is_dir()]
    strange = [name for name in names if not name.isidentifier()]
    if strange:
        raise DamagedFile(f"{folder}/model_index.json names impossible components: {', '.join(map(repr, strange))}")
    for name in names:  # a list without a folder of its name is a setting
        if (folder / name).is_dir() and not _is_class_entry(index[name]):
            raise DamagedFile(f"{folder}/model_index.json: {name} should be [library, class], not {json.dumps(index[name])}")
    return sorted(path.relative_to(folder) for name in names for path in (folder / name).glob("*"))


def refuse_foreign_code(folder: Path, files: Iterable[PurePath]) -> None:
    """Raises InputError if the pipeline class is not one of diffusers, or a Python file lies beside a component."""
    name = _read_json(folder / "model_index.json").get("_class_name")
    scripts = [file.as_posix() for file in files if file.suffix == ".py"]
    if isinstance(name, list) or scripts:  # [file, class]
        raise InputError(f"{folder} wants to run its own code ({', '.join(scripts) or name}), which dmquant never does")
    if not isinstance(name, str):
        raise DamagedFile(f"{folder}/model_index.json: _class_name should name a pipeline class, not {json.dumps(name)}")
    kind = getattr(diffusers, name, None)
    # a DummyObject stands for a pipeline whose libraries are missing, and names them when it is loaded
    if not isinstance(kind, DummyObject) and not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise InputError(f"{folder}/model_index.json: diffusers {diffusers.__version__} knows no pipeline class {name!r}")


def refuse_pickles(files: Iterable[PurePath]) -> None:
    """Raises InputError if a component has pickle weights (.bin) and no safetensors."""
    suffixes = defaultdict(set)
    for file in files:
        suffixes[file.parent].add(file.suffix)
    pickled = sorted(str(folder) for folder, found in suffixes.items() if found & {".bin", ".safetensors"} == {".bin"})
    if pickled:
        way_out = "convert them in a sandbox with torch.load(..., weights_only=True) and safetensors.torch.save_file"
        raise InputError(f"only pickle weights (.bin), which can run any code, in {', '.join(pickled)}; {way_out}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def _is_class_entry(entry: object) -> bool:
    """Returns whether an entry of model_index.json is [library, class], or [null, null] for a component left out."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    return all(isinstance(part, str) for part in entry) or entry == [None, None]
