"""Registration with diffusers: after `import dmquant.hf`, DiffusionPipeline.from_pretrained reads our folders.

diffusers looks `quant_method` up in two module-level tables and has no other way in; SDNQ took the same road. Its loader only
warns about missing, extra or mistyped tensors, so the strictness is in the hooks here: every tensor is claimed and checked.
"""

import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import chain
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from dmquant import __version__
from dmquant.clock import LOOKUPS, Clock
from dmquant.errors import DamagedFile, InputError
from dmquant.kernels.fusion import fuse, unfuse
from dmquant.layers import find_layers
from dmquant.packed import FLOAT_BITS, Format, Layout, PackedWeight, Timing, is_kind, prepare_packed, read_layout, restore_float
from dmquant.quantizers.base import FixedGrid
from dmquant.quantizers.dilated import Divide
from dmquant.quantizers.temporal import TEMPORAL

FORMAT_VERSION = 1
FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# modules whose tensors keep the dtype of the file whatever the model computes in
EXACT = (PackedWeight, FixedGrid, Divide, Clock)


class QuantMethod(str, Enum):
    """diffusers reads `.value`, so a plain string would not do."""

    DMQUANT = "dmquant"


class DmquantConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model: the bits of every layer, and how the model was made.

    Small, because diffusers may send it along in an HTTP header: patterns instead of one entry per layer. The structure is read
    from here and never from the code of a method, so a file outlives the method that made it.
    """

    def __init__(
        self, *, weight_bits: int, act_bits: int, kinds: Sequence[str] = (),
        overrides: Mapping[str, list[int | str]] | None = None, attention_bits: int = FLOAT_BITS,
        attention_kinds: Sequence[str] = (), timing: Mapping[str, int | str] | None = None, method: str | None = None,
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
        self.record = dict(record or {})  # whatever else is known of how it was made: seed, timesteps, ...

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DmquantConfig":
        """The config in a file, checked key by key."""
        _check_config(config_dict)
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "quant_method": self.quant_method.value}

    # the base class prints itself through a method that it does not have
    to_diff_dict = to_dict

    @property
    def layout(self) -> Layout:
        overrides = {name: Format(*entry[:2], tuple(entry[2:])) for name, entry in self.overrides.items()}
        timing = None if self.timing is None else Timing(**self.timing)
        default = Format(self.weight_bits, self.act_bits, tuple(self.kinds))
        return Layout(default, overrides, self.attention_bits, tuple(self.attention_kinds), timing)

    @property
    def run(self) -> dict[str, Any]:
        """How the model was made: the record that quantize left on the denoiser."""
        known = {name: getattr(self, name) for name in ("method", "settings", "weight_bits", "act_bits", "base_model")}
        return {**known, **self.record}


class DmquantQuantizer(DiffusersQuantizer):
    """Loads packed layers into a model of diffusers, or refuses by name what does not fit."""

    def __init__(self, quantization_config: DmquantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise InputError("diffusers cannot quantize with dmquant while loading; use dmquant.quantize(pipeline, method)")
        self.dtype = torch.float32
        self.loaded: set[str] = set()

    is_serializable = True
    is_trainable = False
    is_compileable = True

    def validate_environment(self, torch_dtype: torch.dtype | None = None, device_map: Any = None, **kwargs: Any) -> None:
        if torch_dtype not in (None, *FLOAT_DTYPES):
            raise InputError(f"a packed model computes in float32, bfloat16 or float16, not in {torch_dtype}")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise InputError("a packed model cannot be offloaded to the disk; give a device_map without it")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self.dtype = torch_dtype or torch.float32
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        pickled = [file for file in checkpoint_files if not str(file).endswith(".safetensors")]
        if pickled:
            raise InputError(f"{pickled[0]} is no safetensors file; dmquant reads nothing else")
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        layout = self.quantization_config.layout
        unknown = sorted(layout.unused(list(find_layers(model))))
        if unknown:
            raise DamagedFile(f"quantization_config.overrides: {type(model).__name__} has no layer {unknown[0]!r} to quantize")
        try:
            prepare_packed(model, layout, dtype=self.dtype)
        except ValueError as error:
            raise DamagedFile(f"quantization_config does not fit {type(model).__name__}: {error}") from error

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if missing_keys:
            raise DamagedFile(f"{type(model).__name__}: {_name_some(missing_keys)} missing from the file")
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> bool:
        """All of them: diffusers checks nothing of what it loads itself."""
        return True

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        raise DamagedFile(f"{param_name} has shape {tuple(loaded_param.shape)} instead of {tuple(current_param.shape)}")

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: torch.device | str | int,
        state_dict: dict[str, Tensor], unexpected_keys: list[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if unexpected_keys:
            raise DamagedFile(f"{type(model).__name__} has no {_name_some(unexpected_keys)}, but the file does")
        path, _, leaf = param_name.rpartition(".")
        module, stored = model.get_submodule(path), state_dict[param_name]
        check_tensor(module, leaf, stored, name=param_name)
        # diffusers has cast param_value to torch_dtype already, which would move the grids
        value = (stored if isinstance(module, EXACT) else param_value).to(target_device)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value)
        else:
            module._buffers[leaf] = value
        self.loaded.add(param_name)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if set(model.state_dict()) - self.loaded:
            raise InputError("tensors of a packed model were offloaded while loading, which rounds its grids; load without it")
        empty = [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]
        if empty:
            raise DamagedFile(f"{type(model).__name__}: {_name_some(empty)} were not loaded")
        self.loaded = set()
        model.dmquant_record = self.quantization_config.run
        fuse(model)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        """Plain float layers, under a config that does not call them quantized any more."""
        restore_float(model)
        unfuse(model)
        model._internal_dict = FrozenDict({key: value for key, value in model.config.items() if key != "quantization_config"})
        del model.quantization_method, model.dmquant_record
        return model


def register() -> None:
    """Makes diffusers know dmquant. May be called again; refuses to push out somebody else."""
    for table, ours in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, DmquantConfig),
        (auto.AUTO_QUANTIZER_MAPPING, DmquantQuantizer),
    ):
        owner = table.setdefault(QuantMethod.DMQUANT.value, ours)
        if owner is not ours:
            raise RuntimeError(f"quant_method 'dmquant' of diffusers belongs to {owner.__module__}.{owner.__qualname__}")


def mark(model: nn.Module) -> None:
    """Makes a model packed in this process what a loaded one is: quantized to diffusers, which saves it as such and refuses casts,
    and with fused blocks, so that both give the same floats."""
    run = dict(getattr(model, "dmquant_record", {}))
    bits = run.pop("weight_bits", None), run.pop("act_bits", None)
    layout = read_layout(model, None if None in bits else bits)
    overrides = {name: [*format[:2], *format.kinds] for name, format in layout.overrides.items()}
    known = {name: run.pop(name) for name in ("method", "settings", "base_model") if name in run}
    grids = {**layout.default._asdict(), "overrides": overrides, "attention_bits": layout.attention_bits}
    grids["attention_kinds"] = layout.attention_kinds
    grids["timing"] = None if layout.timing is None else layout.timing._asdict()
    config = DmquantConfig(**grids, **known, record=run)
    # through JSON, so that what is refused when read is refused before it is written
    config = DmquantConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = DmquantQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.dmquant_record = config.run
    fuse(model)


def check_tensor(module: nn.Module, leaf: str, tensor: Tensor, *, name: str) -> None:
    """A DamagedFile if a stored tensor cannot be this parameter or buffer of this module."""
    expected = getattr(module, leaf)
    if tensor.shape != expected.shape:
        raise DamagedFile(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(expected.shape)}")
    is_grid = isinstance(module, EXACT)
    allowed = FLOAT_DTYPES if expected.is_floating_point() and not is_grid else (expected.dtype,)
    if tensor.dtype not in allowed:
        raise DamagedFile(f"{name} is {tensor.dtype} instead of {' or '.join(map(str, allowed))}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise DamagedFile(f"{name} holds values that are not finite")
    if is_grid and leaf in ("scale", "reciprocal") and not (tensor > 0).all():
        raise DamagedFile(f"{name} holds a {leaf} that is not positive")
    if is_grid and leaf == "zero" and not _is_on_grid(tensor, module):
        raise DamagedFile(f"{name} holds a zero that is no code of {module.bits} bits")
    if leaf == "codes" and is_grid and not _has_zero_padding(tensor, module.numel()):
        raise DamagedFile(f"{name} has bits set after its last code")


def _is_on_grid(zero: Tensor, grid: PackedWeight | FixedGrid) -> bool:
    """Whether every zero is a code. One half is allowed between the two of a binary weight, {-1, +1}."""
    is_code = (zero == zero.round()) & (zero >= 0) & (zero < 1 << grid.bits)
    if isinstance(grid, PackedWeight) and grid.bits == 1:
        is_code |= zero == 0.5
    return bool(is_code.all())


def _has_zero_padding(planes: Tensor, count: int) -> bool:
    return count % 8 == 0 or not (planes[:, -1] >> count % 8).any()


def _check_config(config: dict[str, Any]) -> None:
    """Every key is there, known, and of its type; a newer format is refused by the version that can read it."""
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
    kinds = {*config["kinds"], *config.get("attention_kinds", ()), *of_layers}
    if TEMPORAL in kinds and config.get("timing") is None:
        raise DamagedFile("quantization_config.timing is missing: there are grids per timestep")


def _is_bits(value: object) -> bool:
    return type(value) is int and (1 <= value <= 8 or value == FLOAT_BITS)


def _is_kinds(value: object) -> bool:
    return isinstance(value, list) and all(map(is_kind, value)) and len(set(value)) == len(value)


def _is_overrides(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, list) and len(entry) >= 2 and all(map(_is_bits, entry[:2])) and _is_kinds(entry[2:])
        for entry in value.values()
    )


def _is_timing(value: object) -> bool:
    is_pair = isinstance(value, dict) and set(value) == set(Timing._fields)
    has_steps = is_pair and type(value["num_steps"]) is int and 1 <= value["num_steps"] <= MAX_STEPS
    return value is None or (has_steps and value["lookup"] in LOOKUPS)


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_json_object(value: object) -> bool:
    return isinstance(value, dict) and all(math.isfinite(number) for number in value.values() if isinstance(number, float))


MAX_STEPS = 1 << 20  # more timesteps than any sampler has
LATER = {"attention_bits", "attention_kinds", "timing"}  # keys that older files do not have
_IS_VALID = {
    "quant_method": _is_text, "format_version": lambda value: value == FORMAT_VERSION and type(value) is int,
    "producer": lambda value: isinstance(value, str), "weight_bits": _is_bits, "act_bits": _is_bits,
    "kinds": _is_kinds, "overrides": _is_overrides, "attention_bits": _is_bits,
    "attention_kinds": _is_kinds, "timing": _is_timing,
    "method": _is_text, "settings": _is_json_object, "base_model": _is_text,
    "record": _is_json_object,
}  # fmt: skip


def _name_some(names: list[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


register()
