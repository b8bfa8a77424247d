"""Reads files of prompts: plain lines, tables and JSON."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dmquant.errors import InputError

TEXT_KEYS = ("prompt", "caption", "text")  # names of the text, in upper or lower case, first match wins
LIST_KEYS = ("annotations", "captions", "prompts")  # names of the list in a JSON object
IMAGE_KEY = "image_id"  # COCO has five captions of an image: the first is taken
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_prompts(file: str | Path) -> tuple[str, ...]:
    """Returns the prompts of a file in their order. Raises InputError if the file is missing, unreadable or empty.

    `.json` holds a list of texts or objects, or COCO's captions (the first of each image); `.jsonl` one object per line;
    `.csv` and `.tsv` a table with a column prompt, caption or text; any other file one prompt per line, without blank lines.
    """
    file = Path(file)
    try:
        prompts = _read(file, file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; give a file with one prompt per line") from error
    except (ValueError, csv.Error, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors, and so is an InputError
        raise InputError(f"{file} is no file of prompts: {error}") from error
    if not prompts:
        raise InputError(f"{file} holds no prompt; give a file with one prompt per line")
    return prompts


def _read(file: Path, text: str) -> tuple[str, ...]:
    kind = file.suffix.lower()
    if kind in DELIMITERS:
        return _pick(csv.DictReader(text.splitlines(), delimiter=DELIMITERS[kind]))
    if kind == ".json":
        return _pick(_find_list(json.loads(text)))
    if kind == ".jsonl":
        return _pick(json.loads(line) for line in text.splitlines() if line.strip())
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _find_list(document: Any) -> list[Any]:
    if isinstance(document, dict):
        document = next((document[key] for key in LIST_KEYS if key in document), None)
    if not isinstance(document, list):
        raise InputError(f"expected a list, or an object with one under {', '.join(LIST_KEYS)}")
    return document


def _pick(entries: Iterable[Any]) -> tuple[str, ...]:
    """Returns the text of each entry; of several entries with one image, that of the first."""
    prompts: list[str] = []
    seen: set[Any] = set()
    for number, entry in enumerate(entries, 1):
        image = entry.get(IMAGE_KEY) if isinstance(entry, dict) else None
        if image is not None and str(image) in seen:
            continue
        seen.add(str(image))
        prompts.append(_read_text(entry, number))
    return tuple(prompts)


def _read_text(entry: Any, number: int) -> str:
    if isinstance(entry, dict):
        named = {str(key).strip().lower(): value for key, value in entry.items()}
        entry = next((named[key] for key in TEXT_KEYS if key in named), None)
    if not isinstance(entry, str) or not entry.strip():
        raise InputError(f"entry {number} has no text; it should be a text, or have one under {', '.join(TEXT_KEYS)}")
    return entry.strip()
