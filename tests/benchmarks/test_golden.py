"""Tests of golden artefacts: equal sets have no difference, each difference is one line, every method has a case."""

import json
import sys
from itertools import pairwise

import pytest
from PIL import Image

from benchmarks import golden
from dmquant import methods


def test_equal_sets_have_no_difference_and_each_leaf_that_differs_is_one_line():
    old = {"auto/lsq": {"inspect": ["a", "b"], "report.json": {"metrics": {"fid": 1.0, "kid": 2.0}, "bops": None}}}
    assert list(golden.compare(old, json.loads(json.dumps(old)))) == []
    new = {"auto/lsq": {"inspect": ["a", "c", "d"], "report.json": {"metrics": {"fid": 1}, "bops": None}}, "methods": ["x"]}
    assert list(golden.compare(old, new)) == [
        'auto/lsq/inspect/1: "b" -> "c"', 'auto/lsq/inspect/2: "absent" -> "d"',
        "auto/lsq/report.json/metrics/fid: 1.0 -> 1", 'auto/lsq/report.json/metrics/kid: 2.0 -> "absent"',
        'methods: "absent" -> ["x"]',
    ]  # fmt: skip


@pytest.mark.parametrize("change, code, text", [(0, 0, "no difference\n"), (1, 1, "a/b: 0 -> 1\n")])
def test_compare_exits_with_1_where_sets_differ(change, code, text, tmp_path, monkeypatch, capsys):
    for name, value in (("old", 0), ("new", change)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "golden.json").write_text(json.dumps({"a": {"b": value}}))
    monkeypatch.setattr(sys, "argv", ["golden.py", "compare", str(tmp_path / "old"), str(tmp_path / "new")])
    with pytest.raises(SystemExit) as error:
        golden.main()
    assert (error.value.code, capsys.readouterr().out) == (code, text)


def test_times_and_versions_are_left_out_of_json_at_any_depth_and_nothing_else(tmp_path):
    file, kept = tmp_path / "config.json", {"bits": 4, "record": {"seed": 0}}
    file.write_text(json.dumps({**kept, **dict.fromkeys(golden.LEFT_OUT_FIELDS, 1), "record": {"seed": 0, "producer": "x"}}))
    assert golden.describe(file) == kept


def test_a_picture_is_its_pixels_and_any_other_file_its_bytes(tmp_path):
    image, first, second = Image.new("RGB", (4, 2)), tmp_path / "first.png", tmp_path / "second.png"
    image.save(first, compress_level=0)
    image.save(second, compress_level=9)
    assert first.read_bytes() != second.read_bytes() and golden.describe(first) == golden.describe(second)
    image.putpixel((3, 1), (0, 0, 1))
    image.save(second)
    assert golden.describe(first) != golden.describe(second)
    first.rename(tmp_path / "first.safetensors")
    assert golden.describe(tmp_path / "first.safetensors") != golden.describe(second)


def test_every_method_has_a_case_whose_settings_it_knows():
    lines = [f"{case} {golden.RECORDING} {golden.TRAINING}".split() for case in golden.CASES.values()]
    for line in lines:
        methods.get(line[1]).parse(dict(text.split("=") for flag, text in pairwise(line) if flag == "--set"))
    assert {line[1] for line in lines} == set(methods.names())


def test_a_command_that_fails_ends_the_run_with_its_message(tmp_path):
    with pytest.raises(SystemExit, match="(?s)methods nothing ended with 2.*error: .*nothing"):
        golden.run(tmp_path, "methods nothing")
