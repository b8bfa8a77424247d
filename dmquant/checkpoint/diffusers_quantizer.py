"""Registration with diffusers: after `import dmquant.hf`, DiffusionPipeline.from_pretrained reads our folders.

diffusers looks `quant_method` up in two module-level tables and offers no other interface; SDNQ registers there too. Its loader
only warns about missing, extra or mistyped tensors, so the hooks here claim and check every tensor.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from dmquant.checkpoint.quantization_config import DmquantConfig, QuantMethod
from dmquant.errors import DamagedFile, InputError
from dmquant.nn.convert import prepare_packed, read_scheme, restore_float
from dmquant.nn.fake_quant_layers import find_layers
from dmquant.nn.fused.unet import fuse, unfuse
from dmquant.quantizers.base import Float32Buffers
from dmquant.quantizers.traits import GridTrait

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class DmquantQuantizer(DiffusersQuantizer):
    """Loads packed layers into a model of diffusers. Raises DamagedFile with the name of a tensor that does not fit."""

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
        scheme = self.quantization_config.scheme
        unknown = sorted(scheme.unused(list(find_layers(model))))
        if unknown:
            raise DamagedFile(f"quantization_config.overrides: {type(model).__name__} has no layer {unknown[0]!r} to quantize")
        try:
            prepare_packed(model, scheme, dtype=self.dtype)
        except ValueError as error:
            raise DamagedFile(f"quantization_config does not fit {type(model).__name__}: {error}") from error

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if missing_keys:
            raise DamagedFile(f"{type(model).__name__}: {_name_some(missing_keys)} missing from the file")
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> bool:
        """Returns True for all: diffusers does not check the tensors that it loads itself."""
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
        value = (stored if isinstance(module, Float32Buffers) else param_value).to(target_device)
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

    def _dequantize(self, model: ModelMixin) -> ModelMixin:
        """Makes the layers float and removes the quantization_config."""
        restore_float(model)
        unfuse(model)
        model._internal_dict = FrozenDict({key: value for key, value in model.config.items() if key != "quantization_config"})
        del model.quantization_method, model.dmquant_record
        return model


def register() -> None:
    """Adds dmquant to the tables of diffusers. Raises RuntimeError if another package owns the name; may be called again."""
    for table, ours in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, DmquantConfig),
        (auto.AUTO_QUANTIZER_MAPPING, DmquantQuantizer),
    ):
        owner = table.setdefault(QuantMethod.DMQUANT.value, ours)
        if owner is not ours:
            raise RuntimeError(f"quant_method 'dmquant' of diffusers belongs to {owner.__module__}.{owner.__qualname__}")


def mark_as_quantized(model: ModelMixin, record: Mapping[str, Any] | None = None) -> None:
    """Gives a model that was packed in this process the attributes of a loaded one, and fuses its blocks.

    `record` says how the model was made; without it, the record that the model has is kept. The attribute `dmquant_record` holds
    it, since `dmquant.save` is given the pipeline alone.

    diffusers reads the attributes `hf_quantizer`, `is_quantized` and `quantization_method` of the model: it saves the config with
    them and refuses casts. It offers no other interface. `_dequantize` removes them.
    """
    run = dict(getattr(model, "dmquant_record", {}) if record is None else record)
    bits = run.pop("weight_bits", None), run.pop("act_bits", None)
    scheme = read_scheme(model, None if None in bits else bits)
    overrides = {name: [*layer[:2], *_list_kinds(layer.traits)] for name, layer in scheme.overrides.items()}
    known = {name: run.pop(name) for name in ("method", "settings", "base_model") if name in run}
    default = scheme.default
    grids: dict[str, Any] = {"weight_bits": default.weight_bits, "act_bits": default.act_bits}
    grids |= {"kinds": _list_kinds(default.traits), "overrides": overrides, "attention_bits": scheme.attention_bits}
    grids["attention_kinds"] = _list_kinds(scheme.attention_traits)
    grids["timing"] = None if scheme.timing is None else scheme.timing._asdict()
    config = DmquantConfig(**grids, **known, record=run)
    # through JSON: a config that the loader would refuse is refused before it is written
    config = DmquantConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = DmquantQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.dmquant_record = config.run
    fuse(model)


def _list_kinds(traits: Iterable[GridTrait]) -> list[str]:
    """Returns the traits as quantization_config writes them."""
    return [trait.text for trait in traits]


def check_tensor(module: nn.Module, leaf: str, tensor: Tensor, *, name: str) -> None:
    """Raises DamagedFile if a stored tensor cannot be this parameter or buffer of this module."""
    expected = getattr(module, leaf)
    if tensor.shape != expected.shape:
        raise DamagedFile(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(expected.shape)}")
    is_exact = isinstance(module, Float32Buffers)
    allowed = FLOAT_DTYPES if expected.is_floating_point() and not is_exact else (expected.dtype,)
    if tensor.dtype not in allowed:
        raise DamagedFile(f"{name} is {tensor.dtype} instead of {' or '.join(map(str, allowed))}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise DamagedFile(f"{name} holds values that are not finite")
    fault = module.find_fault(leaf, tensor) if isinstance(module, Float32Buffers) else None
    if fault is not None:
        raise DamagedFile(f"{name} {fault}")


def _name_some(names: list[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


register()
