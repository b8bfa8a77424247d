"""Reports -> one table: rows, differences to the float model, and the conditions they hold under.

One model of the rows serves every format. Markdown and the terminal show rounded text, CSV and JSON the full numbers.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dmquant.errors import InputError
from dmquant.report import Protocol, Report

Cell = str | int | float | None
ABSENT = "–"
FRECHET = ("fid", "fd-")
# below this many images a Frechet distance is clearly biased upwards (Chong & Forsyth, 2020)
FEW_IMAGES = 2048


@dataclass(frozen=True)
class Column:
    """One quantity: how it is called, its unit, which way is better, how it is rounded for reading."""

    key: str
    title: str
    unit: str = ""
    better: str = ""  # "lower", "higher" or neither
    decimals: int = 2
    is_signed: bool = False

    @property
    def heading(self) -> str:
        arrow = {"lower": " ↓", "higher": " ↑", "": ""}[self.better]
        return self.title + (f", {self.unit}" if self.unit else "") + arrow

    def write(self, value: Cell) -> str:
        """The value as a reader wants it."""
        if value is None:
            return ABSENT
        if isinstance(value, float):
            return f"{value:{'+' if self.is_signed else ''},.{self.decimals}f}"
        return str(value)


IDENTITY = (Column("model", "model"), Column("method", "method"), Column("bits", "W/A"))
COST = (
    Column("size_mb", "size", "MB", "lower"),
    Column("size_ratio", "float size / size", "", "higher"),
    Column("bits_per_weight", "bits/weight", "", "lower"),
    Column("giga_ops", "OPs", "G", "lower", 3),
)
NUM_IMAGES = Column("num_images", "n")
TIME = Column("seconds_per_image", "time", "s/image", "lower", 3)
METRICS = {
    "fid": Column("fid", "FID", "", "lower"),
    "psnr": Column("psnr", "PSNR to float", "dB", "higher"),
}


@dataclass(frozen=True)
class Comparison:
    """Columns, rows (column key -> value) and the notes without which the numbers mean nothing."""

    columns: tuple[Column, ...]
    rows: tuple[dict[str, Cell], ...]
    notes: tuple[str, ...]

    def headings(self) -> list[str]:
        return [column.heading for column in self.columns]

    def cells(self) -> list[list[str]]:
        """The table's body, rounded and written out."""
        return [[column.write(row[column.key]) for column in self.columns] for row in self.rows]

    def to_markdown(self) -> str:
        # names stand on the left, numbers on the right
        rules = [":--" if column in IDENTITY else "--:" for column in self.columns]
        table = [self.headings(), rules, *self.cells()]
        lines = ["| " + " | ".join(map(_escape_markdown, line)) + " |" for line in table]
        return "\n".join([*lines, "", *(_escape_markdown(note) + "  " for note in self.notes)]) + "\n"

    def to_csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, [column.key for column in self.columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def to_json(self) -> str:
        document = {"columns": [asdict(column) for column in self.columns], "rows": self.rows, "notes": self.notes}
        return json.dumps(document, indent=2, allow_nan=False) + "\n"


def compare(reports: Report | str | Path | Sequence[Report | str | Path], *, mixed: bool = False) -> Comparison:
    """The table of `reports` (or of the files or folders that hold them), float models first.

    Reports taken under different protocols are refused, unless `mixed`: then what differs becomes a column.
    """
    if isinstance(reports, Report | str | Path):
        reports = [reports]
    loaded = [report if isinstance(report, Report) else Report.load(report) for report in reports]
    if not loaded:
        raise InputError("nothing to compare; give report files or folders that hold a report.json")
    ordered = sorted(loaded, key=lambda report: not report.is_float)  # stable: otherwise in the order given
    varying = find_differences(ordered)
    if varying and not mixed:
        raise InputError(_describe_differences(ordered, varying))
    columns = _choose_columns(ordered, varying)
    rows = tuple(_make_row(report, _find_baseline(report, ordered), columns) for report in ordered)
    return Comparison(columns, rows, tuple(_write_notes(ordered, varying)))


def find_differences(reports: Sequence[Report]) -> list[str]:
    """Names of the protocol fields in which the reports do not all agree."""
    values = {field.name: {getattr(report.protocol, field.name) for report in reports} for field in fields(Protocol)}
    return [name for name, found in values.items() if len(found) > 1]


def _describe_differences(reports: Sequence[Report], varying: Sequence[str]) -> str:
    first = reports[0]
    other = next(report for report in reports if first.protocol.differences(report.protocol))
    pairs = first.protocol.differences(other.protocol)
    said = "; ".join(f"{name} is {here} and {there}" for name, (here, there) in pairs.items())
    return (
        f"{first.model} and {other.model} were measured under different protocols: {said}. "
        f"Evaluate them alike, or pass --mixed (in Python: mixed=True) to show {', '.join(varying)} as columns"
    )


def _choose_columns(reports: Sequence[Report], varying: Sequence[str]) -> tuple[Column, ...]:
    conditions = [Column(name, name.replace("_", " ")) for name in varying if name != NUM_IMAGES.key]
    return (*IDENTITY, *COST, NUM_IMAGES, *conditions, *_metric_columns(reports), TIME)


def _metric_columns(reports: Sequence[Report]) -> list[Column]:
    """A column per metric, Frechet distances first, each followed by its change where a float model has it too."""
    names = {name for report in reports for name in report.metrics}
    measured_on_float = {name for report in reports if report.is_float for name in report.metrics}
    columns = []
    for name in sorted(names, key=lambda name: (not name.startswith(FRECHET), name)):
        metric = METRICS.get(name) or _name_metric(name)
        columns.append(metric)
        if name in measured_on_float and len(reports) > 1:
            columns.append(Column(f"{name}_change", "to float", "%", metric.better, 1, is_signed=True))
    return columns


def _name_metric(name: str) -> Column:
    if name.startswith("fd-"):
        return Column(name, f"FD {name.removeprefix('fd-')}", "", "lower", 4)
    return Column(name, name, "", "", 4)


def _make_row(report: Report, baseline: Report | None, columns: Sequence[Column]) -> dict[str, Cell]:
    values: dict[str, Any] = {
        **report.metrics,
        "model": report.model,
        "method": report.method,
        "bits": f"{report.weight_bits}/{report.act_bits}",
        "size_mb": report.size_bytes / 1e6,
        "size_ratio": report.float_size_bytes / report.size_bytes,
        "bits_per_weight": report.bits_per_weight,
        "giga_ops": report.ops / 1e9,
        "seconds_per_image": report.seconds_per_image,
        **asdict(report.protocol),
        **_changes(report, baseline),
    }
    return {column.key: values.get(column.key) for column in columns}


def _changes(report: Report, baseline: Report | None) -> dict[str, float]:
    """Change of each metric against the float model, in percent of its value there."""
    if baseline is None or report.is_float:
        return {}
    shared = {name: value for name, value in report.metrics.items() if baseline.metrics.get(name)}
    return {f"{name}_change": 100 * (value / baseline.metrics[name] - 1) for name, value in shared.items()}


def _find_baseline(report: Report, reports: Sequence[Report]) -> Report | None:
    """The float report of the model that this one was made from; None where it is not among them.

    A pipeline that was made in memory names no origin: then the float report is meant if there is one only.
    """
    base = report.base_model
    alike = [other for other in reports if other.is_float and not report.protocol.differences(other.protocol)]
    if base is None:
        return alike[0] if len(alike) == 1 else None
    return next((other for other in alike if _is_same(base, other.model)), None)


def _is_same(model: str, other: str) -> bool:
    return model == other or os.path.abspath(model) == os.path.abspath(other)


def _write_notes(reports: Sequence[Report], varying: Sequence[str]) -> list[str]:
    shared = reports[0].protocol
    notes = [
        "size: the denoiser's weights as stored (float: at 32 bits), 1 MB = 10^6 bytes; time: sampling alone",
        "OPs: BOPs / 64 + float MACs + the quantizers' own operations, one denoiser call on one image",
    ]
    parts = {
        "steps": f"{shared.steps} steps",
        "sampler": f"sampler {shared.sampler}",
        "num_images": f"n = {shared.num_images}",
        "seed": f"seeds from {shared.seed}",
        "batch": f"batches of {shared.batch}",
        "image_size": f"{shared.image_size} pixels",
        "extractor": f"features of {shared.extractor}",
        "reference": f"reference {shared.reference} ({shared.reference_images} images)",
    }
    agreed = [text for name, text in parts.items() if name not in varying and getattr(shared, name) is not None]
    notes.append("protocol: " + ", ".join(agreed))
    if any(name.startswith(FRECHET) and r.protocol.num_images < FEW_IMAGES for r in reports for name in r.metrics):
        notes.append(f"a Frechet distance of fewer than {FEW_IMAGES} images is biased upwards: compare it at equal n only")
    if any("psnr" in report.metrics for report in reports):
        notes.append("PSNR: mean over the first seeds, at most 64")
    return notes


def _escape_markdown(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
