"""Parses and checks arguments of the command line: settings, metrics, conditioning, default folders, paths to write."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmquant.diffusion.prompts import read_prompts
from dmquant.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dmquant.diffusion.conditioning import Conditioning

RUNS = Path("runs")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def refuse_empty(line: list[str]) -> None:
    """Raises InputError if an argument is empty.

    It usually stems from a shell variable that is not set; as a path it would mean the working folder.
    """
    for before, argument in zip(["", *line], line):
        name, equals, value = argument.partition("=")
        if not argument or (name.startswith("--") and equals and not value):
            raise InputError(f"{name or before or 'the first argument'} is empty; give a value or leave it out")


def merge_settings(options: dict[str, int | None], pairs: list[str]) -> dict[str, int | str]:
    """Returns the settings given by options (None: not given) and by key=value; raises InputError if one is given twice."""
    merged: dict[str, int | str] = {key: value for key, value in options.items() if value is not None}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set takes key=value, got {pair!r}")
        if key in merged:
            raise InputError(f"setting {key!r} is given twice")
        merged[key] = value
    return merged


def read_metrics(text: str | None, shorthands: Sequence[str] = ()) -> tuple[str, ...] | None:
    """Returns the metrics named in `text`, as in fid,psnr, then `shorthands`, without duplicates; None if none is given.

    Raises:
        InputError: a name is unknown.
    """
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if not names and not shorthands:
        return None
    from dmquant.evaluation.metrics.registry import check_names

    check_names(names)
    return tuple(dict.fromkeys((*names, *shorthands)))


def default_result_folder(model: str | None, method: str, weight_bits: int, act_bits: int) -> Path:
    """Returns the folder of a quantized pipeline if none is given: runs/MODEL-METHOD-wBITSaBITS."""
    return RUNS / f"{_short_name(model)}-{method}-w{weight_bits}a{act_bits}"


def default_report_folder(model: str | None) -> Path:
    """Returns the folder of a report if none is given: that of a local quantized pipeline, else runs/eval-MODEL."""
    from dmquant.diffusion.pipeline import is_quantized

    if model is not None and Path(model).is_dir() and is_quantized(model):
        return Path(model)
    return RUNS / f"eval-{_short_name(model)}"


def require_writable(folder: Path) -> Path:
    """Returns the folder; raises InputError if it does not exist and cannot be made, or cannot be written."""
    ancestor = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not ancestor.is_dir():
        raise InputError(f"{folder} cannot be made: {ancestor} is a file; choose another with -o")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written: no permission in {ancestor}; choose another with -o")
    return folder


def require_picture(file: Path) -> None:
    """Raises InputError if no picture can be written to the file."""
    if file.suffix.lower() not in PICTURES:
        raise InputError(f"{file} must end in {', '.join(PICTURES)}")
    if file.is_dir():
        raise InputError(f"{file} is a folder; choose another name with -o")
    require_writable(file.absolute().parent)


def find_reports(paths: list[Path]) -> list[Path]:
    """Returns the paths; a folder without report.json is replaced by those of its subfolders that have one."""
    found = []
    for path in paths:
        inner = sorted(file.parent for file in path.glob("*/report.json")) if path.is_dir() else []
        found += inner if inner and not (path / "report.json").exists() else [path]
    return found


def require_page(file: Path) -> None:
    """Raises InputError if no HTML page can be written to the file; an existing file is allowed."""
    if file.suffix.lower() not in (".html", ".htm") or file.is_dir():
        raise InputError(f"{file} must be a file that ends in .html")
    require_writable(file.absolute().parent)


def require_new(file: Path, suffix: str) -> None:
    """Raises InputError if the file exists, does not end in `suffix`, or cannot be written."""
    if file.suffix != suffix:
        raise InputError(f"{file} must end in {suffix}")
    if file.exists():
        raise InputError(f"{file} exists; remove it, or choose another name with -o")
    require_writable(file.absolute().parent)


def open_model(model: str | None, device: str | None, *, any_tool: bool = False) -> "DiffusionPipeline":
    """Returns the pipeline that a command line names, on `device` or the fastest one here.

    Args:
        any_tool: Accept pipelines that other tools quantized.
    """
    from dmquant.checkpoint import serialization
    from dmquant.diffusion.pipeline import choose_device

    return serialization.open_any(model, device=device or choose_device(), any_tool=any_tool)


def read_conditioning(prompts: Path | None, labels: str | None, guidance: float | None) -> "Conditioning":
    """Returns the conditioning from a file of prompts, class labels as in 0,7,8, and a guidance scale.

    Raises:
        InputError: a class label is no whole number, or the prompts cannot be read.
    """
    texts = () if prompts is None else read_prompts(prompts)
    try:
        numbers = () if labels is None else tuple(int(label) for label in labels.split(","))
    except ValueError as error:
        raise InputError(f"--class-labels takes whole numbers as 0,7,8, got {labels!r}") from error
    from dmquant.diffusion.conditioning import Conditioning

    return Conditioning(texts, numbers, guidance)


def _short_name(model: str | None) -> str:
    return "embedded" if model is None else Path(model).absolute().name
