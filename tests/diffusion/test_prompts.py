"""Captions come as they are published, and what is no list of prompts is refused with its place."""

import json

import pytest

from dmquant.diffusion.prompts import read_prompts
from dmquant.errors import InputError

CATS = ("a red cat", 'two cats, "big" ones', "a cat\u00e9")


@pytest.mark.parametrize(
    "name, text",
    [
        ("lines.txt", 'a red cat\n\n  two cats, "big" ones  \na cat\u00e9'),
        ("lines", '\ufeffa red cat\r\ntwo cats, "big" ones\r\na cat\u00e9\r\n'),
        ("list.json", json.dumps(CATS)),
        ("objects.json", json.dumps([{"id": i, "text": cat} for i, cat in enumerate(CATS)])),
        ("coco.json", json.dumps({"images": [], "annotations": [{"image_id": i, "caption": c} for i, c in enumerate(CATS)]})),
        ("metadata.jsonl", "\n".join(json.dumps({"file_name": "x.png", "text": cat}) for cat in CATS)),
        ("table.csv", 'id,Caption\n1,a red cat\n2,"two cats, ""big"" ones"\n3,a cat\u00e9\n'),
        ("parti.tsv", 'Prompt\tCategory\na red cat\tx\n"two cats, ""big"" ones"\ty\na cat\u00e9\tz\n'),
    ],
)
def test_every_kind_of_file_gives_its_prompts_in_their_order(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == CATS


def test_of_the_captions_of_one_image_the_first_stands(tmp_path):
    captions = [{"image_id": 7, "caption": "one"}, {"image_id": 8, "caption": "two"}, {"image_id": 7, "caption": "again"}]
    (tmp_path / "coco.json").write_text(json.dumps({"annotations": captions}))
    assert read_prompts(tmp_path / "coco.json") == ("one", "two")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("bytes.txt", b"\xff\xfe\x00", "is no file of prompts"),
        ("broken.json", b"[", "is no file of prompts"),
        ("deep.json", b"[" * 100_000, "is no file of prompts"),
        ("number.json", b"7", "expected a list"),
        ("object.json", b'{"cats": []}', "one under annotations, captions, prompts"),
        ("mixed.json", b'["a", 3]', "entry 2 has no text"),
        ("blank.json", b'["a", " "]', "entry 2 has no text"),
        ("table.csv", b"id,name\n1,x\n", "entry 1 has no text; .* under prompt, caption, text"),
    ],
)
def test_what_is_no_list_of_prompts_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_said_to_be(tmp_path):
    with pytest.raises(InputError, match="nowhere.txt cannot be read: No such file"):
        read_prompts(tmp_path / "nowhere.txt")
