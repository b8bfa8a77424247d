"""Report: the measurements of one model with their protocol, stored as one JSON file.

Reading raises DamagedFile with the key path for an unknown key, a missing key or a value of the wrong type: a reader that
ignored unknown keys could compare reports whose protocols differ.
"""

import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from dmquant.errors import DamagedFile, InputError

FILE_NAME = "report.json"
FORMAT_VERSION = 3
# format version -> keys that it added; files of an earlier version are read with the defaults of these keys
ADDED = {2: ("bops", "attention_macs", "peak_memory_bytes", "curves"), 3: ("layers",)}
ADDED_TO_PROTOCOL = {
    3: ("condition", "num_conditions", "conditions_sha256", "guidance_scale", "clip", "clip_sha256"),
}  # fmt: skip
FLOAT_METHOD = "float"
MAX_FILE_BYTES = 16 * 2**20
NUMBERS = re.compile(r"\[\n[-+.\deE,\s]+\]")  # a list of numbers as json indents it; JSON strings contain no line break
Range = tuple[float, float, float, float]  # smallest value, 0.1 % quantile, 99.9 % quantile, largest value


@dataclass(frozen=True)
class Protocol:
    """Conditions of a measurement. Two reports are comparable if all fields are equal."""

    num_images: int
    seed: int  # of the first image; image i is drawn with seed + i
    steps: int
    sampler: str
    batch: int
    image_size: int  # side in pixels
    extractor: str | None = None  # None: no metric uses features
    extractor_sha256: str | None = None
    reference: str | None = None
    reference_sha256: str | None = None
    reference_images: int | None = None
    condition: str | None = None  # "prompts" or "class labels"; None: an unconditional pipeline
    num_conditions: int | None = None  # seed s uses condition s mod this number
    conditions_sha256: str | None = None
    guidance_scale: float | None = None
    clip: str | None = None  # folder or hub id of the CLIP model of clip_score
    clip_sha256: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "steps", "batch", "image_size"):
            _require_positive(name, getattr(self, name))

    def differences(self, other: "Protocol") -> dict[str, tuple[Any, Any]]:
        """Returns the fields that differ: name -> (own value, value of `other`)."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True)
class LayerProfile:
    """One layer's error and input range along trajectories of the float model (evaluation/metrics/layer_sqnr.py)."""

    name: str
    role: str
    weight_bits: int
    act_bits: int
    local_db: float | None  # SQNR of the layer on the float layer's input; None: no error, or no float layer
    total_db: float | None  # SQNR on the input that its own model computes: errors of earlier layers included
    ranges: dict[str, Range]  # timestep -> range of the float layer's input


