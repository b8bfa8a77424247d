"""Writes the model card of a quantized pipeline: description, code that loads it, metrics, command that made it."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dmquant import methods
from dmquant.errors import InputError
from dmquant.evaluation.reports.columns import name_metric
from dmquant.evaluation.reports.comparison import compare
from dmquant.evaluation.reports.report import Report

FILE_NAME = "README.md"
MARK = "<!-- written by dmquant; remove this line to keep dmquant from replacing the card -->"
TASK = "unconditional-image-generation"
UNKNOWN = "unknown"
BODY = """---
{data}
---
{mark}

# {title}

A diffusers pipeline whose denoiser was quantized by dmquant, method {method}: {weight_bits} bits per weight, {act_bits} bits per
activation. The denoiser's file has {size_mb:.2f} MB, {bits_per_weight:.2f} bits per parameter; in float32 it would have
{float_mb:.2f} MB.

```python
import dmquant.checkpoint.diffusers_quantizer  # teaches diffusers the format
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}")
```

## Measured

{table}

## Made by

```
{command}
```
"""


def write_card(folder: Path, report: Report, reports: Sequence[Report], *, mixed: bool = False) -> Path:
    """Writes README.md into the folder of the pipeline that `report` measured, with the table of all `reports`.

    Args:
        mixed: Accept reports with different protocols.

    Raises:
        InputError: the folder has a README.md that dmquant did not write.
    """
    file = folder / FILE_NAME
    if file.exists() and MARK not in file.read_text(encoding="utf-8"):
        raise InputError(f"{file} was not written by dmquant; move it away to get a new card")
    file.write_text(format_card(report, reports, mixed=mixed), encoding="utf-8")
    return file


def format_card(report: Report, reports: Sequence[Report], *, mixed: bool = False) -> str:
    """Returns the card's text. It contains only the last part of each path: readers have no access to the folders above."""
    name = Path(report.model).name
    short = [replace(other, model=Path(other.model).name, base_model=_shorten(other.base_model)) for other in reports]
    return str(ModelCard(BODY.format(
        data=make_metadata(report, name).to_yaml(), mark=MARK, title=name, folder=name, method=report.method,
        weight_bits=report.weight_bits, act_bits=report.act_bits, size_mb=report.size_bytes / 1e6,
        bits_per_weight=report.bits_per_weight, float_mb=report.float_size_bytes / 1e6,
        table=compare(short, mixed=mixed).to_markdown().rstrip(), command=format_command(report, name),
    )))  # fmt: skip


def make_metadata(report: Report, name: str) -> ModelCardData:
    """Returns the card's metadata for the hub: tags, base model, and each metric with its protocol."""
    protocol = report.protocol
    conditions = {"num_images": protocol.num_images, "steps": protocol.steps, "sampler": protocol.sampler, "seed": protocol.seed}
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=protocol.reference or UNKNOWN,
            dataset_name=protocol.reference or UNKNOWN,
            metric_type=key,
            metric_name=name_metric(key).title,
            metric_value=value,
            metric_config=None,
            dataset_args=conditions,
        )
        for key, value in report.metrics.items()
    ]
    base = report.base_model if is_hub_id(report.base_model) else None
    origin: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["dmquant", report.method, f"w{report.weight_bits}a{report.act_bits}"],
        model_name=name,
        eval_results=results,
        **origin,
    )


def format_command(report: Report, name: str) -> str:
    """Returns the command line that quantizes in the same way; it contains the settings that differ from the defaults."""
    defaults = {item.name: item.default for item in methods.get(report.method).describe()}
    defaults = methods.get(report.method).parse(defaults).settings()
    bits = {"weight_bits": "--wbits", "act_bits": "--abits"}
    base = _shorten(report.base_model)
    words = ["dmquant", "quantize", *([base] if base and base != "embedded" else []), "--method", report.method]
    words += [word for key, option in bits.items() for word in (option, str(getattr(report, key)))]
    changed = {key: value for key, value in report.settings.items() if key not in bits and defaults.get(key) != value}
    words += [word for key, value in changed.items() for word in ("--set", f"{key}={_format_setting(value)}")]
    return shlex.join([*words, "-o", name])


def is_hub_id(model: str | None) -> bool:
    """Whether a name has the form owner/name of the hub and is no local path."""
    return model is not None and model.count("/") == 1 and not model.startswith(("/", ".")) and not Path(model).exists()


def _shorten(model: str | None) -> str | None:
    """Returns a hub id as it is, and the last part of a path."""
    return model if model is None or is_hub_id(model) else Path(model).name


def _format_setting(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
