"""`DmquantConfig`: the `quantization_config` of a packed model as JSON, checked key by key when it is read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from dmquant import __version__
from dmquant.errors import DamagedFile, InputError
from dmquant.nn.scheme import FLOAT_BITS, LayerScheme, Scheme, Timing, parse_trait
from dmquant.quantizers.timestep_clock import LOOKUPS
from dmquant.quantizers.traits import GridTrait

FORMAT_VERSION = 1


class QuantMethod(StrEnum):
    """An Enum, because diffusers reads its `.value`."""

    DMQUANT = "dmquant"


class DmquantConfig(QuantizationConfigMixin):
    """How a packed model is stored (bits and grid traits of every layer) and how it was made.

    diffusers may send it in an HTTP header, so it is kept small: patterns instead of one entry per layer. The structure is read
    from here and never from the code of a method, so a file can be read without the method that made it.
    """

    def __init__(
        self, *, weight_bits: int, act_bits: int, kinds: Sequence[str] = (),
        overrides: Mapping[str, Sequence[Any]] | None = None, attention_bits: int = FLOAT_BITS,
        attention_kinds: Sequence[str] = (), timing: Mapping[str, Any] | None = None, method: str | None = None,
        settings: Mapping[str, Any] | None = None, base_model: str | None = None, record: Mapping[str, Any] | None = None,
        producer: str = f"dmquant {__version__}", format_version: int = FORMAT_VERSION, quant_method: str = "dmquant",
    ):  # fmt: skip
        self.quant_method = QuantMethod(quant_method)
        self.format_version, self.producer = format_version, producer
        self.weight_bits, self.act_bits, self.kinds = weight_bits, act_bits, list(kinds)
        self.overrides = {name: list(entry) for name, entry in (overrides or {}).items()}
        self.attention_bits, self.attention_kinds = attention_bits, list(attention_kinds)
        self.timing = None if timing is None else dict(timing)
        self.method, self.settings, self.base_model = method, dict(settings or {}), base_model
        self.record = dict(record or {})  # other facts about the run: seed, timesteps, ...

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DmquantConfig":
        """Returns the config of a file. Raises DamagedFile or InputError for keys and values that it cannot have."""
        _check_config(config_dict)
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "quant_method": self.quant_method.value}

    # __repr__ of the base class calls to_diff_dict, which the base class lacks
    to_diff_dict = to_dict

    @property
    def scheme(self) -> Scheme:
        """Returns how the denoiser is stored."""
        overrides = {name: LayerScheme(entry[0], entry[1], _parse_kinds(entry[2:])) for name, entry in self.overrides.items()}
        timing = None if self.timing is None else Timing(**self.timing)
        default = LayerScheme(self.weight_bits, self.act_bits, _parse_kinds(self.kinds))
        return Scheme(default, overrides, self.attention_bits, _parse_kinds(self.attention_kinds), timing)

    @property
    def run(self) -> dict[str, Any]:
        """Returns how the model was made: method, settings, bits, base model, seed."""
        known = {name: getattr(self, name) for name in ("method", "settings", "weight_bits", "act_bits", "base_model")}
        return {**known, **self.record}


def _check_config(config: dict[str, Any]) -> None:
    """Raises DamagedFile for a missing, unknown or mistyped key, InputError for other tools and newer format versions."""
    if not isinstance(config, dict):
        raise DamagedFile(f"quantization_config should be a JSON object, not a {type(config).__name__}")
    if config.get("quant_method") != QuantMethod.DMQUANT.value:
        raise InputError(f"this is a {config.get('quant_method')} checkpoint, not one of dmquant")
    version = config.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise InputError(f"needs dmquant >= {str(config.get('producer')).removeprefix('dmquant ')}, this is {__version__}")
    odd = sorted((set(config) ^ set(_IS_VALID)) - (LATER - set(config)))
    if odd:
        raise DamagedFile(f"quantization_config.{odd[0]} is {'unknown' if odd[0] in config else 'missing'}")
    for key, value in config.items():
        if not _IS_VALID[key](value):
            raise DamagedFile(f"quantization_config.{key} cannot be {value!r}")
    of_layers = chain.from_iterable(entry[2:] for entry in config["overrides"].values())
    kinds = [*config["kinds"], *config.get("attention_kinds", ()), *of_layers]
    if any(trait.needs_clock for trait in _parse_kinds(kinds)) and config.get("timing") is None:
        raise DamagedFile("quantization_config.timing is missing: there are grids per timestep")


def _parse_kinds(kinds: Iterable[str]) -> tuple[GridTrait, ...]:
    """Returns the grid traits that are written as `kinds`."""
    return tuple(trait for kind in kinds if (trait := parse_trait(kind)) is not None)


def _is_bits(value: object) -> bool:
    return type(value) is int and (1 <= value <= 8 or value == FLOAT_BITS)


def _is_kinds(value: object) -> bool:
    return isinstance(value, list) and all(map(parse_trait, value)) and len(set(value)) == len(value)


def _is_overrides(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, list) and len(entry) >= 2 and all(map(_is_bits, entry[:2])) and _is_kinds(entry[2:])
        for entry in value.values()
    )


def _is_timing(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != set(Timing._fields):
        return False
    return type(value["num_steps"]) is int and 1 <= value["num_steps"] <= MAX_STEPS and value["lookup"] in LOOKUPS


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_json_object(value: object) -> bool:
    return isinstance(value, dict) and all(math.isfinite(number) for number in value.values() if isinstance(number, float))


MAX_STEPS = 1 << 20  # more timesteps than any sampler has
LATER = {"attention_bits", "attention_kinds", "timing"}  # optional keys: older files do not have them
_IS_VALID = {
    "quant_method": _is_text, "format_version": lambda value: value == FORMAT_VERSION and type(value) is int,
    "producer": lambda value: isinstance(value, str), "weight_bits": _is_bits, "act_bits": _is_bits,
    "kinds": _is_kinds, "overrides": _is_overrides, "attention_bits": _is_bits,
    "attention_kinds": _is_kinds, "timing": _is_timing,
    "method": _is_text, "settings": _is_json_object, "base_model": _is_text,
    "record": _is_json_object,
}  # fmt: skip