@dataclass(frozen=True)
class Report:
    """Measurements of one model. Sizes are in bytes, `ops` in float MACs (BOPs / 64 + float MACs)."""

    model: str
    method: str  # "float" for a pipeline that is not quantized
    settings: dict[str, Any]
    weight_bits: int
    act_bits: int
    metrics: dict[str, float]  # "fid" only with Inception features, else "fd-<extractor>"
    protocol: Protocol
    size_bytes: int
    float_size_bytes: int
    bits_per_weight: float
    ops: float
    seconds_per_image: float
    versions: dict[str, str]
    base_model: str | None = None
    bops: int | None = None  # bit operations of the layers; a float layer counts 32 x 32 per MAC
    attention_macs: int | None = None  # MACs of the attention products, which `ops` and `bops` do not contain
    peak_memory_bytes: int | None = None  # of the accelerator while sampling; None on a CPU
    curves: dict[str, dict[str, float]] = field(default_factory=dict)  # metric -> timestep -> value
    layers: tuple[LayerProfile, ...] = ()  # in the order in which the denoiser runs them

    def __post_init__(self) -> None:
        for name in ("size_bytes", "float_size_bytes"):
            _require_positive(name, getattr(self, name))
        for name in ("weight_bits", "act_bits"):
            if not 1 <= getattr(self, name) <= 32:
                raise InputError(f"{name} must be 1 to 32, got {getattr(self, name)}")

    @property
    def is_float(self) -> bool:
        """Whether the model is not quantized."""
        return self.method == FLOAT_METHOD

    def to_json(self) -> str:
        """Returns the file's text, keys sorted.

        Raises:
            InputError: a metric is NaN or infinite.
        """
        curves = {f"{name} at {at}": value for name, curve in self.curves.items() for at, value in curve.items()}
        for name, value in {**self.metrics, **curves}.items():
            if not math.isfinite(value):
                raise InputError(f"metric {name!r} is {value}: a report holds finite numbers only")
        document = {"format_version": FORMAT_VERSION, **asdict(self)}
        text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False)
        return NUMBERS.sub(lambda found: "".join(found.group().split()).replace(",", ", "), text) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = FILE_NAME) -> "Report":
        """Returns the report that `text` holds; errors name it `source`.

        Raises:
            DamagedFile: the text is not a valid report.
            InputError: a newer version of dmquant wrote it.
        """
        document = _parse(text, source)
        version = document.pop("format_version", None)
        if type(version) is not int:
            raise DamagedFile(f"{source}: format_version is {version!r}, not a whole number: this is not a dmquant report")
        if version > FORMAT_VERSION:
            raise InputError(f"{source}: format_version {version} is newer than {FORMAT_VERSION}; update dmquant")
        return _build(cls, _add_defaults(document, version, source), source)

    def save(self, path: str | Path) -> Path:
        """Writes report.json into the folder `path`, or `path` itself if it ends in .json; atomic. Returns the file."""
        file = name_file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(file, self.to_json())
        return file

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Returns the report in a file, or in the report.json of a folder.

        Raises:
            InputError: there is no such file.
            DamagedFile: the file cannot be read or is not a valid report.
        """
        path = Path(path)
        if path.is_dir() and not (path / FILE_NAME).exists():
            raise InputError(f"no {FILE_NAME} in {path}; make one with: dmquant eval {path} --fid")
        file = path / FILE_NAME if path.is_dir() else path
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise DamagedFile(f"{file} is larger than {MAX_FILE_BYTES} bytes: not a dmquant report")
            return cls.from_json(file.read_text(encoding="utf-8"), source=str(file))
        except FileNotFoundError as error:
            raise InputError(f"{file} does not exist; give a report file or a folder that holds one") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedFile(f"{file} cannot be read: {error}") from error


def name_file(path: str | Path) -> Path:
    """Returns the file that a report is saved to: `path` itself if it ends in .json and is no folder, else a file inside it."""
    path = Path(path)
    return path if path.suffix == ".json" and not path.is_dir() else path / FILE_NAME


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        document = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{source} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise DamagedFile(f"{source}: expected a JSON object, found {type(document).__name__}")
    return document


def _add_defaults(document: dict[str, Any], version: int, source: str) -> dict[str, Any]:
    """Returns the document with the defaults of keys that later versions added."""
    whole = document | _later_defaults(Report, ADDED, document, version, source)
    protocol = document.get("protocol")
    if isinstance(protocol, dict):
        whole["protocol"] = protocol | _later_defaults(Protocol, ADDED_TO_PROTOCOL, protocol, version, f"{source}: protocol")
    return whole


def _later_defaults(
    cls: type, added: Mapping[int, tuple[str, ...]], values: dict[str, Any], version: int, where: str
) -> dict[str, Any]:
    """Returns the defaults of keys that were added after `version`; raises DamagedFile if `values` has one of them."""
    later = {name for number, names in added.items() if number > version for name in names}
    for name in sorted(later & values.keys()):
        raise DamagedFile(f"{where}: unknown key {name!r} in format_version {version}")
    entries = [entry for entry in fields(cls) if entry.name in later]
    return {entry.name: _default(entry) for entry in entries}


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return dict(pairs)


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    """Returns an instance of the dataclass `cls` from JSON values; raises DamagedFile if one does not have its annotated type."""
    hints = get_type_hints(cls)
    for key in values.keys() - hints.keys():
        raise DamagedFile(f"{where}: unknown key {key!r}")
    for key in hints.keys() - values.keys():
        raise DamagedFile(f"{where}: key {key!r} is missing")
    checked = {key: _check(values[key], hints[key], f"{where}: {key}") for key in hints}
    try:
        return cls(**checked)
    except InputError as error:
        raise DamagedFile(f"{where}: {error}") from error


def _check(value: Any, hint: Any, where: str) -> Any:
    if hint is Any:
        return value
    if isinstance(hint, UnionType):
        return None if value is None else _check(value, get_args(hint)[0], where)
    expected = get_origin(hint) or hint
    if is_dataclass(expected) or expected is dict:
        if type(value) is not dict:
            raise DamagedFile(f"{where}: expected an object, found {value!r:.40}")
        if isinstance(expected, type) and is_dataclass(expected):
            return _build(expected, value, where)
        return {key: _check(item, get_args(hint)[1], f"{where}.{key}") for key, item in value.items()}
    if expected is tuple:
        return _check_items(value, get_args(hint), where)
    # type(), not isinstance: isinstance(True, int) holds, but true is no number in JSON
    if type(value) is not expected and not (expected is float and type(value) is int):
        raise DamagedFile(f"{where}: expected {expected.__name__}, found {value!r:.40}")
    return _to_float(value, where) if expected is float else value


def _check_items(value: Any, hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    """Returns the items of a list as a tuple, each checked against its hint; `hints` are the arguments of a tuple annotation."""
    if type(value) not in (list, tuple):  # a tuple: the default of a missing key
        raise DamagedFile(f"{where}: expected a list, found {value!r:.40}")
    hints = hints[:1] * len(value) if hints[-1] is Ellipsis else hints
    if len(hints) != len(value):
        raise DamagedFile(f"{where}: expected {len(hints)} values, found {len(value)}")
    return tuple(_check(item, hint, f"{where}[{number}]") for number, (item, hint) in enumerate(zip(value, hints)))


def _to_float(value: int | float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DamagedFile(f"{where}: not a finite number")
    return number


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")


def _write_atomically(file: Path, text: str) -> None:
    """Writes a file so that a reader sees either the old text or the whole new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
