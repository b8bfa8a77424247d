"""Tests of reports: a file is read back unchanged, and a file that is no valid report is refused with the key path."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.errors import DamagedFile, InputError
from dmquant.evaluation.reports.report import ADDED, ADDED_TO_PROTOCOL, FORMAT_VERSION, LayerProfile, Protocol, Report

PROTOCOL = Protocol(num_images=100, seed=0, steps=20, sampler="ddim", batch=50, image_size=32, extractor="resnet-cifar10")
REPORT = Report(
    model="out", method="lsq", settings={"lr": 1e-4, "keep": ["conv_in"]}, weight_bits=4, act_bits=8,
    metrics={"fd-resnet-cifar10": 12.5}, protocol=PROTOCOL, size_bytes=1_000, float_size_bytes=8_000,
    bits_per_weight=4.1, ops=1.5e9, seconds_per_image=0.1, versions={"torch": "2.13.0"}, base_model="embedded",
)  # fmt: skip

LAYER = LayerProfile("conv_in", "first", 8, 8, 38.92, None, {"950": (-4.199, -3.251, 3.21, 4.12), "0": (-1.0, -0.5, 0.5, 1e-9)})

finite = st.floats(allow_nan=False, allow_infinity=False)
any_json = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda s: st.lists(s, max_size=2))


def document(**changes) -> str:
    return json.dumps({**json.loads(REPORT.to_json()), **changes})


@given(st.dictionaries(st.text(), finite), st.text(), finite, st.none() | st.text())
def test_reading_gives_back_what_was_written(metrics, model, ops, base_model):
    report = replace(REPORT, metrics=metrics, model=model, ops=ops, base_model=base_model)
    assert Report.from_json(report.to_json()) == report


@settings(max_examples=20)
@given(st.lists(st.builds(
    LayerProfile, st.text(), st.text(), st.integers(1, 32), st.integers(1, 32), st.none() | finite, st.none() | finite,
    st.dictionaries(st.text(), st.tuples(finite, finite, finite, finite)),
), max_size=3))  # fmt: skip
def test_layers_are_read_back_unchanged(layers):
    report = replace(REPORT, layers=tuple(layers), settings={"text": "[\n1, 2]"})
    assert Report.from_json(report.to_json()) == report


def test_a_range_takes_one_line():
    lines = replace(REPORT, layers=(LAYER,)).to_json().splitlines()
    assert '        "950": [-4.199, -3.251, 3.21, 4.12]' in lines


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ranges": {"0": [1.0, 2.0]}}, r"layers\[1\]: ranges.0: expected 4 values, found 2"),
        ({"ranges": {"0": 5}}, "expected a list, found 5"),
        ({"local_db": "high"}, "local_db: expected float"),
        ({"name": None}, "name: expected str"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_a_wrong_entry_of_a_layer_is_refused_with_its_key_path(change, message):
    with pytest.raises(DamagedFile, match=message):
        Report.from_json(document(layers=[asdict(LAYER), {**asdict(LAYER), **change}]))


def test_the_same_report_gives_the_same_bytes_and_the_umask_decides_who_may_read_them(tmp_path):
    first, second = REPORT.save(tmp_path / "a"), REPORT.save(tmp_path / "b.json")
    assert (first.name, second.name) == ("report.json", "b.json")
    assert first.read_bytes() == second.read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    assert first.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_report_loads_from_its_file_and_from_its_folder(tmp_path):
    file = REPORT.save(tmp_path)
    assert Report.load(file) == Report.load(tmp_path) == REPORT


def test_a_failed_write_keeps_the_old_report_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    REPORT.save(tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        replace(REPORT, model="other").save(tmp_path)
    assert Report.load(tmp_path) == REPORT
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_never_written(value):
    with pytest.raises(InputError, match="psnr"):
        replace(REPORT, metrics={"psnr": value}).to_json()
    with pytest.raises(InputError, match="cosine at 20"):
        replace(REPORT, curves={"cosine": {"20": value}}).to_json()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight_bits": "4"}, "weight_bits: expected int"),
        ({"weight_bits": True}, "weight_bits: expected int"),
        ({"weight_bits": 33}, "weight_bits must be 1 to 32"),
        ({"size_bytes": 0}, "size_bytes must be at least 1"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"metrics": {"fid": "low"}}, "metrics.fid: expected float"),
        ({"metrics": {"fid": 10**400}}, "metrics.fid: not a finite number"),
        ({"metrics": [1]}, "metrics: expected an object"),
        ({"protocol": {**json.loads(REPORT.to_json())["protocol"], "steps": 2.5}}, "protocol: steps: expected int"),
        ({"protocol": {}}, "is missing"),
        ({"format_version": "1"}, "format_version"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_key(changes, message):
    with pytest.raises(DamagedFile, match=message):
        Report.from_json(document(**changes))


def test_reports_of_the_first_format_are_read_with_the_defaults_of_later_keys():
    first = {key: value for key, value in json.loads(document(format_version=1)).items() if key not in sum(ADDED.values(), ())}
    newer = set(sum(ADDED_TO_PROTOCOL.values(), ()))
    whole, first["protocol"] = first["protocol"], {k: v for k, v in first["protocol"].items() if k not in newer}
    report = Report.from_json(json.dumps(first))
    assert report == REPORT and (report.bops, report.peak_memory_bytes, report.curves, report.layers) == (None, None, {}, ())
    with pytest.raises(DamagedFile, match="unknown key 'bops' in format_version 1"):
        Report.from_json(json.dumps(first | {"bops": 1}))
    with pytest.raises(DamagedFile, match="protocol: unknown key 'clip' in format_version 1"):
        Report.from_json(json.dumps(first | {"protocol": whole}))
    with pytest.raises(DamagedFile, match="key 'curves' is missing"):
        Report.from_json(json.dumps({key: value for key, value in json.loads(document()).items() if key != "curves"}))


def test_the_reports_of_the_benchmarks_are_readable():
    for file in (Path(__file__).parents[3] / "benchmarks" / "results").glob("*.json"):
        documents = json.loads(file.read_text(encoding="utf-8"))
        for found in documents if isinstance(documents, list) else ():
            assert Report.from_json(json.dumps(found)).metrics


def test_a_newer_format_asks_for_an_update():
    with pytest.raises(InputError, match="update dmquant"):
        Report.from_json(document(format_version=FORMAT_VERSION + 1))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"a": 1, "a": 2}', '{"ops": NaN}', "9" * 5000])
def test_what_is_not_a_json_object_is_a_damaged_file(text):
    with pytest.raises(DamagedFile):
        Report.from_json(text)


@given(st.sampled_from(sorted(json.loads(REPORT.to_json()))), any_json)
def test_any_value_in_any_place_is_read_or_refused_but_never_a_crash(key, value):
    with suppress(DamagedFile, InputError):
        Report.from_json(document(**{key: value}))


def test_a_missing_file_and_a_folder_without_report_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Report.load(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="dmquant eval"):
        Report.load(tmp_path)


def test_bytes_that_are_no_text_are_a_damaged_file(tmp_path):
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedFile, match="cannot be read"):
        Report.load(tmp_path)


def test_protocols_name_their_differences():
    assert PROTOCOL.differences(PROTOCOL) == {}
    assert PROTOCOL.differences(replace(PROTOCOL, steps=50)) == {"steps": (20, 50)}
