"""Tests that the README is short, shows its picture, and that its numbers are in the records of measurements."""

import json
import re
from statistics import fmean

import pytest
from PIL import Image

from dmquant.evaluation.reports.report import Report
from tests.pages import README, ROOT, read, tables

RESULTS = ROOT / "benchmarks" / "results"
METHODS = ROOT / "docs" / "methods.md"
# row of a table -> file and name of the experiment, without its seed
EXPERIMENTS = {
    ("32/32", "float"): ("lsq", "embedded"),
    ("8/8", "`lsq`"): ("lsq", "w8a8"),
    ("6/6", "`lsq`"): ("dilatequant", "w6a6-lsq"),
    ("6/6", "`dilatequant`"): ("dilatequant", "w6a6-dilatequant"),
    ("4/8", "`efficientdm`"): ("efficientdm", "w4a8-efficientdm"),
    ("4/8", "`lsq`"): ("efficientdm", "w4a8-lsq"),
    ("4/4", "`dilatequant`"): ("dilatequant", "w4a4-dilatequant"),
    ("4/4", "`efficientdm`"): ("efficientdm", "w4a4-efficientdm"),
    ("4/4", "`lsq`"): ("efficientdm", "w4a4-lsq"),
    ("1/32", "`binarydm`, 1,200 steps"): ("binarydm", "w1a32-binarydm-1200"),
    ("1/8", "`binarydm`"): ("binarydm", "w1a8-binarydm"),
    ("1/4", "`binarydm`"): ("binarydm", "w1a4-binarydm"),
    ("1/4", "`lsq`, plain binarization"): ("binarydm", "w1a4-plain"),
}
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def find_rows(page) -> list[dict[str, str]]:
    """Returns the rows of the page's table of results."""
    return next(rows for rows in tables(page) if "FD resnet-cifar10" in rows[0])


def find_reports(row: dict[str, str]) -> list[Report]:
    """Returns the reports of a row of results, one per training seed."""
    file, experiment = EXPERIMENTS[row["W/A"], row["method"]]
    documents = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    reports = [Report.from_json(json.dumps(document)) for document in documents]
    return [report for report in reports if re.sub(r"-seed\d+$", "", report.model.split("/")[-1]) == experiment]


def read_latency(file: str, model: str, variant: str) -> float:
    """Returns how many times faster than float32 channels_last a denoiser call is in a record of denoiser_latency.py."""
    record = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    assert record["conditions"]["threads"] == 1 and record["conditions"]["kernels"]["amx"] == ""
    assert record["conditions"]["torch"].startswith("2.13.0")
    variants = record["models"][model]["variants"]
    return variants["fp32 channels_last"]["median_ms"] / variants[variant]["median_ms"]


def assert_says(cell: str, value: float) -> None:
    """Asserts that the number in a cell is the value, rounded to the digits of the cell."""
    shown = NUMBER.search(cell).group()
    digits = len(shown.partition(".")[2])
    assert abs(float(shown) - value) <= 0.5 * 10**-digits + 1e-4 * abs(value), f"{cell!r} should say {value:.4f}"


def test_the_readme_is_short():
    assert 80 <= len(read(README).splitlines()) <= 120


def test_the_picture_is_large_enough_to_see_and_small_enough_to_load():
    file = ROOT / "docs" / "images" / "samples.png"
    assert "docs/images/samples.png" in read(README) and file.stat().st_size <= 300_000
    with Image.open(file) as picture:
        assert picture.width >= 8 * 96 and picture.height >= 3 * 96


@pytest.mark.parametrize("page", [README, METHODS], ids=["README", "methods"])
def test_every_figure_of_the_table_of_results_is_in_a_record(page):
    rows = find_rows(page)
    float_distance = find_reports({"W/A": "32/32", "method": "float"})[0].metrics["fd-resnet-cifar10"]
    assert len(rows) >= 7
    for row in rows:
        reports = find_reports(row)
        distances = [report.metrics["fd-resnet-cifar10"] for report in reports]
        assert all(report.protocol.num_images == 2000 and report.protocol.steps == 20 for report in reports)
        assert {f"{report.weight_bits}/{report.act_bits}" for report in reports} == {row["W/A"]}
        assert len(reports) == (1 if row["W/A"] in ("32/32", "8/8") else 3)
        assert_says(row["size, MB"], reports[0].size_bytes / 1e6)
        mean, *extremes = NUMBER.findall(row["FD resnet-cifar10"])
        for shown, value in zip([mean, *extremes], [fmean(distances), min(distances), max(distances)]):
            assert_says(shown, value)
        if "smaller" in row and row["method"] != "float":
            assert_says(row["smaller"], reports[0].float_size_bytes / reports[0].size_bytes)
        if row["method"] != "float":
            assert_says(row.get("to float") or row["FD to float"], 100 * (fmean(distances) / float_distance - 1))


def test_the_speed_of_the_readmes_table_is_in_a_record():
    for row in find_rows(README)[1:]:
        weights, acts = row["W/A"].split("/")
        assert_says(row["faster"], read_latency("denoiser_latency", "embedded", f"W{weights}A{acts}"))


@pytest.mark.parametrize("text, file, model, variant", [
    ("CIFAR DDPM (36 M parameters) is {}x", "denoiser_latency", "cifar", "W4A4"),
    ("LDM-4 (274 M) {}x", "denoiser_latency_ldm4", "ldm4", "W4A4"),
    ("attention at 8 bits LDM-4 is {}x", "denoiser_latency_ldm4", "ldm4", "W4A4 A8 attention"),
    ("Stable Diffusion 1.5 {}x", "denoiser_latency_sd15", "sd15", "W4A4 A8 attention"),
])  # fmt: skip
def test_the_speed_of_larger_models_is_in_a_record(text, file, model, variant):
    pattern = re.escape(text).replace(r"\{\}", r"([\d.]+)")
    found = re.search(pattern, " ".join(read(README).split()))
    assert_says(found.group(1), read_latency(file, model, variant))


@pytest.mark.parametrize("text, file, model", [
    ("1/{} of the time of the float one for a DDPM", "denoiser_latency", "cifar"),
    ("1/{} for LDM-4", "denoiser_latency_ldm4", "ldm4"),
    ("1/{} for Stable Diffusion 1.5", "denoiser_latency_sd15", "sd15"),
    ("1/{} for the embedded pipeline", "denoiser_latency", "embedded"),
])  # fmt: skip
def test_the_speed_of_one_bit_weights_is_in_a_record(text, file, model):
    pattern = re.escape(text).replace(r"\{\}", r"([\d.]+)")
    found = re.search(pattern, " ".join(read(METHODS).split()))
    assert_says(found.group(1), read_latency(file, model, "W1A4 A8 attention"))


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_set_up_commands_are_make_targets(target):
    assert re.search(rf"^make {target}\b", read(README), re.MULTILINE)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
