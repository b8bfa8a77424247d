"""Files of prompts: plain lines, tables and JSON, as captions are published."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dmquant.errors import InputError

TEXT_KEYS = ("prompt", "caption", "text")  # what the text is called, in any case, in the order they are looked for
LIST_KEYS = ("annotations", "captions", "prompts")  # where a JSON object keeps its list
IMAGE_KEY = "image_id"  # COCO has five captions of an image: the first stands for it
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_prompts(file: str | Path) -> tuple[str, ...]:
    """The prompts of a file in their order; one that is not there, unreadable or empty is an InputError.

    `.json` holds a list of texts or of objects, or COCO's captions (of each image the first); `.jsonl` an object per line;
    `.csv` and `.tsv` a table with a column prompt, caption or text; any other file one prompt per line, blank lines left out.
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
    """The text of each entry; of several with one image the first."""
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
