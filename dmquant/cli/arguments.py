"""What a command line says and what it leaves unsaid: settings given as text, names of folders, doors to try first."""

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
    """An argument without text is a variable that was not set: as a path it would be the working folder."""
    for before, argument in zip(["", *line], line):
        name, equals, value = argument.partition("=")
        if not argument or (name.startswith("--") and equals and not value):
            raise InputError(f"{name or before or 'the first argument'} is empty; give a value or leave it out")


def merge_settings(options: dict[str, int | None], pairs: list[str]) -> dict[str, int | str]:
    """Settings that have options of their own and those given as key=value; each may be given once."""
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
    """Names of metrics as in fid,psnr, and those whose own options are given; each once, and None if there are none.

    Raises:
        InputError: a name is unknown.
    """
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if not names and not shorthands:
        return None
    from dmquant.evaluation.metrics.registry import refuse_unknown

    refuse_unknown(names)
    return tuple(dict.fromkeys((*names, *shorthands)))


def name_run(model: str | None, method: str, weight_bits: int, act_bits: int) -> Path:
    """Where a quantized pipeline goes when no folder is given."""
    return RUNS / f"{_short_name(model)}-{method}-w{weight_bits}a{act_bits}"


def name_evaluation(model: str | None) -> Path:
    """Where a report goes when no folder is given: beside a quantized pipeline that lies here, else under runs."""
    from dmquant.diffusion.pipeline import is_quantized

    if model is not None and Path(model).is_dir() and is_quantized(model):
        return Path(model)
    return RUNS / f"eval-{_short_name(model)}"


def require_writable(folder: Path) -> Path:
    """The folder, which need not exist yet: hours of work must not end before a closed door."""
    home = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not home.is_dir():
        raise InputError(f"{folder} cannot be made: {home} is a file; choose another with -o")
    if not os.access(home, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written: no permission in {home}; choose another with -o")
    return folder


def require_picture(file: Path) -> None:
    """Refuses a file name that no picture can be written to."""
    if file.suffix.lower() not in PICTURES:
        raise InputError(f"{file} must end in {', '.join(PICTURES)}")
    if file.is_dir():
        raise InputError(f"{file} is a folder; choose another name with -o")
    require_writable(file.absolute().parent)


def find_reports(paths: list[Path]) -> list[Path]:
    """The paths, where a folder without a report of its own stands for those of its folders that have one."""
    found = []
    for path in paths:
        inner = sorted(file.parent for file in path.glob("*/report.json")) if path.is_dir() else []
        found += inner if inner and not (path / "report.json").exists() else [path]
    return found


def require_page(file: Path) -> None:
    """Refuses a file name that no page can be written to; a page that is there is replaced."""
    if file.suffix.lower() not in (".html", ".htm") or file.is_dir():
        raise InputError(f"{file} must be a file that ends in .html")
    require_writable(file.absolute().parent)


def require_new(file: Path, suffix: str) -> None:
    """Refuses a file name that does not end as it should or is taken."""
    if file.suffix != suffix:
        raise InputError(f"{file} must end in {suffix}")
    if file.exists():
        raise InputError(f"{file} is there already; remove it, or choose another name with -o")
    require_writable(file.absolute().parent)


def open_model(model: str | None, device: str | None, *, any_tool: bool = False) -> "DiffusionPipeline":
    """The pipeline that a command line names, on its device or on the best one here; of any tool, to look at it."""
    from dmquant.checkpoint import serialization
    from dmquant.diffusion.pipeline import choose_device

    return serialization.open_any(model, device=device or choose_device(), any_tool=any_tool)


def read_conditioning(prompts: Path | None, labels: str | None, guidance: float | None) -> "Conditioning":
    """What a conditional pipeline is asked for, from a file of prompts or from class labels as 0,7,8."""
    texts = () if prompts is None else read_prompts(prompts)
    try:
        numbers = () if labels is None else tuple(int(label) for label in labels.split(","))
    except ValueError as error:
        raise InputError(f"--class-labels takes whole numbers as 0,7,8, got {labels!r}") from error
    from dmquant.diffusion.conditioning import Conditioning

    return Conditioning(texts, numbers, guidance)


def _short_name(model: str | None) -> str:
    return "embedded" if model is None else Path(model).absolute().name
