"""Tests of the table: reports of one protocol are compared, reports of different protocols are refused."""

import csv
import io
import json
from dataclasses import replace

import pytest

from dmquant.errors import InputError
from dmquant.evaluation.reports.columns import ABSENT
from dmquant.evaluation.reports.comparison import add_efforts, compare, find_differences
from dmquant.evaluation.reports.report import Protocol, Report
from dmquant.training.run_cost import Effort, Stage

PROTOCOL = Protocol(
    num_images=5000, seed=0, steps=20, sampler="ddim", batch=50, image_size=32,
    extractor="resnet-cifar10", reference="cifar10-train", reference_images=50_000,
)  # fmt: skip
FLOAT = Report(
    model="embedded", method="float", settings={}, weight_bits=32, act_bits=32, metrics={"fd-resnet-cifar10": 10.0},
    protocol=PROTOCOL, size_bytes=8_000_000, float_size_bytes=8_000_000, bits_per_weight=32.0, ops=96e9,
    seconds_per_image=0.1, versions={},
)  # fmt: skip
QUANTIZED = replace(
    FLOAT, model="out", method="lsq", weight_bits=4, act_bits=8, metrics={"fd-resnet-cifar10": 11.0, "psnr": 30.0},
    size_bytes=1_000_000, bits_per_weight=4.0, ops=12.3e9, base_model="embedded",
)  # fmt: skip


def test_the_float_model_comes_first_and_changes_are_relative_to_it():
    comparison = compare([QUANTIZED, FLOAT])
    assert [row["model"] for row in comparison.rows] == ["embedded", "out"]
    first, second = comparison.rows
    assert first["fd-resnet-cifar10_change"] is None
    assert second["fd-resnet-cifar10_change"] == pytest.approx(10.0)
    assert (second["size_mb"], second["size_ratio"], second["giga_ops"]) == (1.0, 8.0, 12.3)


def test_headings_have_unit_and_direction_and_missing_values_are_dashes():
    comparison = compare([FLOAT, QUANTIZED])
    table = dict(zip(comparison.headings(), zip(*comparison.cells())))
    assert table["FD resnet-cifar10 ↓"] == ("10.0000", "11.0000")
    assert table["to float, % ↓"] == (ABSENT, "+10.0")
    assert table["PSNR to float, dB ↑"] == (ABSENT, "30.00")
    assert table["size, MB ↓"] == ("8.00", "1.00")
    assert table["n"] == ("5000", "5000")


def test_a_baseline_of_another_model_gives_no_difference():
    stranger = replace(QUANTIZED, base_model="another")
    assert compare([FLOAT, stranger]).rows[1]["fd-resnet-cifar10_change"] is None


def test_a_pipeline_made_in_memory_is_measured_against_the_only_float_one():
    made = replace(QUANTIZED, base_model=None)
    assert compare([FLOAT, made]).rows[1]["fd-resnet-cifar10_change"] == pytest.approx(10.0)
    assert compare([FLOAT, replace(FLOAT, model="b"), made]).rows[2]["fd-resnet-cifar10_change"] is None


def test_one_report_gives_a_table(tmp_path):
    assert compare(FLOAT) == compare(FLOAT.save(tmp_path)) == compare(str(tmp_path)) == compare([FLOAT])


def test_different_protocols_are_refused_and_every_difference_is_named():
    other = replace(QUANTIZED, protocol=replace(PROTOCOL, steps=50, sampler="euler"))
    with pytest.raises(InputError, match=r"steps is 20 and 50; sampler is ddim and euler.*--mixed"):
        compare([FLOAT, other])


def test_mixed_protocols_become_columns_and_are_not_measured_against_each_other():
    other = replace(QUANTIZED, protocol=replace(PROTOCOL, steps=50))
    comparison = compare([FLOAT, other], mixed=True)
    assert [row["steps"] for row in comparison.rows] == [20, 50]
    assert comparison.rows[1]["fd-resnet-cifar10_change"] is None
    assert not any("20 steps" in note for note in comparison.notes)


def test_a_difference_in_any_field_of_the_protocol_is_found():
    changed = {"num_images": 1, "seed": 1, "steps": 1, "sampler": "x", "batch": 1, "image_size": 1, "extractor": "x",
               "extractor_sha256": "x", "reference": "x", "reference_sha256": "x", "reference_images": 1}  # fmt: skip
    for name, value in changed.items():
        other = replace(FLOAT, protocol=replace(PROTOCOL, **{name: value}))
        assert find_differences([FLOAT, other]) == [name]


def test_all_formats_have_the_same_rows():
    comparison = compare([FLOAT, QUANTIZED])
    from_json = json.loads(comparison.to_json())["rows"]
    from_csv = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert from_json == list(comparison.rows)
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in comparison.rows] == from_csv
    markdown = comparison.to_markdown().splitlines()
    assert markdown[0].count("|") == len(comparison.columns) + 1
    assert [cell.strip() for cell in markdown[3].split("|")[1:-1]] == comparison.cells()[1]


