"""Builds one table from reports: rows, changes against the float model, and notes on the protocol.

Markdown, LaTeX and the terminal show rounded text, CSV and JSON the full numbers.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dmquant.errors import InputError
from dmquant.evaluation.reports.columns import (
    CHANGE,
    COST,
    IDENTITY,
    MEMORY,
    NUM_IMAGES,
    QUANTIZING,
    TIME,
    Cell,
    Column,
    is_distance,
    name_metric,
    sort_key,
)  # fmt: skip
from dmquant.evaluation.reports.report import FLOAT_METHOD, Protocol, Report
from dmquant.training.run_cost import Effort

# below this many images a Frechet distance is clearly biased upwards (Chong & Forsyth, 2020)
FEW_IMAGES = 2048
BOLD = "\0"  # marks a cell as bold; occurs in no text
LATEX = {
    **{char: "\\" + char for char in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "–": "--", "<": "$<$", ">": "$>$",
}  # fmt: skip
LATEX_SPECIAL = re.compile("|".join(map(re.escape, LATEX)))


@dataclass(frozen=True)
class Comparison:
    """Columns, rows (column key -> value) and notes: the conditions under which the numbers were measured."""

    columns: tuple[Column, ...]
    rows: tuple[dict[str, Cell], ...]
    notes: tuple[str, ...]

    def headings(self) -> list[str]:
        """Returns the heading of each column."""
        return [column.heading for column in self.columns]

    def cells(self, *, mark: Callable[[str], str] = str) -> list[list[str]]:
        """Returns the rows as rounded text. `mark` is applied to the best value of the quantized models in each column."""
        best = self.best()
        return [
            [(mark if (number, column.key) in best else str)(column.format(row[column.key])) for column in self.columns]
            for number, row in enumerate(self.rows)
        ]

    def best(self) -> set[tuple[int, str]]:
        """Returns (row, column key) of the best value of the quantized models in each column.

        A column without a direction, or in which all values are equal, has none.
        """
        found = set()
        for column in self.columns:
            rows = {n: row[column.key] for n, row in enumerate(self.rows) if row.get("method") != FLOAT_METHOD}
            values = {number: value for number, value in rows.items() if value is not None}
            if column.better and not column.is_change and len(set(values.values())) > 1:
                target = (min if column.better == "lower" else max)(values.values())
                found |= {(number, column.key) for number, value in values.items() if value == target}
        return found

    def to_markdown(self) -> str:
        """Returns a Markdown table with the best values in bold, followed by the notes."""
        # names are aligned left, numbers right
        rules = [":--" if column in IDENTITY else "--:" for column in self.columns]
        table = [self.headings(), rules, *self.cells(mark="**{}**".format)]
        lines = ["| " + " | ".join(map(_escape_markdown, line)) + " |" for line in table]
        return "\n".join([*lines, "", *(_escape_markdown(note) + "  " for note in self.notes)]) + "\n"

    def to_latex(self) -> str:
        """Returns a tabular for the booktabs package, followed by the notes as comments."""
        sides = "".join("l" if column in IDENTITY else "r" for column in self.columns)
        body = [[_escape_latex(cell) for cell in line] for line in self.cells(mark=lambda text: f"{BOLD}{text}")]
        head = [_escape_latex(heading) for heading in self.headings()]
        lines = [" & ".join(line) + r" \\" for line in (head, *body)]
        notes = [f"% {_escape_latex(note)}" for note in self.notes]
        rules = (r"\begin{tabular}{" + sides + "}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule")
        return "\n".join([*rules, r"\end{tabular}", *notes]) + "\n"

    def to_csv(self) -> str:
        """Returns the rows as CSV: column keys in the first line, unrounded numbers, no notes."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [column.key for column in self.columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def to_json(self) -> str:
        """Returns an object with "columns", "rows" (unrounded numbers) and "notes"."""
        document = {"columns": [asdict(column) for column in self.columns], "rows": self.rows, "notes": self.notes}
        return json.dumps(document, indent=2, allow_nan=False) + "\n"


def compare(reports: Report | str | Path | Sequence[Report | str | Path], *, mixed: bool = False) -> Comparison:
    """Returns the table of `reports` (or of files or folders that hold them), float models first.

    Args:
        mixed: Accept reports with different protocols; each field that differs becomes a column.

    Raises:
        InputError: there are no reports, or their protocols differ and `mixed` is False.
    """
    if isinstance(reports, Report | str | Path):
        reports = [reports]
    loaded = [report if isinstance(report, Report) else Report.load(report) for report in reports]
    if not loaded:
        raise InputError("nothing to compare; give report files or folders that hold a report.json")
    ordered = sorted(loaded, key=lambda report: not report.is_float)  # stable: models of one kind keep the given order
    varying = find_differences(ordered)
    if varying and not mixed:
        raise InputError(_describe_differences(ordered, varying))
    columns = _choose_columns(ordered, varying)
    rows = tuple(_make_row(report, _find_baseline(report, ordered), columns) for report in ordered)
    return Comparison(columns, rows, tuple(_write_notes(ordered, varying)))