def test_table_characters_in_a_name_do_not_split_its_cell():
    line = compare([replace(FLOAT, model="a|b\nc")]).to_markdown().splitlines()[2]
    assert line.startswith("| a\\|b c |")


def test_a_metric_cannot_overwrite_another_column():
    assert compare([replace(FLOAT, metrics={"model": 1.0})]).rows[0]["model"] == "embedded"


def test_a_note_says_that_few_images_bias_a_frechet_distance():
    few = replace(FLOAT, protocol=replace(PROTOCOL, num_images=100))
    assert any("biased" in note for note in compare([few]).notes)
    assert not any("biased" in note for note in compare([FLOAT]).notes)


def test_reports_are_read_from_files_and_folders(tmp_path):
    file = FLOAT.save(tmp_path / "float.json")
    QUANTIZED.save(tmp_path / "out")
    assert compare([file, tmp_path / "out"]) == compare([FLOAT, QUANTIZED])


def test_nothing_to_compare_is_an_error():
    with pytest.raises(InputError, match="nothing to compare"):
        compare([])


# The best, and the formats that show it

BETTER = replace(QUANTIZED, model="better", metrics={"fd-resnet-cifar10": 10.5, "psnr": 29.0}, seconds_per_image=0.2)


def test_the_best_of_the_quantized_models_is_found_by_the_direction_of_each_column():
    comparison = compare([FLOAT, QUANTIZED, BETTER])
    assert comparison.best() == {(2, "fd-resnet-cifar10"), (1, "psnr"), (1, "seconds_per_image")}
    assert compare([FLOAT, QUANTIZED]).best() == set()


def test_the_best_is_bold_in_markdown_and_latex():
    comparison = compare([FLOAT, QUANTIZED, BETTER])
    assert "**10.5000**" in comparison.to_markdown() and "**11.0000**" not in comparison.to_markdown()
    assert r"\textbf{30.00}" in comparison.to_latex()


def test_latex_is_a_booktabs_table_of_the_same_cells():
    comparison = compare([replace(FLOAT, model="a_b & 100% ~{x}^2 #\\"), QUANTIZED])
    lines = comparison.to_latex().splitlines()
    assert lines[0] == r"\begin{tabular}{lll" + "r" * (len(comparison.columns) - 3) + "}" and lines[1] == r"\toprule"
    assert r"FD resnet-cifar10 $\downarrow$" in lines[2] and r"to float, \% $\downarrow$" in lines[2]
    assert lines[4].startswith(r"a\_b \& 100\% \textasciitilde{}\{x\}\textasciicircum{}2 \#\textbackslash{} & float & 32/32 &")
    rows = (lines[2], lines[4], lines[5])
    assert all(line.count(" & ") == len(comparison.columns) - 1 and line.endswith(r" \\") for line in rows)
    assert lines[6:8] == [r"\bottomrule", r"\end{tabular}"] and all(line.startswith("% ") for line in lines[8:])


def test_metrics_have_a_fixed_order_and_only_distances_have_a_change():
    metrics = {"cosine": 0.99, "psnr": 30.0, "kd-x": 0.01, "fd-x": 3.0, "sfd-x": 4.0, "precision-x": 0.5, "is": 9.0, "odd": 1.0}
    comparison = compare([replace(FLOAT, metrics=metrics), replace(QUANTIZED, metrics=metrics)])
    shown = [column.key for column in comparison.columns[8:-1]]
    assert shown == ["fd-x", "fd-x_change", "sfd-x", "sfd-x_change", "kd-x", "is", "precision-x", "psnr", "cosine", "odd"]
    assert {"SFD x ↓", "KD x ↓", "IS ↑", "precision ↑", "cosine to float ↑"} <= set(comparison.headings())


def test_peak_memory_is_a_column_where_it_was_measured():
    assert "peak_memory_mb" not in compare([FLOAT]).rows[0]
    assert compare([replace(FLOAT, peak_memory_bytes=2_000_000), QUANTIZED]).rows[0]["peak_memory_mb"] == 2.0


def test_the_cost_of_quantizing_is_shown_for_runs_with_a_complete_record():
    table = compare([FLOAT, QUANTIZED, QUANTIZED, QUANTIZED])
    whole = Effort({"calibration": Stage(10.0, 9.0, None), "fine-tuning": Stage(50.0, 49.0, 3_000_000)}, 0, "cpu", 1, 0.1, True)
    unknown = replace(whole, stages={"calibration": Stage(70.0, 9.0, None)})
    wide = add_efforts(table, [None, whole, unknown, replace(whole, is_whole=False)])
    cells = dict(zip(wide.headings(), zip(*wide.cells())))
    assert cells["quantize, s ↓"] == (ABSENT, "60", "70", ABSENT)
    assert cells["quantizing memory, MB ↓"] == (ABSENT, "3", ABSENT, ABSENT)
    assert wide.rows[1].items() > table.rows[1].items() and wide.notes[:-1] == table.notes
    with pytest.raises(InputError, match="none of these folders has a record of the cost of quantizing"):
        add_efforts(table, [None] * 4)