def add_efforts(table: Comparison, efforts: Sequence[Effort | None]) -> Comparison:
    """Returns the table with the seconds and the memory of quantizing; `efforts` has one entry per row.

    A run that was interrupted and resumed has no complete record: its cells are empty.

    Raises:
        InputError: no row has a record.
    """
    if not any(efforts):
        raise InputError("none of these folders has a record of the cost of quantizing; give folders that dmquant quantized")
    seconds, memory = (column.key for column in QUANTIZING)
    rows = []
    for row, effort in zip(table.rows, efforts, strict=True):
        is_known = effort is not None and effort.is_whole
        peak_bytes = effort.peak_bytes if effort is not None and is_known else None
        duration = effort.seconds if effort is not None and is_known else None
        rows.append({**row, seconds: duration, memory: peak_bytes and peak_bytes / 1e6})
    note = "quantize: seconds of all stages without a recording that several runs share; memory beyond that in use at the start"
    return Comparison((*table.columns, *QUANTIZING), tuple(rows), (*table.notes, note))


def find_differences(reports: Sequence[Report]) -> list[str]:
    """Returns the names of the protocol fields that differ between reports."""
    values = {field.name: {getattr(report.protocol, field.name) for report in reports} for field in fields(Protocol)}
    return [name for name, found in values.items() if len(found) > 1]


def _describe_differences(reports: Sequence[Report], varying: Sequence[str]) -> str:
    first = reports[0]
    other = next(report for report in reports if first.protocol.differences(report.protocol))
    pairs = first.protocol.differences(other.protocol)
    listed = "; ".join(f"{name} is {here} and {there}" for name, (here, there) in pairs.items())
    return (
        f"{first.model} and {other.model} were measured under different protocols: {listed}. "
        f"Evaluate both with the same options, or pass --mixed (in Python: mixed=True) to show {', '.join(varying)} as columns"
    )


def _choose_columns(reports: Sequence[Report], varying: Sequence[str]) -> tuple[Column, ...]:
    conditions = [Column(name, name.replace("_", " ")) for name in varying if name != NUM_IMAGES.key]
    memory = [MEMORY] if any(report.peak_memory_bytes for report in reports) else []
    return (*IDENTITY, *COST, NUM_IMAGES, *conditions, *_metric_columns(reports), TIME, *memory)


def _metric_columns(reports: Sequence[Report]) -> list[Column]:
    """Returns a column per metric, and after a Frechet distance that a float model has too, its change in percent."""
    names = {name for report in reports for name in report.metrics}
    measured_on_float = {name for report in reports if report.is_float for name in report.metrics}
    columns = []
    for name in sorted(names, key=sort_key):
        metric = name_metric(name)
        columns.append(metric)
        if is_distance(name) and name in measured_on_float and len(reports) > 1:
            columns.append(Column(f"{name}{CHANGE}", "to float", "%", metric.better, 1, is_signed=True))
    return columns


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
        "peak_memory_mb": report.peak_memory_bytes and report.peak_memory_bytes / 1e6,
        **asdict(report.protocol),
        **_changes(report, baseline),
    }
    return {column.key: values.get(column.key) for column in columns}


def _changes(report: Report, baseline: Report | None) -> dict[str, float]:
    """Returns the change of each metric in percent of the float model's value."""
    if baseline is None or report.is_float:
        return {}
    shared = {name: value for name, value in report.metrics.items() if baseline.metrics.get(name)}
    return {f"{name}{CHANGE}": 100 * (value / baseline.metrics[name] - 1) for name, value in shared.items()}


def _find_baseline(report: Report, reports: Sequence[Report]) -> Report | None:
    """Returns the float report, under the same protocol, of the model that this one was made from; None if there is none.

    A report of a pipeline that was made in memory names no model: then it is the float report, if there is only one.
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
        "condition": f"{shared.num_conditions} {shared.condition} in turn",
        "guidance_scale": f"guidance {shared.guidance_scale}",
        "extractor": f"features of {shared.extractor}",
        "reference": f"reference {shared.reference} ({shared.reference_images} images)",
        "clip": f"CLIP {shared.clip}",
    }
    agreed = [text for name, text in parts.items() if name not in varying and getattr(shared, name) is not None]
    notes.append("protocol: " + ", ".join(agreed))
    if any(is_distance(name) and r.protocol.num_images < FEW_IMAGES for r in reports for name in r.metrics):
        notes.append(f"a Frechet distance of fewer than {FEW_IMAGES} images is biased upwards: compare it at equal n only")
    measured = {name for report in reports for name in report.metrics}
    if measured & {"psnr", "ssim"}:
        notes.append("PSNR and SSIM: mean over the first seeds, at most 64")
    if "cosine" in measured:
        notes.append("cosine: between the denoisers' outputs along the float model's trajectories, mean over the timesteps")
    return notes


def _escape_latex(text: str) -> str:
    is_bold, text = text.startswith(BOLD), " ".join(text.removeprefix(BOLD).split())
    written = LATEX_SPECIAL.sub(lambda found: LATEX[found.group()], text)
    return rf"\textbf{{{written}}}" if is_bold else written


def _escape_markdown(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
